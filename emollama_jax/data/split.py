"""A split of a prepared set, as one object: examples, face priors, index, classes, conversations.

    split = Split("data", "dfew/fold1", "test")
    split.examples[0]["media"], split.priors[0].boxes, split.index.ids[0], split.space.classes

A fold is a view: positions in clips that are stored once for all folds, and so are their priors,
a teacher's labels and the answers that were paid for. What is read is read when first asked for.
"""

import copy
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from emollama_jax.data.builders.stored import Example, Index, StoredSet, index_of
from emollama_jax.data.emotions import LabelSpace
from emollama_jax.data.items import CONVERSES, DONE, Instructed, category_item
from emollama_jax.data.priors import Prior, Priors
from emollama_jax.data.sets import check_one_fold, family_of, label_space, not_prepared
from emollama_jax.errors import UserError
from emollama_jax.paths import as_path
from emollama_jax.terms import Kind


class Split:
    """A split of a prepared set; picklable.

    Args:
        data_dir: folder of prepared sets.
        name: name of the set, e.g. "raf_db", "dfew/fold1", "own/office", "actionfaces/images".
        split: name of the split.

    Raises:
        UserError: no such set, not prepared, or no such split.
    """

    def __init__(self, data_dir: epath.PathLike, name: str, split: str):
        self.data_dir, self.name, self.split = data_dir, name, split
        self.stored = StoredSet(data_dir, check_one_fold(name).stored(name))
        views = self.stored.views()
        if name not in views:
            beside = f" (prepared are {', '.join(views)})" if views else ""
            raise not_prepared(data_dir, name, f"not prepared{beside}")
        if split not in views[name]:
            known = ", ".join(views[name])
            raise UserError(f"{name}: there is no split {split!r}; choose one of {known}")
        self.stored_split, self.positions = views[name][split]

    @property
    def place(self) -> str:
        """Folder of its examples, e.g. "dfew/clips", and of other files shared by all views."""
        return f"{self.stored.name}/{self.stored_split}"

    @functools.cached_property
    def examples(self) -> Sequence[Example]:
        """Its examples: lazy, random access."""
        whole = self.stored.examples(self.stored_split)
        stored = self._metadata.get("classes", self.space.classes)
        if tuple(stored) != self.space.classes:  # a view may have fewer than are stored
            whole = _Reasked(whole, self.space.classes)
        return whole if self.positions is None else _Picked(whole, self.positions)

    @functools.cached_property
    def priors(self) -> Sequence[Prior]:
        """Face priors of the examples, in their order.

        Raises:
            UserError: they are not prepared.
        """
        whole = Priors(self.priors_folder)
        return whole if self.positions is None else _Picked(whole, self.positions)

    @property
    def priors_folder(self) -> epath.Path:
        """Folder of the stored split's priors."""
        return as_path(self.data_dir) / "priors" / self.place

    @functools.cached_property
    def index(self) -> Index:
        """Ids, labels and digests of its examples."""
        whole = self.stored.index(self.stored_split)
        return whole if self.positions is None else whole.at(self.positions)

    @functools.cached_property
    def space(self) -> LabelSpace:
        """Its classes."""
        return family_of(self.name).label_space(self.name, self._metadata)

    @functools.cached_property
    def _metadata(self) -> Mapping[str, Any]:
        return self.stored.metadata or {}

    @functools.cached_property
    def kind(self) -> Kind:
        """Pictures or clips."""
        return self.examples[0]["kind"]

    @property
    def instruct_folder(self) -> epath.Path:
        """Folder of the output of `emollama data instruct` for this split."""
        return as_path(self.data_dir) / "instruct" / self.name / self.split

    @property
    def has_conversations(self) -> bool:
        """Whether `emollama data instruct` has made some."""
        return (self.instruct_folder / DONE).exists()

    def with_examples(self, examples: Sequence[Example]) -> "Split":
        """This split with other contents of its examples, one for each."""
        other = copy.copy(self)
        other.examples = examples
        return other

    def instructed(self) -> "Split":
        """This split with its conversations, if it has some.

        Raises:
            UserError: they are of another preparation.
        """
        if not self.has_conversations:
            return self
        return self.with_examples(Instructed(self.examples, self.instruct_folder))

    def items(self, index: int) -> list[Any]:
        """An example's items; those of `emollama data instruct` are read without its media."""
        if isinstance(self.examples, Instructed):
            return self.examples.items(index)
        return json.loads(self.examples[index]["items"])

    def drawable(self, items: str) -> Sequence[int]:
        """The positions that training may draw.

        A source of conversations alone leaves out the examples that have none: those that were set
        aside, or not asked about yet.

        Args:
            items: items setting of the source: "category", "conversation" or "both".
        """
        if items != "conversation" or not self.has_conversations:
            return range(len(self.examples))
        with (self.instruct_folder / CONVERSES).open("rb") as file:
            return np.flatnonzero(np.load(file)).tolist()

    def also_in(self, other: str) -> Sequence[str]:
        """The ids of its examples that are in another split too, by id or content, in order.

        A model that was trained on one of them has seen it. There are more than `emollama data
        inspect` counts where one content stands twice in the split.

        Raises:
            UserError: no such split, or the same one.
        """
        if other == self.split:
            raise UserError(f"--without {other}: this is the tested split itself: choose another")
        here, there = self.index, Split(self.data_dir, self.name, other).index
        ids, digests = set(there.ids), set(there.digests)
        pairs = zip(here.ids, here.digests, strict=True)
        return [name for name, content in pairs if name in ids or content in digests]


