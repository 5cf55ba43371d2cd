"""Arrays gathered over the mesh that are not parameters.

Under FSDP each layer's parameters are gathered just before they are used, and nothing else should
be: an activation that is gathered over the batch costs what the batch's split was to save.
"""

import dataclasses
from collections.abc import Iterable

from emollama_jax.scale import hlo
from emollama_jax.scale.cost import part_of

KINDS = ("all-gather", "all-to-all", "ragged-all-to-all")
# Norms, biases and masks of single frames: a gather of less than this costs its latency alone.
SMALL = 1 << 14  # bytes


@dataclasses.dataclass(frozen=True, order=True)
class Moved:
    """One array that a device gathers or exchanges."""

    kind: str
    part: str  # of the model
    dtype: str
    dims: tuple[int, ...]
    op_name: str
    bytes: int


def activations(module: hlo.Module, parameters: Iterable[tuple[int, ...]]) -> list[Moved]:
    """All gathers and exchanges of what has no parameter's shape.

    A parameter may be gathered with its axes in another order, split (heads) or with axes of 1.
    What stays by design: where a Linear sees one row a frame (FIM's face tokens, the content token
    of a mean), the compiler gathers those rows for the kernel's gradient, as they are fewer bytes
    than the gradient that would else be reduced.

    Args:
        module: one device's program.
        parameters: shapes that gathering them gives, see `steps.gathered_shapes`. With `tensor` in
            the mesh they are many, and an activation may have one of them by chance.
    """
    known = {tuple(sorted(d for d in shape if d > 1)) for shape in parameters}
    found = set()
    for computation in module.computations.values():
        for x in computation.instructions.values():
            kind = x.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            # A start's result holds its operand too; gathered, it is the larger one.
            sizes = {array.bytes for array in x.result}
            for array in x.result:
                if array.bytes < max(SMALL, max(sizes)) or _is_one_of(array.dims, known):
                    continue
                part = part_of(x.op_name)
                found.add(Moved(kind, part, array.dtype, array.dims, x.op_name, array.bytes))
    return sorted(found)


def _is_one_of(dims: tuple[int, ...], known: set[tuple[int, ...]]) -> bool:
    """Whether the axes, in any order, make one of the shapes when some are multiplied."""
    axes = tuple(sorted(d for d in dims if d > 1))
    return axes in known or any(
        _is_one_of((*axes[:i], *axes[i + 1 : j], *axes[j + 1 :], axes[i] * axes[j]), known)
        for i in range(len(axes))
        for j in range(i + 1, len(axes))
    )
