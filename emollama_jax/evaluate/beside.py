"""Predictions in a file beside the prepared set that their items belong to.

The set tells what the file does not: what the face network says of each face, and which items also
stand in another split. Items are matched by name; the folder and the ending of a name count only
where the set's names have them.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from emollama_jax.data.sets import check_prepared
from emollama_jax.errors import UserError
from emollama_jax.evaluate import groups
from emollama_jax.evaluate.copies import Copies, find_copies
from emollama_jax.evaluate.protocol import Prediction

FOLDER = "data"  # of prepared sets, as everywhere


@dataclasses.dataclass(frozen=True)
class Place:
    """Location of the prepared set, and what is wanted from it."""

    split: str = "test"
    dir: str | None = None  # None: `FOLDER`
    without: str | None = None  # another split of it: items that also stand there are left out

    @property
    def named(self) -> bool:
        """Whether the user asked for the set."""
        return self.dir is not None or self.without is not None


def look_up(
    predictions: Sequence[Prediction], source: str | None, place: Place, *, named: bool
) -> tuple[groups.Seen, Copies | None]:
    """Looks predicted items up in the prepared set, by the predictions' own names.

    Args:
        predictions: records of a file.
        source: the set; None: the one that a file of `emollama eval` names.
        place: location of the prepared set.
        named: whether a column names the items.

    Returns:
        The face network's attributes of them, and those that are also in `place.without`.

    Raises:
        UserError: items that cannot be looked up, where `place.without` asks for it.
    """
    own, _, of = predictions[0].source.partition(":")  # of a file that this program wrote
    name = own if of else source
    split = of if of.isidentifier() else place.split  # "set:file" where it scored another's file
    try:
        if not name:
            raise UserError("no set is named: --source NAME, prepared in --dir DIR")
        if not of and not named:
            raise UserError("items have only line numbers: name their column with --id-column")
        folder = place.dir or FOLDER
        check_prepared(folder, [name])  # before TFDS is imported
        names = match(
            [one.id for one in predictions],
            groups.item_names(folder, name, split),
            where=f"{name}, {split} in {folder}",
        )
    except UserError as error:
        if place.without is not None:
            raise UserError(f"--without {place.without}: {error}") from None
        return groups.Seen({}, why=str(error)), None
    seen = groups.read_seen(folder, name, split)
    if not seen.why:
        seen = dataclasses.replace(
            seen, groups={mine: seen.groups[theirs] for mine, theirs in names.items()}
        )
    copies = find_copies(folder, name, split, place.without)
    if copies is not None:
        twice = set(copies.items)
        copies = Copies(copies.split, [mine for mine, theirs in names.items() if theirs in twice])
    return seen, copies


def match(mine: Sequence[str], theirs: Sequence[str], *, where: str) -> Mapping[str, str]:
    """Matches names to items of a set.

    Args:
        mine: names in a file.
        theirs: the set's.
        where: name of the set, for messages.

    Raises:
        UserError: a name that means none, or several.
    """
    whole = set(theirs)
    short: dict[str, list[str]] = {}
    for name in theirs:
        short.setdefault(_stem(name), []).append(name)
    found, strange = {}, []
    for name in mine:
        near = [name] if name in whole else short.get(_stem(name), [])
        if len(near) == 1:
            found[name] = near[0]
        else:
            strange.append(name)
    if strange:
        raise UserError(
            f"{len(strange):,} of {len(mine):,} items are not in {where}, e.g. {strange[0]!r} "
            f"(its first is {theirs[0]!r})"
        )
    return found


def _stem(name: str) -> str:
    return pathlib.PurePosixPath(name.replace("\\", "/")).stem
