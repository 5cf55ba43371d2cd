"""Small checkpoints of every source, made by random numbers and our own tables."""

import dataclasses
import functools
import json
import zlib

import ml_dtypes
import numpy as np
from rich.console import Console

from emollama_jax import config
from emollama_jax.config import EmoLlamaConfig, MeshConfig
from tools.convert_torch import convert as conversion
from tools.convert_torch import facexformer, llama_vid, mtcnn, peft
from tools.convert_torch.engine import emit
from tools.convert_torch.export import export
from tools.convert_torch.sources import SOURCES

ONE = MeshConfig(data=1, fsdp=1, tensor=1)
DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
OVERRIDES = (
    *("llama.vocab_size=70", "llama.vocab_multiple=64", "llama.width=32", "llama.mlp_width=48"),
    *("llama.layers=3", "llama.heads=4", "llama.kv_heads=2", "llama.head_dim=8"),
    *("llama.lora.rank=2", "llama.lora.alpha=6.0", "vision.image_size=32", "vision.depth=2"),
    *("vision.width=32", "vision.mlp_width=40", "vision.heads=2", "qformer.encoder_width=32"),
    *("qformer.vocab_size=50", "qformer.width=24", "qformer.mlp_width=40", "qformer.heads=4"),
    *("face.swin.image_size=32", "face.swin.depths=[2, 2]", "face.swin.heads=[1, 2]"),
    *("face.width=32",),
)
# How each source is exported, and the files of that.
EXPORTED = {
    "llama": ("llama", "model.safetensors"),
    "llama-vid": ("llama-vid", "pytorch_model.bin"),
    "eva-vit": ("eva-vit", "eva_vit_g.pth"),
    "qformer": ("qformer", "qformer.pth"),
    "facexformer": ("facexformer", "model.pt"),
    "mtcnn": ("mtcnn", None),
    "peft": ("peft", "adapter_model.safetensors"),
}


@functools.cache
def toy_config(*overrides: str):
    """A whole run's config of the toy sizes."""
    return config.load("tiny", [f"model.{line}" for line in (*OVERRIDES, *overrides)])


def toy(*overrides: str) -> EmoLlamaConfig:
    """The toy model's sizes."""
    return toy_config(*overrides).model


def rows(source: str, model: EmoLlamaConfig):
    """The table in the naming that `export` writes."""
    every = model.qformer.cross_attention_every
    return {
        "llama": lambda: llama_vid.llama(model.llama),
        "llama-vid": lambda: llama_vid.llama_vid(model.llama, every),
        "eva-vit": lambda: llama_vid.eva_vit(),
        "qformer": lambda: llama_vid.qformer(every, llama_vid.LAVIS),
        "facexformer": lambda: facexformer.facexformer(model.face),
        "mtcnn": lambda: mtcnn.mtcnn(),
        "peft": lambda: peft.adapter(model.llama),
    }[source]()


def random(path: str, shape) -> np.ndarray:
    """Numbers that follow from a name."""
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    return rng.standard_normal(shape, dtype=np.float32)


def state_dict(source: str, model: EmoLlamaConfig, *, dtype=np.float32) -> dict[str, np.ndarray]:
    """A checkpoint's tensors."""
    shapes = conversion.shapes(SOURCES[source], model)
    tensors = emit(lambda path: random(path, shapes[path]), rows(source, model))
    return {key: value.astype(dtype) for key, value in tensors}


def to_torch(array):
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def from_torch(tensor):
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def save(state, path) -> None:
    """As a `.safetensors` or a PyTorch file; entries that are dicts are kept."""
    import torch
    from safetensors.numpy import save_file

    def tree(value):
        if isinstance(value, dict):
            return {key: tree(entry) for key, entry in value.items()}
        return to_torch(value) if isinstance(value, np.ndarray) else value

    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(tree(state), path)


def write(source: str, folder, model: EmoLlamaConfig, *, dtype=np.float32) -> dict[str, np.ndarray]:
    """Writes a source's checkpoint as its authors do; returns its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    state = state_dict(source, model, dtype=dtype)
    if source == "mtcnn":
        for name in mtcnn.LAYERS:
            start = f"{name}."
            part = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
            save(part, folder / f"{name}.pt")
        return state
    name = EXPORTED[source][1]
    wrapped = {
        "facexformer": lambda: {"state_dict_backbone": state, "optimizer": {"lr": 1.0}},
        "qformer": lambda: {"model": state},
    }.get(source, lambda: state)()
    save(wrapped, folder / name)
    if source == "peft":
        (folder / "adapter_config.json").write_text(json.dumps(peft.to_settings(model.llama)))
    return state


def read(source: str, folder) -> dict[str, np.ndarray]:
    """What `export` wrote, the tensors alone."""
    import torch
    from safetensors.numpy import load_file

    if source == "mtcnn":
        return {
            f"{name}.{key}": from_torch(value)
            for name in mtcnn.LAYERS
            for key, value in torch.load(folder / f"{name}.pt", weights_only=True).items()
        }
    path = folder / EXPORTED[source][1]
    if path.suffix == ".safetensors":
        return load_file(path)
    state = torch.load(path, weights_only=True)
    state = state.get("state_dict_backbone", state.get("model", state))
    return {key: from_torch(value) for key, value in state.items()}


def convert(source: str, paths, out, model: EmoLlamaConfig, *, dtype="f32", mesh=ONE):
    """The real converter."""
    paths = paths if isinstance(paths, list) else [paths]
    return conversion.convert(
        source, paths, out, dtype=dtype, model=model, mesh=mesh, console=Console(quiet=True)
    )


def write_back(to: str, src, out, **changes):
    """The real exporter."""
    how = {"base": (), "merge": True, "dtype": "source", "shard_gb": 5.0} | changes
    return export(to, src, out, console=Console(quiet=True), **how)


def replaced(model: EmoLlamaConfig, section: str, **fields) -> EmoLlamaConfig:
    """The model's config with fields of one section changed."""
    part = dataclasses.replace(getattr(model, section), **fields)
    return dataclasses.replace(model, **{section: part})
