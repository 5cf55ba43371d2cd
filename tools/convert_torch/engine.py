"""Weight tables between PyTorch state dicts and our modules, read in both directions.

A table is a list of `Row`s; each says which PyTorch keys make one leaf of ours, and how. `match`
lays a table between a model's leaves and a file's tensors and finds all that is wrong; what it
gives is read leaf by leaf. `emit` goes the other way, tensor by tensor.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from emollama_jax.errors import UserError
from tools.convert_torch.files import Tensor, in_memory

TILE = (512, 256)  # rows and columns of a matrix that are transposed at once
SHOWN = 12  # lines of an error
LINE = 64  # bytes of a line of a processor's cache
Empty = Callable[[tuple[int, ...], np.dtype], np.ndarray]  # as np.empty
FLOATS = tuple(np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16))


@dataclass(frozen=True)
class Transform:
    """An invertible change of layout, for one layer's tensor.

    Attributes:
        name: for messages.
        to_ours: raises ValueError where shape or values do not fit. A row of several paths gives
            its leaves along a first axis.
        to_torch: its inverse.
    """

    name: str
    to_ours: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


def drop_leading(n: int) -> Transform:
    """Leading axes of length one: torch [1, …, 1, *s], ours [*s]."""

    def to_ours(x: np.ndarray) -> np.ndarray:
        if x.shape[:n] != (1,) * n:
            raise ValueError(f"{x.shape} does not start with {(1,) * n}")
        return x.reshape(x.shape[n:])

    return Transform(f"drop_leading({n})", to_ours, lambda x: x.reshape((1,) * n + x.shape))


def _patches_to_ours(x: np.ndarray) -> np.ndarray:
    if x.ndim != 4 or x.shape[2] != x.shape[3]:
        raise ValueError(f"{x.shape} is not the kernel of square patches")
    return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])


def _patches_to_torch(x: np.ndarray) -> np.ndarray:
    patch = math.isqrt(x.shape[0] // 3)
    return x.reshape(patch, patch, 3, x.shape[1]).transpose(3, 2, 0, 1)


def _qkv_to_ours(x: np.ndarray) -> np.ndarray:
    if x.ndim != 2 or x.shape[0] % 3:
        raise ValueError(f"{x.shape} does not hold q, k and v")
    return x.T.reshape(x.shape[1], 3, -1)


def _qv_to_ours(x: np.ndarray) -> np.ndarray:
    if x.ndim != 1 or x.shape[0] % 3:
        raise ValueError(f"{x.shape} does not hold q, k and v")
    q, k, v = x.reshape(3, -1)
    if k.any():
        raise ValueError("the bias of k is not zero; EVA-ViT has none")
    return np.stack([q, v])


def vocabulary(ids: int, rows: int, *, transposed: bool) -> Transform:
    """A vocabulary of `ids` entries, torch [ids, D], padded with zeros to `rows` in ours.

    Args:
        ids: number of the tokenizer's ids.
        rows: rows of our leaf, at least `ids`.
        transposed: ours is [D, rows], as an output layer, instead of [rows, D].
    """

    def to_ours(x: np.ndarray) -> np.ndarray:
        if x.ndim != 2 or x.shape[0] != ids:
            raise ValueError(f"{x.shape} is not a vocabulary of {ids}")
        if rows > ids:
            whole = np.zeros((rows, x.shape[1]), x.dtype)
            whole[:ids] = x
            x = whole
        return x.T if transposed else x

    def to_torch(x: np.ndarray) -> np.ndarray:
        return (x.T if transposed else x)[:ids]

    name = "transpose" if transposed else "same"
    return Transform(f"{name}, {rows - ids} rows of padding", to_ours, to_torch)


SAME = Transform("same", lambda x: x, lambda x: x)
TRANSPOSE = Transform("transpose", np.transpose, np.transpose)  # Linear: [out, in], ours [in, out]
PATCHES = Transform(  # convolution whose stride is its size: [D, 3, p, p], ours [p·p·3, D]
    "patches", _patches_to_ours, _patches_to_torch
)
QKV = Transform(  # fused q, k, v: [3·D, D], ours [D, 3, D]
    "qkv", _qkv_to_ours, lambda x: x.reshape(x.shape[0], -1).T
)
QV_BIAS = Transform(  # bias of fused q, k, v with nothing for k: [3·D], ours [2, D]
    "qv_bias",
    _qv_to_ours,
    lambda x: np.concatenate([x[0], np.zeros_like(x[0]), x[1]]),
)


@dataclass(frozen=True)
class Row:
    """One leaf of ours, or several that one tensor holds.

    Attributes:
        torch: key, e.g. "model.layers.{i}.mlp.up_proj.weight"; `{i}` runs over our first axis.
        path: path of the leaf, e.g. "llama/layers/up_proj/kernel", or of each leaf.
        transform: from one torch tensor to one layer of the leaf.
        first, stride: our j-th layer is torch's `first + stride · j`.
    """

    torch: str
    path: str | tuple[str, ...]
    transform: Transform = SAME
    first: int = 0
    stride: int = 1

    @property
    def stacked(self) -> bool:
        return "{i}" in self.torch

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path

    def keys(self, shape: Sequence[int]) -> list[str]:
        """The torch keys that make a leaf of this shape, in order."""
        if not self.stacked:
            return [self.torch]
        return [
            self.torch.replace("{i}", str(self.first + self.stride * j)) for j in range(shape[0])
        ]

    def matches(self, key: str) -> bool:
        """Whether a torch key is one that some model's leaf of this row would have."""
        start, number, end = self.torch.partition("{i}")
        if not number:
            return key == self.torch
        middle = key[len(start) : len(key) - len(end)]
        if not (key.startswith(start) and key.endswith(end) and middle.isdigit()):
            return False
        index = int(middle) - self.first
        return index >= 0 and index % self.stride == 0


