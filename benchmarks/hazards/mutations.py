"""Inputs as words: a base that is made here, and a list of small changes, each named.

A failing input is kept as its words, which make the same bytes again, never as a file: a file that
makes one program fail may make others fail, too.
"""

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

Change = tuple[str, tuple[Any, ...]]  # name and arguments

# Values that nobody expects in a place of JSON or YAML; deep and long ones are built when used.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**70, 10**40, 0.5, -0.0, 1e-320, 1e308),
    *(float("inf"), float("-inf"), float("nan"), "", " ", "0", "1e5", "nan", "true", "null"),
    *("[red]", "[/]", "<b>", "../..", "/", "a\nb", "a\tb", "\0", "\ud800", "é", "\U0001f600"),
    *([], {}, [[]], [None], {"": None}, ["a", 1], {"a": {"a": {}}}, [1.5] * 3),
)
NUMBERS = (b"0", b"-1", b"1e999", b"NaN", b"99999999999999999999", b"9" * 5000, b"0x10", b"1:30")
MARKS = (b"\0", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"\n\n", b'"', b"'", b"[", b"{", b"]", b"}")
DEEP = 20_000


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An input in words."""

    kind: str
    base: str
    changes: tuple[Change, ...]

    def words(self) -> str:
        """One line."""
        return f"{self.kind}, {self.base}: {json.dumps(self.changes)}"


def change_bytes(data: bytes, change: Change) -> bytes:
    """Applies one change to bytes; places are shares of the length, so they fit any input."""
    name, args = change
    if name == "cut":
        return data[: int(args[0] * len(data))]
    place = int(args[0] * len(data))
    if name == "flip":
        if not data:
            return data
        place = min(place, len(data) - 1)
        return data[:place] + bytes([data[place] ^ args[1]]) + data[place + 1 :]
    if name == "fill":
        return data[:place] + bytes([args[2]]) * args[1] + data[place + args[1] :]
    if name == "drop":
        return data[:place] + data[place + args[1] :]
    if name == "repeat":
        return data[:place] + data[place : place + args[1]] * args[2] + data[place + args[1] :]
    if name == "insert":
        return data[:place] + MARKS[args[1]] + data[place:]
    if name == "number":
        return data[:place] + NUMBERS[args[1]] + data[place:]
    if name == "deep":
        return data[:place] + (b"[", b'{"a":', b"- ")[args[1]] * DEEP + data[place:]
    raise ValueError(name)


def random_bytes(rng: random.Random, *, text: bool) -> Change:
    """One change, drawn."""
    kinds = ["flip", "flip", "flip", "fill", "drop", "repeat", "cut"]
    kinds += ["insert", "insert", "number", "deep"] if text else ["insert"]
    name, place = rng.choice(kinds), round(rng.random(), 6)
    more: dict[str, Callable[[], tuple[Any, ...]]] = {
        "cut": lambda: (),
        "flip": lambda: (rng.choice([1, 2, 4, 8, 16, 32, 64, 128, 255]),),
        "fill": lambda: (rng.choice([1, 2, 4, 8, 64]), rng.choice([0, 1, 127, 128, 255])),
        "drop": lambda: (rng.choice([1, 2, 4, 16, 256]),),
        "repeat": lambda: (rng.choice([1, 4, 64, 512]), rng.choice([2, 3, 20])),
        "insert": lambda: (rng.randrange(len(MARKS)),),
        "number": lambda: (rng.randrange(len(NUMBERS)),),
        "deep": lambda: (rng.randrange(3),),
    }
    return name, (place, *more[name]())


def change_tree(tree: Any, change: Change) -> Any:
    """Applies one change to a tree of plain values: another value, one key less, one more."""
    name, (place, *args) = change
    paths = list(paths_of(tree))
    path = paths[min(int(place * len(paths)), len(paths) - 1)]
    if name == "value":
        return put(tree, path, lambda old: ODD[args[0]])
    if name == "wrap":
        return put(tree, path, lambda old: [old] if args[0] else {"a": old})
    if name == "less":
        return put(tree, path[:-1], lambda old: _without(old, path[-1])) if path else tree
    if name == "more":
        return put(
            tree,
            path,
            lambda old: (
                old | {str(ODD[args[0]]): 1}
                if isinstance(old, dict)
                else [*old, ODD[args[0]]]
                if isinstance(old, list)
                else [old, ODD[args[0]]]
            ),
        )
    raise ValueError(name)


def random_tree(rng: random.Random) -> Change:
    """One change of a tree, drawn."""
    name, place = rng.choice(["value", "value", "value", "wrap", "less", "more"]), rng.random()
    last = rng.randrange(2) if name == "wrap" else rng.randrange(len(ODD))
    return name, (round(place, 6), last)


def paths_of(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    if isinstance(tree, dict | list):
        entries = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in entries:
            yield from paths_of(value, (*path, key))


def put(tree: Any, path: tuple, new: Callable[[Any], Any]) -> Any:
    if not path:
        return new(tree)
    first, rest = path[0], path[1:]
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree)
    changed = {key: put(value, rest, new) if key == first else value for key, value in entries}
    return changed if isinstance(tree, dict) else list(changed.values())


def _without(tree: Any, key: Any) -> Any:
    if isinstance(tree, dict):
        return {k: v for k, v in tree.items() if k != key}
    return [v for n, v in enumerate(tree) if n != key]


def shrink(recipe: Recipe, fails: Callable[[Recipe], bool]) -> Recipe:
    """The recipe with as few changes as still fail."""
    kept = list(recipe.changes)
    for change in recipe.changes:
        fewer = [one for one in kept if one is not change]
        if fails(dataclasses.replace(recipe, changes=tuple(fewer))):
            kept = fewer
    return dataclasses.replace(recipe, changes=tuple(kept))
