"""Cost of a compiled program on one device: cycles, FLOPs, memory traffic, collectives.

Rules, as measured with libtpu 0.0.42:

* Loops are multiplied out by their trip count; a loop whose count depends on data counts once and
  is named in `Cost.unbounded`.
* Of a conditional, the dearest branch counts, always: the loss is counted as if every chunk of
  text bore labels, and a draw as if it sampled.
* Cycles are the compiler's `estimated_cycles`. Collectives and Pallas kernels have none: the
  former are priced by bytes and bandwidth, the latter are listed in `Cost.kernels`.
* FLOPs are those of matrix products and convolutions, counted as XLA's own cost analysis does:
  positions that fall on padding cost nothing.
* Memory traffic is what instructions outside fusions read from and write to HBM; what the compiler
  keeps in vector memory is free, and of an array that is only sliced the slice counts.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from emollama_jax.scale import hlo

# Scopes that the model and the train step set with `jax.named_scope`, the innermost counts.
PARTS = ("llm", "vision", "face", "fim", "qformer", "visual_tokens", "loss", "optimizer")
OTHER = "other"
SCOPE = re.compile(rf"(?<![\w.])({'|'.join(PARTS)})(?![\w.])")

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# What writes into its first operand: the place of what is written among the operands.
IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}
FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional"),
    *("call", "partition-id", "replica-id", "after-all", "iota", "opt-barrier", "add-dependency"),
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of collective over one choice of mesh axes, by one part of the model."""

    kind: str
    axes: tuple[str, ...]
    part: str


@dataclasses.dataclass
class Traffic:
    """Sums over the executions of such a collective, for one device."""

    count: int = 0
    bytes: int = 0  # of the larger side: what is gathered, reduced or exchanged
    sent: float = 0  # bytes that a ring sends from each device
    cycles: float = 0  # at the interconnect's bandwidth
    exposed: float = 0  # of these, what no work between start and done hides

    def add(self, other: "Traffic", times: int = 1) -> None:
        """Adds `times` of another."""
        for field in dataclasses.fields(Traffic):
            value = getattr(self, field.name) + getattr(other, field.name) * times
            setattr(self, field.name, value)


@dataclasses.dataclass
class Cost:
    """Cost on one device."""

    cycles: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    flops: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    recomputed: float = 0  # of the FLOPs, those of a forward pass that is run again
    traffic: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    collectives: dict[Collective, Traffic] = dataclasses.field(default_factory=dict)
    kernels: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    unbounded: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: "Cost", times: int = 1) -> None:
        """Adds `times` executions of another program."""
        for name in ("cycles", "flops", "traffic", "kernels"):
            mine, theirs = getattr(self, name), getattr(other, name)
            for key, value in theirs.items():
                mine[key] += value * times
        self.recomputed += other.recomputed * times
        for key, theirs in other.collectives.items():
            self.collectives.setdefault(key, Traffic()).add(theirs, times)
        self.unbounded += [name for name in other.unbounded if name not in self.unbounded]

    @property
    def exposed(self) -> float:
        """Cycles in which the device waits for collectives."""
        return sum(traffic.exposed for traffic in self.collectives.values())

    @property
    def total(self) -> float:
        """Cycles of the program: the compiler's and the exposed collectives'."""
        return sum(self.cycles.values()) + self.exposed


# (sent bytes, device groups or pairs) → cycles at the interconnect's bandwidth
Price = Callable[[float, np.ndarray], float]


def cost(module: hlo.Module, shape: Mapping[str, int], price: Price, *, part: str = OTHER) -> Cost:
    """Adds up a program.

    Args:
        module: HLO module of one device.
        shape: sizes of the mesh's axes in their order.
        price: price of moving bytes between devices.
        part: part of the model for instructions that name none.
    """
    return _Counter(module, shape, price).of((module.computations[module.entry], {}), part)


