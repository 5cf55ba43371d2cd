"""Anyone's predictions: CSV or JSON lines in, the protocol's records out. No model, no JAX.

The truth and the answer of an item each stand in a named column. Both are words: numbers are
refused, since several number orders circulate for the same set. A truth has to be a class word or
its synonym; an answer may be anything that `parse_answer` reads as a ranked list, and in JSON
also scores, records and lists.

Without a named set the classes are the seven basic emotions; with contempt, or all of MAFW's
eleven, where a truth needs them. They bear the truth column's own words. Truths that are different
words for one of these classes ("calm" and "neutral") may be two classes or one; that is asked.
"""

import contextlib
import difflib
import json
import math
import pathlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from emollama_jax.data.emotions import LABEL_SPACES, SYNONYMS, LabelSpace, stem
from emollama_jax.data.sets import label_space
from emollama_jax.errors import UserError
from emollama_jax.evaluate.options import PredictionFiles
from emollama_jax.evaluate.parse import parse_answer
from emollama_jax.evaluate.parse.vocabulary import vocabulary
from emollama_jax.evaluate.protocol import Prediction, read_predictions
from emollama_jax.tables import Rows, read_rows

_ALL = LABEL_SPACES["mafw"].classes  # the seven basic ones first, then contempt, then three more
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
_SAMPLES = ("resps", "filtered_resps")  # lmms-eval's: several answers to one question


def read_foreign(
    path: pathlib.Path, columns: PredictionFiles, space: LabelSpace | None = None
) -> tuple[list[Prediction], LabelSpace]:
    """Reads a predictions file of any origin.

    Args:
        path: CSV (comma, semicolon, tab or |) with a header, JSON lines, or a JSON list of objects.
        columns: names of the columns or keys of truth, answer and item.
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
    truth_column, answer_column = columns.truth_column, columns.prediction_column
    own = {"label", "predicted", "parsed", "source"} <= rows[0][1].keys()
    if own and (truth_column, answer_column) == ("label", "predicted"):
        found = read_predictions(path)
        return found, space or _own_space(path, found)
    named = {"truth": truth_column, "prediction": answer_column, "id": columns.id_column}
    for role, column in named.items():
        if column is not None:
            _check_column(path, rows, column, option=f"--{role}-column")
    truths = [_truth(path, line, row.get(truth_column)) for line, row in rows]
    space = space or _infer(path, rows, truths)
    words = vocabulary(space) | {name.casefold(): name for name in space.classes}
    cells = [_answer(row.get(answer_column)) for _, row in rows]
    texts = [cell if isinstance(cell, str) else json.dumps(cell, default=str) for cell in cells]
    _refuse_numbers(path, rows, texts)
    form = "samples" if answer_column in _SAMPLES else "ranked"
    found = []
    for (line, row), truth, cell, text in zip(rows, truths, cells, texts, strict=True):
        if truth not in words:
            raise UserError(
                f"{path}, line {line}: truth {truth!r} is not a class of {space.title} (wanted one "
                f"of {', '.join(space.classes)}; name other classes with --classes)"
            )
        parsed = parse_answer(cell, space, form=form)
        found.append(
            Prediction(
                id=_id(path, line, row, columns.id_column),
                source=path.name,
                label=words[truth],
                predicted=parsed.label,
                text=text,
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


def _check_column(path: pathlib.Path, rows: Rows, column: str, *, option: str) -> None:
    known = list(dict.fromkeys(name for _, row in rows for name in row))
    if column not in known:
        near = difflib.get_close_matches(column.casefold(), [n.casefold() for n in known], n=1)
        hint = next((f"; did you mean {n}?" for n in known if n.casefold() in near), "")
        found = f"found: {', '.join(known)}{hint}"
        raise UserError(f"{path}: no column {column!r} ({found}): name yours with {option}")


# ---- cells


def _truth(path: pathlib.Path, line: int, cell: Any) -> str:
    """The casefolded word of a truth."""
    while isinstance(cell, list) and len(cell) == 1:
        cell = cell[0]
    text = "" if cell is None else str(cell).strip()
    if _NUMBER.fullmatch(text):
        raise UserError(_numeric(f"{path}, line {line}: truth {text}"))
    if not text:
        raise UserError(f"{path}, line {line}: no truth; every item needs its true label")
    return text.casefold()


def _id(path: pathlib.Path, line: int, row: Mapping[str, Any], column: str | None) -> str:
    """The item's name."""
    if column is None:
        return f"line {line}"
    cell = row.get(column)
    if not isinstance(cell, str | int | float) or cell == "":
        raise UserError(
            f"{path}, line {line}: {column} is {json.dumps(cell)[:80]}, wanted the item's id: a "
            "text or a number"
        )
    return str(cell)


def _answer(cell: Any) -> Any:
    """An answer as a text, or as the dict or list that JSON holds."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    while isinstance(cell, list) and len(cell) == 1:  # as lmms-eval logs one answer to one request
        cell = cell[0]
    return cell if isinstance(cell, str | dict | list) else str(cell)


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
    first: dict[str, tuple[str, int]] = {}  # class → its first truth and that one's line
    for (line, _), truth in zip(rows, truths, strict=True):
        common = SYNONYMS.get(truth, truth)
        if common not in _ALL:
            raise UserError(
                f"{path}, line {line}: truth {truth!r} is not an emotion class (known: "
                f"{', '.join(_ALL)} and their synonyms; name other classes with --classes)"
            )
        other, where = first.setdefault(common, (truth, line))
        if stem(other) != stem(truth):
            raise UserError(
                f"{path}: truths {other!r} (line {where}) and {truth!r} (line {line}): one class "
                f"or two? Two: --classes {','.join(dict.fromkeys(truths))}; one, {common}: "
                "--source with the set whose classes count, e.g. raf_db"
            )
        spelled.setdefault(common, Counter())[truth] += 1
    return _usual(path.name, {name: n.most_common(1)[0][0] for name, n in spelled.items()})


def _usual(title: str, spelled: Mapping[str, str]) -> LabelSpace:
    """Seven, eight or eleven classes, some in words of their own."""
    last = max(map(_ALL.index, spelled))
    size = 7 if last < 7 else 8 if last < 8 else len(_ALL)
    classes = tuple(spelled.get(name, name) for name in _ALL[:size])
    return LabelSpace(title=title, classes=classes, written=classes, splits={}, support={})


def _own_space(path: pathlib.Path, found: Sequence[Prediction]) -> LabelSpace:
    """The classes of a file of `emollama eval`: its set's, or those that its items bear."""
    source = found[0].source.partition(":")[0]
    with contextlib.suppress(UserError):  # a user's own set, of which only the file is here
        return label_space(source)
    words = dict.fromkeys(item.label for item in found)
    words |= dict.fromkeys(item.predicted for item in found if item.predicted is not None)
    spelled = {SYNONYMS.get(word.casefold(), word.casefold()): word for word in words}
    if len(spelled) < len(words) or not spelled.keys() <= set(_ALL):
        raise UserError(
            f"{path}: classes {', '.join(words)} match no known set: list the classes "
            "with --classes"
        )
    return _usual(path.name, spelled)
