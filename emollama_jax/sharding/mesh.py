"""The device mesh `(data, fsdp, tensor)` of a run.

Batches are split over `data` and `fsdp`, parameters over `fsdp` and `tensor` (`rules.py`). Over
several TPU slices, `data` alone crosses the data-centre network: its collectives are the smallest,
one sum of the trainable gradients a step. Axis types are always given: JAX's default became
Explicit, this code is written for Auto, where the compiler chooses the collectives. A mesh is
entered with `jax.set_mesh(mesh)`.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from emollama_jax.config import MeshConfig
from emollama_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # the examples of a batch are split over both


def make_mesh(cfg: MeshConfig, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays devices out as `(data, fsdp, tensor)`.

    Args:
        cfg: number of devices along each axis, and of slices.
        devices: to choose from; all by default. A single host may use fewer than it has.

    Raises:
        UserError: two sizes of −1, more devices asked for than there are, slices that
            `data` does not hold, a mesh that the preset leaves no use for, or one that leaves
            devices of a multi-host run idle (their hosts would wait for ever).
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(cfg, len(devices))
    wanted = math.prod(sizes)
    if jax.process_count() > 1 and wanted != len(devices):
        raise UserError(_misfit(sizes, len(devices)))
    types = (AxisType.Auto,) * 3
    devices = devices[:wanted]
    if cfg.slices == 1:
        return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)
    inside = (sizes[0] // cfg.slices, *sizes[1:])
    across = (cfg.slices, 1, 1)
    if all(getattr(device, "slice_index", None) is not None for device in devices):
        found = len({device.slice_index for device in devices})
        if found != cfg.slices:
            raise UserError(f"mesh.slices is {cfg.slices}, found {found}: set mesh.slices={found}")
        grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices=devices)
    else:  # devices that know no slices, as on a CPU: consecutive ones are taken as one
        parts = np.array_split(np.asarray(devices, dtype=object), cfg.slices)
        grid = np.concatenate([part.reshape(inside) for part in parts])
    return Mesh(grid, AXES, axis_types=types)


def mesh_sizes(cfg: MeshConfig, devices: int) -> tuple[int, int, int]:
    """The sizes of the axes, with −1 filled in.

    Args:
        cfg: config of the mesh.
        devices: number of devices.

    Raises:
        UserError: as of `make_mesh`.
    """
    sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    if sizes.count(-1) > 1:
        raise UserError(f"mesh: {_layout(sizes)}: only one size can be −1, all that are left")
    if -1 in sizes:
        rest = math.prod(size for size in sizes if size != -1)
        if devices % rest:
            raise UserError(
                f"mesh: {_layout(sizes)}: {devices} devices cannot be divided by {rest}: change "
                "the other sizes"
            )
        sizes[sizes.index(-1)] = devices // rest
    if math.prod(sizes) > devices:
        raise UserError(_misfit(sizes, devices))
    if sizes[0] % cfg.slices:
        raise UserError(
            f"mesh: data {sizes[0]}, slices {cfg.slices}: data crosses the slices, so it must be "
            "a multiple of their number"
        )
    if cfg.preset == "fsdp" and sizes[2] > 1:
        raise UserError(
            f"mesh: preset fsdp splits nothing over tensor {sizes[2]}: set mesh.tensor=1, or "
            "mesh.preset=fsdp+tensor"
        )
    return sizes[0], sizes[1], sizes[2]


def _layout(sizes: Sequence[int]) -> str:
    return " × ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))


def _misfit(sizes: Sequence[int], devices: int) -> str:
    return (
        f"mesh: {_layout(sizes)} is {math.prod(sizes)} devices, found {devices}: "
        "set mesh.data, mesh.fsdp and mesh.tensor so that their product fits (−1: what is left)"
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis is split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def flags_for(device: jax.Device, flags: Mapping[str, str]) -> dict[str, str]:
    """A run's XLA flags where it computes on TPUs, none elsewhere: no other compiler knows them."""
    return dict(flags) if device.platform == "tpu" else {}
