"""LLaMA-VID as the golden files have it: configs and filled networks."""

import dataclasses
import functools
import json
import pathlib
import zlib

import jax.numpy as jnp
import numpy as np
from flax import nnx

from emollama_jax.config import EvaVitConfig, LlamaConfig, LoraConfig, QFormerConfig
from tools.convert_torch import engine
from tools.convert_torch.golden import LlamaVid, tensor
from tools.convert_torch.llama_vid import BUFFERS, llama_vid

FOLDER = pathlib.Path(__file__).parent.parent / "golden"
WHOLE, LAYER = 5e-5, 1e-5  # tolerances, relative to the largest value
NO_LORA = LoraConfig(rank=0, alpha=1.0, dropout=0.0, targets=())
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HOW = {"dtype": "float32", "remat": "none"}

TINY_LLAMA = LlamaConfig(
    vocab_size=200,
    vocab_multiple=1,
    width=48,
    mlp_width=96,
    layers=2,
    heads=4,
    kv_heads=4,
    head_dim=12,
    norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=1.0,
    rope_llama3=None,
    max_positions=512,
    tied=False,
    attention="xla",
    lora=NO_LORA,
    **HOW,
)
TINY_VISION = EvaVitConfig(
    image_size=28,
    patch_size=7,
    width=32,
    depth=2,
    heads=2,
    mlp_width=139,
    norm_eps=1e-6,
    last_norm=False,
    image_mean=CLIP_MEAN,
    image_std=CLIP_STD,
    attention="xla",
    **HOW,
)
TINY_QFORMER = QFormerConfig(
    vocab_size=60,
    width=24,
    layers=4,
    heads=4,
    mlp_width=40,
    max_positions=64,
    encoder_width=32,
    encoder_norm_eps=1e-5,
    cross_attention_every=2,
    queries=4,
    norm_eps=1e-12,
    dropout=0.1,
    **HOW,
)
REAL_LLAMA = dataclasses.replace(
    TINY_LLAMA, vocab_size=1000, width=256, mlp_width=688, heads=8, kv_heads=8, head_dim=32
)
REAL_VISION = dataclasses.replace(
    TINY_VISION, image_size=224, patch_size=14, width=1408, heads=16, mlp_width=6144
)
REAL_QFORMER = dataclasses.replace(
    TINY_QFORMER,
    vocab_size=30523,
    width=768,
    heads=12,
    mlp_width=3072,
    max_positions=512,
    encoder_width=1408,
    queries=32,
)


def build(llama: LlamaConfig, vision: EvaVitConfig, qformer: QFormerConfig, tensors) -> LlamaVid:
    """The networks, filled from a state dict through the weight table."""
    model = nnx.eval_shape(lambda: LlamaVid(llama, vision, qformer))
    rows = llama_vid(llama, qformer.cross_attention_every)
    engine.assign(model, tensors, rows, ignore=BUFFERS)
    return model


@functools.cache
def tiny_arrays() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "llama_vid_tiny.npz") as file:
        return dict(file)


def tiny_state_dict() -> dict[str, np.ndarray]:
    arrays = tiny_arrays()
    return {key[3:]: arrays[key] for key in arrays if key.startswith("sd/")}


def tiny_model(llama=TINY_LLAMA, vision=TINY_VISION, qformer=TINY_QFORMER) -> LlamaVid:
    return build(llama, vision, qformer, tiny_state_dict())


def real_manifest() -> dict:
    return json.loads((FOLDER / "llama_vid.json").read_text())


def real_state_dict() -> dict[str, np.ndarray]:
    """The state dict of `llama_vid.npz`, integer buffers left out."""
    entries = real_manifest()["state_dict"].items()
    return {
        key: tensor(key, tuple(entry["shape"]), 21)
        for key, entry in entries
        if entry["dtype"].startswith("float")
    }


def fill(module: nnx.Module, seed: int) -> nnx.Module:
    """Gives an abstract module weights by path, large enough for every part to show.

    Norm scales are around 1, biases around 0, the rest is divided by the root of its fan-in.
    """
    for path, leaf in nnx.iter_graph(module):
        if not isinstance(leaf, nnx.Param):
            continue
        *_, name = path
        rng = np.random.default_rng([seed, zlib.crc32("/".join(map(str, path)).encode())])
        x = rng.standard_normal(leaf.shape, dtype=np.float32)
        if name == "scale":
            x = 1 + 0.1 * x
        elif "bias" in str(name) or leaf.ndim == 1:
            x = 0.1 * x
        else:
            x = x / np.sqrt(leaf.shape[-3 if name == "qkv" else -2])
        leaf.set_value(jnp.asarray(x, leaf.dtype))
    return module


def parameters(module: nnx.Module) -> dict[str, nnx.Param]:
    leaves = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {"/".join(map(str, path)): leaf for path, leaf in leaves}
