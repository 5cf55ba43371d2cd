"""Our weights for PyTorch: Hugging Face LLaMA, PEFT adapters, LLaMA-VID, FaceXFormer and the rest.

The tables are those of the import, read the other way. What a format has no place for (Face Info
Mining in LLaMA-VID, say) is named in the result. A folder appears when it is whole.
"""

import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from rich.console import Console

from emollama_jax import (
    checkpoint,
    config,
    config_weights,
    imported,
    runs,
)
from emollama_jax.config import EmoLlamaConfig
from emollama_jax.data.templates import TEMPLATE_FILE
from emollama_jax.errors import UserError
from emollama_jax.models.parameters import named_parameters
from emollama_jax.paths import as_path
from tools.convert_torch import facexformer, language, llama_vid, mtcnn, peft
from tools.convert_torch.convert import DTYPES, TOGETHER
from tools.convert_torch.engine import Row, emit
from tools.convert_torch.files import LANGUAGE
from tools.convert_torch.settings import to_transformers

Tensors = Iterator[tuple[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Ours:
    """Weights that can be exported: their config, their paths, and each by its path."""

    model: EmoLlamaConfig
    paths: tuple[str, ...]
    get: Callable[[str], np.ndarray]
    carried: Mapping[str, bytes]  # its tokenizer's files, by name


def open_ours(src: pathlib.Path, base: Iterable[pathlib.Path]) -> Ours:
    """Opens a run, or folders of weights.

    Args:
        src: a run of `emollama train`, `package`, or a folder that this tool wrote.
        base: more such folders.

    Raises:
        UserError: neither of the two, or folders that do not fit each other.
    """
    if runs.is_run(src):
        if extra := list(base):
            raise UserError(f"--base {extra[0]}: a run records its base; leave it out")
        whole = [f"{name}=float" for name in config.RUN_SETTINGS]  # no base in 8 bits
        cfg, model = checkpoint.load_for_inference(src, changes=whole)
        leaves = named_parameters(model)
        folders = config_weights.folders(cfg.weights)
        get = lambda path: np.asarray(leaves[path][...])  # noqa: E731
        return Ours(cfg.model, tuple(leaves), get, _carried(folders))
    folders = [src, *base]
    tree = config.to_dict(config.load("emollama_7b"))
    where: dict[str, pathlib.Path] = {}
    seen: dict[str, tuple[Any, pathlib.Path]] = {}
    for folder in folders:
        for section, fields in imported.read_manifest(folder).model.items():
            before, other = seen.setdefault(section, (fields, folder))
            if before != fields:
                raise UserError(f"{folder}: its {section} has other sizes than that of {other}")
            part = tree["model"]["llama"]["lora"] if section == "lora" else tree["model"][section]
            part.update(fields)
        for path in imported.leaves_of(folder):
            if path in where:
                raise UserError(f"{path}: both in {where[path]} and in {folder}: keep one of them")
            where[path] = folder
    model = config.from_dict(tree, origin=str(src)).model
    return Ours(model, tuple(where), _Reader(where).get, _carried(folders))


def _carried(folders: Iterable[epath.PathLike]) -> dict[str, bytes]:
    """The files of a tokenizer in folders of weights."""
    files = [as_path(folder) / name for folder in folders for name in (*LANGUAGE, TEMPLATE_FILE)]
    return {path.name: path.read_bytes() for path in files if path.exists()}


class _Reader:
    """Leaves of folders; small ones are read together with those that follow them."""

    def __init__(self, where: Mapping[str, pathlib.Path]):
        self._where = where
        self._held: dict[str, np.ndarray] = {}

    def get(self, path: str) -> np.ndarray:
        if path not in self._held:
            folder, size = self._where[path], 0
            leaves = imported.leaves_of(folder)
            paths = list(leaves)
            here = paths.index(path)
            together: list[str] = []
            for other in paths[here:] + paths[:here]:
                if other in self._held:
                    continue
                size += math.prod(leaves[other].shape) * leaves[other].dtype.itemsize
                if together and size > TOGETHER:
                    break
                together.append(other)
            while sum(value.nbytes for value in self._held.values()) > TOGETHER:
                self._held.pop(next(iter(self._held)))  # the oldest
            self._held |= imported.load_numpy(folder, together)
        return self._held[path]


def export(
    to: str,
    src: pathlib.Path,
    out: pathlib.Path,
    *,
    base: Iterable[pathlib.Path],
    merge: bool,
    dtype: str,
    shard_gb: float,
    console: Console,
) -> str:
    """Writes our weights in a format of PyTorch's.

    Args:
        to: name in `FORMATS`.
        src: as of `open_ours`.
        out: the folder, or for "ours" the file, to make; not there yet.
        base: as of `open_ours`.
        merge: fold LoRA into the kernels; else the adapters are left out.
        dtype: "bf16", "f32", or "source" for each leaf's own.
        shard_gb: size at which a file is closed and another begun.
        console: terminal for progress.

    Returns:
        What was written and what was left out, for a person.

    Raises:
        UserError: an unknown format, leaves that it needs and that are absent, or a folder that is
            there; nothing is left behind then.
    """
    if to not in FORMATS:
        raise UserError(f"export {to}: unknown format (known: {', '.join(FORMATS)})")
    if shard_gb <= 0:
        raise UserError(f"--shard-gb {shard_gb:g}: wanted more than 0")
    if out.exists():
        raise UserError(f"{out}: already exists: delete it, or choose another")
    with console.status(f"reading {src}"):
        ours = open_ours(src, base)
    rows = ROWS[to](ours)
    wanted = [path for row in rows for path in row.paths]
    if to == "peft" and not wanted:
        raise UserError(f"{src}: holds no LoRA adapters")
    if to in ("eva-vit", "llama-vid") and ours.model.vision.last_norm:
        raise UserError(
            f"{src}: its vision tower ends in a norm, as DINOv2's, for which {to} has no place: "
            "export ours"
        )
    absent = [path for path in wanted if path not in ours.paths]
    if absent:
        raise UserError(
            f"{src}: {to} needs {len(absent)} leaves that are not in it ({', '.join(absent[:3])} …)"
            ": give the folder that holds them with --base"
        )
    adapters = [path for path in ours.paths if path.endswith("lora_A")]
    get = ours.get
    if merge and adapters and to != "peft":
        get = _merged(ours, dtype=np.dtype(np.float32) if dtype == "f32" else None)
    tensors = _cast(emit(get, rows), dtype)
    partial = out.parent / f"{out.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        with console.status(f"writing {out}"):
            count, size = FORMATS[to](partial, tensors, ours, dtype, int(shard_gb * 1e9))
        whole = partial / "ours.safetensors" if to == "ours" else partial
        whole.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    read = {*wanted, *(path for path in ours.paths if get is not ours.get and "/lora_" in path)}
    left = sorted({path.split("/")[0] for path in set(ours.paths) - read if "/lora_" not in path})
    lines = [f"{out}: {count} tensors, {size / 1e9:.2f} GB"]
    if left:
        lines.append(f"note: {to} has no place for {', '.join(left)}: left out")
    if adapters and to in ("llama", "llama-vid"):
        lines.append("note: LoRA is " + ("folded into the kernels" if merge else "left out"))
    return "\n".join(lines)


def _merged(ours: Ours, *, dtype: np.dtype | None) -> Callable[[str], np.ndarray]:
    """Leaves with LoRA's update, summed in float32, in the kernels that it sits on.

    Args:
        ours: the leaves.
        dtype: dtype of those kernels; None for their own.
    """
    lora = ours.model.llama.lora

    def get(path: str) -> np.ndarray:
        value = ours.get(path)
        home = path.removesuffix("/kernel")
        if f"{home}/lora_A" not in ours.paths:
            return value
        a, b = (ours.get(f"{home}/lora_{side}") for side in "AB")
        merged = np.empty(value.shape, dtype or value.dtype)
        for layer in range(len(value)):
            update = a[layer].astype(np.float32) @ b[layer].astype(np.float32)
            update *= np.float32(lora.alpha / lora.rank)
            merged[layer] = value[layer].astype(np.float32) + update
        return merged

    return get


def _cast(tensors: Tensors, dtype: str) -> Tensors:
    if dtype == "source":
        return tensors
    wanted = np.dtype(jax.dtypes.canonicalize_dtype(DTYPES[dtype]))
    return ((key, value.astype(wanted)) for key, value in tensors)


def _shards(tensors: Tensors, limit: int) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    size = 0
    for key, value in tensors:
        if shard and size + value.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[key] = value
        size += value.nbytes
    yield shard


def _sharded(
    folder: pathlib.Path,
    tensors: Tensors,
    limit: int,
    *,
    stem: str,
    suffix: str,
    save: Callable[[dict[str, np.ndarray], pathlib.Path], None],
) -> tuple[int, int]:
    """Files of at most `limit` bytes and their index; no index where one file is enough."""
    held: list[tuple[pathlib.Path, list[str]]] = []
    total = 0
    for number, shard in enumerate(_shards(tensors, limit), 1):
        path = folder / f"{stem}-{number:05d}{suffix}"
        save(shard, path)
        held.append((path, list(shard)))
        total += sum(value.nbytes for value in shard.values())
    if len(held) == 1:
        held[0][0].rename(folder / f"{stem}{suffix}")
    else:
        where = {}
        for number, (path, keys) in enumerate(held, 1):
            name = f"{stem}-{number:05d}-of-{len(held):05d}{suffix}"
            path.rename(folder / name)
            where |= dict.fromkeys(keys, name)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index, indent=2))
    return sum(len(keys) for _, keys in held), total