def linear(torch: str, path: str, *, bias: bool, first: int = 0, stride: int = 1) -> list[Row]:
    """The rows of a Linear: kernel and, where it has one, bias."""
    rows = [Row(f"{torch}.weight", f"{path}/kernel", TRANSPOSE, first=first, stride=stride)]
    return rows + (
        [Row(f"{torch}.bias", f"{path}/bias", first=first, stride=stride)] if bias else []
    )


def norm(torch: str, path: str, *, first: int = 0, stride: int = 1) -> list[Row]:
    """The rows of a LayerNorm."""
    return [
        Row(f"{torch}.weight", f"{path}/scale", first=first, stride=stride),
        Row(f"{torch}.bias", f"{path}/bias", first=first, stride=stride),
    ]


@dataclass(frozen=True)
class Leaf:
    """A leaf of ours and the tensors that make it, one for each layer; nothing is read yet."""

    path: str
    shape: tuple[int, ...]
    row: Row
    keys: tuple[str, ...]
    parts: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(part.nbytes for part in self.parts) // len(self.row.paths)

    @property
    def slots(self) -> range:
        """Its layers; a leaf that does not stack any has one slot, the whole."""
        return range(self.shape[0] if self.row.stacked else 1)

    @property
    def slot_shape(self) -> tuple[int, ...]:
        """Shape of a layer, or of the whole."""
        return self.shape[1:] if self.row.stacked else self.shape

    def read(
        self,
        slot: int,
        dtype: np.dtype,
        window: tuple[slice, ...] | None = None,
        empty: Empty = np.empty,
    ) -> np.ndarray:
        """A window of a slot, the whole slot by default, in our layout.

        Args:
            slot: slot of `slots`.
            dtype: to cast to.
            window: a slice for each dimension.
            empty: gives the array that is filled, by shape and dtype.

        Raises:
            UserError: a value that the row's transform refuses.
        """
        try:
            part = self.row.transform.to_ours(self.parts[slot].read())
        except ValueError as error:
            name = self.row.transform.name
            raise UserError(f"{self.keys[slot]}: {name}: {error}") from None
        if len(self.row.paths) > 1:
            part = part[self.row.paths.index(self.path)]
        part = part if window is None else part[window]
        out = empty(part.shape, dtype)
        fill(out, part)
        return out


