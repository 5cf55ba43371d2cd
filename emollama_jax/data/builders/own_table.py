"""A user's table: columns of paths and labels, FER2013's column of pixels, or LLaVA's JSON.

Which columns are taken is a rule, and is told: a column's name without case, spaces and signs is
looked up in `COLUMNS`, the first that fits wins, and of label columns that fit, those that hold
words come before those that hold numbers.
"""

import dataclasses
import io
import itertools
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from emollama_jax import tables
from emollama_jax.data.emotions import LABEL_SPACES, SYNONYMS
from emollama_jax.errors import UserError

TABLES = (".csv", ".tsv", ".txt", ".jsonl", ".json")
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
FER2013_SPLITS = {"publictest": "validation", "privatetest": "test"}  # its column Usage
COLUMNS = {
    "path": (
        *("path", "filepath", "imagepath", "imgpath", "videopath", "clippath", "mediapath", "pth"),
        *("file", "filename", "imagefile", "imgfile", "videofile"),
        *("imagename", "imgname", "videoname", "image", "img", "picture", "photo"),
        *("video", "clip", "media"),
    ),
    "label": (
        *("label", "emotion", "expression", "class", "emotionlabel", "expressionlabel"),
        *("labelname", "emotionname", "classname", "category", "target"),
        *("truth", "groundtruth", "gt"),
    ),
    "split": ("split", "set", "partition", "subset", "usage"),
    "subject": (
        *("subject", "subjectid", "person", "personid", "identity", "identityid"),
        *("participant", "actor"),
    ),
}
SIDE = 48  # pixels of FER2013's pictures
# The one order in which FER2013 is published; a column of 48 × 48 pixels shows that it is it.
FER2013 = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)")


@dataclasses.dataclass(frozen=True)
class UserExample:
    """One example of a user's data."""

    path: str  # relative to the data, or a name where the table itself holds the picture
    label: str
    split: str | None  # None: the data name no splits
    where: str  # it is written
    subject: str = ""
    content: bytes | None = None  # an encoded picture


def read_table(path: pathlib.Path) -> tuple[list[UserExample], list[str]]:
    """The examples of a table, and how it was read.

    Raises:
        UserError: a column is missing or ambiguous, a label is no word, a split is unknown.
    """
    rows = tables.iterate_rows(path)
    first = next(rows, None)
    if first is None:
        return [], []
    unit = "item" if path.suffix.lower() == ".json" else "line"
    numbered = ((f"{path}, {unit} {n}", row) for n, row in itertools.chain([first], rows))
    names = {plain(name) for name in first[1]}
    if "pixels" in names:
        return _pixels(numbered)  # a row at a time: the whole is hundreds of megabytes
    if "conversations" in names and not names & set(COLUMNS["label"]):
        return _llava(list(numbered))
    return _columns(list(numbered))


def plain(name: str) -> str:
    """A column's name without case, spaces and signs."""
    return re.sub(r"[\W_]+", "", name.lower())


def label_of(written: Any, where: str) -> str:
    """A label as a class is called.

    Raises:
        UserError: empty, a number, or no text.
    """
    if not isinstance(written, str | int | float) or isinstance(written, bool):
        raise UserError(f"{where}: label {written!r}, wanted a word")
    label = " ".join(str(written).split()).lower()
    if not label:
        raise UserError(f"{where}: the label is empty")
    if NUMBER.fullmatch(label):
        raise UserError(
            f"{where}: label {written!r} is a number: write the class's name, since several number "
            "orders are in use"
        )
    return label


# ---- columns


def _columns(rows: Sequence[tuple[str, dict[str, Any]]]) -> tuple[list[UserExample], list[str]]:
    taken = choose(rows)
    examples = []
    for where, row in rows:
        cell = {column: row.get(name) for column, name in taken.items()}
        path = cell["path"]
        if isinstance(path, list) and len(path) == 1:
            path = path[0]
        examples.append(
            UserExample(
                path=path_of(path, where),
                label=label_of("" if cell["label"] is None else cell["label"], where),
                split=split_of(cell["split"], where) if "split" in cell else None,
                where=where,
                subject=str(cell.get("subject") or "").strip(),
            )
        )
    return examples, [f"columns: {', '.join(f'{c} from {n!r}' for c, n in taken.items())}"]


def choose(
    rows: Sequence[tuple[str, Mapping[str, Any]]], needed: Sequence[str] = ("path", "label")
) -> dict[str, str]:
    """What is wanted → the column that has it.

    Raises:
        UserError: no column for something that is needed, or two with the same name.
    """
    where = rows[0][0]
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    taken: dict[str, str] = {}
    for column, known in COLUMNS.items():
        fitting = [name for word in known for name in names if plain(name) == word]
        if column == "label" and len(fitting) > 1:
            words = [name for name in fitting if not _numbers(rows, name)]
            fitting = words or fitting
        if fitting:
            first = fitting[0]
            if len(fitting) > 1 and plain(fitting[1]) == plain(first):
                raise UserError(
                    f"{where}: {first!r} and {fitting[1]!r} both name the {column}: keep one"
                )
            taken[column] = first
        elif column in needed:
            votes = {"neutral", "happiness", "contempt"} <= {plain(name) for name in names}
            hint = "; votes of FERPlus are prepared as ferplus" if votes else ""
            raise UserError(
                f"{where}: no column {column} (found: {', '.join(names) or 'nothing'}; wanted e.g. "
                f"{', '.join(known[:3])}){hint}"
            )
    return taken


def _numbers(rows: Sequence[tuple[str, Mapping[str, Any]]], name: str) -> bool:
    return all(NUMBER.fullmatch(str(row.get(name, "")).strip()) for _, row in rows)