class _Counter:
    def __init__(self, module: hlo.Module, shape: Mapping[str, int], price: Price):
        self.module, self.shape, self.price = module, shape, price

    def of(self, scope: hlo.Scope, part: str) -> Cost:
        """A computation outside fusions; `part` is whose it is where nothing says."""
        total = Cost()
        # By channel: an asynchronous one stands in its start, in the work that it runs beside, and
        # in its done. It is one, and all between the first and the last hides it.
        running: dict[str, tuple[Collective, Traffic, float, float]] = {}
        for x in scope[0].instructions.values():
            before = sum(total.cycles.values())
            self._instruction(total, scope, x, _part(self.module, x) or part)
            now = sum(total.cycles.values())
            if x.opcode.endswith("-done") and x.operands[0] in running:
                key, traffic, since, _ = running[x.operands[0]]
                running[x.operands[0]] = (key, traffic, since, before)
            for kind, where, y in self._collectives(scope[0], x):
                channel = re.search(r"channel_id=(\d+)", y.attributes)
                name = x.name if channel is None or x is y else f"channel {channel[1]}"
                if name in running:
                    running[name] = (*running[name][:3], now)
                else:
                    running[name] = (*self._traffic(kind, where, y, part), now, now)
        for key, traffic, since, until in running.values():
            traffic.exposed = max(0.0, traffic.cycles - (until - since))
            total.collectives.setdefault(key, Traffic()).add(traffic)
        return total

    def _instruction(self, total: Cost, scope: hlo.Scope, x: hlo.Instruction, part: str) -> None:
        computation = scope[0]
        if x.opcode == "while":
            times = hlo.trip_count(self.module, scope, x)
            if times is None:
                times = 1
                total.unbounded.append(x.op_name or x.name)
            body = self.module.computations[x.called_by("body")]
            total.add(self.of((body, {0: (scope, x.operands[0])}), part), times)
        elif x.opcode == "conditional":
            branches = [
                self.of((self.module.computations[name], {0: (scope, operand)}), part)
                for name, operand in zip(x.called, x.operands[1:], strict=True)
            ]
            total.add(max(branches, key=lambda branch: (branch.total, sum(branch.flops.values()))))
        elif x.opcode == "call":
            total.add(self.of(hlo._inside(self.module, scope, x), part))
        else:
            total.cycles[part] += self._cycles(x)
            total.traffic[part] += _moved(self.module, computation, x)
            for where, y in _products(self.module, computation, x):
                flops = _flops(where, y)
                whose = part_of(y.op_name) or part
                total.flops[whose] += flops
                if "rematted_computation" in y.op_name:
                    total.recomputed += flops
            if x.opcode == "custom-call" and not x.cycles:
                target = re.findall(r'custom_call_target="([^"]*)"', x.attributes)[0]
                if target == "tpu_custom_call":
                    total.kernels[_kernel(x)] += 1

    def _cycles(self, x: hlo.Instruction) -> int:
        """The compiler's estimate; of a fusion without one, what its instructions have."""
        if x.cycles or x.opcode != "fusion":
            return x.cycles
        inner = self.module.computations[x.called[0]]
        return sum(self._cycles(y) for y in inner.instructions.values())

    def _collectives(
        self, computation: hlo.Computation, x: hlo.Instruction
    ) -> Iterator[tuple[str, hlo.Computation, hlo.Instruction]]:
        """(kind, computation, instruction) of each collective that x starts or is."""
        kind = x.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            yield kind, computation, x
        elif x.opcode in ("fusion", "async-start"):
            inner = self.module.computations[x.called[0]]
            for y in inner.instructions.values():
                for kind, where, z in self._collectives(inner, y):
                    # TPUs reduce-scatter by an all-reduce fused with the slice that is kept.
                    scatters = x.name.startswith("all-reduce-scatter")
                    yield "reduce-scatter" if scatters else kind, where, z

    def _traffic(
        self, kind: str, computation: hlo.Computation, x: hlo.Instruction, part: str
    ) -> tuple[Collective, Traffic]:
        given = sum(_bytes(computation, name) for name in x.operands)
        # A start's result holds its operands too, and flags.
        taken = sum(a.bytes for a in x.result) - (given if x.opcode.endswith("-start") else 0)
        if kind == "collective-permute":
            members = hlo.pairs(x.attributes)[:, None, :]
            size, sent = given, float(given)
        else:
            found = hlo.groups(x.attributes)
            devices = int(np.prod(list(self.shape.values())))
            members = np.arange(devices)[None] if found is None else found
            n = members.shape[-1]
            size = max(given, taken)
            sent = size * (n - 1) / n * (2 if kind == "all-reduce" else 1)
        axes = hlo.mesh_axes(members.reshape(-1, members.shape[-1]), self.shape)
        cycles = self.price(sent, members.reshape(-1, members.shape[-1])) if sent else 0.0
        key = Collective(kind, axes, part_of(x.op_name) or part)
        return key, Traffic(count=1, bytes=size, sent=sent, cycles=cycles)


def part_of(op_name: str) -> str:
    """The part of the model that an instruction's scopes name, the innermost; "" for none."""
    found = SCOPE.findall(op_name)
    return found[-1] if found else ""


def _part(module: hlo.Module, x: hlo.Instruction) -> str:
    """As `part_of`; a fusion that has no name takes the first that its inside gives."""
    if (part := part_of(x.op_name)) or x.opcode != "fusion":
        return part
    inner = module.computations[x.called[0]]
    return next(filter(None, (_part(module, y) for y in inner.instructions.values())), "")


def _kernel(x: hlo.Instruction) -> str:
    named = re.search(r'kernel_name[=:]\s*"?([\w.]+)', x.attributes)
    return named[1] if named else x.op_name.rsplit("/", 1)[-1] or "tpu_custom_call"


# ------------------------------------------------------------------ FLOPs


def _products(
    module: hlo.Module, computation: hlo.Computation, x: hlo.Instruction
) -> Iterator[tuple[hlo.Computation, hlo.Instruction]]:
    """Matrix products and convolutions of an instruction, inside fusions too."""
    if x.opcode in ("dot", "convolution"):
        yield computation, x
    elif x.opcode in ("fusion", "async-start"):
        inner = module.computations[x.called[0]]
        for y in inner.instructions.values():
            yield from _products(module, inner, y)


