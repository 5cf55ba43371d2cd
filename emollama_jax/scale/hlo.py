"""A reader of compiled HLO text: computations, instructions, trip counts of loops, replica groups.

Pure: text in, structs out. The text is what `compiled.as_text()` of XLA:TPU gives, scheduled and
partitioned, so that it is one device's program.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

import numpy as np

BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
NAME = re.compile(r"%([\w.\-]+)")
INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = ")
HEADER = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
CALLED = re.compile(
    r"\b(?:calls|body|condition|to_apply|true_computation|false_computation)=%([\w.\-]+)"
    r"|\b(?:branch_computations|called_computations)=\{([^}]*)\}"
)


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    space: int  # memory space: 0 is HBM, 1 the core's vector memory (VMEM)
    order: tuple[int, ...] = ()  # of the dimensions in memory, the fastest first
    tile: tuple[int, ...] = ()  # of the fastest dimensions, the slowest first

    @property
    def bytes(self) -> int:
        """Without the padding of tiles."""
        bits = BITS.get(self.dtype)
        if bits is None:
            bits = int(re.findall(r"\d+", self.dtype)[0])
        return math.prod(self.dims) * bits // 8

    @property
    def padded(self) -> int:
        """Bytes that it takes in memory: tiles are filled up."""
        sizes = [self.dims[axis] for axis in reversed(self.order)]
        sizes = [1] * (len(self.tile) - len(sizes)) + sizes
        whole = len(sizes) - len(self.tile)
        full = [-(-n // t) * t for n, t in zip(sizes[whole:], self.tile, strict=True)]
        return dataclasses.replace(self, dims=(*sizes[:whole], *full)).bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line, with the lines that follow it where a kernel's text is inside."""

    name: str
    opcode: str
    result: tuple[Array, ...]  # the leaves of a tuple
    operands: tuple[str, ...]  # names in the same computation
    argument: str  # what stands between the brackets: a constant's value, a parameter's number
    attributes: str
    root: bool

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Computations that it names, in order."""
        names = []
        for one, many in CALLED.findall(self.attributes):
            names += [one] if one else NAME.findall(many)
        return tuple(names)

    def called_by(self, key: str) -> str:
        """The computation that an attribute names: `body`, `condition`."""
        return re.findall(rf"\b{key}=%([\w.\-]+)", self.attributes)[0]

    @functools.cached_property
    def op_name(self) -> str:
        """JAX's path of scopes; "" where the compiler made the instruction up."""
        found = re.search(r'metadata=\{[^}]*?op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @functools.cached_property
    def cycles(self) -> int:
        """`estimated_cycles`, 0 where none is given; of a loop of kernels, the first's."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else 0


@dataclasses.dataclass(frozen=True)
class Computation:
    """A list of instructions in the order of their schedule."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        return next(x for x in self.instructions.values() if x.root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(x.argument): x for x in self.instructions.values() if x.opcode == "parameter"}


@dataclasses.dataclass(frozen=True)
class Module:
    """A whole program."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Reads HLO text.

    Raises:
        ValueError: text without an entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, name, lines = "", "", []
    for line in text.splitlines():
        if name and line == "}":
            computations[name] = Computation(name, _instructions(lines))
            name = ""
        elif name:
            lines.append(line)
        elif header := HEADER.match(line):
            name, lines = header[2], []
            entry = name if header[1] else entry
    if entry not in computations:
        raise ValueError("not the text of an HLO module: no ENTRY computation")
    return Module(computations, entry)


def _instructions(lines: list[str]) -> dict[str, Instruction]:
    whole: list[str] = []
    for line in lines:
        if INSTRUCTION.match(line) or not whole:
            whole.append(line)
        else:  # the text of a kernel goes on
            whole[-1] += "\n" + line
    return {x.name: x for x in map(_instruction, whole)}


def _instruction(line: str) -> Instruction:
    head = INSTRUCTION.match(line)
    if head is None:
        raise ValueError(f"not an HLO instruction: {line[:200]}")
    start = head.end()
    stop = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    bracket = line.index("(", stop)
    end = _closing(line, bracket)
    inside = line[bracket + 1 : end]
    return Instruction(
        name=head[2],
        opcode=line[stop:bracket].strip(),
        result=tuple(_array(*found) for found in ARRAY.findall(line[start:stop])),
        operands=tuple(NAME.findall(inside)),
        argument=inside,
        attributes=line[end + 1 :],
        root=bool(head[1]),
    )


def _closing(line: str, start: int) -> int:
    depth = 0
    for place in range(start, len(line)):
        depth += (line[place] == "(") - (line[place] == ")")
        if depth == 0:
            return place
    raise ValueError(f"brackets do not close: {line[:200]}")


def _array(dtype: str, dims: str, layout: str) -> Array:
    space = re.search(r"S\((\d+)\)", layout)
    sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
    order, _, rest = layout.partition(":")
    tile = re.match(r"T\(([\d,]+)\)", rest)
    return Array(
        dtype,
        sizes,
        int(space[1]) if space else 0,
        tuple(int(axis) for axis in order.split(",") if axis.isdigit()),
        tuple(int(size) for size in tile[1].split(",")) if tile else (),
    )


# ------------------------------------------------------------------ loops

Scope = tuple[Computation, Mapping[int, tuple["Scope", str]]]  # parameters → where they come from


def integer(module: Module, scope: Scope, name: str, index: int | None = None) -> int | None:
    """The value of an integer that does not depend on data, or None.

    Args:
        module: the program.
        scope: the computation, and for each parameter the scope and name of its operand.
        name: name of an instruction in it.
        index: index of the wanted element, if the instruction is a tuple.
    """
    computation, sources = scope
    x = computation.instructions[name]

    def operand(place: int, index: int | None = None) -> int | None:
        return integer(module, scope, x.operands[place], index)

    if x.opcode == "constant" and re.fullmatch(r"-?\d+", x.argument):
        return int(x.argument)
    if x.opcode == "parameter" and int(x.argument) in sources:
        above, source = sources[int(x.argument)]
        return integer(module, above, source, index)
    if x.opcode in ("copy", "convert", "bitcast", "copy-done", "reshape"):
        return operand(0, index)
    if x.opcode == "copy-start":
        return operand(0)
    if x.opcode == "get-tuple-element":
        return operand(0, int(re.findall(r"index=(\d+)", x.attributes)[0]))
    if x.opcode == "tuple" and index is not None:
        return operand(index)
    if x.opcode == "while" and index is not None:  # what the body hands on unchanged
        body = module.computations[x.called_by("body")]
        kept = body.instructions[body.root.operands[index]]
        same = kept.opcode == "get-tuple-element" and f"index={index}" in kept.attributes
        return operand(0, index) if same else None
    if x.opcode in ("add", "subtract"):
        a, b = operand(0), operand(1)
        return None if a is None or b is None else a + b if x.opcode == "add" else a - b
    if x.opcode == "fusion":
        inner = _inside(module, scope, x)
        root = inner[0].root
        if root.opcode == "tuple" and index is not None:
            return integer(module, inner, root.operands[index])
        return integer(module, inner, root.name)
    return None


def _inside(module: Module, scope: Scope, x: Instruction) -> Scope:
    """The scope of the computation that a fusion or a call runs."""
    inner = module.computations[x.called[0]]
    return inner, {place: (scope, name) for place, name in enumerate(x.operands)}


def trip_count(module: Module, scope: Scope, loop: Instruction) -> int | None:
    """How often a `while` runs, or None where that depends on data.

    Its condition compares an element of the carried tuple with a bound; the body adds a step to it.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition = module.computations[loop.called_by("condition")]
    carried = {0: (scope, loop.operands[0])}
    test: Scope = (condition, carried)
    compare = condition.root
    while compare.opcode == "fusion":
        test = _inside(module, test, compare)
        compare = test[0].root
    if compare.opcode != "compare":
        return None
    direction = re.findall(r"direction=(\w+)", compare.attributes)[0]
    flipped = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}
    left, right = compare.operands
    for counter, other, way in (
        (left, right, direction),
        (right, left, flipped.get(direction, direction)),
    ):
        index = _element(test, counter)
        step = None if index is None else _step(module, loop, index)
        if step:  # 0: carried along unchanged, the bound
            return _turns(
                integer(module, scope, loop.operands[0], index),
                integer(module, test, other),
                step,
                way,
            )
    return None


