"""Errors that the user can fix: one line, exit status 2; and Orbax' errors, as one line."""

import contextlib
import difflib
import gc
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

SETTLE = 0.5  # seconds for the other reads of a checkpoint after one failed


LONGEST = 4000  # characters of a message


class UserError(Exception):
    """Bad input; its one line names the thing, the values found and wanted, and the next step.

    Of a longer message, whose middle is what some file holds, both ends are kept.
    """

    def __init__(self, message: str):
        if len(message) > LONGEST:
            message = f"{message[: LONGEST // 2]} … {message[-LONGEST // 2 :]}"
        super().__init__(message)


def did_you_mean(found: str, known: Iterable[str]) -> str:
    """ " (did you mean NAME?)" where a known name is near, else nothing.

    Case and separators do not count: `RAF-DB`, `rafdb` and `raf_db` are one name.

    Args:
        found: word that the user wrote.
        known: names that exist.
    """
    plain = {}
    for name in known:
        plain.setdefault(_plain(name), name)
    wanted = _plain(found)
    near = difflib.get_close_matches(wanted, plain, n=1, cutoff=0.7)
    if not near and len(wanted) > 2:  # `affectnet` for affectnet7
        near = [name for name in plain if name.startswith(wanted)][:1]
    return f" (did you mean {plain[near[0]]}?)" if near else ""


def some(problems: Sequence[str]) -> str:
    """The first three of them, and how many more there are."""
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Orbax warns of what is meant (no OCDBT), and prints pages of log where a read fails."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    disabled = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        yield
    finally:
        for logger, was in zip(loggers, disabled, strict=True):
            logger.disabled = was


def attempt(read: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Result of an Orbax read and [], or {} and the texts of its error and that error's causes.

    Its readers raise anything. A failed read leaves other reads on a loop that is closed: they
    complain when they come back, or when they are collected. Both are waited for here.
    """
    hook, texts = sys.unraisablehook, []
    try:
        sys.unraisablehook = lambda _: None
        with quiet_orbax(), warnings.catch_warnings():
            try:
                return read(), []
            except Exception as error:
                cause: BaseException | None = error
                while cause is not None:
                    texts.append(" ".join(str(cause).split()) or type(cause).__name__)
                    cause = cause.__cause__ or cause.__context__
            warnings.simplefilter("ignore")
            gc.collect()  # the error, and with it Orbax' frames and tasks, is gone by now
            time.sleep(SETTLE)
            gc.collect()
        return {}, texts
    finally:
        sys.unraisablehook = hook


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.lower())
