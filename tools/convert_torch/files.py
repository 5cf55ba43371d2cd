"""Weight files and folders of them, read lazily: what is in them, and one tensor at a time.

Safetensors are memory-mapped tensor by tensor; PyTorch's own files are opened by `pickled.py`. What
a folder holds and nobody reads is named.
"""

import json
import math
import pathlib
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from emollama_jax import foreign_json
from tools.convert_torch.pickled import PICKLED, Unreadable

SAFETENSORS = (".safetensors",)
GGUF = (".gguf",)
PICKLES = (".bin", ".pt", ".pth", ".pkl")
ONNX = ".onnx"
ELSEWHERE = (".ckpt", ".npz", ".h5", ".msgpack", *GGUF, ONNX)  # weights that are not read
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
NOT_WEIGHTS = ("training_args.bin", "optimizer.*", "scheduler.*", "rng_state*.pth", "scaler.pt")
CONFIG, ADAPTER = "config.json", "adapter_config.json"
# What a folder says of its language, in the order in which Hugging Face reads it.
LANGUAGE = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja")
WRAPPED = (
    "module.",
    "_orig_mod.",
    "_forward_module.",
)  # what DDP, compile and FSDP put before keys
SHOWN = 20  # names of files in one note
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


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file, not read yet."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: str  # for messages
    read: Callable[[], np.ndarray]
    raw: np.ndarray | None = None  # as it is stored, where that is otherwise

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
        notes: remarks for the user, e.g. which of two formats was read.
        files: files that hold tensors, with their sizes in bytes.
        settings: every `config.json` and `adapter_config.json` beside them, and of a GGUF what
            would stand in the first.
        carried: files of the tokenizer and its chat template, by name.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: dict[pathlib.Path, int] = field(default_factory=dict)
    settings: dict[pathlib.Path, dict[str, Any]] = field(default_factory=dict)
    carried: dict[str, bytes] = field(default_factory=dict)

    def of_models(self) -> dict[pathlib.Path, dict[str, Any]]:
        """The settings of models: of `config.json` or of a GGUF."""
        kept = self.settings.items()
        return {p: held for p, held in kept if p.name == CONFIG or p.suffix in GGUF}

    def named(self, name: str) -> dict[pathlib.Path, dict[str, Any]]:
        """The settings in files of one name."""
        return {path: held for path, held in self.settings.items() if path.name == name}

    def add(self, path: pathlib.Path, *, prefix: str = "") -> set[str]:
        """Adds the tensors of one file; returns their keys as the file has them.

        Args:
            path: path of the file.
            prefix: put before every key, where several files use the same.
        """
        if path.suffix == ONNX:
            self.problems.append(f"{path}: an ONNX file, which only the source dinov2 reads")
            return set()
        try:
            found = _safetensors(path) if path.suffix in SAFETENSORS else self._pickled(path)
        except Unreadable as error:
            self.problems.append(f"{path}: {error}")
            return set()
        self.files[path] = path.stat().st_size
        start = prefix + _wrapped(found)
        for key, tensor in found.items():
            key = prefix + (prefix + key).removeprefix(start)
            if key in self.tensors:
                self.problems.append(f"{key}: in {self.tensors[key].file} and in {path.name}")
            else:
                self.tensors[key] = tensor
        return set(found)

    def _pickled(self, path: pathlib.Path) -> dict[str, Tensor]:
        import torch

        state = PICKLED.get(path)
        if state.left:
            inside, left = ".".join(state.place), ", ".join(state.left)
            self.notes.append(f"{path.name}: read its {inside}, left {left}")
        tensors = {}
        for key, value in state.tensors.items():
            if not isinstance(value, torch.Tensor):
                raise Unreadable(f"{key!r} is a {type(value).__name__}, wanted a tensor")
            if value.layout != torch.strided or value.is_quantized:
                raise Unreadable(f"{key!r} is sparse or quantized, wanted a plain tensor")
            tensors[key] = Tensor(
                tuple(value.shape), _dtype(value), path.name, _Unpickled(path, key)
            )
        PICKLED.release()
        return tensors


def open_paths(
    paths: Sequence[pathlib.Path],
    *,
    names: Sequence[str] = NAMES,
    beside: Collection[str] = (),
    carried: Collection[str] = (),
) -> Opened:
    """Opens files and folders, and the settings beside them.

    Args:
        paths: weight files, index files, or folders of them in Hugging Face's layout.
        names: names of a folder's weight files; the first that exists is read.
        beside: names of files to read too, if they are in a folder.
        carried: names of files that are kept as they are, where they lie beside the weights.
    """
    from tools.convert_torch import gguf_file  # which makes tensors of this module's

    opened = Opened()
    if not paths:
        opened.problems.append("--src: no path given")
    for path in paths:
        if not path.exists():
            opened.problems.append(f"{path}: no such file or folder")
            continue
        folder = path if path.is_dir() else path.parent
        if path.suffix in GGUF:
            gguf_file.add(opened, path)
            continue
        settings = _settings(opened, folder)
        for held in (folder / name for name in carried if (folder / name).is_file()):
            opened.carried.setdefault(held.name, held.read_bytes())
            settings.append(held)
        if path.is_dir():
            _folder(opened, path, names=names, beside=beside, settings=settings)
        elif path.name.endswith(".index.json"):
            _indexed(opened, path)
        else:
            opened.add(path)
    if paths and not opened.tensors and not opened.problems:
        opened.problems.append(f"{', '.join(map(str, paths))}: no tensor in it")
    return opened


