"""Instruction data: the category item that every set has, as EMO-LLaMA's FERID words it, and the
conversations that `emollama data instruct` stored beside a prepared set, as training reads them.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from emollama_jax.errors import UserError
from emollama_jax.terms import Kind

# What `emollama data instruct` leaves in its folder of a split.
ITEMS = "items.array_record"  # an example's id, items and their maker as JSON, in the split's order
CONVERSES = "conversations.npy"  # bool [n], which examples have a conversation
DONE = "instruct.json"  # settings and counts; written last, so what is beside it is whole

# What a kind of example is called in a sentence.
MEDIUM = {"image": "image", "clip": "video"}


def standard_question(kind: Kind) -> str:
    """The question that is put where nobody asks one."""
    return f"Describe the face in the {MEDIUM[kind]} and name the emotion."


def category_question(classes: Sequence[str], kind: Kind) -> str:
    """Returns the category question with its options, without the `<image>` place holder.

    Args:
        classes: Label words in the set's native order.
        kind: A clip is called a video.
    """
    options = "{" + ", ".join(classes) + "}"
    return (
        f"What is the facial expression of the person in the {MEDIUM[kind]}? "
        f"Choose one from the following options: {options}."
    )


def category_item(classes: Sequence[str], label: int, kind: Kind) -> list[dict[str, str]]:
    """Returns the category question and the bare label word, as LLaVA's list of {"from", "value"}.

    Args:
        classes: Label words in the set's native order.
        label: Index of the answer.
        kind: A clip is called a video.
    """
    return [
        {"from": "human", "value": "<image>\n" + category_question(classes, kind)},
        {"from": "gpt", "value": classes[label]},
    ]


class Instructed(Sequence):
    """A split whose `items` are those of `emollama data instruct`: lazy, picklable."""

    def __init__(self, data: Sequence[Mapping[str, Any]], folder: epath.Path):
        import grain

        self._data, self._folder = data, folder
        self._items = grain.sources.ArrayRecordDataSource([str(folder / ITEMS)])
        if len(self._items) != len(data):
            raise UserError(self._other(f"{len(self._items)} examples, the split has {len(data)}"))

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        example = self._data[index]
        record = json.loads(self._items[index])
        if record["id"] != example["id"]:
            raise UserError(self._other(f"{record['id']} where the split has {example['id']}"))
        return {**example, "items": json.dumps(record["items"])}

    def items(self, index: int) -> list[Any]:
        """An example's items alone."""
        return json.loads(self._items[index])["items"]

    def _other(self, found: str) -> str:
        return (
            f"{self._folder}: made for another preparation of the set ({found}); move it away and "
            "run `emollama data instruct` again"
        )
