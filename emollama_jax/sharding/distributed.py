"""Several hosts, one run: how the processes connect, and which rows each of them feeds.

Every host runs the same program and holds a part of every global array. `start` connects them,
before anything else asks JAX for its devices. On one host it does nothing.
"""

import contextlib
import dataclasses
import pickle
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Int

from emollama_jax.config import DistributedConfig
from emollama_jax.errors import UserError
from emollama_jax.locks import hold
from emollama_jax.sharding.mesh import batch_sharding, batch_shards

# What `jax.distributed.initialize` says where it finds neither cluster nor address, and where JAX
# is in use already. It raises ValueError and RuntimeError for much else.
NO_CLUSTER = "coordinator_address should be defined"
TOO_LATE = "must be called before"


def start(cfg: DistributedConfig, *, saves_on_notice: bool) -> None:
    """Connects the processes of a run; call it once, before JAX is used.

    With `coordinator: auto`, Cloud TPU, GKE, Slurm and Open MPI are recognised; with none of them,
    or if JAX runs already, the process runs alone.

    Args:
        cfg: coordinator address and process numbers.
        saves_on_notice: whether SIGTERM is a notice for `train.loop.StopSignals`; otherwise it
            ends the process as usual.

    Raises:
        UserError: an invalid address or number, or hosts that do not answer.
    """
    if cfg.coordinator == "none" or jax.distributed.is_initialized():
        return
    # The service takes SIGTERM over, so it must be off where nobody asks it.
    jax.config.update("jax_enable_preemption_service", saves_on_notice)
    try:
        if cfg.coordinator == "auto":
            jax.distributed.initialize()
        else:
            _check(cfg)
            jax.distributed.initialize(
                cfg.coordinator,
                cfg.processes,
                cfg.process_id,
                cluster_detection_method="deactivate",
            )
    except (ValueError, RuntimeError) as error:
        if cfg.coordinator == "auto" and (NO_CLUSTER in str(error) or TOO_LATE in str(error)):
            return
        raise UserError(
            f"distributed.coordinator {cfg.coordinator}: the hosts did not connect "
            f"({str(error).splitlines()[0]}): is every process started, with its own "
            "distributed.process_id, and the port open between the hosts?"
        ) from None


def _check(cfg: DistributedConfig) -> None:
    host, _, port = cfg.coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(
            f"distributed.coordinator: {cfg.coordinator!r} is neither auto nor none nor host:port "
            "of process 0"
        )
    if not 0 <= cfg.process_id < cfg.processes:
        raise UserError(
            f"distributed.process_id is {cfg.process_id}, distributed.processes "
            f"{cfg.processes}: each process needs its own number, from 0"
        )


def alone(what: str) -> None:
    """Raises for a command that runs on one host only.

    Raises:
        UserError: there are several hosts.
    """
    if jax.process_count() > 1:
        raise UserError(
            f"{what} runs on one host, found {jax.process_count()}: run it on one before the others"
        )


def hold_together(folder: epath.PathLike, stack: contextlib.ExitStack, *, instead: str) -> None:
    """Locks the folder of all hosts' work until the stack ends: the first does; if not, all raise.

    Args:
        folder: on a disk or in a bucket.
        stack: stack that the lock goes onto.
        instead: advice to the user if another process holds it.

    Raises:
        UserError: another process holds it, or it cannot be made.
    """
    refusal = None
    if leads():
        try:
            stack.enter_context(hold(folder, instead=instead))
        except UserError as error:
            refusal = str(error)
        except OSError as error:
            refusal = f"{folder}: cannot be the output's folder: {error.strerror}"
    for said in gather(refusal):
        if said is not None:
            raise UserError(said)


def leads() -> bool:
    """Whether this process writes the files that only one host writes."""
    return jax.process_index() == 0


@dataclasses.dataclass(frozen=True)
class Share:
    """A host's part of every batch. Hosts that share a `tensor` group feed the same part."""

    index: int  # of the part
    count: int  # of parts
    shards: tuple[int, ...]  # of the batch's shards on the mesh, those of this part
    all: int  # shards

    def rows(self, batch: int) -> Int[np.ndarray, " b"]:
        """Rows of a batch of that size that this host feeds, in its own order."""
        each = batch // self.all
        return (np.array(self.shards)[:, None] * each + np.arange(each)).reshape(-1)


def share(mesh: Mesh) -> Share:
    """This host's part of a batch.

    Args:
        mesh: mesh of `make_mesh`.

    Raises:
        UserError: a mesh in which the rows of two hosts overlap in part.
    """
    parts = batch_shards(mesh)
    held: dict[int, set[int]] = {}  # process → its parts of a batch
    for device, (rows,) in batch_sharding(mesh).devices_indices_map((parts,)).items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    groups = sorted({frozenset(part) for part in held.values()}, key=min)
    size = len(groups[0])
    if any(len(group) != size for group in groups) or size * len(groups) != parts:
        raise UserError(
            f"mesh: tensor {mesh.shape['tensor']} puts parts of a batch on hosts that share only "
            "some of them: make tensor divide the devices of a host, or a multiple of them"
        )
    mine = frozenset(held[jax.process_index()])
    return Share(groups.index(mine), len(groups), tuple(sorted(mine)), parts)


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """Builds the global batch from the rows of every host.

    Args:
        batch: tree of arrays [B / share.count, …].
        mesh: mesh of the run.

    Returns:
        The tree with arrays [B, …].
    """
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def put(value: Any, sharding: NamedSharding) -> jax.Array:
    """Shards an array that every host holds in full, without communication.

    Args:
        value: array of NumPy, or of JAX on this host.
        sharding: sharding over the devices of all hosts.
    """
    if jax.process_count() == 1:
        return jax.device_put(value, sharding)
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda part: value[part])


def whole(tree: Any) -> Any:
    """Gathers a tree of global arrays into NumPy arrays on every host."""
    return multihost_utils.process_allgather(tree, tiled=True)


def gather(value: Any) -> list[Any]:
    """Gathers a picklable value from every host, in the order of the processes."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int64(data.size))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
