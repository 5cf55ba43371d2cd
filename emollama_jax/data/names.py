"""Names of data sets, and where their examples lie: what can be checked before anything is read.

A name is a set (`raf_db`, `affectnet7`), a set and its fold (`dfew/fold1`), a user's own data
(`own/NAME`), or the embedded set and its config (`actionfaces/images`).
"""

import pathlib
import re
from collections.abc import Mapping, Sequence

from emollama_jax.errors import UserError, did_you_mean

# Set → number of its folds; 0 where it has none.
OFFICIAL: Mapping[str, int] = {
    "raf_db": 0,
    "ferplus": 0,
    "affectnet7": 0,
    "affectnet8": 0,
    "dfew": 5,
    "ferv39k": 0,
    "mafw": 5,
}
EMBEDDED = ("actionfaces/images", "actionfaces/clips")
OWN = "own"
PREPARE_HERE = "prepare here, then copy it: gcloud storage cp -r data/* gs://…"
STORED = {"affectnet7": "affectnet", "affectnet8": "affectnet"}  # views of one stored set


def known() -> str:
    """The names that can be prepared, for messages and help."""
    return ", ".join([*EMBEDDED, *OFFICIAL, f"{OWN}/NAME"])


def check(name: str) -> None:
    """Refuses a name that is no set.

    Raises:
        UserError: with the nearest name, and those that are.
    """
    builder, slash, rest = name.partition("/")
    if name not in EMBEDDED and builder == "actionfaces" and slash:
        configs = [known.partition("/")[2] for known in EMBEDDED]
        raise UserError(
            f"{builder}: unknown config {rest!r}{did_you_mean(rest, configs)}; choose one of "
            f"{', '.join(configs)}"
        )
    folds = [f"fold{k}" for k in range(1, OFFICIAL.get(builder, 0) + 1)]
    fine = (
        name in EMBEDDED
        or (builder == OWN and re.fullmatch(r"\w[\w-]*", rest) is not None)
        or (builder in OFFICIAL and (not slash or rest in folds))
    )
    if not fine:
        near = did_you_mean(name, [*EMBEDDED, *OFFICIAL])
        near = near or did_you_mean(builder, [*EMBEDDED, *OFFICIAL])
        raise UserError(f"{name}: no such data set{near}; known are {known()}")


def check_one_fold(name: str) -> None:
    """Refuses a set with folds of which none is named.

    Raises:
        UserError: with an example.
    """
    check(name)
    if OFFICIAL.get(name, 0):
        raise UserError(f"{name} has folds: name one, e.g. {name}/fold1")


def check_source(name: str, source: pathlib.Path | None, fold: int | None = None) -> None:
    """Refuses a name, a source or a fold that cannot be prepared.

    Args:
        name: of the set.
        source: folder or table that `--source` names; None: none.
        fold: that `--fold` names; None: none.

    Raises:
        UserError: with what the set wants.
    """
    check(name)
    if name in EMBEDDED and source is not None:
        raise UserError(f"{name} is drawn, not read: leave --source out")
    if name not in EMBEDDED and source is None:
        raise UserError(f"{name}: say where the set lies: --source DIR")
    if source is not None and not source.exists():
        raise UserError(f"--source {source}: no such file or folder")
    count = OFFICIAL.get(name.partition("/")[0], 0)
    if fold is not None and not count:
        raise UserError(f"--fold {fold}: {name} has no folds")
    if fold is not None and not 1 <= fold <= count:
        raise UserError(f"--fold {fold}: {name} has the folds 1 … {count}")


def check_prepared(folder: str, names: Sequence[str]) -> None:
    """Refuses sets of which nothing lies in a data folder; what lies there is checked when opened.

    Args:
        folder: the data folder; in a bucket, nothing is looked up.
        names: of the sets.

    Raises:
        UserError: with the command that prepares the set.
    """
    for name in names:
        check(name)
        builder = name.partition("/")[0]
        stored = STORED.get(builder, builder) if builder in OFFICIAL else name
        if "://" in folder or (pathlib.Path(folder) / stored).is_dir():
            continue
        source = "" if name in EMBEDDED else " --source DIR"
        raise UserError(
            f"{folder}: {name} is not prepared; run `emollama data prepare {name}{source}` first"
        )