def _turns(start: int | None, bound: int | None, step: int, direction: str) -> int | None:
    if start is None or bound is None:
        return None
    distance = bound - start + {"LE": 1, "GE": -1}.get(direction, 0)
    return max(0, math.ceil(distance / step))


def _element(scope: Scope, name: str) -> int | None:
    """Which element of the carried tuple a value is, looking out through fusions."""
    computation, sources = scope
    x = computation.instructions[name]
    if x.opcode in ("copy", "bitcast", "convert"):
        return _element(scope, x.operands[0])
    if x.opcode == "parameter" and int(x.argument) in sources:
        above, source = sources[int(x.argument)]
        return _element(above, source)
    if x.opcode == "get-tuple-element":
        source = computation.instructions[x.operands[0]]
        if source.opcode == "parameter":
            return int(re.findall(r"index=(\d+)", x.attributes)[0])
    return None


def _step(module: Module, loop: Instruction, index: int) -> int | None:
    """What the body adds to an element of the carried tuple; None where it is no counter."""
    body = module.computations[loop.called_by("body")]
    # With the counter at 0 and everything else unknown, its next value is the step.
    if body.root.opcode != "tuple":
        return None
    zero = Instruction("zero", "constant", (), (), "0", "", False)
    counters = {
        name
        for name, x in body.instructions.items()
        if x.opcode == "get-tuple-element"
        and f"index={index}," in f"{x.attributes},"
        and body.instructions[x.operands[0]].opcode == "parameter"
    }
    if not counters:
        return None
    changed = {name: dataclasses.replace(zero, name=name) for name in counters}
    copy = Computation(body.name, body.instructions | changed)
    return integer(module, (copy, {}), body.root.operands[index])


