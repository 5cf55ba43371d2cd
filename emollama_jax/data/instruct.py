"""Instruction data: the category item that every set has, as EMO-LLaMA's FERID words it."""

from collections.abc import Sequence
from typing import Literal

# What a kind of example is called in a sentence.
MEDIUM = {"image": "image", "clip": "video"}


def category_question(classes: Sequence[str], kind: Literal["image", "clip"]) -> str:
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


def category_item(
    classes: Sequence[str], label: int, kind: Literal["image", "clip"]
) -> list[dict[str, str]]:
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
