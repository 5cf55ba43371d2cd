"""LLaMA-VID as the golden files have it: configs, filled networks, the original's data flow."""

import dataclasses
import functools
import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from golden import det_weights

from emollama_jax.batch import IGNORE, IMAGE_TOKEN
from emollama_jax.config import EvaVitConfig, LlamaConfig, LoraConfig, QFormerConfig
from emollama_jax.models.eva_vit import EvaVit
from emollama_jax.models.llama import Llama
from emollama_jax.models.qformer import QFormer
from emollama_jax.models.visual_tokens import VisualTokens, merge
from tools.convert_torch import engine
from tools.convert_torch.llama_vid import BUFFERS, llama_vid

FOLDER = pathlib.Path(__file__).parent / "golden"
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
    max_positions=512,
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
    image_mean=CLIP_MEAN,
    image_std=CLIP_STD,
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


class LlamaVid(nnx.Module):
    """The networks under the names that `EmoLlama` gives them."""

    def __init__(self, llama: LlamaConfig, vision: EvaVitConfig, qformer: QFormerConfig):
        rngs = nnx.Rngs(0)
        self.llama = Llama(llama, rngs=rngs)
        self.vision = EvaVit(vision, rngs=rngs)
        self.qformer = QFormer(qformer, rngs=rngs)
        self.visual_tokens = VisualTokens(
            qformer,
            visual_width=vision.width,
            llm_width=llama.width,
            dtype=llama.dtype,
            rngs=rngs,
        )

    def frame_tokens(self, visual, text, text_mask, *, kind):
        """[F, 1 + P, D], each frame under its question [F, L] → [F, 1 + n, H]."""
        queries = self.qformer(self.visual_tokens.ln(visual), text=text, text_mask=text_mask)
        patches = visual[:, 1:]
        context = self.visual_tokens.context(patches, queries)
        return jnp.concatenate([context, self.visual_tokens.content(patches, kind=kind)], axis=1)

    def read(self, ids, visual):
        """Expanded ids [B, T] and visual tokens [B, V, H] → logits [B, T, V]."""
        embeds = merge(self.llama.embed(ids), ids, visual)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        return self.llama.logits(self.llama(embeds, positions=positions).hidden)


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
        key: det_weights.tensor(key, tuple(entry["shape"]), 21)
        for key, entry in entries
        if entry["dtype"].startswith("float")
    }


def jitted(module: nnx.Module, function):
    """`function(module, *args)` compiled as one, without its first argument."""
    graphdef, state = nnx.split(module)
    compiled = jax.jit(lambda state, *args: function(nnx.merge(graphdef, state), *args))
    return functools.partial(compiled, state)


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


def pixels(x: np.ndarray) -> jax.Array:
    """Channels first → last."""
    return jnp.asarray(np.moveaxis(x, -3, -1))


def expand(ids: np.ndarray, values: np.ndarray, tokens: int) -> np.ndarray:
    """Repeats what stands beside an IMAGE_TOKEN, once per visual token of its block."""
    return np.repeat(values, np.where(ids == IMAGE_TOKEN, tokens, 1))


def expand_labels(ids: np.ndarray, labels: np.ndarray, tokens: int) -> np.ndarray:
    """Labels of the expanded ids: none on visual tokens."""
    return expand(ids, np.where(ids == IMAGE_TOKEN, IGNORE, labels), tokens)


def loss(logits, labels) -> float:
    """Mean cross-entropy of the next token over what is not ignored, in float64."""
    logits, labels = np.asarray(logits, np.float64)[:, :-1], labels[:, 1:]
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    kept = labels != IGNORE
    chosen = np.take_along_axis(log_p, np.where(kept, labels, 0)[..., None], -1)[..., 0]
    return float(-chosen[kept].mean())


def off(actual, wanted) -> float:
    """The largest difference, relative to the largest value wanted."""
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    assert actual.shape == wanted.shape, f"{actual.shape} is not {wanted.shape}"
    return float(np.abs(actual - wanted).max() / np.abs(wanted).max())