def _save_safetensors(tensors: Mapping[str, np.ndarray], path: pathlib.Path) -> None:
    from safetensors.numpy import save_file

    save_file(dict(tensors), path, metadata={"format": "pt"})  # transformers asks for the format


def _save_torch(tree: Mapping[str, Any], path: pathlib.Path) -> None:
    """A dict of arrays, or of dicts of them, as PyTorch's own file."""
    import torch

    def tensor(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: tensor(entry) for key, entry in value.items()}
        if value.dtype.name == "bfloat16":
            return torch.from_numpy(np.array(value).view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(np.array(value))  # a copy: PyTorch wants memory that it may write

    torch.save(tensor(tree), path)


def _llama(
    folder: pathlib.Path, tensors: Tensors, ours: Ours, dtype: str, limit: int
) -> tuple[int, int]:
    kernel = ours.get("llama/norm/scale").dtype.name
    written = {"source": kernel}.get(dtype, DTYPES[dtype])
    settings = to_transformers(ours.model, dtype=written) | language.stops(ours.carried)
    for name in LANGUAGE:
        if name in ours.carried:
            (folder / name).write_bytes(ours.carried[name])
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    return _sharded(
        folder, tensors, limit, stem="model", suffix=".safetensors", save=_save_safetensors
    )


def _llama_vid(
    folder: pathlib.Path, tensors: Tensors, ours: Ours, dtype: str, limit: int
) -> tuple[int, int]:
    """PyTorch shards with an index: the original's loader reads nothing else."""
    model = ours.model
    size = model.vision.image_size
    settings = to_transformers(model, dtype=DTYPES[dtype] if dtype != "source" else "float16") | {
        "architectures": ["LlavaLlamaAttForCausalLM"],
        "model_type": "llava",
        "mm_vision_tower": "./model_zoo/LAVIS/eva_vit_g.pth",
        "image_processor": f"./llamavid/processor/clip-patch14-{size}",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": model.vision.width,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "bert_type": "qformer_pretrain",
        "num_query": model.qformer.queries,
        "compress_type": None if model.content == "all" else model.content,
        "image_aspect_ratio": "pad",
        "tokenizer_model_max_length": 2048,
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    return _sharded(folder, tensors, limit, stem="pytorch_model", suffix=".bin", save=_save_torch)


def _peft(
    folder: pathlib.Path, tensors: Tensors, ours: Ours, dtype: str, limit: int
) -> tuple[int, int]:
    held = dict(tensors)
    _save_safetensors(held, folder / "adapter_model.safetensors")
    settings = peft.to_settings(ours.model.llama)
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2))
    return _count(held)