def _settings(opened: Opened, folder: pathlib.Path) -> list[pathlib.Path]:
    """Reads what a folder says of its weights; returns the files."""
    read = [folder / name for name in (CONFIG, ADAPTER) if (folder / name).is_file()]
    for path in read:
        if path in opened.settings:
            continue
        try:
            held = foreign_json.parse(path.read_bytes())
        except (ValueError, OSError, RecursionError) as error:
            opened.problems.append(f"{path}: not JSON ({str(error)[:120]})")
            continue
        if isinstance(held, dict):
            opened.settings[path] = held
        else:
            opened.problems.append(f"{path}: holds a {type(held).__name__}, wanted an object")
    return read


def _folder(
    opened: Opened,
    folder: pathlib.Path,
    *,
    names: Sequence[str],
    beside: Collection[str],
    settings: Iterable[pathlib.Path],
) -> None:
    read = set(settings)
    known = [folder / name for name in names if (folder / name).is_file()]
    weights = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.suffix in SAFETENSORS + PICKLES
        and path.name not in beside
        and not any(path.match(pattern) for pattern in NOT_WEIGHTS)
    ]
    chosen = known[:1] or weights
    if len(chosen) == 1:
        read |= set(chosen)
        if chosen[0].name.endswith(".index.json"):
            read |= _indexed(opened, chosen[0])
        else:
            opened.add(chosen[0])
    elif chosen:
        listed = ", ".join(path.name for path in chosen)
        opened.problems.append(
            f"{folder}: several weight files and no index ({listed}): name those you mean"
        )
        return
    else:
        ggufs = [path.name for path in sorted(folder.iterdir()) if path.suffix in GGUF]
        hint = f"; {ggufs[0]} is to be named itself" if ggufs else ""
        wanted = ", ".join(names)
        opened.problems.append(f"{folder}: no weights in it (wanted one of {wanted}){hint}")
        return
    for name in beside:
        if (folder / name).is_file() and folder / name not in read:
            read.add(folder / name)
            opened.add(folder / name)
    name_unread(opened, folder, read)


def name_unread(opened: Opened, folder: pathlib.Path, read: Collection[pathlib.Path]) -> None:
    """Notes every other file of a folder, those that may be weights first."""
    left = [path for path in sorted(folder.iterdir()) if path not in read]
    weights = [
        path
        for path in left
        if path.is_file()
        and path.suffix in SAFETENSORS + PICKLES + ELSEWHERE
        and not any(path.match(pattern) for pattern in NOT_WEIGHTS)
    ]
    others = [path for path in left if path not in weights]
    if weights:
        opened.notes.append(f"{folder}: weights that were not read: {_names(weights)}")
    if others:
        opened.notes.append(f"{folder}: also not read: {_names(others)}")


def _names(paths: Iterable[pathlib.Path]) -> str:
    """Their names, those that differ in a number alone as one."""
    alike: dict[str, list[str]] = {}
    for path in paths:
        name = path.name + ("/" if path.is_dir() else "")
        alike.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    shown = [
        ", ".join(names) if len(names) < 3 else f"{pattern} ({len(names)})"
        for pattern, names in alike.items()
    ]
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return ", ".join(shown[:SHOWN]) + more


def _indexed(opened: Opened, index: pathlib.Path) -> set[pathlib.Path]:
    """Adds the files that an index names; returns those that are there."""
    try:
        shards_of = foreign_json.parse(index.read_bytes())["weight_map"]
        shards = sorted(set(shards_of.values()))
        if not all(isinstance(shard, str) and shard and "\0" not in shard for shard in shards):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        opened.problems.append(f"{index}: not an index (wanted JSON with a weight_map)")
        return set()
    held: dict[str, set[str]] = {}
    absent = []
    for shard in shards:
        path = index.parent / shard
        if path.resolve().parent != index.parent.resolve():
            opened.problems.append(f"{index}: names {shard}, which is outside its folder")
        elif path.is_file():
            held[shard] = opened.add(path)
        else:
            absent.append(shard)
    if absent:
        keys = [key for key, name in shards_of.items() if name in absent]
        what = f"{absent[0]}, which is" if len(absent) == 1 else f"{len(absent)} files that are"
        names = "" if len(absent) == 1 else f": {', '.join(absent[:3])} …"
        opened.problems.append(
            f"{index.name} names {what} absent ({len(keys)} tensors, {keys[0]} …){names}"
        )
    for key, shard in shards_of.items():
        if shard in held and held[shard] and key not in held[shard]:
            opened.problems.append(f"{key}: {index.name} says {shard}, but it is not in it")
    return {index.parent / shard for shard in held}


def _wrapped(keys: Collection[str]) -> str:
    """What training put before every key of a file, maybe several times."""
    start = ""
    while keys:
        more = [word for word in WRAPPED if all(key.startswith(start + word) for key in keys)]
        if not more:
            break
        start += more[0]
    return start


def _safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="numpy"):  # checks the header and the file's length
            pass
    except (SafetensorError, OSError) as error:
        raise Unreadable(f"not a complete safetensors file ({error})") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in header.items():
        dtype, shape = DTYPES.get(entry["dtype"]), tuple(entry["shape"])
        if dtype is None:
            raise Unreadable(f"{key} has dtype {entry['dtype']}, which NumPy does not know")
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


@dataclass(frozen=True)
class _Unpickled:
    """Reads one tensor of a PyTorch file."""

    path: pathlib.Path
    key: str

    def __call__(self) -> np.ndarray:
        import torch

        tensor = PICKLED.get(self.path).tensors[self.key].detach()
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
