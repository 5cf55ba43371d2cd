"""PyTorch's weight files, read lazily and safely: what is in them, and one tensor at a time.

Safetensors are memory-mapped tensor by tensor. PyTorch's own files (`.bin`, `.pt`, `.pth`) are
pickles: they are read with `weights_only=True` alone, memory-mapped where their format allows it,
and at most one of them is open at a time. A file that holds more than tensors and plain values is
refused, never run.
"""

import json
import math
import pathlib
import pickle
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

SAFETENSORS = (".safetensors",)
PICKLES = (".bin", ".pt", ".pth", ".pkl")
# What a folder's weights are called, the safe format first; the index of several files before one.
NAMES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "adapter_model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "adapter_model.bin",
    "mm_projector.bin",
)
NOT_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state*.pth")
DTYPES = {  # safetensors' names
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(bool),
}
RESAVE = "docs/convert.md, 'A file that is refused', shows how to save its tensors as safetensors"


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file, not read yet."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: str  # for messages
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def in_memory(array: np.ndarray, *, file: str = "memory") -> Tensor:
    """An array as a tensor of a file."""
    return Tensor(array.shape, array.dtype, file, lambda: array)


@dataclass
class Opened:
    """Everything that some paths hold.

    Attributes:
        tensors: by their torch key.
        problems: all that is wrong, one line each.
        notes: what a person should know, e.g. which of two formats was read.
        files: that hold tensors, with their sizes in bytes.
        settings: of `config.json` or `adapter_config.json` beside them; empty without one.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: dict[pathlib.Path, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def add(self, path: pathlib.Path, *, inside: str | None = None, prefix: str = "") -> set[str]:
        """Adds the tensors of one file; returns their keys.

        Args:
            path: of the file.
            inside: the entry of the file's dict that holds the state dict, where there is one.
            prefix: put before every key, where several files use the same.
        """
        try:
            found = _safetensors(path) if path.suffix in SAFETENSORS else _pickled(path, inside)
        except _Unreadable as error:
            self.problems.append(f"{path}: {error}")
            return set()
        self.files[path] = path.stat().st_size
        found = {prefix + key: tensor for key, tensor in found.items()}
        for key, tensor in found.items():
            if key in self.tensors:
                self.problems.append(f"{key}: in {self.tensors[key].file} and in {path.name}")
            else:
                self.tensors[key] = tensor
        return set(found)


class _Unreadable(Exception):
    """A file that cannot be read, and why."""


def open_paths(paths: Sequence[pathlib.Path], *, inside: str | None = None) -> Opened:
    """Opens files and folders.

    Args:
        paths: weight files, index files, or folders of them as Hugging Face lays them out.
        inside: the entry of a pickled dict that holds the state dict, where there is one.
    """
    opened = Opened()
    if not paths:
        opened.problems.append("--src: no path given")
    for path in paths:
        if not path.exists():
            opened.problems.append(f"{path}: no such file or folder")
        elif path.is_dir():
            _folder(opened, path, inside=inside)
        elif path.name.endswith(".index.json"):
            _indexed(opened, path)
        else:
            opened.add(path, inside=inside)
    if paths and not opened.tensors and not opened.problems:
        opened.problems.append(f"{', '.join(map(str, paths))}: no tensor in it")
    return opened


def _folder(opened: Opened, folder: pathlib.Path, *, inside: str | None) -> None:
    for name in ("config.json", "adapter_config.json"):
        if (folder / name).is_file():
            try:
                opened.settings.update(json.loads((folder / name).read_text()))
            except ValueError as error:
                opened.problems.append(f"{folder / name}: not JSON ({error})")
    known = [folder / name for name in NAMES if (folder / name).is_file()]
    if known:
        chosen, *others = known
        if others:
            left = ", ".join(path.name for path in others)
            opened.notes.append(f"{folder}: read {chosen.name}, left {left}")
        if chosen.name.endswith(".index.json"):
            _indexed(opened, chosen)
        else:
            opened.add(chosen, inside=inside)
        return
    weights = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix in SAFETENSORS + PICKLES
        and not any(path.match(pattern) for pattern in NOT_WEIGHTS)
    ]
    if len(weights) == 1:
        opened.add(weights[0], inside=inside)
    elif weights:
        names = ", ".join(path.name for path in weights)
        opened.problems.append(
            f"{folder}: several weight files and no index ({names}): name those you mean"
        )
    else:
        opened.problems.append(f"{folder}: no weights in it (wanted one of {', '.join(NAMES)})")


def _indexed(opened: Opened, index: pathlib.Path) -> None:
    try:
        shards_of = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(shards_of.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        opened.problems.append(f"{index}: not an index (wanted JSON with a weight_map)")
        return
    held: dict[str, set[str]] = {}
    for shard in shards:
        path = index.parent / shard
        if path.resolve().parent != index.parent.resolve():
            opened.problems.append(f"{index}: names {shard}, which lies outside its folder")
        elif path.is_file():
            held[shard] = opened.add(path)
        else:
            keys = [key for key, name in shards_of.items() if name == shard]
            opened.problems.append(
                f"{index.name} names {shard}, which is absent ({len(keys)} tensors, {keys[0]} …)"
            )
    for key, shard in shards_of.items():
        if shard in held and held[shard] and key not in held[shard]:
            opened.problems.append(f"{key}: {index.name} says {shard}, but it is not in it")


def _safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="numpy"):  # checks the header and the file's length
            pass
    except (SafetensorError, OSError) as error:
        raise _Unreadable(f"not a whole safetensors file ({error})") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in header.items():
        dtype, shape = DTYPES.get(entry["dtype"]), tuple(entry["shape"])
        if dtype is None:
            raise _Unreadable(f"{key} has dtype {entry['dtype']}, which NumPy does not know")
        read = _Mapped(path, dtype, shape, 8 + length + entry["data_offsets"][0])
        tensors[key] = Tensor(shape, dtype, path.name, read)
    return tensors


@dataclass(frozen=True)
class _Mapped:
    """Maps one tensor of a safetensors file; its pages go when the array does."""

    path: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def __call__(self) -> np.ndarray:
        if math.prod(self.shape) == 0:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape or (1,)).reshape(
            self.shape
        )


class _Pickles:
    """The one PyTorch file that is open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._path: pathlib.Path | None = None
        self._tensors: Mapping[str, Any] = {}
        self._mapped = False

    def get(self, path: pathlib.Path, inside: str | None) -> Mapping[str, Any]:
        with self._lock:
            if self._path != path:
                self._path, self._tensors = None, {}  # lets go of the last one first
                self._tensors, self._mapped = _load(path, inside)
                self._path = path
            return self._tensors

    def trim(self) -> None:
        """Lets go of pages that were read, where opening the file again is quick."""
        if self._mapped:
            self.release()

    def release(self) -> None:
        """Closes it: the pages that were read from it go."""
        with self._lock:
            self._path, self._tensors = None, {}


