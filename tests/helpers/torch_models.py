"""PyTorch models with random weights on the disk, and our networks out of what is converted."""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from emollama_jax import config, imported
from emollama_jax.config import EmoLlamaConfig, EvaVitConfig, LlamaConfig, MeshConfig, QFormerConfig
from emollama_jax.models.eva_vit import EvaVit
from emollama_jax.models.layers import LayerNorm
from emollama_jax.models.llama import Llama
from emollama_jax.models.parameters import named_parameters
from emollama_jax.models.qformer import MASKED, QFormer
from tests.helpers.llama_vid_golden import WHOLE
from tools.convert_torch import convert as conversion
from tools.convert_torch.golden import jitted, off, pixels

torch = pytest.importorskip("torch", reason="PyTorch is the reference (extra `parity`)")
transformers = pytest.importorskip("transformers", reason="its classes are the reference")

ONE = MeshConfig(data=1, fsdp=1, tensor=1)


def sized(
    *, llama: dict | None = None, vision: dict | None = None, qformer: dict | None = None
) -> EmoLlamaConfig:
    """The tiny model's config with fields of its networks changed."""
    tiny = config.load("tiny").model
    return dataclasses.replace(
        tiny,
        llama=dataclasses.replace(tiny.llama, **llama or {}),
        vision=dataclasses.replace(tiny.vision, **vision or {}),
        qformer=dataclasses.replace(tiny.qformer, **qformer or {}),
    )


# 16 patches; a Q-Former in groups of two. Its vision norm is that of `transformers`' tower.
MODEL = sized(
    vision=dict(
        image_size=28, patch_size=7, width=32, depth=3, heads=2, mlp_width=44, norm_eps=1e-6
    ),
    qformer=dict(
        vocab_size=60,
        width=24,
        layers=4,
        heads=4,
        mlp_width=40,
        max_positions=16,
        encoder_width=32,
        encoder_norm_eps=1e-6,
        cross_attention_every=2,
        queries=5,
    ),
)


def randomise(model, seed: int):
    """Gives a PyTorch model weights that are large enough for every part to show.

    Norms are around 1, biases around 0, kernels are divided by the root of their fan-in, embeddings
    are not. EVA-ViT's bias of q, k and v has nothing for k.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            x = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                x = 0.2 * x + name.endswith("weight")
            elif name.endswith("weight") and ("embed" not in name or "patch_embedding" in name):
                x = x / math.sqrt(parameter[0].numel())
            if name.endswith("qkv.bias"):
                x[len(x) // 3 : 2 * len(x) // 3] = 0
            parameter.copy_(x)
    return model.eval()


def vision_settings(cfg: EvaVitConfig) -> dict:
    """Of `transformers`' BLIP-2 and InstructBLIP towers."""
    return dict(
        hidden_size=cfg.width,
        intermediate_size=cfg.mlp_width,
        num_hidden_layers=cfg.depth,
        num_attention_heads=cfg.heads,
        image_size=cfg.image_size,
        patch_size=cfg.patch_size,
        layer_norm_eps=cfg.norm_eps,
    )


def qformer_settings(cfg: QFormerConfig) -> dict:
    """Of `transformers`' BLIP-2 and InstructBLIP Q-Formers."""
    return dict(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.width,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        intermediate_size=cfg.mlp_width,
        max_position_embeddings=cfg.max_positions,
        layer_norm_eps=cfg.norm_eps,
        cross_attention_frequency=cfg.cross_attention_every,
        pad_token_id=0,
    )


def text_settings():
    """A language model that nobody reads."""
    return transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )


# --- ours ----------------------------------------------------------------------------------------


class Language(nnx.Module):
    """What the source `llama` fills, under `EmoLlama`'s names."""

    def __init__(self, cfg: LlamaConfig):
        self.llama = Llama(cfg, rngs=nnx.Rngs(0))

    def logits(self, ids: jax.Array, positions: jax.Array) -> jax.Array:
        return self.llama.logits(self.llama(self.llama.embed(ids), positions=positions).hidden)


