"""From a PyTorch checkpoint to a folder of our weights, a few layers in memory at a time.

files ─► tensors, not read ─► table laid against the model ─► all problems, or
      ─► layer by layer: read, brought into our layout, cast, put on its devices ─► Orbax
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import mmap
import pathlib
import re
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from emollama_jax import config
from emollama_jax.config import EmoLlamaConfig, MeshConfig, Preset
from emollama_jax.disk import room
from emollama_jax.errors import UserError
from emollama_jax.imported import Manifest, Writer, layer_key, layer_place, sizes
from emollama_jax.locks import hold_new
from emollama_jax.sharding.mesh import make_mesh
from emollama_jax.sharding.rules import param_shardings
from tools.convert_torch import positions
from tools.convert_torch.engine import Empty, Leaf, listed, match
from tools.convert_torch.files import Opened, Tensor
from tools.convert_torch.leaves import every_leaf
from tools.convert_torch.pickled import PICKLED
from tools.convert_torch.sources import SOURCES, Source, guess

TOGETHER = 320 << 20  # bytes that are written at once; as much is read meanwhile
READERS = 2  # threads that bring tensors into our layout; NumPy lets go of the lock meanwhile
FIRST = 64 << 10  # bytes of each tensor that its fingerprint reads
POSITIONS = ("pos_embed", "position_embedding", "position_embeddings")  # of vision towers
DTYPES = {"bf16": "bfloat16", "f32": "float32", "source": "source"}


Piece = tuple[Leaf, int]  # and the slot of it


@dataclasses.dataclass(frozen=True)
class Plan:
    """A conversion that is known to fit."""

    source: str
    kind: Source
    naming: str
    model: EmoLlamaConfig
    leaves: list[Leaf]
    left_out: dict[str, int]  # reason → number of tensors
    opened: Opened


@dataclasses.dataclass(frozen=True)
class Summary:
    """Summary of a conversion."""

    tensors: int
    leaves: int
    read: int  # bytes
    written: int
    seconds: float
    peak: int  # bytes of memory, of the whole process
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.tensors} tensors into {self.leaves} leaves, read {self.read / 1e9:.2f} GB, "
            f"wrote {self.written / 1e9:.2f} GB in {self.seconds:.1f} s, peak memory "
            f"{self.peak / 1e9:.2f} GB"
        )


class Buffers:
    """Memory for the arrays of one group, taken again for those of a later one.

    New memory costs as much time as filling it. Aligned to pages, it is also what JAX takes on a
    CPU without a copy.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[mmap.mmap]] = {}  # by bytes

    def take(self, nbytes: int) -> mmap.mmap:
        """Memory that is not cleared; from any thread."""
        try:
            return self._free.get(nbytes, []).pop()
        except IndexError:
            memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)
            return memory

    def give_back(self, memory: Iterable[mmap.mmap]) -> None:
        """Takes back what may be overwritten. What nobody took since the last time is let go."""
        free: dict[int, list[mmap.mmap]] = {}
        for part in memory:
            free.setdefault(len(part), []).append(part)
        self._free = free


@dataclasses.dataclass(frozen=True)
class Reading:
    """A group that is being read."""

    arrays: list[Future[tuple[str, jax.Array]]]
    memory: list[mmap.mmap]  # of the arrays


class Reader:
    """Reads pieces in threads, each to its devices.

    Args:
        targets: dtype of each leaf, by path.
        places: where each leaf lies, by path.
        pool: the threads.
        advance: is told the bytes that were read.
    """

    def __init__(
        self,
        targets: Mapping[str, np.dtype],
        places: Mapping[str, NamedSharding],
        pool: ThreadPoolExecutor,
        advance: Callable[[float], None],
    ):
        self.targets, self.buffers = targets, Buffers()
        self._places, self._pool, self._advance = places, pool, advance

    def begin(self, group: Sequence[Piece]) -> Reading:
        """Begins to read a group."""
        PICKLED.trim()
        memory: list[mmap.mmap] = []
        return Reading([self._pool.submit(self._read, piece, memory) for piece in group], memory)

    def _read(self, piece: Piece, memory: list[mmap.mmap]) -> tuple[str, jax.Array]:
        leaf, slot = piece

        def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
            memory.append(self.buffers.take(max(1, math.prod(shape) * dtype.itemsize)))
            return np.frombuffer(memory[-1], dtype, math.prod(shape)).reshape(shape)

        array = _place(leaf, slot, self.targets[leaf.path], self._places[leaf.path], empty)
        self._advance(leaf.parts[slot].nbytes / len(leaf.row.paths))
        return (layer_key(leaf.path, slot) if leaf.row.stacked else leaf.path), array


