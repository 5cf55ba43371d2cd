"""Keys, bounds and meaning of a config's settings, read from its classes; messages on faults.

The meaning of a field is the comment beside it, or the one above.
"""

import dataclasses
import difflib
import functools
import inspect
import re
import reprlib
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pydantic

from emollama_jax.bounds import Bounds, NotANumber, OutOfBounds

# Values of settings that older files and runs lack.
BEFORE = {
    "model.llama.tied": False,
    "model.llama.rope_llama3": None,
    "model.vision.last_norm": False,
    "data.template": "vicuna",
}
SHOWN = 8  # faults of one file that a message lists


def fields(root: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """(dotted key, field) of every setting, sections opened; in lists of sections `key[].name`."""
    for key, field, _ in _owned(root, prefix):
        yield key, field


def bounds_of(field: dataclasses.Field) -> Bounds | None:
    """The bounds of a number, or of the numbers of a list."""
    for part in (field.type, *typing.get_args(field.type)):
        for mark in getattr(part, "__metadata__", ()):
            if isinstance(mark, Bounds):
                return mark
    return None


def table(root: Any) -> str:
    """A line for every setting: key, kind or bounds, default, meaning."""
    lines = []
    for key, field, owner in _owned(root):
        default = field.default
        given = "" if default is dataclasses.MISSING else f"; {_written(default)} if left out"
        meaning = _comments(owner).get(field.name, "")
        lines.append((key, f"{_kind(field)}{given}", meaning))
    wide = max(len(key) for key, _, _ in lines)
    return "\n".join(
        f"{key:{wide}}  {kind}{f'  # {meaning}' if meaning else ''}" for key, kind, meaning in lines
    )


def explain(error: pydantic.ValidationError, root: Any, section: str) -> str:
    """One line on what is wrong.

    Args:
        error: error from checking one section, or all.
        root: the class of the whole config.
        section: dotted, or empty for all.
    """
    errors = error.errors()
    words = [_explain(one, root, section.split(".") if section else []) for one in errors[:SHOWN]]
    return "; ".join(words + [f"and {len(errors) - SHOWN} more"] * (len(errors) > SHOWN))


def did_you_mean(parts: Sequence[Any], root: Any) -> str:
    """A hint for a key that does not exist: a like one beside it, or of that name elsewhere."""
    key, leaf = _plain(parts), str(parts[-1])
    home = key[: len(key) - len(leaf)]
    known = [path for path, _ in fields(root)]
    beside = list(
        dict.fromkeys(
            path.removeprefix(home).partition(".")[0].removesuffix("[]")
            for path in known
            if path.startswith(home)
        )
    )
    hints = [home + name for name in near(leaf, beside)] or [
        home + name for name in beside if "".join(word[0] for word in name.split("_")) == leaf
    ]
    if not hints:
        hints = [path for path in known if path.rpartition(".")[2] == leaf]
    return f" (did you mean {' or '.join(hints[:3])}?)" if hints else ""


def near(word: str, known: Sequence[str]) -> list[str]:
    """The one of `known` that is most like a word, in capitals or not; none if none is."""
    lower = {name.lower(): name for name in known}
    return [lower[name] for name in difflib.get_close_matches(word.lower(), lower, n=1)]


def completed(tree: Any, given: Mapping[str, Any]) -> Any:
    """A plain tree with leaves that it lacks, where it has their sections.

    Args:
        tree: as of a YAML file; not changed.
        given: values by dotted key.
    """
    for key, value in given.items():
        tree = _with(tree, key.split("."), value)
    return tree


def _with(tree: Any, parts: Sequence[str], value: Any) -> Any:
    first, *rest = parts
    if not isinstance(tree, dict) or (first in tree) != bool(rest):
        return tree
    return {**tree, first: _with(tree[first], rest, value) if rest else value}


def section_of(cls: Any, root: Any) -> str:
    """The section that a class describes; empty if there are several, or none."""
    homes = {key.rpartition(".")[0] for key, _, owner in _owned(root) if owner is cls}
    return homes.pop() if len(homes) == 1 else ""


def _owned(root: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    for field in dataclasses.fields(root):
        parts = [field.type, *typing.get_args(field.type)]
        section = next(
            (p for p in parts if isinstance(p, type) and dataclasses.is_dataclass(p)), None
        )
        if section is None:
            yield prefix + field.name, field, root
        else:
            optional = type(None) in typing.get_args(field.type)
            mark = "" if section is field.type or optional else "[]"
            yield from _owned(section, f"{prefix}{field.name}{mark}.")


_WANTED = {
    "int": "a whole number", "float": "a number", "bool": "true or false",
    "string": "text", "tuple": "a list", "dataclass": "keys with values",
}  # fmt: skip
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, 80, 80, 80


def _explain(error: Any, root: Any, section: list[str]) -> str:
    """One pydantic error as `key: found …, wanted …`."""
    parts = [*section, *error["loc"]]
    key = ".".join(map(str, parts))
    kind = error["type"]
    if kind == "unexpected_keyword_argument":
        return f"unknown key {key}{did_you_mean(parts, root)}"
    if kind in ("missing", "missing_argument"):
        return f"{key} is missing"
    found = _found(error["input"])
    bounds = _bounds_at(parts, root)
    raised = error.get("ctx", {}).get("error")
    if isinstance(raised, OutOfBounds):
        return f"{key}: found {found}, wanted {bounds}"
    wanted = _WANTED.get("float" if isinstance(raised, NotANumber) else kind.partition("_")[0])
    if wanted is None:
        return f"{key}: {error['msg']}, found {found}"
    within = f", {bounds}" if bounds is not None else ""
    return f"{key}: found {found}, wanted {wanted}{within}"


def _found(value: Any) -> str:
    try:
        return _SHORT.repr(value)
    except ValueError:  # a number of thousands of digits
        return "a number of thousands of digits"


def _plain(parts: Sequence[Any]) -> str:
    """A location as `fields` writes it: data.sources.0.weight is data.sources[].weight."""
    return re.sub(r"\.\d+(?=\.)", "[]", ".".join(map(str, parts)))


def _bounds_at(parts: Sequence[Any], root: Any) -> Bounds | None:
    key = re.sub(r"\.\d+$", "", _plain(parts))  # one number of a list
    return next((bounds_of(field) for path, field in fields(root) if path == key), None)


def _kind(field: dataclasses.Field) -> str:
    bounds, kind = bounds_of(field), field.type
    listed = typing.get_origin(kind) is tuple
    if bounds is not None:
        bare = typing.get_args(kind)[0] if listed else kind
        name = typing.get_args(bare)[0].__name__
        return f"list of {name}, each {bounds}" if listed else f"{name}, {bounds}"
    words = typing.get_args(kind)[0] if listed else kind
    if typing.get_origin(words) is typing.Literal:
        return f"{'list of ' if listed else ''}{' | '.join(typing.get_args(words))}"
    if kind is bool:
        return "true | false"
    return {str: "text", tuple[str, ...]: "list of text"}.get(kind, "text, or list of text")


def _written(value: Any) -> str:
    return "nothing" if value in ("", ()) else str(value)


@functools.cache  # finding a class in its file takes 20 ms
def _comments(cls: Any) -> dict[str, str]:
    """Name of a field → the comment beside it, or above."""
    found, above = {}, []
    for line in inspect.getsource(cls).splitlines():
        field = re.match(r"    (\w+): [^#]*(?:# (.*))?$", line)
        if field:
            found[field[1]] = field[2] or " ".join(above)
        above = [*above, line.strip()[2:]] if line.startswith("    # ") else []
    return found