def path_of(written: Any, where: str) -> str:
    """The path of an example.

    Raises:
        UserError: no text, empty, or a URL.
    """
    if not isinstance(written, str):
        raise UserError(f"{where}: path {written!r}, wanted the path of one file")
    if not written.strip():
        raise UserError(f"{where}: the path is empty")
    if re.match(r"\w+://", written.strip()):
        raise UserError(f"{where}: {written.strip()} is a URL: download it and name the file")
    return written.strip().replace("\\", "/")


def split_of(written: Any, where: str) -> str:
    """The split that a cell names.

    Raises:
        UserError: none that is known.
    """
    word = str(written or "").strip()
    known = SPLITS | FER2013_SPLITS
    if plain(word) not in known:
        raise UserError(f"{where}: split {word!r}, wanted train, validation or test")
    return known[plain(word)]


# ---- FER2013


def _pixels(rows: Iterable[tuple[str, dict[str, Any]]]) -> tuple[list[UserExample], list[str]]:
    examples, taken = [], {}
    for number, (where, row) in enumerate(rows):
        if not taken:
            taken = choose([(where, row)], needed=("label",))
            taken["pixels"] = next(name for name in row if plain(name) == "pixels")
        examples.append(
            UserExample(
                path=f"fer{number:07d}",  # as FERPlus calls them
                label=_fer_label(row[taken["label"]], where),
                split=split_of(row[taken["split"]], where) if "split" in taken else None,
                where=where,
                content=_picture(row[taken["pixels"]], where),
            )
        )
    order = ", ".join(f"{n}={name}" for n, name in enumerate(FER2013))
    return examples, [f"FER2013's column of pixels, {SIDE} × {SIDE}; emotions are {order}"]


def _fer_label(written: Any, where: str) -> str:
    text = str(written).strip()
    if not NUMBER.fullmatch(text):
        return label_of(written, where)
    if text not in map(str, range(len(FER2013))):
        raise UserError(f"{where}: emotion {text}, and FER2013's are 0 (angry) … 6 (neutral)")
    return FER2013[int(text)]


def _picture(written: Any, where: str) -> bytes:
    """The PNG of a cell of grey values."""
    text = str(written)
    if not re.fullmatch(r"\s*[0-9][0-9\s]*", text):
        raise UserError(f"{where}: wanted pixels from 0 to 255, whole numbers")
    values = np.fromstring(text, np.int64, sep=" ")  # int() of each takes much longer
    if len(values) != SIDE * SIDE or values.max() > 255:
        raise UserError(
            f"{where}: {len(values)} pixels up to {values.max()}, wanted FER2013's {SIDE} × {SIDE}"
            f" = {SIDE * SIDE} from 0 to 255"
        )
    file = io.BytesIO()
    Image.fromarray(values.astype(np.uint8).reshape(SIDE, SIDE)).save(file, "PNG", compress_level=1)
    return file.getvalue()


# ---- LLaVA's JSON

_WORDS = {*SYNONYMS, *(name for space in LABEL_SPACES.values() for name in space.classes)}


def _llava(rows: Sequence[tuple[str, dict[str, Any]]]) -> tuple[list[UserExample], list[str]]:
    """One example for each medium: a class word is its label, all else is conversation."""
    found: dict[str, tuple[str, str]] = {}  # path → label, where
    first: dict[str, str] = {}  # path → where
    said: dict[str, str] = {}  # path → an answer that names no class
    without = 0
    for where, row in rows:
        medium = row.get("image") or row.get("video")
        if not medium:
            without += 1
            continue
        if isinstance(medium, list) and len(medium) == 1:
            medium = medium[0]
        path = path_of(medium, where)
        first.setdefault(path, where)
        for question, answer in _turns(row["conversations"], where):
            label = _class_word(question, answer)
            if label is None:
                said.setdefault(path, answer)
                continue
            known, there = found.setdefault(path, (label, where))
            if known != label:
                raise UserError(
                    f"{where}: {path} is {label!r}, but {known!r} in {there.rpartition(', ')[2]}"
                )
    for path, where in first.items():
        if path not in found:
            raise UserError(
                f"{where}: no answer is just a class word (found {said.get(path, '')[:60]!r}); "
                "give the label as the answer to one question, or as a key 'label'"
            )
    subset = [
        UserExample(path=path, label=label, split=None, where=where)
        for path, (label, where) in found.items()
    ]
    told = [f"LLaVA's JSON: labels from the answers (items: {len(rows)}, files: {len(subset)})"]
    if without:
        told.append(f"skipped, without image or video: {without} of the items")
    return subset, told


def _turns(conversations: Any, where: str) -> list[tuple[str, str]]:
    """(question, answer) of a conversation."""
    try:
        turns = [(turn["from"], turn["value"]) for turn in conversations]
    except (TypeError, KeyError):
        raise UserError(
            f"{where}: conversations, wanted a list of {{'from': …, 'value': …}}"
        ) from None
    if not all(isinstance(value, str) for _, value in turns):
        raise UserError(f"{where}: a turn without text")
    pairs = itertools.pairwise(turns)
    return [(q, a) for (_, q), (who, a) in pairs if who in ("gpt", "assistant")]


def _class_word(question: str, answer: str) -> str | None:
    """The class of an answer that is one class word and nothing else.

    A class is a word that the known sets use, or one of the options that the question lists in
    braces or brackets, if emotions are among them.
    """
    word = " ".join(re.sub(r"^\W+|\W+$", "", answer).casefold().split())
    if word in _WORDS:
        return word
    for listed in re.findall(r"[{\[]([^{}\[\]]+)[}\]]", question):
        options = [option.strip(" '\"").casefold() for option in listed.split(",")]
        if word in options and _WORDS & set(options):
            return word
    return None