def make_plan(source: str, paths: Sequence[pathlib.Path], model: EmoLlamaConfig) -> Plan:
    """Opens a checkpoint and matches its table with the model.

    Args:
        source: name in `SOURCES`.
        paths: files or folders.
        model: sizes of what is to be filled; a `config.json` beside the weights overrides LLaMA's.

    Raises:
        UserError: all that is wrong, in one error.
    """
    kind = SOURCES[source]
    opened = kind.open(paths)
    if opened.problems:
        raise _refusal(source, opened.problems)
    model, rows = kind.fit(opened, model)
    known = kind.naming(opened.tensors)
    if opened.problems:
        raise _refusal(source, opened.problems)
    if known is None:
        raise _refusal(source, [_unknown(source, opened.tensors, model)])
    naming, prefix = known
    notes, tensors = [*opened.notes], opened.tensors
    if "vision" in kind.parts:
        tensors = _resized(tensors, model, notes)
    kind = kind.holding(rows)
    ignore = dict(naming.ignore(model))
    rows = naming.rows(model, prefix) + rows
    leaves, problems = match(shapes(kind, model), tensors, rows, ignore=ignore)
    if problems:
        raise _refusal(source, _another(source, tensors, model) or problems)
    used = {key for leaf in leaves for key in leaf.keys}
    left_out: dict[str, int] = {}
    for key in tensors:
        if key not in used:
            reason = next(why for pattern, why in ignore.items() if re.fullmatch(pattern, key))
            left_out[reason] = left_out.get(reason, 0) + 1
    opened = dataclasses.replace(opened, tensors=tensors, notes=notes)
    return Plan(source, kind, naming.name, model, leaves, left_out, opened)


def shapes(source: Source, model: EmoLlamaConfig) -> dict[str, tuple[int, ...]]:
    """Our leaves that a source fills, with their shapes."""
    return {path: leaf.shape for path, leaf in abstract_leaves(source, model).items()}


def abstract_leaves(source: Source, model: EmoLlamaConfig) -> dict[str, nnx.Param]:
    """Our leaves that a source fills, without numbers."""
    leaves = every_leaf(source.parts, model)
    return {path: leaf for path, leaf in leaves.items() if re.fullmatch(source.fills, path)}


def convert(
    source: str,
    paths: Sequence[pathlib.Path],
    out: pathlib.Path,
    *,
    dtype: str,
    model: EmoLlamaConfig,
    mesh: MeshConfig,
    console: Console,
) -> Summary:
    """Converts a checkpoint into a folder of weights.

    Args:
        source: name in `SOURCES`.
        paths: files or folders.
        out: the folder, not there yet.
        dtype: "bf16", "f32", or "source" for each tensor's own.
        model: as of `make_plan`.
        mesh: mesh that holds each leaf while it is written; one device by default.
        console: terminal for progress.

    Raises:
        UserError: all that is wrong; nothing is left behind then.
    """
    with hold_new(out, instead="choose another --out"):
        if out.exists():
            raise UserError(f"{out}: already exists: delete it, or choose another folder")
        plan = make_plan(source, paths, model)
        return _convert(plan, out, dtype=dtype, mesh=mesh, console=console)


