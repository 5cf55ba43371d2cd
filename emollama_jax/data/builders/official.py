"""Sets that are read from a tree of files in the layout that their authors released."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from etils import epath

from emollama_jax.data.builders.listing import Listing
from emollama_jax.data.emotions import LabelSpace
from emollama_jax.data.sets import Preparation, Report, Testing, parse
from emollama_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class OfficialSet:
    """One set, and its folds if it has some."""

    name: str
    space: LabelSpace
    list_tree: Callable[[pathlib.Path, int | None], Listing]  # (source, fold; None for all)
    folds: int = 0
    place: str = ""  # where it is stored, if not under its name
    testing: Testing | None = None
    drawn: ClassVar[bool] = False

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def accepts(self, config: str) -> bool:
        return config in ("", *(f"fold{k}" for k in range(1, self.folds + 1)))

    def stored(self, name: str) -> str:
        return self.place or self.name

    def label_space(self, name: str, metadata: Mapping[str, Any] | None) -> LabelSpace:
        return self.space

    def prepare(
        self, name: str, data_dir: epath.PathLike, how: Preparation, progress: Report
    ) -> tuple[pathlib.Path, list[str]]:
        from emollama_jax.data.builders import store  # TFDS

        assert how.source is not None
        fold = parse(name).fold or how.fold
        found = self.list_tree(how.source, fold)
        if self.folds:
            # What was prepared before stays: clips are stored once for all folds.
            before = store.StoredSet(data_dir, self.stored(name)).views()
            for view in sorted(before.keys() - found.views.keys()):
                try:
                    found = _joined(found, self.list_tree(how.source, parse(view).fold))
                except UserError:
                    continue  # this tree has no lists of that fold: it is not kept
        folder = store.prepare(data_dir, self.stored(name), found, how, name, progress)
        return folder, found.lines()


def _joined(first: Listing, second: Listing) -> Listing:
    """Two listings of the same tree as one."""
    entries = {entry.id: entry for found in (first, second) for entry in found.splits["clips"]}
    order = {name: n for n, name in enumerate(sorted(entries))}

    def move(found: Listing) -> dict:
        ids = [entry.id for entry in found.splits["clips"]]
        return {
            view: {
                split: ("clips", [order[ids[n]] for n in positions or []])
                for split, (_, positions) in splits.items()
            }
            for view, splits in found.views.items()
        }

    return dataclasses.replace(
        first,
        splits={"clips": [entries[name] for name in order]},
        views={**move(second), **move(first)},
        missing=list(dict.fromkeys([*first.missing, *second.missing])),
        notes=[*first.notes, *second.notes],
    )
