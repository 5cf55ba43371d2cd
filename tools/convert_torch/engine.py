"""Weight tables between PyTorch state dicts and our modules, read in both directions.

A table is a list of `Row`s; each says which PyTorch keys make one leaf of ours, and how. `assign`
fills a module by a table, `extract` is its exact inverse. Both work on NumPy arrays.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import nnx

from emollama_jax.errors import UserError


@dataclass(frozen=True)
class Transform:
    """An invertible change of layout, for one layer's tensor."""

    name: str
    to_ours: Callable[[np.ndarray], np.ndarray]  # raises ValueError where the shape does not fit
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


SAME = Transform("same", lambda x: x, lambda x: x)
TRANSPOSE = Transform("transpose", np.transpose, np.transpose)  # Linear: [out, in], ours [in, out]
PATCHES = Transform(  # convolution whose stride is its size: [D, 3, p, p], ours [p·p·3, D]
    "patches", _patches_to_ours, _patches_to_torch
)
QKV = Transform(  # fused q, k, v: [3·D, D], ours [D, 3, D]
    "qkv", _qkv_to_ours, lambda x: x.reshape(x.shape[0], -1).T
)


@dataclass(frozen=True)
class Row:
    """One leaf of ours.

    Attributes:
        torch: key, e.g. "model.layers.{i}.mlp.up_proj.weight"; `{i}` runs over our first axis.
        path: of the leaf, e.g. "llama/layers/up_proj/kernel".
        transform: from one torch tensor to one layer of the leaf.
        first, stride: our j-th layer is torch's `first + stride · j`.
    """

    torch: str
    path: str
    transform: Transform = SAME
    first: int = 0
    stride: int = 1

    @property
    def stacked(self) -> bool:
        return "{i}" in self.torch

    def keys(self, shape: Sequence[int]) -> list[str]:
        """The torch keys that make a leaf of this shape, in order."""
        if not self.stacked:
            return [self.torch]
        return [
            self.torch.replace("{i}", str(self.first + self.stride * j)) for j in range(shape[0])
        ]


def linear(torch: str, path: str, *, bias: bool, **numbering: int) -> list[Row]:
    """The rows of a Linear: kernel and, where it has one, bias."""
    rows = [Row(f"{torch}.weight", f"{path}/kernel", TRANSPOSE, **numbering)]
    return rows + ([Row(f"{torch}.bias", f"{path}/bias", **numbering)] if bias else [])


def norm(torch: str, path: str, **numbering: int) -> list[Row]:
    """The rows of a LayerNorm."""
    return [
        Row(f"{torch}.weight", f"{path}/scale", **numbering),
        Row(f"{torch}.bias", f"{path}/bias", **numbering),
    ]


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
        tensors: the state dict.
        rows: the table.
        ignore: torch keys that are not read: a pattern of the whole key → the reason.
        keep: our leaves that keep their values: a pattern of the whole path → the reason.

    Raises:
        UserError: all that is wrong, one line each: keys without a row, leaves without a key,
            wrong shapes and dtypes, rows without a leaf.
    """
    leaves = _leaves(module)
    problems: list[str] = []
    used: set[str] = set()
    filled: dict[str, list[np.ndarray]] = {}
    for row in rows:
        leaf = leaves.get(row.path)
        if leaf is None:
            problems.append(f"{row.path}: in the table, but not in the model")
            continue
        if row.path in filled:
            problems.append(f"{row.path}: filled by more than one row")
            continue
        parts = filled[row.path] = []
        for key in row.keys(leaf.shape):
            if key in used:
                problems.append(f"{key}: read by more than one row")
            used.add(key)
            if key not in tensors:
                problems.append(f"{key}: missing (for {row.path})")
                continue
            wanted = leaf.shape[1:] if row.stacked else leaf.shape
            problem, part = _part(row, tensors[key], wanted)
            parts.append(part)
            problems += [f"{key}: {problem}"] if problem else []
    problems += [
        f"{path}: no row of the table fills it"
        for path in leaves
        if path not in filled and not _matches(path, keep or {})
    ]
    problems += [
        f"{key}: no row of the table reads it"
        for key in tensors
        if key not in used and not _matches(key, ignore)
    ]
    if problems:
        lines = "\n  ".join(problems)
        raise UserError(
            f"the weights do not fit the model ({len(problems)} problems; is it another size or "
            f"another source?):\n  {lines}"
        )
    stacked = {row.path for row in rows if row.stacked}
    for path, parts in filled.items():
        value = np.stack(parts) if path in stacked else parts[0]
        leaves[path].set_value(jnp.asarray(value, leaves[path].dtype))


def extract(module: nnx.Module, rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """The state dict that `assign` reads back, in each parameter's dtype.

    Raises:
        UserError: a row of the table names a leaf that the model does not have.
    """
    leaves = _leaves(module)
    absent = [row.path for row in rows if row.path not in leaves]
    if absent:
        raise UserError(f"not in the model, but in the table: {', '.join(absent)}")
    tensors = {}
    for row in rows:
        value = np.asarray(leaves[row.path][...])
        layers = value if row.stacked else [value]
        for key, layer in zip(row.keys(value.shape), layers, strict=True):
            tensors[key] = np.ascontiguousarray(row.transform.to_torch(layer))
    return tensors


def _part(row: Row, tensor: np.ndarray, wanted: Sequence[int]) -> tuple[str, np.ndarray]:
    """What is wrong with a tensor, or "", and the tensor in our layout."""
    name = row.transform.name
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        return f"dtype {tensor.dtype}, wanted a floating-point one", tensor
    try:
        part = row.transform.to_ours(tensor)
    except ValueError as error:
        return f"{name}: {error} (for {row.path})", tensor
    if part.shape != tuple(wanted):
        return f"shape {tensor.shape} gives {part.shape} by {name}, {row.path} wants {wanted}", part
    return "", part


def _matches(name: str, patterns: Mapping[str, str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _leaves(module: nnx.Module) -> dict[str, nnx.Param]:
    """The module's parameters (the very objects, not copies) by path, sorted."""
    graph = nnx.iter_graph(module)
    leaves = {"/".join(map(str, path)): leaf for path, leaf in graph if isinstance(leaf, nnx.Param)}
    return dict(sorted(leaves.items()))