def _convert(
    plan: Plan, out: pathlib.Path, *, dtype: str, mesh: MeshConfig, console: Console
) -> Summary:
    start = time.monotonic()
    targets = {leaf.path: _dtype(leaf, dtype) for leaf in plan.leaves}
    places = _places(plan, make_mesh(mesh), mesh.preset)
    manifest = _manifest(plan, dtype)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    whole = sum(
        math.prod(leaf.slot_shape) * targets[leaf.path].itemsize
        for leaf in plan.leaves
        for _ in leaf.slots
    )
    with (
        room(out.parent, whole),
        Progress(*columns, console=console) as progress,
        Writer(out, manifest, files=plan.opened.carried) as writer,
        ThreadPoolExecutor(READERS) as pool,
    ):
        task = progress.add_task(plan.source, total=sum(leaf.nbytes for leaf in plan.leaves))
        reader = Reader(targets, places, pool, functools.partial(progress.advance, task))
        written = _copy(plan, reader, writer)
        writer.finish()
    return Summary(
        tensors=len({key for leaf in plan.leaves for key in leaf.keys}),
        leaves=len(plan.leaves),
        read=sum(leaf.nbytes for leaf in plan.leaves),
        written=written,
        seconds=time.monotonic() - start,
        peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        notes=manifest.notes,
    )


def _manifest(plan: Plan, dtype: str) -> Manifest:
    """What stands beside the weights."""
    notes = tuple(plan.opened.notes) + tuple(
        f"left out {number} tensor{'s' if number > 1 else ''}: {reason}"
        for reason, number in plan.left_out.items()
    )
    return Manifest(
        source=plan.source,
        files={path.name: size for path, size in plan.opened.files.items()},
        fingerprint=fingerprint(plan.leaves),
        dtype=DTYPES[dtype],
        model=sizes(plan.model, plan.kind.sections, free=plan.kind.free),
        notes=notes,
    )


def _copy(plan: Plan, reader: Reader, writer: Writer) -> int:
    """Reads every leaf and gives it to the writer; the bytes written."""
    groups = map(reader.begin, _groups(_in_file_order(plan), reader.targets))
    before: list[mmap.mmap] = []
    written = 0
    # The next group is being read while this one waits for the last one to be written.
    for group, _ in itertools.pairwise(itertools.chain(groups, [Reading([], [])])):
        arrays = dict(future.result() for future in group.arrays)
        writer.add(arrays)  # the group before is on the disk now
        written += sum(array.nbytes for array in arrays.values())
        reader.buffers.give_back(before)
        before = group.memory
    PICKLED.release()
    return written


