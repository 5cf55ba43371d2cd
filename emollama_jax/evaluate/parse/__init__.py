"""From an answer to the class that it names: `parse_answer`; nothing else is called from outside.

`reasoning.py` takes the reasoning away, `structured.py` reads data, `sentences.py` weighs what
plain English asserts with the patterns of `phrases.py`, and `reader.py` asks them in turn.
"""

from typing import Any, Literal

from emollama_jax.data.emotions import LabelSpace
from emollama_jax.evaluate.parse.reader import AnswerReader, Parsed, Reading

Form = Literal["text", "ranked", "samples"]

__all__ = ["Form", "Parsed", "Reading", "parse_answer"]


def parse_answer(answer: Any, space: LabelSpace, *, form: Form = "text") -> Parsed:
    """Reads the class that an answer names.

    Reasoning goes first; what was cut off in it is `unfinished`. What is left is read as the first
    of these that it is:
      exact    a class name and nothing else;
      score    data, or pairs of labels with numbers or yes and no: the best label;
      word     sentences that assert one class, by its name;
      synonym  or by another word for it ("joyful" → happiness). Both are judged together.
    All else is unparsed; it counts as wrong, and its rate is reported:
      ambiguous   two classes are named, or two scores are alike;
      none        no class is;
      foreign     the best label is not a class of the set;
      refusal     the model declines to answer;
      unfinished  the reasoning was cut off.

    Args:
        answer: a text, or what a file holds as data: scores, records, lists of JSON.
        space: the classes.
        form: "text": the words of a model. "ranked": a text may also be a ranked, comma-separated
            list, with only single words between its commas ("pain, fear, sadness") or only a class
            with words of degree ("mild fear, slight surprise"); its first entry is the answer, also
            where that names no class of the set. "samples": as "ranked", but a list of texts has
            several answers to one question, which must agree; else they are ranked labels.
    """
    return AnswerReader(space).parse(answer, form)
