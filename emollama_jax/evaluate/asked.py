"""What a question lists: the tested set's own label words or another set's, in which order.

A model that learned RAF-DB's words ("happiness") is asked in them about DFEW, and its answers are
mapped by the words that all sets share ("happy"). What does not map is said: classes of the tested
set that the question cannot name count as wrong, and so does an answer that the tested set lacks.

Shuffled options differ from item to item (seeded by the item's name), so that a model that likes
the first option shows: `position_bias`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from emollama_jax.data.emotions import SYNONYMS, LabelSpace
from emollama_jax.data.items import category_question
from emollama_jax.evaluate import metrics
from emollama_jax.evaluate.options import Order
from emollama_jax.evaluate.protocol import Prediction


@dataclasses.dataclass(frozen=True)
class Asked:
    """The classes that a question lists."""

    space: LabelSpace
    order: Order = "native"
    seed: int = 0  # of shuffled options
    native: bool = False  # whether these are the questions that the set is prepared with

    def options(self, item: str) -> tuple[str, ...]:
        """The options of an item's question, in their order."""
        if self.order == "native":
            return self.space.classes
        digest = hashlib.sha256(f"{self.seed}\0{item}".encode()).digest()
        rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "big")))
        return tuple(self.space.classes[i] for i in rng.permutation(len(self.space.classes)))

    def question(self, item: str, kind: Literal["image", "clip"]) -> str:
        """The category question of an item."""
        return category_question(self.options(item), kind)


class Reworded(Sequence):
    """A split whose category questions are those of an `Asked`; picklable if the split is."""

    def __init__(self, data: Sequence[Mapping[str, Any]], asked: Asked):
        self._data, self._asked = data, asked

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        example = self._data[index]
        items = json.loads(example["items"])
        question = self._asked.question(example["id"], example["kind"])
        items[0] = [{"from": "human", "value": f"<image>\n{question}"}, *items[0][1:]]
        return {**example, "items": json.dumps(items)}


def map_classes(asked: LabelSpace, tested: LabelSpace) -> dict[str, str | None]:
    """Asked class → tested class of the same meaning; None: the tested set has none."""
    there = dict(zip(tested.canonical, tested.classes, strict=True))
    pairs = zip(asked.classes, asked.canonical, strict=True)
    return {name: name if name in tested.classes else there.get(common) for name, common in pairs}


def unanswerable(asked: LabelSpace, tested: LabelSpace) -> tuple[str, ...]:
    """Classes of the tested set that the question does not list: always wrong."""
    reached = set(map_classes(asked, tested).values())
    return tuple(name for name in tested.classes if name not in reached)


def position_bias(predictions: Sequence[Prediction]) -> metrics.Positions | None:
    """Influence of an option's position, over the items with shuffled options.

    None where no item has both a true and an answered class among its options.
    """
    true, answered, places = [], [], 0
    for item in predictions:
        if item.options is None or item.predicted is None:
            continue
        names = [_common(name) for name in item.options]
        pair = [_common(item.label), _common(item.predicted)]
        if all(name in names for name in pair):
            true.append(names.index(pair[0]))
            answered.append(names.index(pair[1]))
            places = max(places, len(names))
    return metrics.positions(true, answered, places=places) if true else None


def _common(name: str) -> str:
    return SYNONYMS.get(name.casefold(), name.casefold())
