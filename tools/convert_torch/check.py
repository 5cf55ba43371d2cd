"""Proves the converter and the networks on golden files of the original PyTorch code.

golden files ─► state dict ─► real files, in each layout ─► the converter ─► a folder of ours
             ─► the network, filled from it ─► every golden array, or
             ─► (later layouts) bit for bit the first layout's leaves
"""

import json
import pathlib
import tempfile
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from safetensors.numpy import save_file

from emollama_jax import imported
from emollama_jax.config import MeshConfig
from emollama_jax.errors import UserError
from tools.convert_torch.convert import abstract_leaves, convert
from tools.convert_torch.golden_files import GoldenSet, Row, read_sets
from tools.convert_torch.sources import SOURCES

LAYOUTS = ("file", "bin-shards", "safetensors-shards", "safetensors")
SHARDS = 3
ONE_DEVICE = MeshConfig(data=1, fsdp=1, tensor=1)


def check(
    dir: pathlib.Path,
    *,
    seed: int,
    images: pathlib.Path | None,
    layouts: Sequence[str],
    console: Console,
) -> bool:
    """Converts the weights of golden files, runs the networks, and prints what differs.

    Args:
        dir: with any of facexformer.json and .npz, llama_vid.json and .npz, llama_vid_tiny.npz,
            mtcnn.json.
        seed: random seed of facexformer's weights and pictures.
        images: a folder of the pictures that mtcnn.json names, searched before the packages
            scikit-image and matplotlib.
        layouts: weight file layouts: "file", "bin-shards", "safetensors-shards", "safetensors".
            The first one's weights are run, the others' must be the same, bit for bit. MTCNN's are
            three PyTorch files, always.
        console: terminal for progress.

    Returns:
        Whether every array is within its limit.

    Raises:
        UserError: golden files that are absent or cannot be read.
    """
    if not layouts:
        raise UserError("--layouts: wanted at least one")
    sets = read_sets(dir, seed=seed, images=images)
    failed, total = [], 0
    _print("set", Row("array", "difference", "limit", True), verdict="")
    with jax.default_matmul_precision("highest"):
        for golden in sets:
            rows = _prove(golden, tuple(dict.fromkeys(layouts)), console)
            failed += [f"{golden.name} {row.array}" for row in rows if not row.ok]
            total += len(rows)
    if failed:
        print(f"{len(failed)} of {total} lines OFF: {', '.join(failed)}")
    else:
        print(f"all {total} lines ok")
    return not failed


def _print(name: str, row: Row, *, verdict: str | None = None) -> None:
    verdict = ("ok" if row.ok else "OFF") if verdict is None else verdict
    line = f"{name:<15} {row.array:<30} {row.difference:>22} {row.limit:>8}  {verdict}"
    print(line.rstrip(), flush=True)


def _prove(golden: GoldenSet, layouts: Sequence[str], console: Console) -> list[Row]:
    """Converts one set in each layout, compares, and prints as it goes."""
    rows: list[Row] = []

    def say(more: Sequence[Row]) -> None:
        for row in more:
            _print(golden.name, row)
        rows.extend(more)

    console.print(f"{golden.name}: making its weights", highlight=False)
    state = golden.state()
    first: dict[str, jax.Array] = {}
    for layout in layouts if golden.file else ("file",):
        console.print(f"{golden.name}: {layout}", highlight=False)
        try:
            values = _converted(golden, state, layout, console)
        except UserError as error:  # a layout that is refused is a failure, not the end
            say([Row(f"layout {layout}", " ".join(str(error).split()), "", False)])
            continue
        if not first:
            first = values
            say([Row(f"layout {layout}", f"{len(values)} leaves", "", True)])
            network = golden.network()
            _fill(network, values)
            say(golden.compare(network))
        else:
            say([_same(layout, values, first)])
    return rows