def match(
    leaves: Mapping[str, Sequence[int]],
    tensors: Mapping[str, Tensor],
    rows: Sequence[Row],
    *,
    ignore: Mapping[str, str],
    keep: Mapping[str, str] | None = None,
) -> tuple[list[Leaf], list[str]]:
    """Lays a table between a model's leaves and the tensors of a file.

    Args:
        leaves: our leaves' shapes by path.
        tensors: by torch key.
        rows: the table.
        ignore: torch keys that are not read: a pattern of the whole key → the reason.
        keep: our leaves that keep their values: a pattern of the whole path → the reason.

    Returns:
        What to read, and all that is wrong, one line each: keys without a row, leaves without a
        key, wrong shapes and dtypes, rows without a leaf.
    """
    problems: list[str] = []
    used: set[str] = set()
    filled: dict[str, Leaf] = {}
    for row in rows:
        absent = [path for path in row.paths if path not in leaves]
        twice = [path for path in row.paths if path in filled]
        problems += [f"{path}: in the table, but not in the model" for path in absent]
        problems += [f"{path}: filled by more than one row" for path in twice]
        if absent or twice:
            continue
        shape = tuple(leaves[row.paths[0]])
        keys, parts = row.keys(shape), []
        for key in keys:
            if key in used:
                problems.append(f"{key}: read by more than one row")
            used.add(key)
            if key not in tensors:
                problems.append(f"{key}: missing (for {', '.join(row.paths)})")
                continue
            parts.append(tensors[key])
            wanted = shape[1:] if row.stacked else shape
            if problem := problem_of(row, tensors[key], wanted):
                problems.append(f"{key}: {problem}")
        for path in row.paths:
            filled[path] = Leaf(path, shape, row, tuple(keys), tuple(parts))
    problems += [
        f"{path}: no row of the table fills it"
        for path in leaves
        if path not in filled and not matches_any(path, keep or {})
    ]
    problems += [
        f"{key}: no row of the table reads it"
        for key in tensors
        if key not in used and not matches_any(key, ignore)
    ]
    return list(filled.values()), problems


def listed(problems: Sequence[str]) -> str:
    """One problem as it is; of several how many there are, and each on a line of its own.

    Those that differ in the number of a layer alone share a line.
    """
    lines = _alike(problems)
    if len(lines) == 1:
        return lines[0]
    more = [f"… and {len(lines) - SHOWN} more: inspect shows them"] if len(lines) > SHOWN else []
    return "\n  ".join([f"{len(problems)} problems:", *lines[:SHOWN], *more])


