"""Anyone's predictions: CSV or JSON lines in, the protocol's records out. No model, no JAX.

The truth and the answer of an item each stand in a named column. Both are words: numbers are
refused, since several number orders circulate for the same set. A truth has to be a class word or
its synonym; an answer may be anything that `answers.parse_ranked` reads.

Without a named set the classes are the seven basic emotions; with contempt, or all of MAFW's
eleven, where a truth needs them. They bear the truth column's own words.
"""

import difflib
import math
import pathlib
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from emollama_jax.data.emotions import LABEL_SPACES, SYNONYMS, LabelSpace, label_space
from emollama_jax.errors import UserError
from emollama_jax.evaluate.answers import parse_ranked, vocabulary
from emollama_jax.evaluate.protocol import Evaluation, Prediction, read_predictions
from emollama_jax.tables import Rows, read_rows

_ALL = LABEL_SPACES["mafw"].classes  # the seven basic ones first, then contempt, then three more
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


def read_foreign(
    path: pathlib.Path,
    *,
    truth_column: str,
    prediction_column: str,
    id_column: str | None = None,
    space: LabelSpace | None = None,
) -> tuple[list[Prediction], LabelSpace]:
    """Reads a predictions file of any origin.

    Args:
        path: CSV (comma, semicolon, tab or |) with a header, JSON lines, or a JSON list of objects.
        truth_column: the column or key of the true label.
        prediction_column: of the answer: a label, a ranked list of labels, or free text; empty
            for none.
        id_column: of the item's name, each once; None: items are named by their line.
        space: the classes; None: what the truths are, or the set that a file of `emollama eval`
            names.

    Returns:
        A record for each item, and the classes.

    Raises:
        UserError: no such file or column, a broken line, a truth that is no class, numeric labels.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such predictions file")
    rows = read_rows(path)
    if not rows:
        raise UserError(f"{path}: no predictions: nothing to evaluate")
    own = {"label", "predicted", "parsed", "source"} <= rows[0][1].keys()
    if own and (truth_column, prediction_column) == ("label", "predicted"):
        found = read_predictions(path)
        return found, space or label_space(found[0].source.partition(":")[0])
    for column in filter(None, (truth_column, prediction_column, id_column)):
        _check_column(path, rows, column)
    truths = [_truth(path, line, row.get(truth_column)) for line, row in rows]
    space = space or _infer(path, rows, truths)
    words = vocabulary(space) | {name.casefold(): name for name in space.classes}
    answers = [_answer(path, line, row.get(prediction_column)) for line, row in rows]
    _refuse_numbers(path, rows, answers)
    found = []
    for (line, row), truth, answer in zip(rows, truths, answers, strict=True):
        if truth not in words:
            raise UserError(
                f"{path}, line {line}: truth {truth!r} is no class of {space.title} (wanted one of "
                f"{', '.join(space.classes)}; name other classes with --classes)"
            )
        parsed = parse_ranked(answer, space)
        found.append(
            Prediction(
                id=str(row[id_column]) if id_column else f"line {line}",
                source=path.name,
                label=words[truth],
                predicted=parsed.label,
                text=answer,
                scores=None,
                parsed=parsed.how,
            )
        )
    return found, space


def named_classes(names: str) -> LabelSpace:
    """The classes of a comma-separated list.

    Raises:
        UserError: fewer than two, or one twice.
    """
    classes = tuple(name.strip() for name in names.split(",") if name.strip())
    if len({name.casefold() for name in classes}) < max(len(classes), 2):
        raise UserError(f"--classes {names}: wanted at least two names, each once")
    return LabelSpace(title="--classes", classes=classes, written=classes, splits={}, support={})


def summary(evaluation: Evaluation) -> dict[str, Any]:
    """What `emollama eval --json` prints: shares, 0 … 1; recalls of the classes that occur."""
    recall = zip(evaluation.classes, evaluation.per_class.recall.tolist(), strict=True)
    return {
        "WAR": evaluation.war,
        "UAR": evaluation.uar,
        "n": evaluation.n,
        "unparsed": evaluation.unparsed,
        "recall": {name: value for name, value in recall if not math.isnan(value)},
    }


def _check_column(path: pathlib.Path, rows: Rows, column: str) -> None:
    known = list(dict.fromkeys(name for _, row in rows for name in row))
    if column not in known:
        near = difflib.get_close_matches(column.casefold(), [n.casefold() for n in known], n=1)
        hint = next((f"; did you mean {n}?" for n in known if n.casefold() in near), "")
        raise UserError(f"{path}: no column {column!r} (found: {', '.join(known)}{hint})")


# ---- cells


def _truth(path: pathlib.Path, line: int, cell: Any) -> str:
    """The casefolded word of a truth."""
    text = "" if cell is None else str(cell).strip()
    if _NUMBER.fullmatch(text):
        raise UserError(_numeric(f"{path}, line {line}: truth {text}"))
    if not text:
        raise UserError(f"{path}, line {line}: no truth; every item needs its true label")
    return text.casefold()


def _answer(path: pathlib.Path, line: int, cell: Any) -> str:
    """An answer as text; lists of JSON are ranked lists."""
    if isinstance(cell, list) and all(isinstance(entry, str) for entry in cell):
        return ", ".join(cell)
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if isinstance(cell, str | int | float) and not isinstance(cell, bool):
        return str(cell)
    raise UserError(f"{path}, line {line}: answer {cell!r}, wanted a text or a list of texts")


def _refuse_numbers(path: pathlib.Path, rows: Rows, answers: Sequence[str]) -> None:
    """A number among words is an answer that names nothing; a column of numbers is a trap."""
    given = [(line, a) for (line, _), a in zip(rows, answers, strict=True) if a.strip()]
    numbers = [(line, a) for line, a in given if _NUMBER.fullmatch(a.split(",")[0].strip())]
    if numbers and 2 * len(numbers) > len(given):
        line, number = numbers[0]
        raise UserError(_numeric(f"{path}, line {line}: answer {number.strip()}"))


def _numeric(what: str) -> str:
    return (
        f"{what} is a numeric id, and several number orders circulate for the same set (3 is "
        "disgust in RAF-DB, neutral in DFEW, surprise in AffectNet): write class names"
    )


def _infer(path: pathlib.Path, rows: Rows, truths: Sequence[str]) -> LabelSpace:
    """The smallest usual set of classes that has every truth, in the truths' own words."""
    spelled: dict[str, Counter[str]] = {}
    for (line, _), truth in zip(rows, truths, strict=True):
        common = SYNONYMS.get(truth, truth)
        if common not in _ALL:
            raise UserError(
                f"{path}, line {line}: truth {truth!r} is no emotion class (known: "
                f"{', '.join(_ALL)} and their synonyms; name other classes with --classes)"
            )
        spelled.setdefault(common, Counter())[truth] += 1
    last = max(map(_ALL.index, spelled))
    size = 7 if last < 7 else 8 if last < 8 else len(_ALL)
    classes = tuple(
        spelled[name].most_common(1)[0][0] if name in spelled else name for name in _ALL[:size]
    )
    return LabelSpace(title=path.name, classes=classes, written=classes, splits={}, support={})