class Tower(nnx.Module):
    """What the source `eva-vit` fills."""

    def __init__(self, cfg: EvaVitConfig):
        self.vision = EvaVit(cfg, rngs=nnx.Rngs(0))


class Queries(nnx.Module):
    """What the source `qformer` fills."""

    def __init__(self, cfg: QFormerConfig):
        rngs = nnx.Rngs(0)
        self.qformer = QFormer(cfg, rngs=rngs)
        norm = LayerNorm(cfg.encoder_width, eps=cfg.encoder_norm_eps, rngs=rngs)
        self.visual_tokens = nnx.Dict(ln=norm)

    def read(self, visual: jax.Array, text: jax.Array, mask: jax.Array) -> jax.Array:
        encoded = self.visual_tokens.ln(visual)
        return self.qformer(encoded, text=text, text_mask=mask)


def convert(source: str, path: pathlib.Path, out: pathlib.Path, model: EmoLlamaConfig = MODEL):
    """The real converter; returns its summary."""
    return conversion.convert(
        source, [path], out, dtype="f32", model=model, mesh=ONE, console=Console(quiet=True)
    )


def leaves(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Everything that a folder of weights holds."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
        for path, leaf in imported.leaves_of(folder).items()
    }
    return {path: np.asarray(value) for path, value in imported.load(folder, wanted).items()}


def filled(module, cfg, folder: pathlib.Path):
    """A network of which every parameter comes from a folder, and the folder holds no others."""
    network = nnx.eval_shape(lambda: module(cfg))
    parameters, values = named_parameters(network), leaves(folder)
    assert parameters.keys() == values.keys()
    for path, leaf in parameters.items():
        assert values[path].shape == leaf.shape, path
        assert values[path].dtype == np.float32, path
        leaf.set_value(jnp.asarray(values[path]))
    return network


def partly_filled(module, cfg, folder: pathlib.Path):
    """A network with what a folder holds, and zeros for the rest."""
    network = nnx.eval_shape(lambda: module(cfg))
    values = leaves(folder)
    for path, leaf in named_parameters(network).items():
        leaf.set_value(jnp.asarray(values.pop(path, np.zeros(leaf.shape, np.float32))))
    assert values == {}
    return network


def assert_same(folder: pathlib.Path, other: pathlib.Path) -> None:
    """Two folders hold the same leaves, bit for bit."""
    one, two = leaves(folder), leaves(other)
    assert one.keys() == two.keys()
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf.view(np.uint32), two[path].view(np.uint32), path)


def assert_close(got, wanted) -> None:
    """Within the tolerance of a whole network, relative to the largest value."""
    assert off(got, wanted) < WHOLE


def run_tower(folder: pathlib.Path, cfg: EvaVitConfig, x: np.ndarray) -> np.ndarray:
    """Our tower with a folder's weights on pixels, channels first."""
    tower = filled(Tower, cfg, folder)
    return np.asarray(jitted(tower, lambda tower, x: tower.vision(x))(pixels(x)))


def run_queries(folder: pathlib.Path, cfg: QFormerConfig, visual, text, mask) -> np.ndarray:
    """Our Q-Former with a folder's weights on vision tokens that are not normed yet."""
    run = jitted(filled(Queries, cfg, folder), Queries.read)
    return np.asarray(run(jnp.asarray(visual), jnp.asarray(text, jnp.int32), jnp.asarray(mask)))


def text_alone(network: Queries, text: jax.Array, mask: jax.Array) -> list[jax.Array]:
    """BERT's hidden states out of the Q-Former's layers: text without queries."""
    qformer = network.qformer
    x = qformer.word_embeddings[...][text] + qformer.position_embeddings[: text.shape[1]]
    states = [qformer.norm(x)]
    bias = jnp.where(mask, 0.0, MASKED)
    graphdef, stacked = nnx.split(qformer.groups)
    for i in range(qformer.cfg.layers // qformer.cfg.cross_attention_every):
        group = nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], stacked))
        for layer in (group.cross, *group.plain):
            x = layer.attention(states[-1], keys=states[-1], bias=bias, dropout_key=None)
            states.append(layer.text_ffn(x, dropout_key=None))
    return states