def _converted(
    golden: GoldenSet, state: Mapping, layout: str, console: Console
) -> dict[str, jax.Array]:
    """Writes PyTorch's files, converts them, and reads what was written as a run does."""
    with tempfile.TemporaryDirectory(prefix="emollama_check_") as name:
        theirs, ours = pathlib.Path(name, "theirs"), pathlib.Path(name, "ours")
        theirs.mkdir()
        _write(golden, state, layout, theirs)
        convert(
            golden.source,
            [theirs],
            ours,
            dtype="f32",
            model=golden.model,
            mesh=ONE_DEVICE,
            console=console,
        )
        leaves = abstract_leaves(SOURCES[golden.source], golden.model)
        shapes = {path: leaf.shape for path, leaf in leaves.items()}
        imported.check_base([ours], golden.model, shapes)
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = {
            path: jax.ShapeDtypeStruct(shape, np.float32, sharding=here)
            for path, shape in shapes.items()
        }
        return jax.block_until_ready(imported.load(ours, wanted))


def _fill(network: nnx.Module, values: Mapping[str, jax.Array]) -> None:
    """Gives an abstract network its numbers."""
    left = dict(values)
    for path, leaf in nnx.iter_graph(network):
        if isinstance(leaf, nnx.Param):
            leaf.set_value(left.pop("/".join(map(str, path))))
    if left:
        raise UserError(f"not in the network, but converted: {', '.join(left)}")


def _same(layout: str, values: Mapping[str, jax.Array], first: Mapping[str, jax.Array]) -> Row:
    """Whether every leaf is the first layout's, bit for bit."""
    other = [
        path
        for path, value in values.items()
        if not np.array_equal(np.asarray(value).view("u4"), np.asarray(first[path]).view("u4"))
    ]
    if other:
        what = f"{len(other)} of {len(values)} leaves differ ({other[0]} …)"
        return Row(f"layout {layout}", what, "bits", False)
    return Row(f"layout {layout}", f"{len(values)} leaves the same", "bits", True)


# --- PyTorch's files ------------------------------------------------------------------------------


def _write(golden: GoldenSet, state: Mapping, layout: str, folder: pathlib.Path) -> None:
    """Writes a state dict as PyTorch or `transformers` would."""
    if not golden.file:
        for name, part in state.items():
            _save_torch(_tensors(part), folder / f"{name}.pt")
    elif layout == "file":
        tensors = _tensors(state)
        whole = {golden.entry: tensors, "optimizer": {}} if golden.entry else tensors
        _save_torch(whole, folder / golden.file)
    elif layout == "safetensors":
        save_file(_contiguous(state), folder / "model.safetensors", metadata={"format": "pt"})
    elif layout == "bin-shards":
        _shards(state, folder, stem="pytorch_model", end=".bin")
    elif layout == "safetensors-shards":
        _shards(state, folder, stem="model", end=".safetensors")
    else:
        raise UserError(f"--layouts {layout}: unknown (known: {', '.join(LAYOUTS)})")


def _shards(state: Mapping[str, np.ndarray], folder: pathlib.Path, *, stem: str, end: str) -> None:
    """Several files of about the same size, and their index."""
    total = sum(array.nbytes for array in state.values())
    parts: list[dict[str, np.ndarray]] = [{} for _ in range(SHARDS)]
    before = 0
    for key, array in state.items():
        parts[min(before * SHARDS // total, SHARDS - 1)][key] = array
        before += array.nbytes
    files: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = f"{stem}-{number:05d}-of-{SHARDS:05d}{end}"
        files |= dict.fromkeys(part, name)
        if end == ".bin":
            _save_torch(_tensors(part), folder / name)
        else:
            save_file(_contiguous(part), folder / name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / f"{stem}{end}.index.json").write_text(json.dumps(index))


def _contiguous(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: np.ascontiguousarray(array) for key, array in state.items()}


def _tensors(state: Mapping[str, np.ndarray]) -> dict:
    """PyTorch's tensors."""
    torch = _torch()
    writable = {key: np.require(array, requirements="CW") for key, array in state.items()}
    return {key: torch.from_numpy(array) for key, array in writable.items()}


def _save_torch(tensors: Mapping, path: pathlib.Path) -> None:
    _torch().save(dict(tensors), path)


def _torch():
    try:
        import torch
    except ImportError:
        raise UserError("needs PyTorch: pip install 'emollama-jax[convert]'") from None
    return torch
