"""Logical axis → mesh axis: one table a preset, applied to the `axes` that every parameter carries.

A rule is not followed where it cannot be: a dimension that the mesh axis does not divide, or a
second dimension on a mesh axis that the parameter already uses. Such a dimension stays replicated
and is listed in `Shardings.replicated`, so that nothing is replicated unseen.
"""

import dataclasses
import re
from collections.abc import Mapping

from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from emollama_jax.config import Preset

Axes = Mapping[str | None, str | None]


@dataclasses.dataclass(frozen=True)
class Rules:
    """A preset."""

    axes: Axes  # logical axis → mesh axis, None for replicated
    whole: str = ""  # pattern of the paths of parameters that every device holds whole


# ZeRO's third stage: the residual stream's width over `fsdp`, nothing over `tensor`.
FSDP: Axes = {
    "embed": "fsdp",
    "mlp": None,
    "heads": None,
    "kv_heads": None,
    "vocab": None,
    "layers": None,  # scanned over
    "rank": None,  # of LoRA: too small to be worth a collective
    "patches": None,
    "queries": None,
    "fourier": None,
    None: None,
}
# With Megatron's split of heads, feed-forward and vocabulary over `tensor`.
FSDP_TENSOR: Axes = {
    **FSDP,
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
}
PRESETS: dict[Preset, Rules] = {
    "fsdp": Rules(FSDP),
    "fsdp+tensor": Rules(FSDP_TENSOR),
    # The frozen towers see every frame in one pass forward: 2.3 GB in bfloat16 spare gathering
    # their layers for each chunk of frames.
    "replicated-frozen": Rules(FSDP_TENSOR, whole="(vision|face)/.*"),
}


@dataclasses.dataclass(frozen=True)
class Shardings:
    """Sharding of every parameter."""

    params: dict[str, NamedSharding]  # by path
    replicated: tuple[str, ...]  # one line for each dimension whose rule was not followed


def param_shardings(params: Mapping[str, nnx.Param], mesh: Mesh, *, preset: Preset) -> Shardings:
    """Applies a preset's rules to parameters, real or abstract.

    Args:
        params: by path; each has `axes`, one logical name per dimension.
        mesh: mesh of `make_mesh`.
        preset: name in `PRESETS`.

    Raises:
        ValueError: a parameter without `axes`, with another number of them than dimensions, or
            with a name that no rule knows.
    """
    rules = PRESETS[preset]
    notes: list[str] = []
    shardings = {
        path: NamedSharding(mesh, PartitionSpec(*_spec(path, param, mesh, rules, notes)))
        for path, param in params.items()
    }
    return Shardings(params=shardings, replicated=tuple(notes))


def _spec(
    path: str, param: nnx.Param, mesh: Mesh, rules: Rules, notes: list[str]
) -> list[str | None]:
    """The mesh axis of each dimension; what a rule could not split joins `notes`."""
    axes = param.get_metadata().get("axes")
    if axes is None or len(axes) != len(param.shape):
        raise ValueError(f"{path}: axes {axes} for shape {param.shape}: one name per dimension")
    whole = re.fullmatch(rules.whole, path)
    spec: list[str | None] = []
    for axis, size in zip(axes, param.shape, strict=True):
        if axis not in rules.axes:
            known = ", ".join(str(name) for name in rules.axes)
            raise ValueError(f"{path}: no rule for the axis {axis!r} (known: {known})")
        target = None if whole else rules.axes[axis]
        parts = 1 if target is None else mesh.shape[target]
        if parts == 1:
            spec.append(None)
        elif size % parts:
            notes.append(f"{path}: {axis} of {size} is not divisible by {target} {parts}")
            spec.append(None)
        elif target in spec:
            notes.append(f"{path}: {axis} of {size}, but {target} splits an earlier dimension")
            spec.append(None)
        else:
            spec.append(target)
    return spec