def _flops(computation: hlo.Computation, x: hlo.Instruction) -> float:
    left, right = (computation.instructions[name].result[0].dims for name in x.operands[:2])
    out = x.result[0].dims
    if x.opcode == "dot":
        summed = re.findall(r"lhs_contracting_dims=\{([\d,]*)\}", x.attributes)[0]
        sizes = [left[int(axis)] for axis in summed.split(",") if axis]
        return 2 * float(np.prod(out)) * float(np.prod(sizes))
    labels = re.findall(r"dim_labels=(\w+)_(\w+)->(\w+)", x.attributes)[0]
    window = re.search(r"window=\{([^}]*)\}", x.attributes)
    settings = dict(item.split("=") for item in window[1].split()) if window else {}
    positions = 1.0
    for axis in sorted(label for label in labels[0] if label.isdigit()):
        positions *= _valid_positions(
            left[labels[0].index(axis)],
            right[labels[1].index(axis)],
            out[labels[2].index(axis)],
            *_window(settings, int(axis)),
        )

    def group(name: str) -> int:
        found = re.search(rf"{name}=(\d+)", x.attributes)
        return int(found[1]) if found else 1

    features = left[labels[0].index("f")] / group("feature_group_count")
    batch = left[labels[0].index("b")] / group("batch_group_count")
    return 2 * batch * features * out[labels[2].index("f")] * positions


def _window(settings: Mapping[str, str], axis: int) -> tuple[int, int, int, int]:
    """Stride, low padding, dilation of the input and of the kernel along one axis."""

    def setting(name: str, default: str) -> str:
        return settings[name].split("x")[axis] if name in settings else default

    return (
        int(setting("stride", "1")),
        int(setting("pad", "0_0").split("_")[0]),
        int(setting("lhs_dilate", "1")),
        int(setting("rhs_dilate", "1")),
    )


@functools.cache
def _valid_positions(
    size: int, kernel: int, out: int, stride: int, pad: int, dilate: int, kernel_dilate: int
) -> int:
    """Pairs of output and kernel positions along one axis that meet a real input position."""
    place = np.arange(out)[:, None] * stride - pad + np.arange(kernel) * kernel_dilate
    return int(((place >= 0) & (place <= (size - 1) * dilate) & (place % dilate == 0)).sum())


# ------------------------------------------------------------------ memory


def _bytes(computation: hlo.Computation, name: str) -> int:
    return sum(array.bytes for array in computation.instructions[name].result)


def _moved(module: hlo.Module, computation: hlo.Computation, x: hlo.Instruction) -> int:
    """Bytes that an instruction reads from and writes to HBM."""
    if x.opcode in FREE or x.opcode.endswith("-done"):
        return 0
    if x.opcode == "fusion":
        inner = module.computations[x.called[0]]
        read = sum(
            _read(module, inner, inner.parameters[place].name, _hbm(computation, name))
            for place, name in enumerate(x.operands)
        )
        return read + _written(inner, x)
    if x.opcode == "dynamic-slice":
        return 2 * sum(a.bytes for a in x.result if not a.space)
    if x.opcode == "dynamic-update-slice":
        return 2 * _hbm(computation, x.operands[1])
    if x.opcode.endswith("-start"):  # its result names its operands again
        return sum(a.bytes for a in x.result if not a.space)
    read = sum(_hbm(computation, name) for name in x.operands)
    return read + sum(a.bytes for a in x.result if not a.space)


def _hbm(computation: hlo.Computation, name: str) -> int:
    return sum(a.bytes for a in computation.instructions[name].result if not a.space)


def _read(module: hlo.Module, computation: hlo.Computation, name: str, whole: int) -> int:
    """Bytes of a fusion's operand that it reads: the slices where it only slices."""
    if not whole:
        return 0
    size = 0
    for x in computation.instructions.values():
        if name not in x.operands:
            continue
        if x.opcode == "dynamic-slice" and x.operands[0] == name:
            size += sum(a.bytes for a in x.result)
        elif x.opcode in IN_PLACE and x.operands[0] == name:
            continue
        elif x.opcode == "bitcast":
            size += _read(module, computation, x.name, whole)
        elif x.opcode == "fusion":
            inner = module.computations[x.called[0]]
            parameter = inner.parameters[x.operands.index(name)].name
            if inner.root.opcode in ("bitcast", "copy") and inner.root.operands == (parameter,):
                size += _read(module, computation, x.name, whole)  # the same, tiled otherwise
            else:
                size += _read(module, inner, parameter, whole)
        else:
            return whole
    return min(size, whole)


def _written(inner: hlo.Computation, x: hlo.Instruction) -> int:
    """Bytes of a fusion's result that it writes: the update where it updates in place."""
    names = inner.root.operands if inner.root.opcode == "tuple" else (inner.root.name,)
    size = 0
    for array, name in zip(x.result, names, strict=False):
        y = inner.instructions[name]
        while y.opcode == "bitcast":
            y = inner.instructions[y.operands[0]]
        if y.opcode in IN_PLACE:
            size += 0 if array.space else _bytes(inner, y.operands[IN_PLACE[y.opcode]])
        else:
            size += 0 if array.space else array.bytes
    return size
