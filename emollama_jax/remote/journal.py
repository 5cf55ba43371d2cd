"""A journal of questions and answers that survives a kill at any moment.

One JSON object a line, only ever appended. The first says what the journal is of; then, by key:
  {"sent": key, "cost": …}     a question is on its way; its cost at the most, until more is known
  {"failed": key, "cost": …}   it got no answer; the cost is that of one that may have been made
  {"answer": key, …}           it got one: text, tokens, cost, and what was made of it: a value, or
                               why it was rejected, and whether the item is set aside with that
Answers reach the disk before anything else happens (fsync), so a paid answer is lost only in the
moment between its arrival and its line. A line that a kill cut short is dropped when the journal is
opened again; one that cannot be read is told of and left alone: its item is asked again, and what
its question cost at the most stays in the sum. Only one process may write at a time.
"""

import dataclasses
import json
import logging
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from emollama_jax import foreign_json
from emollama_jax.errors import UserError, some
from emollama_jax.locks import lock_file

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Entry:
    """The journal's record of one item."""

    value: Any = None  # of the accepted answer
    rejections: list[str] = dataclasses.field(default_factory=list)
    aside: str = ""  # why it was set aside
    answers: int = 0
    reserved: float = 0.0  # for a question on its way; more than 0 or `on_its_way` after a kill
    on_its_way: bool = False

    @property
    def done(self) -> bool:
        return self.value is not None or bool(self.aside)


class Journal:
    """Opened for writing; `close` lets another process in."""

    def __init__(self, path: pathlib.Path, of: Mapping[str, Any]):
        """Opens or begins a journal.

        Args:
            path: journal file.
            of: subject of the journal; a journal of anything else is refused.

        Raises:
            UserError: another process writes it, it is of something else, or it is damaged.
        """
        self.entries: dict[str, Entry] = {}
        self.spent = 0.0  # US dollars, what is on its way included
        self.input_tokens = self.output_tokens = 0
        self._path = path
        busy = f"{path}: another process is writing it; wait for it to end"
        self._file = lock_file(path, busy=busy)
        try:
            self._read(dict(of))
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets another process in."""
        os.close(self._file)

    def entry(self, key: str) -> Entry:
        """Record of an item; empty if it was never asked."""
        return self.entries.get(key) or Entry()

    def sent(self, key: str, cost: float) -> None:
        """Notes that a question leaves, before it does."""
        self._write({"sent": key, "cost": cost}, sync=False)

    def failed(self, key: str, why: str, cost: float) -> None:
        """Notes that it got no answer, and what it may have cost all the same."""
        self._write({"failed": key, "why": why, "cost": cost}, sync=False)

    def answer(
        self,
        key: str,
        *,
        text: str,
        value: Any,
        why: str,
        aside: bool,
        cost: float,
        tokens: tuple[int, int],
    ) -> None:
        """Notes an answer and what was made of it; on the disk when this returns."""
        line = {"answer": key, "text": text, "value": value, "why": why, "aside": aside}
        self._write(line | {"cost": cost, "tokens": list(tokens)}, sync=True)

    def set_aside(self, key: str, why: str) -> None:
        """Notes that an item cannot be asked."""
        self._write({"aside": key, "why": why}, sync=True)

    def _write(self, line: dict[str, Any], *, sync: bool) -> None:
        text = json.dumps(line, ensure_ascii=False, allow_nan=False)
        data = foreign_json.plain(text).encode() + b"\n"
        while data:  # a full disk may take a part
            data = data[os.write(self._file, data) :]
        if sync:
            os.fsync(self._file)
        self._take(line)

    def _take(self, line: Mapping[str, Any]) -> None:
        if "aside" in line and "answer" not in line:
            self.entries.setdefault(line["aside"], Entry()).aside = line["why"]
            return
        key = line.get("sent") or line.get("failed") or line["answer"]
        entry = self.entries.setdefault(key, Entry())
        if "sent" in line:
            # A question that a kill left on its way stays in the sum: it may have been answered.
            entry.reserved, entry.on_its_way = line["cost"], True
            self.spent += line["cost"]
            return
        self.spent += line["cost"] - entry.reserved
        entry.reserved, entry.on_its_way = 0.0, False
        if "failed" in line:
            return
        entry.answers += 1
        self.input_tokens += line["tokens"][0]
        self.output_tokens += line["tokens"][1]
        entry.value = line["value"]
        if line["value"] is None:
            entry.rejections.append(line["why"])
            entry.aside = line["why"] if line["aside"] else ""

    def _read(self, of: dict[str, Any]) -> None:
        data = self._path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.ftruncate(self._file, whole)
        lines = data[:whole].splitlines()
        if not lines:
            text = json.dumps({"journal": 1, "of": of}, ensure_ascii=False)
            os.write(self._file, text.encode() + b"\n")
            os.fsync(self._file)
            folder = os.open(self._path.parent, os.O_RDONLY)
            os.fsync(folder)  # the new name, too
            os.close(folder)
            return
        try:
            found = dict(foreign_json.parse(lines[0])["of"])
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{self._path}, line 1: damaged: it says what the journal is of; move the file "
                "away to start over (and pay again)"
            ) from None
        damaged = []
        for number, line in enumerate(lines[1:], 2):
            try:
                self._take(_checked(foreign_json.parse(line)))
            except (ValueError, KeyError, TypeError):
                damaged.append(str(number))
        if damaged:
            _log.warning(
                "%s: left out line %s, which cannot be read: its item is asked again",
                self._path,
                some(damaged),
            )
        if found != of:
            names = [name for name in {**found, **of} if found.get(name) != of.get(name)]
            name = names[0]
            raise UserError(
                f"{self._path}: a journal of {name} = {found.get(name)!r}, and this is "
                f"{of.get(name)!r}; move the file away to start over (and pay again)"
            )


def _checked(line: Any) -> dict[str, Any]:
    """A line that `Journal._write` may have written.

    Raises:
        ValueError: a value of another kind.
        KeyError: a missing one.
        TypeError: no object.
    """
    texts = [line[name] for name in ("sent", "failed", "answer", "text", "why") if name in line]
    costs = [] if "aside" in line and "answer" not in line else [line["cost"]]
    tokens: list[Any] = []
    if "answer" in line:
        tokens = [*line["tokens"]]
        good = len(tokens) == 2 and isinstance(line["aside"], bool) and {"text", "value"} <= {*line}
        if not good or (line["value"] is None and "why" not in line):
            raise ValueError("an answer without its parts")
    elif "aside" in line:
        texts += [line["aside"], line["why"]]
    numbers = [*costs, *tokens]
    whole = all(isinstance(n, int) for n in tokens)
    if not all(isinstance(text, str) for text in texts) or not whole:
        raise ValueError("a value of another kind")
    if not all(isinstance(n, int | float) and math.isfinite(n) and n >= 0 for n in numbers):
        raise ValueError("a number that counts nothing")
    return line
