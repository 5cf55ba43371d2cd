"""Which data sets there are, and how a name leads to examples.

`data/names.py` says which names there are, and refuses others.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping

from emollama_jax.data.builders import (
    affectnet,
    dfew,
    ferplus,
    ferv39k,
    mafw,
    own,
    raf_db,
    schema,
    store,
)
from emollama_jax.data.builders.listing import Listing
from emollama_jax.data.emotions import LabelSpace, label_space
from emollama_jax.data.names import check, check_one_fold
from emollama_jax.errors import UserError
from emollama_jax.tiny import builder as actionfaces

Report = Callable[[int, int], None]  # (done, all)


@dataclasses.dataclass(frozen=True)
class Official:
    """One of the six sets."""

    stored: str  # where it lies; two sets may be views of one
    builder: type[store.Builder]
    read: Callable[[pathlib.Path, int | None], Listing]
    folds: int = 0


SETS: Mapping[str, Official] = {
    "raf_db": Official("raf_db", raf_db.RafDb, raf_db.read),
    "ferplus": Official("ferplus", ferplus.FerPlus, ferplus.read),
    "affectnet7": Official("affectnet", affectnet.AffectNet, affectnet.read),
    "affectnet8": Official("affectnet", affectnet.AffectNet, affectnet.read),
    "dfew": Official("dfew", dfew.Dfew, dfew.read, dfew.FOLDS),
    "ferv39k": Official("ferv39k", ferv39k.Ferv39k, ferv39k.read),
    "mafw": Official("mafw", mafw.Mafw, mafw.read, mafw.FOLDS),
}


def prepare_set(
    name: str,
    source: pathlib.Path,
    data_dir: str | os.PathLike,
    *,
    fold: int | None,
    missing_share: float,
    processes: int,
    progress: Report,
) -> tuple[pathlib.Path, Listing]:
    """Prepares an official set or a user's data.

    Args:
        name: of the set; "dfew/fold1" is "dfew" and fold 1.
        source: the tree, or a user's table.
        data_dir: where sets are prepared.
        fold: of a set with folds; None for all that the tree has lists of.
        missing_share: of the files; more stop the preparation.
        processes: that write side by side.
        progress: called with (done, all) examples.

    Returns:
        The prepared folder, and what was found in the tree.

    Raises:
        UserError: an unknown name, a tree that is not the set's, too many missing files.
    """
    check(name)
    builder, _, config = name.partition("/")
    if builder == own.NAME:
        if fold is not None:
            raise UserError(f"--fold {fold}: {name} has no folds")
        found, place = own.read(source, name), name
        make: Callable[..., store.Builder] = functools.partial(own.Own, config_name=config)
    else:
        official = SETS[builder]
        fold = int(config.removeprefix("fold")) if config else fold
        if fold is not None and not official.folds:
            raise UserError(f"--fold {fold}: {name} has no folds")
        found, place = official.read(source, fold), official.stored
        make = official.builder
        if official.folds:
            found = _with_prepared_folds(found, official, builder, source, data_dir)
    folder = store.prepare(
        data_dir,
        place,
        make,
        found,
        title=name,
        missing_share=missing_share,
        processes=processes,
        progress=progress,
    )
    return folder, found


def _with_prepared_folds(
    found: Listing,
    official: Official,
    builder: str,
    source: pathlib.Path,
    data_dir: str | os.PathLike,
) -> Listing:
    """Adds the folds that were prepared before, from their lists: clips are stored once for all."""
    before = store.read_views(data_dir, official.stored)
    for view in sorted(before.keys() - found.views.keys()):
        number = int(view.removeprefix(f"{builder}/fold"))
        try:
            other = official.read(source, number)
        except UserError:
            continue  # this tree has no lists of that fold: it is not kept
        found = _joined(found, other)
    return found


def _joined(first: Listing, second: Listing) -> Listing:
    """Two listings of the same tree as one."""
    items = {item.id: item for found in (first, second) for item in found.splits["clips"]}
    order = {name: n for n, name in enumerate(sorted(items))}

    def move(found: Listing) -> dict:
        ids = [item.id for item in found.splits["clips"]]
        return {
            view: {
                split: ("clips", [order[ids[n]] for n in positions or []])
                for split, (_, positions) in splits.items()
            }
            for view, splits in found.views.items()
        }

    return dataclasses.replace(
        first,
        splits={"clips": [items[name] for name in order]},
        views={**move(second), **move(first)},
        missing=list(dict.fromkeys([*first.missing, *second.missing])),
        notes=[*first.notes, *second.notes],
    )


def place_of(name: str) -> str:
    """Where a set is stored under the data folder."""
    builder = name.partition("/")[0]
    return SETS[builder].stored if builder in SETS else name


def prepared(data_dir: str | os.PathLike, name: str) -> dict[str, list[str]]:
    """The names that a set can be opened by, e.g. its folds → their splits.

    Raises:
        UserError: nothing of it is prepared.
    """
    check(name)
    builder, slash, _ = name.partition("/")
    if builder == actionfaces.NAME:
        return {name: list(actionfaces.SIZES[name.partition("/")[2]])}
    views = store.read_views(data_dir, place_of(name))
    inner = [v for v in views if v == name or (not slash and v.startswith(f"{name}/"))]
    if not inner:
        raise UserError(
            f"{data_dir}: {name} is not prepared; run `emollama data prepare {name} --source DIR`"
        )
    return {view: list(views[view]) for view in sorted(inner)}


def find(data_dir: str | os.PathLike, name: str, split: str) -> store.Place:
    """Where the examples of a split lie, and so its face priors.

    Raises:
        UserError: not prepared, or no such split.
    """
    check_one_fold(name)
    if name.partition("/")[0] == actionfaces.NAME:
        return store.Place(name, split, None)
    return store.find(data_dir, place_of(name), name, split)


def open_stored(data_dir: str | os.PathLike, stored: str, split: str) -> store.Examples:
    """Opens a stored split as it lies, without a view."""
    return schema.open_prepared(data_dir, stored, store.VERSION, split)


def fingerprint(data_dir: str | os.PathLike, stored: str) -> str:
    """Of a stored set; what is computed from its examples is void with another."""
    metadata = store.read_metadata(data_dir, stored)
    return str(dict(metadata).get("fingerprint", dict(metadata))) if metadata else ""


def open_split(data_dir: str | os.PathLike, name: str, split: str) -> store.Examples:
    """Opens a prepared split: lazy, random access, picklable.

    Raises:
        UserError: no such set, not prepared, or no such split.
    """
    where = find(data_dir, name, split)
    if name.startswith(f"{actionfaces.NAME}/"):
        return actionfaces.open_split(data_dir, name.partition("/")[2], split)
    return store.open_place(data_dir, where, space_of(data_dir, name).classes)


def space_of(data_dir: str | os.PathLike, name: str) -> LabelSpace:
    """The classes of a set; those of a user's own data are noted where it is prepared.

    Raises:
        UserError: no such set, or not prepared.
    """
    if not name.startswith(f"{own.NAME}/"):
        return label_space(name)
    metadata = store.read_metadata(data_dir, name)
    if metadata is None:
        raise UserError(
            f"{data_dir}: {name} is not prepared; run `emollama data prepare {name} --source DIR`"
        )
    return own.space(name, tuple(metadata["classes"]))
