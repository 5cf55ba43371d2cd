"""What to know before a number: that many answers, or all of them, name no class."""

from collections import Counter
from collections.abc import Sequence

from emollama_jax.evaluate.protocol import Evaluation

SHARE = 0.1  # of unparsed answers, from which it is said
_KINDS = {
    "ambiguous": "name two classes, or two scores are alike",
    "none": "name no class",
    "foreign": "have a best label that is no class",
    "refusal": "are refusals",
    "unfinished": "break off in their reasoning",
}


def warning(evaluations: Sequence[Evaluation]) -> str:
    """A sentence to print first; "" where few answers are unparsed.

    Args:
        evaluations: of one set, or of its folds.
    """
    total = sum(e.n for e in evaluations)
    lost = sum(round(e.unparsed * e.n) for e in evaluations)
    if lost < SHARE * total:
        return ""
    read = sum((Counter(e.parsed) for e in evaluations), Counter())
    why = ", ".join(f"{read[how]:,} {text}" for how, text in _KINDS.items() if read[how])
    if lost == total:
        return f"All of the {total:,} answers are unparsed, so every number is 0: {why}."
    return f"{lost:,} of {total:,} answers are unparsed and count as wrong: {why}."