# ------------------------------------------------------------------ groups of devices


def groups(attributes: str) -> np.ndarray | None:
    """The device groups of a collective, int [groups, members], or None for all devices together.

    Reads all three ways of writing `replica_groups`: {{0,1},{2,3}}, [2,2]<=[4] with an optional
    transpose, and mesh['a'=2,'b'=2] {'a'}.
    """
    found = re.search(
        r"replica_groups=(mesh\[.*?\] ?(?:\S*? ?)\{[^}]*\}|\{(?:\{[^}]*\},?)*\}|\S+)", attributes
    )
    if found is None:
        return None
    text = found[1]
    if text.startswith("mesh"):
        return _mesh_groups(text)
    if text.startswith("{"):
        rows = [row for row in re.findall(r"\{([\d,]+)\}", text)]
        return np.array([[int(i) for i in row.split(",")] for row in rows]) if rows else None
    return _iota(text)


def _iota(text: str) -> np.ndarray:
    shape, dims, order = re.findall(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)[0]

    def numbers(part: str) -> list[int]:
        return [int(i) for i in part.split(",")]

    ids = np.arange(math.prod(numbers(dims))).reshape(numbers(dims))
    if order:
        ids = ids.transpose(numbers(order))
    return ids.reshape(numbers(shape))


def _mesh_groups(text: str) -> np.ndarray:
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", text)}
    ids = np.arange(math.prod(axes.values()))
    if listed := re.search(r"device_ids=\(?(\[[\d,]+\](?:<=\[[\d,]+\])?(?:T\([\d,]+\))?)", text):
        order = listed[1] if "<=" in listed[1] else None
        ids = ids if order is None else _iota(order).reshape(-1)
    sizes: list[int] = []  # every axis, cut where a group holds only a part of it
    taken: list[int] = []
    wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", text[text.rindex("{") :])
    for name, size in axes.items():
        parts = [(int(before), int(n)) for other, before, n in wanted if other == name and before]
        whole = any(other == name and not before for other, before, _ in wanted)
        if whole or not parts:
            taken += [len(sizes)] if whole else []
            sizes.append(size)
            continue
        before, n = parts[0]
        sizes += [before, n, size // (before * n)]
        taken.append(len(sizes) - 2)
    rest = [axis for axis in range(len(sizes)) if axis not in taken]
    members = math.prod(sizes[axis] for axis in taken)
    return ids.reshape(sizes).transpose([*rest, *taken]).reshape(-1, members)


def pairs(attributes: str) -> np.ndarray:
    """(source, target) of a collective-permute, int [pairs, 2]."""
    text = re.findall(r"source_target_pairs=\{(.*?)\}\}", attributes)
    return np.array([[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)", text[0] + "}")])


def mesh_axes(members: np.ndarray, shape: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of each group differ.

    Args:
        members: int [groups, members], positions in the mesh's device order.
        shape: sizes of the mesh's axes in their order.
    """
    places = np.array(np.unravel_index(members, tuple(shape.values())))  # [axes, groups, members]
    differs = (places != places[:, :, :1]).any(axis=(1, 2))
    return tuple(axis for axis, moves in zip(shape, differs, strict=True) if moves)
