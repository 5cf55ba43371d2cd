"""EVA-ViT: against the original and `transformers`' InstructBLIP tower, sizes, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax import config
from emollama_jax.errors import UserError
from emollama_jax.models.eva_vit import EvaVit
from emollama_jax.models.layers import normalise
from emollama_jax.models.rngs import abstract
from tests.helpers import llama_vid_golden
from tests.helpers.llama_vid_golden import LAYER, WHOLE
from tools.convert_torch import engine
from tools.convert_torch.golden import off, pixels
from tools.convert_torch.llama_vid import eva_vit


def test_tiny_is_the_original():
    a = llama_vid_golden.tiny_arrays()
    assert (
        off(llama_vid_golden.tiny_model().vision(pixels(a["pixel_video"])), a["eva_video"]) < WHOLE
    )


RENAMED = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "blocks.": "encoder.layers.",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
}


def their_state_dict(tensors, depth):
    """EVA's keys → InstructBLIP's; q and v biases become one with zeros for k."""
    renamed = {}
    for key, value in tensors.items():
        if not key.endswith(("q_bias", "v_bias")):
            for old, new in RENAMED.items():
                key = key.replace(old, new)
            renamed[key] = value
    for i in range(depth):
        q, v = (tensors[f"blocks.{i}.attn.{name}_bias"] for name in "qv")
        bias = np.concatenate([q, np.zeros_like(q), v])
        renamed[f"encoder.layers.{i}.self_attn.qkv.bias"] = bias
    return renamed


class Holder(nnx.Module):
    """Weight tables name the network `vision`."""

    def __init__(self, cfg):
        self.vision = EvaVit(cfg, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("depth", "tolerance"), [(1, LAYER), (3, WHOLE)])
def test_transformers(depth, tolerance):
    torch = pytest.importorskip("torch", reason="torch is the reference (extra `convert`)")
    transformers = pytest.importorskip("transformers")
    from tests.helpers.torch_models import vision_settings

    cfg = dataclasses.replace(llama_vid_golden.TINY_VISION, depth=depth)
    holder = llama_vid_golden.fill(nnx.eval_shape(lambda: Holder(cfg)), 2)
    theirs = transformers.InstructBlipVisionModel(
        transformers.InstructBlipVisionConfig(**vision_settings(cfg), attn_implementation="eager")
    ).eval()
    tensors = their_state_dict(engine.extract(holder, eva_vit()), depth)
    result = theirs.load_state_dict(
        {key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}, strict=False
    )
    assert not result.unexpected_keys
    assert all(key.startswith("post_layernorm.") for key in result.missing_keys)
    x = np.random.default_rng(0).standard_normal((2, 3, 28, 28), dtype=np.float32)
    with torch.no_grad():  # `last_hidden_state` has a final norm that LLaMA-VID does not have
        wanted = theirs(pixel_values=torch.from_numpy(x), output_hidden_states=True)
    got = holder.vision(pixels(x))
    assert off(got, wanted.hidden_states[-1].numpy()) < tolerance


def test_normalise():
    frames = jnp.asarray([[[[0, 128, 255]]]], jnp.uint8)
    got = normalise(frames, llama_vid_golden.CLIP_MEAN, llama_vid_golden.CLIP_STD)
    assert got.dtype == jnp.float32
    wanted = [
        (value / 255 - mean) / std
        for value, mean, std in zip(
            (0, 128, 255), llama_vid_golden.CLIP_MEAN, llama_vid_golden.CLIP_STD, strict=True
        )
    ]
    np.testing.assert_allclose(got[0, 0, 0], wanted, rtol=1e-6)


def test_k_has_no_bias():
    names = set(llama_vid_golden.parameters(llama_vid_golden.tiny_model().vision))
    assert {name for name in names if "bias" in name and "attn" in name} == {
        "blocks/attn/q_bias",
        "blocks/attn/v_bias",
        "blocks/attn/proj/bias",
    }


def test_frames_are_independent():
    """What stands beside a frame in the batch does not touch it."""
    model = llama_vid_golden.tiny_model().vision
    frames = pixels(llama_vid_golden.tiny_arrays()["pixel_video"])
    assert off(model(frames)[1:2], model(frames[1:2])) < 1e-6


def test_real_size():
    """39 blocks, 985.9 M parameters; axes name every dimension."""
    cfg = config.load("emollama_7b").model.vision
    model = abstract(lambda rngs: EvaVit(cfg, rngs=rngs))
    leaves = llama_vid_golden.parameters(model)
    assert sum(leaf.size for leaf in leaves.values()) == 985_894_528
    assert leaves["blocks/attn/qkv"].shape == (39, 1408, 3, 1408)
    for path, leaf in leaves.items():
        assert len(leaf.axes) == leaf.ndim, path
        assert (leaf.axes[0] == "layers") == path.startswith("blocks/"), path
    graphdef, state = nnx.split(model)
    pixels = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    y = jax.eval_shape(lambda s, x: nnx.merge(graphdef, s)(x), state, pixels)
    assert (y.shape, y.dtype) == ((2, 257, 1408), jnp.bfloat16)


@pytest.mark.parametrize("change", [{"patch_size": 5}, {"heads": 5}])
def test_refusals(change):
    with pytest.raises(UserError, match="patch_size must divide image_size, heads width"):
        EvaVit(dataclasses.replace(llama_vid_golden.TINY_VISION, **change), rngs=nnx.Rngs(0))