class InMemory(Split):
    """A split in memory, for tests and measurements.

    Args:
        name: name of the set to stand in for.
        split: name of the split.
        examples: with the fields of `schema.features` that are read.
        priors: face priors of the examples.
    """

    has_conversations = False

    def __init__(self, name: str, split: str, examples: Sequence[Example], priors: Sequence[Prior]):
        self.name, self.split, self.examples, self.priors = name, split, examples, priors

    @functools.cached_property
    def space(self) -> LabelSpace:
        return label_space(self.name)

    @functools.cached_property
    def index(self) -> Index:
        return index_of(self.examples)


def space_of(data_dir: epath.PathLike, name: str) -> LabelSpace:
    """The classes of a set, which must be prepared only if it is a user's own.

    Raises:
        UserError: no such set, or not prepared.
    """
    family = family_of(name)
    return family.label_space(name, StoredSet(data_dir, family.stored(name)).metadata)


def prepared(data_dir: epath.PathLike, name: str) -> dict[str, list[str]]:
    """The names that a set can be opened by, e.g. its folds → their splits.

    Raises:
        UserError: nothing of it is prepared.
    """
    views = StoredSet(data_dir, family_of(name).stored(name)).views()
    found = {view: list(views[view]) for view in sorted(views) if f"{view}/".startswith(f"{name}/")}
    if not found:
        raise not_prepared(data_dir, name)
    return found


class _Picked(Sequence):
    """Some of what a stored split has, in an order of their own."""

    def __init__(self, whole: Sequence[Any], positions: Sequence[int]):
        self._whole, self._positions = whole, positions

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of a split of {len(self)}")
        return self._whole[self._positions[index]]


class _Reasked(Sequence):
    """Examples whose category item lists other classes than those that are stored."""

    def __init__(self, whole: Sequence[Example], classes: Sequence[str]):
        self._whole, self._classes = whole, classes

    def __len__(self) -> int:
        return len(self._whole)

    def __getitem__(self, index: int) -> Example:
        example = self._whole[index]
        _, *others = json.loads(example["items"])
        first = category_item(self._classes, int(example["label"]), example["kind"])
        return {**example, "items": json.dumps([first, *others])}
