"""Data sets by name: the one parser of names, and the families that the names belong to.

A name is a family and perhaps one of its configs: `raf_db`, `dfew/fold1`, a user's own `own/NAME`,
`actionfaces/images`. A family knows the classes of its sets and how to prepare them; once prepared,
all sets are alike (`data/split.py`). The families of this package are listed here. An installed
package adds one by an entry point, whose name is the family's:

    [project.entry-points."emollama_jax.sets"]
    toy = "toy_package.toy:FAMILY"

What is here is checked before TFDS, JAX or a tree of files is touched.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple, Protocol

from etils import epath
from tyro.conf import Suppress

from emollama_jax.data.emotions import LabelSpace
from emollama_jax.errors import UserError, did_you_mean

GROUP = "emollama_jax.sets"
FAMILIES: Mapping[str, str] = {  # loaded when first wanted
    "actionfaces": "emollama_jax.tiny.builder:FAMILY",
    "raf_db": "emollama_jax.data.builders.raf_db:FAMILY",
    "ferplus": "emollama_jax.data.builders.ferplus:FAMILY",
    "affectnet7": "emollama_jax.data.builders.affectnet:SEVEN",
    "affectnet8": "emollama_jax.data.builders.affectnet:EIGHT",
    "dfew": "emollama_jax.data.builders.dfew:FAMILY",
    "ferv39k": "emollama_jax.data.builders.ferv39k:FAMILY",
    "mafw": "emollama_jax.data.builders.mafw:FAMILY",
    "own": "emollama_jax.data.builders.own:FAMILY",
}
PREPARE_HERE = "prepare here, then copy it: gcloud storage cp -r data/* gs://…"
MISSING_SHARE = 0.01  # of the files that lists name; above it preparation stops

Report = Callable[[int, int], None]  # (done, all)


class SetName(NamedTuple):
    """The parts of a data set's name."""

    family: str
    config: str  # "" for none

    @property
    def fold(self) -> int | None:
        """The number of a fold's name; None for any other."""
        number = self.config.removeprefix("fold")
        return int(number) if number != self.config and number.isdigit() else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation:
    """Options of preparing a set."""

    source: pathlib.Path | None = None
    """folder of the official layout; for own/NAME a folder, or a .csv, .tsv, .txt, .json
    or .jsonl file."""
    fold: int | None = None
    """fold of dfew and mafw, 1 … 5; all that --source lists by default."""
    missing_share: float = MISSING_SHARE
    """largest share of the listed files that may be missing."""
    processes: int = 1
    """number of worker processes."""
    sizes: Suppress[Mapping[str, int] | None] = None  # examples of each split that is drawn


@dataclasses.dataclass(frozen=True)
class Testing:
    """How the field tests a set, so that numbers can be compared with published ones."""

    frames: str  # of an example
    crop: str  # which pixels show the face
    open: bool = False  # False: a research licence forbids showing its pictures


SEGMENTS = 16  # of a clip in testing: the centre frame of each
PICTURE = "the picture"
CENTRES = f"centre frames of {SEGMENTS} segments; a short clip repeats its last frame"
SCENE = "whole frames; the face crop is FaceXFormer's, of MTCNN's box followed through the clip"


class SetFamily(Protocol):
    """The data sets of one origin."""

    @property
    def names(self) -> Sequence[str]:
        """Names that can be prepared, for messages: "raf_db", "own/NAME"."""
        ...

    @property
    def folds(self) -> int:
        """Number of official folds; 0: none."""
        ...

    @property
    def testing(self) -> Testing | None:
        """How the field tests these sets; None where it does not."""
        ...

    @property
    def drawn(self) -> bool:
        """Whether the sets are made here and not read from a source."""
        ...

    def accepts(self, config: str) -> bool:
        """Whether there is a set of that config; a `UserError` may say more."""
        ...

    def stored(self, name: str) -> str:
        """Folder of a set under the data folder; several names may share one."""
        ...

    def label_space(self, name: str, metadata: Mapping[str, Any] | None) -> LabelSpace:
        """The classes of a set; `metadata`, once it is prepared, is what its preparation noted."""
        ...

    def prepare(
        self, name: str, data_dir: epath.PathLike, how: Preparation, progress: Report
    ) -> tuple[pathlib.Path, list[str]]:
        """Stores a set, or resumes; gives its folder, and what the user should know, in lines."""
        ...


def parse(name: str) -> SetName:
    """The parts of a name, which is not checked."""
    family, _, config = name.partition("/")
    return SetName(family, config)


