"""`emollama plan`: compiles a real step for a TPU slice and says what it would take.

Nothing runs. Memory is what the compiler assigned; FLOPs, traffic and collectives are counted in
the compiled text; times are estimates, of two kinds: a roofline (nothing overlaps badly, the
largest of compute, HBM and interconnect binds), and the compiler's own cycles.
"""

import collections
import dataclasses
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from emollama_jax.base import AbstractModel, abstract_model
from emollama_jax.config import Config, EvaVitConfig, LlamaConfig, MeshConfig
from emollama_jax.data.lengths import Lengths
from emollama_jax.errors import UserError
from emollama_jax.models.remat import keeps, policy_of
from emollama_jax.scale import flops, hlo, moved, steps
from emollama_jax.scale.cost import Cost, cost
from emollama_jax.scale.topologies import Chip, chip_of, compiling, devices
from emollama_jax.sharding.mesh import AXES, make_mesh, mesh_sizes

SHARE = 0.9  # of a chip's memory that a plan may fill: the runtime needs some


class DoesNotFit(UserError):
    """The compiler found no way to fit the step into memory."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    arguments: dict[str, int]  # by kind, what shape × dtype × sharding predict
    padding: int  # of the arguments' tiles: what the compiler assigned beyond that
    temporaries: int
    outputs: int  # that do not take an argument's place
    program: int
    capacity: int

    @property
    def total(self) -> int:
        held = sum(self.arguments.values()) + self.padding
        return held + self.temporaries + self.outputs + self.program

    @property
    def fits(self) -> bool:
        return self.total <= SHARE * self.capacity


@dataclasses.dataclass(frozen=True)
class Plan:
    """Facts about a compiled step. Costs are per device; a chip may have two."""

    config: str
    topology: str
    step: steps.Step
    kind: steps.Kind
    chips: int
    device_count: int
    mesh: dict[str, int]
    preset: str
    shapes: steps.Shapes
    replicated: tuple[str, ...]
    flags: tuple[str, ...]
    compile_seconds: float
    memory: Memory
    model: flops.ModelFlops  # of all that is computed, padding included
    lengths: Lengths | None  # of the examples; None: not known
    real: flops.ModelFlops | None  # of what the examples hold
    cost: Cost
    kernel_flops: float  # of Pallas kernels, analytic, one device
    activations: tuple[moved.Moved, ...]  # gathered or exchanged; a train step should have few
    chip: Chip

    @property
    def peak(self) -> float:
        """FLOP/s of one device."""
        return self.chip.peak / self.chip.devices

    @property
    def model_flops(self) -> float:
        """Of one device."""
        return self.model.total / self.device_count

    @property
    def hlo_flops(self) -> float:
        """Of one device, kernels included."""
        return sum(self.cost.flops.values()) + self.kernel_flops

    @property
    def useful(self) -> float | None:
        """Model FLOPs ÷ FLOPs that the program computes; None where its text shows no product."""
        return self.model_flops / self.hlo_flops if self.hlo_flops else None

    @property
    def roofline(self) -> dict[str, float]:
        """Seconds of each resource if it alone bound."""
        bandwidth = self.chip.bandwidth / self.chip.devices
        moved = sum(traffic.cycles for traffic in self.cost.collectives.values())
        return {
            "compute": self.hlo_flops / self.peak,
            "HBM": sum(self.cost.traffic.values()) / bandwidth,
            "ICI": moved / self.chip.clock,
        }

    @property
    def roofline_seconds(self) -> float:
        return max(self.roofline.values())

    @property
    def seconds(self) -> float:
        """By the compiler's cycles, collectives that nothing hides, and kernels at the peak."""
        return self.cost.total / self.chip.clock + self.kernel_flops / self.peak

    def utilisation(self, seconds: float) -> float:
        """MFU: the model's FLOPs in that time, as a share of the peak; padding counts as work."""
        return self.model_flops / seconds / self.peak

    @property
    def mfu_real(self) -> float | None:
        """MFU by what the examples hold."""
        if self.real is None:
            return None
        return self.real.total / self.device_count / self.seconds / self.peak

    @property
    def real_tokens(self) -> float | None:
        """Tokens of a step's examples."""
        return None if self.lengths is None else self.shapes.examples * self.lengths.tokens

    @property
    def real_token_share(self) -> float | None:
        """Of the LLM's places, those that hold a token."""
        tokens = self.real_tokens
        return None if tokens is None else tokens / (self.shapes.rows * self.shapes.tokens)

    @property
    def examples_per_second(self) -> float:
        return self.shapes.examples / self.seconds


