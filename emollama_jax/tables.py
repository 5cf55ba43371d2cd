"""The one reader of tables: CSV of any usual separator, JSON lines, a JSON list of objects.

Predictions, a user's own lists and the official lists all come through here, so that what is
tolerated (marks, line ends, blank lines, quoted line breaks, spaces around cells) and what is
refused (a column twice, a row of another length, a key twice, other encodings, JSON that is nested
without end) is the same for all.
"""

import csv
import io
import pathlib
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from emollama_jax import foreign_json
from emollama_jax.errors import UserError

Rows = list[tuple[int, dict[str, Any]]]  # line number, or the object's in a list; cells by name

SEPARATORS = ",;\t|"
_MARKS = {
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


def read_rows(path: pathlib.Path) -> Rows:
    """Reads a whole table.

    Returns:
        (number, cells by name) of each row. The number is that of the line on which a row begins;
        in a JSON list, the object's, from 1.

    Raises:
        UserError: unreadable, in no known encoding, a column or key twice, a row of another length,
            broken quotes or JSON.
    """
    return list(iterate_rows(path))


def iterate_rows(path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """`read_rows`, one row at a time."""
    text = read_text(path)
    start = text.lstrip()[:1]
    if start == "{":
        yield from _json_lines(path, text)
    elif start == "[":
        yield from _json_list(path, text)
    else:
        yield from _named(path, text)


def read_text(path: pathlib.Path, *, fallback: Sequence[str] = ()) -> str:
    """The text of a file: UTF-8 with or without a mark, UTF-16 and UTF-32 with one.

    Args:
        path: text file.
        fallback: encodings to try where it is not UTF-8.

    Raises:
        UserError: no such file, unreadable, or in none of them.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if data.startswith(b"PK\x03\x04"):
        raise UserError(f"{path}: a zip or an Excel workbook, wanted text: save the sheet as CSV")
    marked = [name for mark, name in _MARKS.items() if data.startswith(mark)]
    for encoding in marked[:1] or ["utf-8-sig", *fallback]:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" in text:
            raise UserError(
                f"{path}: NUL bytes: not text, or UTF-16 without a mark; save the file as UTF-8"
            )
        return text
    try:
        data.decode(marked[0] if marked else "utf-8")
    except UnicodeDecodeError as error:
        wanted = marked[0].upper() if marked else "UTF-8"
        raise UserError(
            f"{path}: not {wanted} text (byte {error.start}); save the file as UTF-8"
        ) from None
    raise AssertionError("a text that decodes was returned")


def cells(
    path: pathlib.Path, text: str, separator: str, *, first: int = 1
) -> Iterator[tuple[int, list[str]]]:
    """(line on which it begins, cells) of each row that is not blank; quotes may hold line breaks.

    Args:
        path: for messages.
        text: text of the table.
        separator: separator of cells.
        first: number of the text's first line.

    Raises:
        UserError: broken quotes.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a picture may be one cell
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=True
    )
    line = first
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                yield line, row
            line = reader.line_num + first  # of the next row's start
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: broken CSV ({error})") from None


def separator_of(header: str) -> str:
    """The separator that is most frequent outside a header's quotes."""
    bare = re.sub(r'"[^"]*("|$)', "", header)
    return max(SEPARATORS, key=bare.count)


# ---- the three kinds


def _named(path: pathlib.Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    skipped, text = _without_blank_lines(text)
    header = re.split(r"[\r\n]", text, maxsplit=1)[0]
    separator = separator_of(header)
    if told := re.fullmatch(r"sep=(.)", header.strip(" ")):  # Excel's own first line
        rest = text[len(header) :]
        rest = rest.removeprefix("\r\n") if rest.startswith("\r\n") else rest[1:]
        separator, text, skipped = told[1], rest, skipped + 1
    names: list[str] | None = None
    for line, row in cells(path, text, separator, first=skipped + 1):
        if names is None:
            names = [cell.strip() for cell in row]
            check_names(names, f"{path}, line {line}")
        elif len(row) != len(names):
            raise UserError(
                f"{path}, line {line}: {len(row)} cells under a header of {len(names)}; "
                "quote text that contains the separator"
            )
        else:
            yield line, {n: cell for n, cell in zip(names, row, strict=True) if n}


def check_names(names: Sequence[str], where: str) -> None:
    """Refuses a header that names a column twice; columns without a name cannot be meant.

    Raises:
        UserError: with the name.
    """
    for name, times in Counter(filter(None, names)).items():
        if times > 1:
            raise UserError(
                f"{where}: {times} columns are called {name!r}: keep one, or rename them"
            )


def _without_blank_lines(text: str) -> tuple[int, str]:
    """How many blank lines a text begins with, and the rest."""
    match = re.match(r"(?:[ \t]*(?:\r\n|\r|\n))*", text)
    assert match is not None
    return len(re.findall(r"\r\n|\r|\n", match[0])), text[match.end() :]


def _json_lines(path: pathlib.Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, piece in enumerate(text.split("\n"), 1):  # splitlines() would cut at U+2028
        if piece.strip():
            try:
                yield line, _object(_parse(piece))
            except ValueError as error:
                raise UserError(f"{path}, line {line}: no JSON object ({error})") from None


def _json_list(path: pathlib.Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        yield from [(n, _object(row)) for n, row in enumerate(_parse(text), 1)]
    except ValueError as error:
        raise UserError(f"{path}: no list of JSON objects ({error})") from None


def _parse(text: str) -> Any:
    return foreign_json.parse(text, pairs=_pairs)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; Python would quietly keep the last of two equal keys."""
    found = dict(pairs)
    if len(found) < len(pairs):
        name = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {name!r} is given twice")
    return found


def _object(tree: Any) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise ValueError(f"found a {type(tree).__name__}")
    return tree
