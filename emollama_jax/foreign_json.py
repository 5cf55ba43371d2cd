"""JSON that others wrote: a service's answer, a table, a file of another program.

Python's reader raises three kinds of exceptions, and gives back values that fail later: text that
cannot be written (lone surrogates, of emoji that were cut in half), whole numbers that no float
holds, trees so deep that walking them ends in a RecursionError. Here each is a ValueError, or is
mended where nothing is lost.
"""

import json
import re
from collections.abc import Callable
from typing import Any

DEPTH = 64  # of objects and lists in one another
DIGITS = 300  # of a whole number; a float ends at 309
REPLACEMENT = "\ufffd"

_LONE = re.compile("[\ud800-\udfff]")
_LONG = re.compile(rf"\d{{{DIGITS + 1}}}")
_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")

Pairs = Callable[[list[tuple[str, Any]]], Any]


def parse(text: str | bytes, *, pairs: Pairs | None = None) -> Any:
    """The tree in a JSON text.

    Args:
        text: text, or its bytes in UTF-8, UTF-16 or UTF-32.
        pairs: makes an object of its keys and values; `dict` by default.

    Returns:
        Plain values that can be walked and written; lone surrogates are U+FFFD.

    Raises:
        ValueError: not JSON, not text, nested deeper than DEPTH, a whole number of more than
            DIGITS digits.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text))
    whole = _whole if _LONG.search(text) else None
    try:
        tree = json.loads(text, object_pairs_hook=pairs, parse_int=whole)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if text.count("[") + text.count("{") > DEPTH and isinstance(tree, dict | list):
        _check_depth(tree)
    if _LONE.search(text) or _ESCAPED.search(text):
        tree = _clean(tree)
    return tree


def plain(text: str) -> str:
    """A text that can be written: lone surrogates are U+FFFD."""
    return _LONE.sub(REPLACEMENT, text)


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number of {len(digits)} digits, wanted at most {DIGITS}")
    return int(digits)


def _check_depth(tree: Any) -> None:
    level = [tree]
    for _ in range(DEPTH):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"nested deeper than {DEPTH}")


def _clean(tree: Any) -> Any:
    if isinstance(tree, str):
        return plain(tree)
    if isinstance(tree, list):
        return [_clean(entry) for entry in tree]
    if isinstance(tree, dict):
        return {_clean(key): _clean(value) for key, value in tree.items()}
    return tree