def fingerprint(leaves: Sequence[Leaf]) -> str:
    """SHA-256 over the names, shapes, dtypes and first bytes of what leaves are made of.

    The same for the same numbers in one file or in many.
    """
    tensors = {
        key: part for leaf in leaves for key, part in zip(leaf.keys, leaf.parts, strict=True)
    }
    digests = {}
    for key, tensor in sorted(tensors.items(), key=lambda pair: (pair[1].file, pair[0])):
        values = (tensor.read() if tensor.raw is None else tensor.raw).reshape(-1)
        values = values[: FIRST // values.dtype.itemsize]
        digests[key] = hashlib.sha256(values.tobytes()).hexdigest()
    PICKLED.release()
    whole = hashlib.sha256()
    for key in sorted(tensors):
        about = f"{key} {tensors[key].shape} {tensors[key].dtype} {digests[key]}\n"
        whole.update(about.encode())
    return whole.hexdigest()


def _refusal(source: str, problems: Sequence[str]) -> UserError:
    return UserError(f"{source}: nothing was written, {listed(problems)}")


def _unknown(source: str, tensors: Mapping[str, Tensor], model: EmoLlamaConfig) -> str:
    """Why no naming of a source fits, and which source's would."""
    names = " or ".join(naming.name for naming in SOURCES[source].namings)
    some = ", ".join(sorted(tensors)[:3])
    other = guess(tensors, model)
    hint = f"; these look like the source {other.source}" if other is not None else ""
    return f"{len(tensors)} tensors ({some} …), none named as in {names}{hint}"


def _another(source: str, tensors: Mapping[str, Tensor], model: EmoLlamaConfig) -> list[str]:
    """The one line for tensors that another source reads better; empty for none."""
    other = guess(tensors, model)
    if other is None or other.source == source:
        return []
    return [f"these tensors look like the source {other.source}"]


def _resized(
    tensors: dict[str, Tensor], model: EmoLlamaConfig, notes: list[str]
) -> dict[str, Tensor]:
    """A vision tower's positions at the config's picture size, where they have another."""
    wanted = 1 + model.vision.patches
    changed = dict(tensors)
    for key, tensor in tensors.items():
        name = key.rsplit(".", 1)[-1]
        if name not in POSITIONS or len(tensor.shape) != 3:
            continue
        found = tensor.shape[1]
        if found == wanted:
            continue
        old = round((found - 1) ** 0.5)
        if old * old != found - 1:
            continue  # its shape is refused later

        def read(tensor: Tensor = tensor) -> np.ndarray:
            return positions.interpolate(tensor.read(), wanted - 1)

        shape = (tensor.shape[0], wanted, tensor.shape[2])
        changed[key] = Tensor(shape, tensor.dtype, tensor.file, read)
        new = round((wanted - 1) ** 0.5)
        notes.append(f"{key}: interpolated from {old} × {old} to {new} × {new} patches")
    return changed


def _dtype(leaf: Leaf, dtype: str) -> np.dtype:
    if dtype != "source":
        return np.dtype(jax.dtypes.canonicalize_dtype(DTYPES[dtype]))
    found = {part.dtype for part in leaf.parts}
    if len(found) > 1:
        names = ", ".join(sorted(map(str, found)))
        raise UserError(f"{leaf.path}: its layers are {names}: choose --dtype bf16 or f32")
    return found.pop()


def _places(plan: Plan, mesh: Mesh, preset: Preset) -> dict[str, NamedSharding]:
    """Where each leaf lives while it is written; MTCNN's parameters are too small to be split."""
    leaves = abstract_leaves(plan.kind, plan.model)
    if not plan.kind.sections:
        return {path: NamedSharding(mesh, jax.sharding.PartitionSpec()) for path in leaves}
    return param_shardings(leaves, mesh, preset=preset).params


def _place(leaf: Leaf, slot: int, dtype: np.dtype, place: NamedSharding, empty: Empty) -> jax.Array:
    """Reads a layer, or a whole leaf, to its devices, each only its part."""
    held: dict[tuple, np.ndarray] = {}

    def part(window: tuple[slice, ...] | None) -> np.ndarray:
        assert window is not None  # each device of a NamedSharding has one
        key = tuple((cut.start, cut.stop) for cut in window)
        if key not in held:  # replicas are read once
            held[key] = leaf.read(slot, dtype, window, empty)
        return held[key]

    place = layer_place(place) if leaf.row.stacked else place
    return jax.make_array_from_callback(leaf.slot_shape, place, part)


def _in_file_order(plan: Plan) -> list[Piece]:
    """All that is to be read, in the order of the files: of PyTorch's own only one is open."""
    order = {key: number for number, key in enumerate(plan.opened.tensors)}
    pieces = [(leaf, slot) for leaf in plan.leaves for slot in leaf.slots]
    return sorted(pieces, key=lambda piece: order[piece[0].keys[piece[1]]])


def _groups(pieces: Sequence[Piece], targets: Mapping[str, np.dtype]) -> Iterator[list[Piece]]:
    """What is written together, until it fills `TOGETHER`."""
    group: list[Piece] = []
    size = 0
    for leaf, slot in pieces:
        nbytes = math.prod(leaf.slot_shape) * targets[leaf.path].itemsize
        if group and size + nbytes > TOGETHER:
            yield group
            group, size = [], 0
        group.append((leaf, slot))
        size += nbytes
    if group:
        yield group


def load_model(name: str, overrides: Sequence[str]) -> EmoLlamaConfig:
    """The model section of a config, with overrides `key=value`."""
    return config.load(name, overrides).model
