"""TPU slices that can be planned for, and what one chip of each kind can do.

`libtpu` (extra `plan`) describes a slice and compiles for it without owning one. It reads a few
environment variables when it is loaded, so `prepare` comes before JAX.
"""

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

from emollama_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, both of its cores where it has two.

    Sources: Google Cloud's page of each version (docs.cloud.google.com/tpu/docs/v3 … /tpu7x) for
    peak, memory and bandwidths; Jouppi et al. 2023 (arXiv 2304.01433), table 4, for the clocks of
    v3 and v4 and their links. Later clocks are not published: they follow from the peak and the
    multipliers of the matrix units (MXU), two operations each. DCN: v5e 6.4 Tbit/s for a pod of
    256, v5p 50, v6e and tpu7x 100 Gbit/s for a chip.
    """

    peak: float  # bfloat16 FLOP/s
    memory: float  # HBM bytes
    bandwidth: float  # HBM bytes/s
    links: int  # ICI ports: two for each dimension of the torus
    link: float  # bytes/s of a port in one direction
    clock: float  # Hz
    network: float | None  # bytes/s of a chip between slices (DCN); None: not published
    devices: int = 1  # that JAX sees in a chip


GiB = 2**30
CHIPS = {
    # 123 TFLOP/s, 32 GiB, 900 GB/s; 4 links of 70 GB/s; 940 MHz. Two cores, a device each.
    "v3": Chip(123e12, 32 * GiB, 900e9, 4, 70e9, 0.94e9, None, devices=2),
    # 275 TFLOP/s, 32 GiB, 1,200 GB/s; 6 links of 50 GB/s; 1,050 MHz. Compiled without a machine,
    # each of its two cores is a device; on Cloud TPU both are one.
    "v4": Chip(275e12, 32 * GiB, 1200e9, 6, 50e9, 1.05e9, None, devices=2),
    # 197 TFLOP/s, 16 GB, 819 GB/s; 4 ports, 400 GB/s in both directions together.
    # 1 core × 4 MXU × 128 × 128.
    "v5e": Chip(197e12, 16 * GiB, 819e9, 4, 50e9, 197e12 / (4 * 2 * 128**2), 6.4e12 / 8 / 256),
    # 459 TFLOP/s, 95 GiB, 2,765 GB/s; 6 ports, 1,200 GB/s both ways. 2 cores × 4 MXU × 128 × 128.
    "v5p": Chip(459e12, 95 * GiB, 2765e9, 6, 100e9, 459e12 / (8 * 2 * 128**2), 50e9 / 8),
    # 918 TFLOP/s, 32 GiB, 1,638 GB/s; 4 ports, 800 GB/s both ways. The cycles that the compiler
    # gives a matmul count 2^19 operations at most, which makes 1.75 GHz.
    "v6e": Chip(918e12, 32 * GiB, 1638e9, 4, 100e9, 918e12 / 2**19, 100e9 / 8),
    # 2,307 TFLOP/s, 192 GiB, 7,380 GB/s; 6 ports, 1,200 GB/s both ways. Two cores, a device each,
    # of 2^19 operations a cycle.
    "tpu7x": Chip(2307e12, 192 * GiB, 7380e9, 6, 100e9, 2307e12 / 2**20, 100e9 / 8, devices=2),
}

# Slices that the compile-only client was seen to describe.
TOPOLOGIES = (
    "v3:2x2",
    "v4:4x4x4",
    *(f"v5e:{size}" for size in ("1x1", "2x2", "2x4", "4x4", "4x8", "16x16")),
    *(f"v5p:{size}" for size in ("2x2x1", "2x2x2", "4x4x4", "8x8x8")),
    *(f"v6e:{size}" for size in ("2x4", "4x4", "8x8", "16x16")),
    *(f"tpu7x:{size}" for size in ("2x2x2", "4x4x4")),
)

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # JAX must not look for a TPU of its own
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # must name some slice; the topology decides which
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",  # errors about workers that do not exist are no news
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing here owns a chip, so plans may run side by side
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology.

    Raises:
        UserError: a topology that is not in `TOPOLOGIES`.
    """
    if topology not in TOPOLOGIES:
        raise UserError(f"--topology: unknown {topology!r} (known: {', '.join(TOPOLOGIES)})")
    return CHIPS[topology.partition(":")[0]]


def prepare() -> None:
    """Sets what libtpu and JAX read when they are loaded.

    Raises:
        UserError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu is not installed: pip install 'emollama-jax[plan]'")
    os.environ.update(ENVIRONMENT)


def devices(topology: str, slices: int = 1) -> list:
    """The devices of a slice, or of several alike, to compile for; in the order of their positions.

    Raises:
        UserError: as of `chip_of` and `prepare`, or libtpu refuses.
    """
    chip = chip_of(topology)
    prepare()
    from jax.experimental import topologies

    if slices > 1 and chip.network is None:
        raise UserError(f"{topology}: mesh.slices={slices}, but its DCN is not known: set 1")
    more: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if topology.endswith(":1x1"):  # libtpu takes a host to have four chips
        more["chips_per_host_bounds"] = (1, 1, 1)

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more)
    except (RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise UserError(f"{topology}: libtpu refuses: {text[:300]}") from None
    return list(found.devices)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """To compile for devices that are not here: without JAX's compilation cache, which would try
    to load what it finds.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it remembers whether it was on
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
