"""The device that a program is traced for: the entered mesh's, or else the first there is.

A plan is traced on a CPU for a slice that is not here, so JAX's default backend does not tell.
"""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of device."""

    platform: str  # "cpu", "gpu", "tpu"
    kind: str  # as JAX names it, e.g. "TPU v5 lite"


def target() -> Target:
    """What is traced for."""
    found = jax.sharding.get_abstract_mesh().abstract_device
    if found is None or found.platform is None:
        found = jax.devices()[0]
    return Target(found.platform, found.device_kind)