def _alike(problems: Sequence[str]) -> list[str]:
    groups: dict[tuple[str, ...], list[int]] = {}
    for problem in problems:
        found = re.fullmatch(r"(\S*?\.)(\d+)(\.\S*: .*)", problem)
        key = (found[1], found[3]) if found else (problem,)
        groups.setdefault(key, []).extend([int(found[2])] if found else [])
    return [
        (f"{{{_ranges(numbers)}}}" if len(numbers) > 1 else "".join(map(str, numbers))).join(parts)
        for parts, numbers in groups.items()
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """As "0..3, 7"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    said = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(said[:SHOWN]) + (", …" if len(said) > SHOWN else "")


def assign(
    module: nnx.Module,
    tensors: Mapping[str, np.ndarray],
    rows: Sequence[Row],
    *,
    ignore: Mapping[str, str],
    keep: Mapping[str, str] | None = None,
) -> None:
    """Fills a module's parameters in place, in each parameter's own dtype, or changes nothing.

    Args:
        module: concrete, or abstract from `nnx.eval_shape`.
        tensors: the state dict, in memory.
        rows, ignore, keep: as of `match`.

    Raises:
        UserError: all that is wrong, one line each.
    """
    leaves = _leaves(module)
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    held = {key: in_memory(np.asarray(value)) for key, value in tensors.items()}
    found, problems = match(shapes, held, rows, ignore=ignore, keep=keep)
    if problems:
        raise UserError(
            "the weights do not fit the model (is it another size or another source?), "
            f"{listed(problems)}"
        )
    values = [[leaf.read(i, leaves[leaf.path].dtype) for i in leaf.slots] for leaf in found]
    for leaf, value in zip(found, values, strict=True):
        whole = np.stack(value) if leaf.row.stacked else value[0]
        leaves[leaf.path].set_value(jnp.asarray(whole))


def emit(
    leaf: Callable[[str], np.ndarray], rows: Sequence[Row]
) -> Iterator[tuple[str, np.ndarray]]:
    """The torch tensors of a table with their keys, one after the other.

    Args:
        leaf: gives a leaf of ours by its path.
        rows: the table.
    """
    for row in rows:
        values = [leaf(path) for path in row.paths]
        for j, key in enumerate(row.keys(values[0].shape)):
            layers = [value[j] if row.stacked else value for value in values]
            layer = layers[0] if len(layers) == 1 else np.stack(layers)
            tensor = row.transform.to_torch(layer)
            if not tensor.flags.c_contiguous:
                turned, tensor = tensor, np.empty(tensor.shape, tensor.dtype)
                fill(tensor, turned)
            yield key, tensor


def extract(module: nnx.Module, rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """The state dict that `assign` reads back, in each parameter's dtype.

    Raises:
        UserError: a row of the table names a leaf that the model does not have.
    """
    leaves = _leaves(module)
    absent = [path for row in rows for path in row.paths if path not in leaves]
    if absent:
        raise UserError(f"not in the model, but in the table: {', '.join(absent)}")
    return dict(emit(lambda path: np.asarray(leaves[path][...]), rows))


def matches_any(name: str, patterns: Mapping[str, str]) -> bool:
    """Whether one of the patterns matches a whole key or path."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def problem_of(row: Row, tensor: Tensor, wanted: Sequence[int]) -> str:
    """Fault of a tensor's dtype or shape, or ""; nothing is read."""
    name, path = row.transform.name, ", ".join(row.paths)
    if tensor.dtype not in FLOATS:
        known = " or ".join(str(dtype) for dtype in FLOATS)
        return f"dtype {tensor.dtype}, wanted {known}"
    # Its shape is tried on zeros that take no memory.
    empty = np.broadcast_to(np.zeros((), tensor.dtype), tensor.shape)
    try:
        shape = row.transform.to_ours(empty).shape
    except ValueError as error:
        return f"{name}: {error} (for {path})"
    if len(row.paths) > 1:
        shape = shape[1:]
    if shape != tuple(wanted):
        return f"shape {tensor.shape} gives {shape} by {name}, {path} wants {tuple(wanted)}"
    return ""


def fill(into: np.ndarray, part: np.ndarray) -> None:
    """Copies and casts, transposed matrices too in good time.

    Those go tile by tile through a buffer whose rows are an odd number of cache lines apart. A
    matrix' own rows are often so many lines apart that those of a column push each other out.

    Args:
        into: C-contiguous.
        part: array of the same shape.
    """
    integer = np.dtype(f"u{into.dtype.itemsize}")
    if into.dtype == part.dtype:  # NumPy moves bfloat16 number by number, integers in a loop
        into, part = into.view(integer), part.view(integer)
    if part.ndim != 2 or part.strides[0] >= part.strides[1]:
        into[...] = part
        return
    rows, columns = TILE
    buffer = np.empty((rows, columns + LINE // into.dtype.itemsize), into.dtype)
    for top in range(0, part.shape[1], rows):
        for left in range(0, part.shape[0], columns):
            place = (slice(left, left + columns), slice(top, top + rows))
            block = part[place].T
            tile = buffer[: block.shape[0], : block.shape[1]]
            tile[...] = block
            into.view(integer)[place] = tile.view(integer).T


def _leaves(module: nnx.Module) -> dict[str, nnx.Param]:
    """The module's parameters (the very objects, not copies) by path, sorted."""
    graph = nnx.iter_graph(module)
    leaves = {"/".join(map(str, path)): leaf for path, leaf in graph if isinstance(leaf, nnx.Param)}
    return dict(sorted(leaves.items()))
