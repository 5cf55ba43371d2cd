"""Named points at which an activation is laid over the mesh.

GSPMD carries shardings from the arguments onward, but where a parameter is split otherwise than
what it meets, it may as well move the activation, which is larger. So the networks name points, and
this table says what they mean: `constrain` at one array, `within` for a whole region.
On one device, or without a mesh, nothing happens.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import PartitionSpec

# Point → mesh axes of each dimension; those that are not named stay whole.
POINTS: dict[str, tuple[tuple[str, ...], ...]] = {
    # [examples, …], in the LLM and the loss. Heads and feed-forward are split over `tensor` there.
    "batch": (("data", "fsdp"),),
    # [frames of all examples, …], in the towers and all that follows until the LLM: over every
    # device, so that none waits while another sees. Parameters come to the frames: they are fewer.
    "frames": (("data", "fsdp", "tensor"),),
    # [layers, answers, slots, kv_heads · head_dim]: a cache of keys or values
    "cache": ((), (), (), ("tensor",)),
    # [width, vocabulary]: the head's kernel, gathered once before the loop of the loss.
    "head": ((), ("tensor",)),
    # [vocabulary, width]: an embedding's table, so that what is looked up lies as its ids do.
    "table": (("tensor",), ()),
}


# Logical axes of a Linear's output that stay split over `tensor` in the region "batch".
SPLIT = ("heads", "kv_heads", "mlp", "vocab")

_region: contextvars.ContextVar[str | None] = contextvars.ContextVar("region", default=None)


@contextlib.contextmanager
def within(point: str) -> Iterator[None]:
    """All that `features` sees while this is traced is laid out as of a point."""
    token = _region.set(point)
    try:
        yield
    finally:
        _region.reset(token)


def features(y: jax.Array, axis: str | None) -> jax.Array:
    """What a Linear gives, [leading, …, features], as the region of `within` has it.

    So the parameter is gathered along `fsdp`, and not the activation.

    Args:
        y: array of any number of dimensions, at least two.
        axis: logical name of the features.
    """
    region, mesh = _region.get(), _mesh()
    if region is None or mesh.empty or mesh.size == 1:
        return y
    leading = _axes(POINTS[region][0], y.shape[0])
    last = _axes(("tensor",), y.shape[-1]) if region == "batch" and axis in SPLIT else ()
    spec = [leading or None, *[None] * (y.ndim - 2), last or None]
    return jax.lax.with_sharding_constraint(y, PartitionSpec(*spec))


def per_head(examples: int, heads: int) -> PartitionSpec:
    """Of [examples, tokens, heads, width] in the region of `within`; outside of any, "batch".

    For kernels that the compiler cannot split, and which `jax.shard_map` hands to each device.
    """
    region = _region.get() or "batch"
    leading = _axes(POINTS[region][0], examples)
    split = _axes(("tensor",), heads) if region == "batch" else ()
    return PartitionSpec(leading or None, None, split or None)


def parts_here(size: int) -> int:
    """As `parts`, in the region of `within`; outside of any, "batch"."""
    return parts(_region.get() or "batch", size)


def parts(point: str, size: int) -> int:
    """Into how many parts a leading axis of `size` is split at a point."""
    return math.prod(_mesh().shape[axis] for axis in _axes(POINTS[point][0], size))


def constrain(x: jax.Array, point: str) -> jax.Array:
    """The same array, laid out as `POINTS` says.

    Axes of the mesh that do not divide a dimension are left out, the last ones first.
    """
    mesh = _mesh()
    if mesh.empty or mesh.size == 1:
        return x
    spec = [_axes(axes, size) for axes, size in zip(POINTS[point], x.shape, strict=False)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(axes or None for axes in spec)))


def _mesh() -> jax.sharding.AbstractMesh:
    return jax.sharding.get_abstract_mesh()


def _axes(axes: Sequence[str], size: int) -> tuple[str, ...]:
    mesh, axes = _mesh(), tuple(axes)
    if not set(axes) <= set(mesh.axis_names):
        return ()
    while axes and size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return axes