def make_plan(
    cfg: Config,
    topology: str,
    *,
    step: steps.Step = "train",
    kind: steps.Kind = "clip",
    examples: int | None = None,
    lengths: Lengths | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Compiles a step for a slice and reads the result.

    Args:
        cfg: config of the run; folders of weights need not exist.
        topology: name in `TOPOLOGIES`.
        step: which.
        kind: kind of batch.
        examples: examples per step, over all devices, or rows where these hold several; the
            config's by default.
        lengths: tokens of the examples that train; None: not known.
        tell: told what is going on.

    Raises:
        DoesNotFit: the compiler says so.
        UserError: an unknown topology or XLA flag, no libtpu, sizes or arguments that do not fit.
    """
    chip = chip_of(topology)
    mesh = slice_mesh(cfg.mesh, devices(topology, cfg.mesh.slices))
    shapes = steps.shapes(cfg, kind, step, examples=examples)
    start = time.monotonic()
    tell(f"{cfg.name}: tracing the {step} step")
    results, seconds = _compile_step(
        cfg, mesh, shapes, step, lambda name: tell(f"{name}: compiling for {topology}")
    )
    total, memories, activations = Cost(), [], []
    price, whole = make_price(chip, mesh), abstract_model(cfg, mesh)
    for program, result in results:
        tell(f"{program.name}: reading {time.monotonic() - start:.0f} s after the start")
        module = hlo.parse(result.as_text())
        total.add(cost(module, dict(mesh.shape), price, part=program.part))
        memories.append(_memory(program, result, module, chip))
        activations += moved.activations(module, steps.gathered_shapes(whole))
    model = _model_flops(cfg, whole, shapes, step)
    return Plan(
        config=cfg.name,
        topology=topology,
        step=step,
        kind=kind,
        chips=mesh.size // chip.devices,
        device_count=mesh.size,
        mesh=dict(mesh.shape),
        preset=cfg.mesh.preset,
        shapes=shapes,
        replicated=whole.replicated,
        flags=cfg.xla,
        compile_seconds=seconds,
        memory=max(memories, key=lambda memory: memory.total),
        model=model,
        lengths=lengths,
        real=_real_flops(cfg, whole, shapes, lengths) if step == "train" else None,
        cost=total,
        kernel_flops=_kernel_flops(cfg, total, model, step) / mesh.size,
        activations=tuple(activations),
        chip=chip,
    )


def _compile_step(
    cfg: Config, mesh: Mesh, shapes: steps.Shapes, step: steps.Step, told: Callable[[str], None]
) -> tuple[list[tuple[steps.Program, jax.stages.Compiled]], float]:
    """The programs of a step, compiled, and the seconds that compiling took."""
    seconds = 0.0

    def compiled(program: steps.Program) -> jax.stages.Compiled:
        nonlocal seconds
        told(program.name)
        before = time.monotonic()
        result = compile_program(program, cfg)
        seconds += time.monotonic() - before
        return result

    with jax.set_mesh(mesh):
        if step == "train":
            programs = steps.lower_train(cfg, mesh, shapes)
        elif step == "prefill":
            programs = steps.lower_prefill(cfg, mesh, shapes)
        else:
            programs = steps.lower_decode(cfg, mesh, shapes, compiled)
        results = [(program, compiled(program)) for program in programs]
    return results, seconds


def slice_mesh(cfg: MeshConfig, found: Sequence[jax.Device]) -> Mesh:
    """The mesh of a run on the devices of a slice.

    Raises:
        UserError: as `make_mesh`.
    """
    if found[0].device_kind != "TPU v4":
        return make_mesh(cfg, devices=found)
    # JAX lays out v4 by chips only; here each of its cores is a device, in the order of positions.
    sizes = mesh_sizes(cfg, len(found))
    grid = np.array(found[: math.prod(sizes)], dtype=object).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def compile_program(program: steps.Program, cfg: Config) -> jax.stages.Compiled:
    """Compiles, and says in one line what went wrong.

    Raises:
        DoesNotFit, UserError: as `make_plan`.
    """
    try:
        with compiling():
            return program.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        text = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" in text or "Ran out of memory" in text:
            used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w)", text)
            size = f"{used[1]} of {used[2]}" if used else text[:200]
            raise DoesNotFit(
                f"{cfg.name}: the {program.name} step does not fit: {size}: lower the batch, take "
                "more chips, or set model.llama.remat=full"
            ) from None
        if cfg.xla and re.search(r"[Oo]ption|[Ff]lag", text):
            raise UserError(f"xla: {', '.join(cfg.xla)}: {text[:200]}") from None
        raise


DTYPES = {  # HLO's names
    "float32": "f32",
    "bfloat16": "bf16",
    "int32": "s32",
    "uint32": "u32",
    "uint8": "u8",
    "int8": "s8",
    "bool": "pred",
}


def check_arguments(program: steps.Program, module: hlo.Module, assigned: int) -> int:
    """Holds that a step's arguments are the arrays they should be, and no second copy of any.

    Args:
        program: expected arguments; JAX leaves out those that the step does not use.
        module: compiled module.
        assigned: bytes of a device that the compiler gave the arguments.

    Returns:
        Bytes of them that only fill up tiles.

    Raises:
        UserError: an argument too many, or of another shape or dtype, or more bytes than they make.
    """
    given = module.computations[module.entry].parameters.values()
    arrays = [array for x in given for array in x.result]
    left = collections.Counter[tuple[str, tuple[int, ...]]]()
    for held in program.arguments.values():
        for (dtype, shape), count in held.items():
            left[DTYPES[dtype], shape] += count
    left.subtract((array.dtype, array.dims) for array in arrays)
    surplus = [f"{dtype}{list(shape)}" for (dtype, shape), count in left.items() if count < 0]
    padded = sum(array.padded for array in arrays)
    if surplus or assigned > padded:
        raise UserError(
            f"{program.name}: the compiled step's arguments are not its parameters, state and "
            f"batch: {assigned:,} bytes a device for {padded:,}, too many: "
            f"{', '.join(surplus[:5]) or 'none'}: something is duplicated or not sharded"
        )
    return assigned - sum(array.bytes for array in arrays)


def make_price(chip: Chip, mesh: Mesh) -> Callable[[float, np.ndarray], float]:
    """Cycles that moving bytes takes at the interconnect's bandwidth.

    A group that lies along d dimensions of the torus sends over d rings: two ports each where the
    dimension wraps around, one where it is a line. Between slices goes what is left after each
    slice has reduced or gathered its own.
    """
    slices = np.array([getattr(device, "slice_index", None) or 0 for device in mesh.devices.flat])
    places = np.array([device.coords for device in mesh.devices.flat])
    sizes = places.max(axis=0) - places.min(axis=0) + 1
    flat = chip.links == 4

    def price(sent: float, members: np.ndarray) -> float:
        first = places[members[0]]
        along = (first != first[0]).any(axis=0)
        wraps = sizes == 16 if flat else sizes % 4 == 0
        ports = int((along * (1 + wraps)).sum()) or 1
        seconds = sent / (ports * chip.link)
        crossed = len(set(slices[members[0]]))
        if crossed > 1 and chip.network is not None:
            seconds += sent / (members.shape[1] / crossed) / chip.network
        return seconds * chip.clock

    return price


def _memory(
    program: steps.Program, result: jax.stages.Compiled, module: hlo.Module, chip: Chip
) -> Memory:
    said = result.memory_analysis()
    return Memory(
        arguments={name: steps.device_bytes(held) for name, held in program.arguments.items()},
        padding=check_arguments(program, module, said.argument_size_in_bytes),
        temporaries=said.temp_size_in_bytes,
        outputs=said.output_size_in_bytes - said.alias_size_in_bytes,
        program=said.generated_code_size_in_bytes,
        capacity=chip.memory // chip.devices,
    )


def _model_flops(
    cfg: Config, whole: AbstractModel, shapes: steps.Shapes, step: steps.Step
) -> flops.ModelFlops:
    if step == "decode":
        slots = shapes.tokens + cfg.generate.max_new_tokens
        return flops.decode_flops(cfg, examples=shapes.rows, slots=slots)
    load = padded_load(shapes)
    if step == "prefill":
        return flops.prefill_flops(cfg, dataclasses.replace(load, labels=shapes.rows))
    return flops.train_flops(cfg, whole.trainable, load)


def padded_load(shapes: steps.Shapes) -> flops.Load:
    """What a batch of these shapes has places for."""
    tokens, frames = shapes.tokens, shapes.frames
    return flops.Load(
        tokens=tokens,
        pairs=tokens * (tokens + 1) / 2,
        labels=tokens - 1,
        frames=frames,
        asked=frames + shapes.again,
        question=shapes.question_length,
    ).times(shapes.rows)


def _real_flops(
    cfg: Config, whole: AbstractModel, shapes: steps.Shapes, lengths: Lengths | None
) -> flops.ModelFlops | None:
    """A train step's, by what its examples hold."""
    if lengths is None:
        return None
    load = flops.Load(
        tokens=lengths.tokens,
        pairs=(lengths.squares + lengths.tokens) / 2,
        labels=lengths.labels,
        frames=lengths.frames,
        asked=lengths.asked,
        question=lengths.question,
    )
    return flops.train_flops(cfg, whole.trainable, load.times(shapes.examples))


def _kernel_flops(cfg: Config, total: Cost, model: flops.ModelFlops, step: steps.Step) -> float:
    """What the Pallas kernels that were found compute: attention's products, and what they run
    again. A forward pass has 2 products, rematerialisation repeats them; the backward kernels have
    7 where the mathematics has 4.
    """
    if not total.kernels:
        return 0.0
    parts = {"llm": cfg.model.llama, "vision": cfg.model.vision}
    result = 0.0
    for part, network in parts.items():
        if network.attention not in ("splash", "auto") or part not in model.attention:
            continue
        if step != "train" or not model.backward.get(part):
            result += model.attention[part]
        else:
            again = 0 if part_keeps(network) else 2
            result += model.attention[part] * (2 + again + 7) / 6
    return result


def part_keeps(network: LlamaConfig | EvaVitConfig) -> bool:
    """Whether attention's result is kept for the backward pass."""
    policy = policy_of(network) if isinstance(network, LlamaConfig) else network.remat
    return keeps(policy, "attention")


def to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON takes it; bytes, FLOPs, cycles and seconds."""
    tree = dataclasses.asdict(dataclasses.replace(plan, cost=Cost()))
    del tree["cost"], tree["kernel_flops"]
    tree["batch"] = tree.pop("shapes")
    tree["seconds"] = plan.seconds  # work and waiting: `compiler` has both
    tree["examples_per_second"] = plan.examples_per_second
    tree["real_token_share"] = plan.real_token_share
    tree["mfu_real"] = plan.mfu_real
    tree["memory"] |= {"total": plan.memory.total, "fits": plan.memory.fits, "share": SHARE}
    tree["model"]["total"] = plan.model.total
    tree["flops_per_device"] = {
        "model": plan.model_flops,
        "hlo": plan.hlo_flops,
        "hlo_by_part": dict(plan.cost.flops),
        "recomputed": plan.cost.recomputed,
        "kernels": plan.kernel_flops,
        "useful": plan.useful,
    }
    tree["collectives"] = [
        dataclasses.asdict(key) | dataclasses.asdict(traffic)
        for key, traffic in plan.cost.collectives.items()
    ]
    tree["activations_moved"] = tree.pop("activations")
    tree["roofline"] = {
        "seconds": plan.roofline,
        "binds": max(plan.roofline, key=plan.roofline.__getitem__),
        "mfu": plan.utilisation(plan.roofline_seconds),
        "hbm_bytes": dict(plan.cost.traffic),
    }
    tree["compiler"] = {
        "cycles": dict(plan.cost.cycles),
        "exposed_cycles": plan.cost.exposed,
        "total_cycles": plan.cost.total,
        "seconds": plan.seconds,
        "mfu": plan.utilisation(plan.seconds),
        "kernels": dict(plan.cost.kernels),
        "loops_of_unknown_length": plan.cost.unbounded,
    }
    return tree