def _one_file(
    name: str, wrap: Callable[[dict[str, np.ndarray], Ours], Mapping[str, Any]]
) -> Callable[..., tuple[int, int]]:
    """A format of one PyTorch file."""

    def write(
        folder: pathlib.Path, tensors: Tensors, ours: Ours, dtype: str, limit: int
    ) -> tuple[int, int]:
        held = dict(tensors)
        _save_torch(wrap(held, ours), folder / name)
        return _count(held)

    return write


def _facexformer(held: dict[str, np.ndarray], ours: Ours) -> Mapping[str, Any]:
    return {facexformer.CHECKPOINT_KEY: held | facexformer.unread(ours.model.face)}


def _mtcnn(
    folder: pathlib.Path, tensors: Tensors, ours: Ours, dtype: str, limit: int
) -> tuple[int, int]:
    held = dict(tensors)
    for network in mtcnn.LAYERS:
        start = f"{network}."
        state = {k.removeprefix(start): v for k, v in held.items() if k.startswith(start)}
        _save_torch(state, folder / f"{network}.pt")
    return _count(held)


def _ours(
    folder: pathlib.Path, tensors: Tensors, ours: Ours, dtype: str, limit: int
) -> tuple[int, int]:
    held = dict(tensors)
    _save_safetensors(held, folder / "ours.safetensors")
    return _count(held)


def _count(held: Mapping[str, np.ndarray]) -> tuple[int, int]:
    return len(held), sum(value.nbytes for value in held.values())


def _adapters(ours: Ours) -> list[Row]:
    rows = peft.adapter(ours.model.llama)
    return [row for row in rows if row.paths[0] in ours.paths]


ROWS: dict[str, Callable[[Ours], list[Row]]] = {
    "llama": lambda ours: llama_vid.llama(ours.model.llama),
    "peft": _adapters,
    "llama-vid": lambda ours: llama_vid.llama_vid(
        ours.model.llama, ours.model.qformer.cross_attention_every
    ),
    "eva-vit": lambda ours: llama_vid.eva_vit(),
    "qformer": lambda ours: llama_vid.qformer(
        ours.model.qformer.cross_attention_every, llama_vid.LAVIS
    ),
    "facexformer": lambda ours: facexformer.facexformer(ours.model.face),
    "mtcnn": lambda ours: mtcnn.mtcnn(),
    "ours": lambda ours: [Row(path, path) for path in sorted(ours.paths)],
}
FORMATS: dict[str, Callable[..., tuple[int, int]]] = {
    "llama": _llama,
    "peft": _peft,
    "llama-vid": _llama_vid,
    "eva-vit": _one_file("eva_vit_g.pth", lambda held, ours: held),
    "qformer": _one_file("qformer.pth", lambda held, ours: {"model": held}),
    "facexformer": _one_file("model.pt", _facexformer),
    "mtcnn": _mtcnn,
    "ours": _ours,
}
