"""Q-Former: against the original and `transformers`' InstructBLIP, masks, dropout, sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax import config
from emollama_jax.errors import UserError
from emollama_jax.models.qformer import QFormer
from emollama_jax.models.rngs import abstract
from tests.helpers import llama_vid_golden
from tests.helpers.llama_vid_golden import LAYER, WHOLE
from tools.convert_torch import engine
from tools.convert_torch.golden import off, pixels
from tools.convert_torch.llama_vid import INSTRUCT_BLIP, qformer

CFG = llama_vid_golden.TINY_QFORMER


class Holder(nnx.Module):
    """Weight tables name the network `qformer`."""

    def __init__(self, cfg):
        self.qformer = QFormer(cfg, rngs=nnx.Rngs(0))


def holder(cfg, seed=4):
    return llama_vid_golden.fill(nnx.eval_shape(lambda: Holder(cfg)), seed)


def inputs(cfg=CFG):
    """Vision tokens and two questions, of 7 and 4 tokens."""
    rng = np.random.default_rng(0)
    encoded = rng.standard_normal((2, 17, cfg.encoder_width), dtype=np.float32)
    text = rng.integers(0, cfg.vocab_size, (2, 7))
    return encoded, text, np.arange(7) < np.asarray([[7], [4]])


def run(model, encoded, text, mask, key=None):
    return model(
        jnp.asarray(encoded),
        text=jnp.asarray(text, jnp.int32),
        text_mask=jnp.asarray(mask),
        dropout_key=key,
    )


def test_tiny_is_the_original():
    a, model = llama_vid_golden.tiny_arrays(), llama_vid_golden.tiny_model()
    encoded = model.visual_tokens.ln(model.vision(pixels(a["pixel_video"])))
    text, mask = (
        np.repeat(a[f"bert_{name}_video"], encoded.shape[0], 0) for name in ("ids", "mask")
    )
    got = run(model.qformer, encoded, text, mask.astype(bool))
    assert off(got, a["qformer_video"]) < WHOLE


@pytest.mark.parametrize(
    ("layers", "every", "tolerance"),
    [(1, 1, LAYER), (2, 1, WHOLE), (4, 2, WHOLE), (3, 3, WHOLE)],
)
def test_transformers(layers, every, tolerance):
    torch = pytest.importorskip("torch", reason="torch is the reference (extra `convert`)")
    transformers = pytest.importorskip("transformers")
    from tests.helpers.torch_models import qformer_settings

    cfg = dataclasses.replace(CFG, layers=layers, cross_attention_every=every)
    ours = holder(cfg)
    theirs = transformers.InstructBlipQFormerModel(
        transformers.InstructBlipQFormerConfig(
            **qformer_settings(cfg),
            encoder_hidden_size=cfg.encoder_width,
            attn_implementation="eager",
        )
    ).eval()
    rows = [row for row in qformer(every, INSTRUCT_BLIP) if row.torch.startswith("qformer.")]
    tensors = {
        key.removeprefix("qformer."): value for key, value in engine.extract(ours, rows).items()
    }
    theirs.load_state_dict(
        {key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}
    )
    encoded, text, mask = inputs(cfg)
    query = np.repeat(np.asarray(ours.qformer.query[...])[None], 2, 0)
    seen = np.concatenate([np.ones((2, cfg.queries), bool), mask], 1)
    with torch.no_grad():
        wanted = theirs(
            input_ids=torch.from_numpy(text),
            attention_mask=torch.from_numpy(seen.astype(np.int64)),
            query_embeds=torch.from_numpy(query),
            encoder_hidden_states=torch.from_numpy(encoded),
        ).last_hidden_state[:, : cfg.queries]
    assert off(run(ours.qformer, encoded, text, mask), wanted.numpy()) < tolerance


def test_padding_is_not_read():
    model = holder(CFG).qformer
    encoded, text, mask = inputs()
    plain = np.asarray(run(model, encoded, text, mask))
    np.testing.assert_array_equal(
        plain, np.asarray(run(model, encoded, np.where(mask, text, 9), mask))
    )
    longer = [np.pad(x, ((0, 0), (0, 5))) for x in (text, mask)]
    assert off(run(model, encoded, *longer), plain) < 1e-6
    assert off(run(model, encoded, text, np.ones_like(mask)), plain) > 1e-2


def test_last_text_feed_forward_has_no_gradient():
    """As in the original: the only parameters of the network that reach nothing."""
    graphdef, state = nnx.split(holder(CFG).qformer)
    weights = jnp.asarray(np.random.default_rng(2).standard_normal((2, CFG.queries, CFG.width)))

    def total(state):
        return (run(nnx.merge(graphdef, state), *inputs()) * weights).sum()

    gradient = nnx.to_flat_state(jax.jit(jax.grad(total))(state))
    last = CFG.layers // CFG.cross_attention_every - 1
    for path, leaf in gradient:
        name, value = "/".join(map(str, path)), np.asarray(leaf[...])
        if name.endswith("key/bias"):  # shifts all logits of a row alike; zero but for rounding
            continue
        if name.startswith("groups/plain/0/text_ffn"):
            assert not value[last].any(), name
            value = value[:last]
        axes = tuple(range(1, value.ndim))
        assert (np.abs(value).max(axes) > 0).all() if name.startswith("groups") else value.any()


def test_dropout_needs_its_key():
    model = holder(CFG).qformer
    plain, again, one, same, two = (
        np.asarray(run(model, *inputs(), key))
        for key in (None, None, *(jax.random.key(seed) for seed in (1, 1, 2)))
    )
    np.testing.assert_array_equal(plain, again)
    np.testing.assert_array_equal(one, same)
    assert (one != plain).any() and (one != two).any()


def test_real_size():
    """BERT-base with cross-attention in six of twelve layers: 185.7 M with the 32 queries."""
    cfg = config.load("emollama_7b").model.qformer
    model = abstract(lambda rngs: QFormer(cfg, rngs=rngs))
    leaves = llama_vid_golden.parameters(model)
    assert sum(leaf.size for leaf in leaves.values()) == 185_660_160 + 32 * 768
    for path, leaf in leaves.items():
        assert len(leaf.axes) == leaf.ndim, path
        assert (leaf.axes[0] == "layers") == path.startswith("groups/"), path
    graphdef, state = nnx.split(model)
    encoded = jax.ShapeDtypeStruct((2, 257, 1408), jnp.bfloat16)
    text = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    mask = jax.ShapeDtypeStruct((2, 256), jnp.bool_)

    def call(state, encoded, text, mask):
        return nnx.merge(graphdef, state)(encoded, text=text, text_mask=mask)

    y = jax.eval_shape(call, state, encoded, text, mask)
    assert (y.shape, y.dtype) == ((2, 32, 768), jnp.bfloat16)


@pytest.mark.parametrize("change", [{"layers": 5}, {"heads": 5}])
def test_refusals(change):
    with pytest.raises(UserError, match="cross_attention_every must divide layers, heads width"):
        QFormer(dataclasses.replace(CFG, **change), rngs=nnx.Rngs(0))


def test_a_question_too_long_is_refused():
    model = holder(dataclasses.replace(CFG, max_positions=6)).qformer
    with pytest.raises(UserError, match=r"7 question tokens, but max_positions is 6"):
        run(model, *inputs())
