"""PyTorch's own files (`.bin`, `.pt`, `.pth`), opened safely and one at a time.

They are pickles, so they are read with `weights_only=True` alone, memory-mapped where their format
allows it. A file that holds more than tensors and plain values is refused, never run. Training
scripts save the state dict inside a dict of other things, under `state_dict`, `model`, …: it is
found there.
"""

import pathlib
import pickle
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

WRAPPERS = (  # what a state dict is called in the dict around it
    *("state_dict", "model", "model_state_dict", "model_state", "module", "network", "net"),
    *("state_dict_backbone", "params", "weights", "checkpoint"),
)
DEPTH = 4  # of dicts in dicts that are looked into
RESAVE = "docs/convert.md, 'A file that is refused', shows how to save its tensors as safetensors"


class Unreadable(Exception):
    """A file that cannot be read, and why."""


@dataclass(frozen=True)
class State:
    """The state dict of a file.

    Attributes:
        tensors: by key; what is not a tensor is still in it.
        place: the entries that lead to it, outermost first; empty for the file's own dict.
        left: entries beside it that are not read.
        mapped: whether the file is mapped; not every format can be.
    """

    tensors: Mapping[str, Any] = field(default_factory=dict)
    place: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    mapped: bool = False


class _Pickles:
    """The one PyTorch file that is open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._path: pathlib.Path | None = None
        self._state = State()

    def get(self, path: pathlib.Path) -> State:
        with self._lock:
            if self._path != path:
                self._path, self._state = None, State()  # lets go of the last one first
                self._state = _load(path)
                self._path = path
            return self._state

    def trim(self) -> None:
        """Lets go of pages that were read, where opening the file again is quick."""
        if self._state.mapped:
            self.release()

    def release(self) -> None:
        """Closes it: the pages that were read from it go."""
        with self._lock:
            self._path, self._state = None, State()


PICKLED = _Pickles()


def _load(path: pathlib.Path) -> State:
    import torch

    def load(**how: bool) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True, **how)

    mapped = True
    try:
        try:
            held = load(mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            held, mapped = load(), False  # of PyTorch before 1.6: read as a whole
    except pickle.UnpicklingError as error:
        raise Unreadable(f"{_refusal(path, error)}; {RESAVE}") from None
    except Exception as error:  # what a broken file raises differs with where it is broken
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Unreadable(f"truncated, or not a PyTorch file ({first[:120]})") from None
    if not isinstance(held, Mapping):
        raise Unreadable(f"holds a {type(held).__name__}, wanted a state dict")
    place, tensors = _find(held)
    left, around = [], held
    for name in place:
        left += [str(other) for other in around if other != name]
        around = around[name]
    return State({str(key): value for key, value in tensors.items()}, place, tuple(left), mapped)


def _find(held: Mapping[Any, Any]) -> tuple[tuple[str, ...], Mapping[Any, Any]]:
    """The state dict in a file's dict, and the entries that lead to it."""
    found = _under_known_names(held, ())
    if not found and _tensors(held):
        return (), held
    if not found:  # under a name that nobody knows: all tensors, nothing else
        found = [
            ((name,), value)
            for name, value in held.items()
            if isinstance(value, Mapping) and value and len(_tensors(value)) == len(value)
        ]
    if len(found) > 1:
        names = ", ".join(".".join(map(str, place)) for place, _ in found)
        raise Unreadable(f"holds several state dicts ({names}): save only the one that you mean")
    if not found and held:
        names = ", ".join(map(str, list(held)[:6])) + (" …" if len(held) > 6 else "")
        raise Unreadable(
            f"holds {names}, wanted a dict of tensors, or one under state_dict, model, …"
        )
    return found[0] if found else ((), held)


def _under_known_names(
    held: Mapping[Any, Any], place: tuple[str, ...]
) -> list[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    found = []
    for name, value in held.items():
        if name not in WRAPPERS or not isinstance(value, Mapping) or len(place) >= DEPTH:
            continue
        here = (*place, name)
        found += _under_known_names(value, here) or ([(here, value)] if _tensors(value) else [])
    return found


def _tensors(held: Mapping[Any, Any]) -> list[Any]:
    import torch

    return [value for value in held.values() if isinstance(value, torch.Tensor)]


def _refusal(path: pathlib.Path, error: Exception) -> str:
    """Why `weights_only=True` does not read a file."""
    import torch

    try:
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # it reads the zip format alone
        wanted = []
    if not wanted:
        lines = [line for line in str(error).splitlines() if "GLOBAL" in line.upper()]
        words = lines[0].split() if lines else []
        wanted = [word for word in words if "." in word.strip(".")][:1]
    what = f"it wants to run {', '.join(sorted(wanted))}" if wanted else "it is an arbitrary pickle"
    return f"refused, since it holds more than tensors: {what}"
