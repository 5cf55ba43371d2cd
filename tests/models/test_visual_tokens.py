"""Visual tokens alone: pooling, the merge, float32 softmax, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax import config_content
from emollama_jax.batch import IMAGE_TOKEN, visual_places
from emollama_jax.errors import UserError
from emollama_jax.models.visual_tokens import VisualTokens, merge, pool
from tests.helpers import llama_vid_golden
from tools.convert_torch.golden import off


@pytest.mark.parametrize(
    ("kind", "patches", "n"),
    [("all", 256, 256), ("mean", 256, 1)]
    + [(f"grid:{g}", 256, n * n) for g, n in ((2, 2), (3, 3), (4, 4), (5, 5), (6, 8), (16, 16))]
    + [("grid:4", 576, 16)],
)
def test_content_tokens(kind, patches, n):
    assert config_content.tokens(kind, patches) == n
    assert pool(jnp.zeros((1, patches, 2)), kind).shape == (1, n, 2)


@pytest.mark.parametrize("g", [2, 3, 5, 6])
def test_pool_is_torch_average_pooling(g):
    torch = pytest.importorskip("torch", reason="torch is the reference (extra `convert`)")
    x = np.random.default_rng(g).standard_normal((2, 256, 3), dtype=np.float32)
    picture = torch.from_numpy(x).reshape(2, 16, 16, 3).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.avg_pool2d(picture, 16 // g).permute(0, 2, 3, 1)
    assert off(pool(jnp.asarray(x), f"grid:{g}"), wanted.reshape(2, -1, 3).numpy()) < 1e-6


def test_a_grid_finer_than_the_patches_is_refused():
    with pytest.raises(UserError, match=r"grid:5, but a frame has 4 × 4 patches"):
        config_content.tokens("grid:5", 16)


def test_encoder_width_must_fit():
    with pytest.raises(UserError, match=r"encoder_width is 32, but model.vision.width is 40"):
        VisualTokens(
            llama_vid_golden.TINY_QFORMER,
            visual_width=40,
            llm_width=8,
            dtype="float32",
            rngs=nnx.Rngs(0),
        )


def test_merge():
    ids = np.asarray([[1, IMAGE_TOKEN, IMAGE_TOKEN, 2], [IMAGE_TOKEN, 3, 4, 5], [6, 7, 8, 9]])
    embeds = -jnp.ones((3, 4, 1))
    visual = jnp.asarray([[10.0, 11], [20, 21], [30, 31]])[..., None]
    merged = merge(embeds, jnp.asarray(visual_places(ids)), visual)[..., 0]
    np.testing.assert_array_equal(merged, [[-1, 10, 11, -1], [20, -1, -1, -1], [-1] * 4])


def test_merge_beyond_the_visual_tokens_is_nan():
    ids = np.asarray([[IMAGE_TOKEN, IMAGE_TOKEN, 2]])
    merged = merge(jnp.zeros((1, 3, 1)), jnp.asarray(visual_places(ids)), jnp.ones((1, 1, 1)))[
        0, :, 0
    ]
    np.testing.assert_array_equal(merged, [1, np.nan, 0])


def test_context_softmax_is_float32_in_bfloat16():
    """bfloat16 inputs, float32 softmax and sum: within bfloat16's rounding of float32."""
    tokens = llama_vid_golden.fill(
        nnx.eval_shape(
            lambda: VisualTokens(
                llama_vid_golden.TINY_QFORMER,
                visual_width=32,
                llm_width=8,
                dtype="bfloat16",
                rngs=nnx.Rngs(0),
            )
        ),
        5,
    )
    patches = jnp.asarray(np.random.default_rng(0).standard_normal((2, 256, 32)), jnp.bfloat16)
    queries = jnp.asarray(np.random.default_rng(1).standard_normal((2, 4, 24)), jnp.bfloat16)
    jaxpr = str(jax.make_jaxpr(tokens.context)(patches, queries))
    exps = [line for line in jaxpr.splitlines() if "= exp" in line]
    assert exps and all(":f32[" in line for line in exps)
    assert tokens.context(patches, queries).dtype == jnp.bfloat16
