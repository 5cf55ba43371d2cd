"""Errors that the user can mend: one line, exit status 2."""

import difflib
import re
from collections.abc import Iterable


class UserError(Exception):
    """Bad input; its one line names the thing, the values found and wanted, and the next step."""


def did_you_mean(found: str, known: Iterable[str]) -> str:
    """ " (did you mean NAME?)" where a known name is near, else nothing.

    Case and separators do not count: `RAF-DB`, `rafdb` and `raf_db` are one name.

    Args:
        found: what was written.
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


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.lower())
