"""The device mesh `(data, fsdp, tensor)` of a run.

Batches are split over `data` and `fsdp`, parameters over `fsdp` and `tensor` (`rules.py`). Axis
types are always given: JAX's default became Explicit, this code is written for Auto, where the
compiler chooses the collectives. A mesh is entered with `jax.set_mesh(mesh)`.
"""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from emollama_jax.config import MeshConfig
from emollama_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # the examples of a batch are split over both


def make_mesh(cfg: MeshConfig, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays devices out as `(data, fsdp, tensor)`.

    Args:
        cfg: how many devices along each axis.
        devices: to choose from; all by default. A single host may use fewer than it has.

    Raises:
        UserError: a size below 1, more devices asked for than there are, or a mesh that leaves
            devices of a multi-host run idle (their hosts would wait for ever).
    """
    sizes = (cfg.data, cfg.fsdp, cfg.tensor)
    devices = jax.devices() if devices is None else devices
    wanted = math.prod(sizes)
    layout = " × ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
    if min(sizes) < 1:
        raise UserError(f"mesh: {layout}: every size must be at least 1")
    if wanted > len(devices) or (jax.process_count() > 1 and wanted != len(devices)):
        raise UserError(
            f"mesh: {layout} is {wanted} devices, found {len(devices)}: "
            "set mesh.data, mesh.fsdp and mesh.tensor so that their product fits"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:wanted])


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis is split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
