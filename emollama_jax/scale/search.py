"""The largest batch that fits, and the preset and policy that need the least time an example."""

import dataclasses
from collections.abc import Callable
from typing import Any

from emollama_jax.config import Config, Preset
from emollama_jax.errors import UserError
from emollama_jax.models.remat import POLICIES, Policy
from emollama_jax.scale import steps
from emollama_jax.scale.plan import DoesNotFit, Plan, make_plan
from emollama_jax.scale.topologies import CHIPS
from emollama_jax.sharding.mesh import mesh_sizes
from emollama_jax.sharding.rules import PRESETS
from emollama_jax.terms import LlamaRemat

LIMIT = 1024  # examples of one part of the batch


@dataclasses.dataclass(frozen=True)
class Best:
    """The plan of a preset's and a policy's largest batch; None where one example does not fit."""

    preset: Preset
    remat: LlamaRemat
    plan: Plan | None

    @property
    def per_example(self) -> float:
        """Estimated seconds of a step for each of its examples."""
        return float("inf") if self.plan is None else self.plan.seconds / self.plan.shapes.examples

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "preset": self.preset,
            "remat": self.remat,
            "examples": self.plan.shapes.examples if self.plan else 0,
            "seconds_per_example": self.per_example if self.plan else None,
        }


def search(
    cfg: Config,
    topology: str,
    devices: int,
    *,
    step: steps.Step,
    kind: steps.Kind,
    tell: Callable[[str], None],
    plan: Callable[..., Plan] = make_plan,
) -> list[Best]:
    """Tries every preset that the mesh allows, then for training, with the best of them, every
    policy of `models/remat.py`; each with its largest batch.

    Args:
        cfg: config of the run; its batch sizes and preset are not used.
        topology: name in `TOPOLOGIES`.
        devices: devices of the topology.
        step: which.
        kind: kind of batch.
        tell: called with a line on every trial.
        plan: makes the plans.

    Returns:
        The best first.

    Raises:
        UserError: nothing fits with one example.
    """

    def best_of(tried: Config) -> Best:
        data, fsdp, _ = mesh_sizes(tried.mesh, devices)
        unit = data * fsdp * tried.train.accumulation
        name = f"{tried.mesh.preset}, {tried.model.llama.remat}"

        def trial(count: int) -> Plan | None:
            try:
                made = plan(tried, topology, step=step, kind=kind, examples=count * unit, tell=tell)
            except DoesNotFit as error:
                tell(f"{name}, {count} examples a part: {error}")
                return None
            size = made.memory.total / made.memory.capacity
            tell(
                f"{name}, {count} examples a part: {size:.0%} of memory, "
                f"{made.seconds / made.shapes.examples:.4f} s an example"
            )
            return made if made.memory.fits else None

        return Best(tried.mesh.preset, tried.model.llama.remat, largest(trial))

    found: list[Best] = []
    for preset in PRESETS:
        tried = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, preset=preset))
        try:
            mesh_sizes(tried.mesh, devices)
        except UserError as error:
            tell(f"{preset}: left out: {error}")
            continue
        found.append(best_of(tried))
    if step == "train" and found:
        mesh = dataclasses.replace(cfg.mesh, preset=min(found, key=lambda x: x.per_example).preset)
        too_much: list[Policy] = []
        for remat, policy in POLICIES.items():
            if remat == cfg.model.llama.remat or any(map(policy.keeps_more_than, too_much)):
                continue
            llama = dataclasses.replace(cfg.model.llama, remat=remat)
            model = dataclasses.replace(cfg.model, llama=llama)
            found.append(best_of(dataclasses.replace(cfg, mesh=mesh, model=model)))
            if found[-1].plan is None and not policy.offload:
                too_much.append(policy)
    if not any(one.plan for one in found):
        raise UserError(
            f"{cfg.name} on {topology}: nothing fits with one example for each part of the "
            f"batch: take more chips, or another of {', '.join(CHIPS)}"
        )
    return sorted(found, key=lambda one: one.per_example)


def largest(trial: Callable[[int], Plan | None]) -> Plan | None:
    """The plan of the largest count that fits: doubled until one does not, then halved in between.

    Args:
        trial: a count's plan, or None where it does not fit. If one fits, all smaller ones do.
    """
    best, good, bad = None, 0, None
    while bad is None or bad - good > 1:
        count = max(1, 2 * good) if bad is None else (good + bad) // 2
        if count > LIMIT:
            break
        plan = trial(count)
        if plan is None:
            bad = count
        else:
            best, good = plan, count
    return best