PICKLED = _Pickles()


def _pickled(path: pathlib.Path, inside: str | None) -> dict[str, Tensor]:
    import torch

    tensors = {}
    for key, value in PICKLED.get(path, inside).items():
        if not isinstance(value, torch.Tensor):
            raise _Unreadable(f"{key!r} is a {type(value).__name__}, wanted a tensor")
        if value.layout != torch.strided or value.is_quantized:
            raise _Unreadable(f"{key!r} is sparse or quantized, wanted a plain tensor")
        read = _Unpickled(path, inside, str(key))
        tensors[str(key)] = Tensor(tuple(value.shape), _dtype(value), path.name, read)
    PICKLED.release()
    return tensors


@dataclass(frozen=True)
class _Unpickled:
    """Reads one tensor of a PyTorch file."""

    path: pathlib.Path
    inside: str | None
    key: str

    def __call__(self) -> np.ndarray:
        import torch

        tensor = PICKLED.get(self.path, self.inside)[self.key].detach()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


def _dtype(tensor: Any) -> np.dtype:
    name = str(tensor.dtype).removeprefix("torch.")
    if name.startswith(("bfloat16", "float8")):
        return np.dtype(getattr(ml_dtypes, name, np.void))
    try:
        return np.dtype(name)
    except TypeError:
        return np.dtype(np.void)  # refused where a floating-point one is wanted


def _load(path: pathlib.Path, inside: str | None) -> tuple[Mapping[str, Any], bool]:
    """The state dict of a PyTorch file, and whether it is mapped: not every format can be."""
    import torch

    def load(**how: bool) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True, **how)

    mapped = True
    try:
        try:
            state = load(mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            state, mapped = load(), False  # of PyTorch before 1.6: read as a whole
    except pickle.UnpicklingError as error:
        raise _Unreadable(f"{_refusal(path, error)}; {RESAVE}") from None
    except Exception as error:  # what a broken file raises differs with where it is broken
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise _Unreadable(f"truncated, or not a PyTorch file ({first[:120]})") from None
    if isinstance(state, Mapping) and inside is not None:
        state = state.get(inside, state)
    if not isinstance(state, Mapping):
        raise _Unreadable(f"holds a {type(state).__name__}, wanted a state dict")
    return state, mapped


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