def family_of(name: str) -> SetFamily:
    """The family of a set.

    Raises:
        UserError: no such set, with the nearest name and those that are.
    """
    family, config = parse(name)
    entry = _entry(family)
    whole = name == f"{family}/{config}".removesuffix("/")
    if entry is not None and whole and _load(entry).accepts(config):
        return _load(entry)
    known = [known for other in _entries().values() for known in _load(other).names]
    near = did_you_mean(name, known) or did_you_mean(family, known)
    raise UserError(f"{name}: no such data set{near}; known: {', '.join(known)}")


def _entry(family: str) -> EntryPoint | None:
    """Where a family is; installed packages are looked through for others' alone."""
    if family in FAMILIES:
        return EntryPoint(family, FAMILIES[family], GROUP)
    return _entries().get(family)


def _entries() -> dict[str, EntryPoint]:
    """Family → where it is, our own first."""
    entries = {name: EntryPoint(name, place, GROUP) for name, place in FAMILIES.items()}
    for entry in entry_points(group=GROUP):
        entries.setdefault(entry.name, entry)
    return entries


def _load(entry: EntryPoint) -> SetFamily:
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"data set {entry.name}: the entry point {entry.value} cannot be loaded ({error}); "
            "reinstall its package, or remove it"
        ) from None


def known_family(name: str) -> SetFamily | None:
    """The family that a name, which is not checked, would belong to; None for no known one."""
    entry = _entry(parse(name).family)
    return None if entry is None else _load(entry)


def testing_of(name: str) -> Testing | None:
    """How the field tests a set; None where it does not, as with a user's own."""
    family = known_family(name)
    return None if family is None else family.testing


def label_space(name: str) -> LabelSpace:
    """The classes of a set that need not be prepared; its family's name will do.

    Raises:
        UserError: no such set, or one whose classes are known only where it is prepared.
    """
    family = known_family(name) or family_of(name)
    return family.label_space(name, None)


def check_one_fold(name: str) -> SetFamily:
    """The family of a set that can be opened: one with folds names one.

    Raises:
        UserError: no such set, or no fold named; with an example.
    """
    family = family_of(name)
    if family.folds and parse(name).fold is None:
        raise UserError(f"{name} has folds: name one, e.g. {name}/fold1")
    return family


def check_source(name: str, how: Preparation) -> SetFamily:
    """The family of a set that can be prepared.

    Raises:
        UserError: no such set, a source or a fold that it does not take; with what it wants.
    """
    family, source, fold = family_of(name), how.source, how.fold
    if family.drawn and source is not None:
        raise UserError(f"{name} is drawn, not read: leave --source out")
    if not family.drawn and source is None:
        raise UserError(f"{name}: give its location: --source DIR")
    if source is not None and not source.exists():
        raise UserError(f"--source {source}: no such file or folder")
    if fold is not None and not family.folds:
        raise UserError(f"--fold {fold}: {name} has no folds")
    if fold is not None and not 1 <= fold <= family.folds:
        raise UserError(f"--fold {fold}: {name} has the folds 1 … {family.folds}")
    return family


def check_prepared(folder: str, names: Sequence[str]) -> None:
    """Raises for sets that a data folder does not hold; their content is checked when opened.

    Args:
        folder: the data folder; in a bucket, nothing is looked up.
        names: names of the sets.

    Raises:
        UserError: with the command that prepares the set.
    """
    for name in names:
        stored = family_of(name).stored(name)
        if "://" not in folder and not pathlib.Path(folder, stored).is_dir():
            raise not_prepared(folder, name)


def not_prepared(folder: epath.PathLike, name: str, found: str = "not prepared") -> UserError:
    """The error that names the command which prepares a set."""
    source = "" if family_of(name).drawn else " --source DIR"
    return UserError(
        f"{folder}: {name} is {found}; run `emollama data prepare {name}{source}` first"
    )


def _no_progress(done: int, total: int) -> None:
    pass


def prepare(
    name: str,
    data_dir: epath.PathLike,
    how: Preparation,
    progress: Report = _no_progress,
) -> tuple[pathlib.Path, list[str]]:
    """Prepares the examples of a set; what is complete is kept, what was stopped resumes.

    Args:
        name: name of the set; "dfew/fold1" is "dfew" and fold 1.
        data_dir: folder of prepared sets.
        how: from what, and with what limits.
        progress: called with (done, all) examples.

    Returns:
        The prepared folder, and what the user should know, a line each.

    Raises:
        UserError: an unknown name, a tree that is not the set's, too many missing files.
    """
    return check_source(name, how).prepare(name, data_dir, how, progress)
