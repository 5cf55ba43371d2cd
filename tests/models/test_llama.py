"""LLaMA: against `transformers`, with and without a cache, LoRA, sizes, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax import config
from emollama_jax.errors import UserError
from emollama_jax.models.layers import stretch
from emollama_jax.models.llama import KVCache, Llama
from emollama_jax.models.rngs import abstract
from tests.helpers import llama_vid_golden
from tests.helpers.llama_vid_golden import LAYER, WHOLE
from tools.convert_torch import engine
from tools.convert_torch.golden import off
from tools.convert_torch.llama_vid import TIED, llama

GQA = dataclasses.replace(llama_vid_golden.TINY_LLAMA, heads=6, kv_heads=2, head_dim=8)
# Of eight wavelengths, three are short, four are long, and one lies between.
LLAMA3 = config.RopeLlama3Config(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=256
)
LORA = config.LoraConfig(rank=2, alpha=6.0, dropout=0.5, targets=("q_proj", "down_proj"))


class Holder(nnx.Module):
    """Weight tables name the network `llama`."""

    def __init__(self, cfg):
        self.llama = Llama(cfg, rngs=nnx.Rngs(0))


def make(cfg, seed=1):
    return llama_vid_golden.fill(abstract(lambda rngs: Llama(cfg, rngs=rngs)), seed)


def embeds_of(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def arange(batch, length):
    return jnp.broadcast_to(jnp.arange(length), (batch, length))


# --- transformers ------------------------------------------------------------------------------


def reference(cfg, seed=0):
    """`transformers`' model with random weights, and ours with the same."""
    torch = pytest.importorskip("torch", reason="torch is the reference (extra `convert`)")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    if cfg.rope_scaling != 1:
        rope |= {"rope_type": "linear", "factor": cfg.rope_scaling}
    if cfg.rope_llama3 is not None:
        fields = dataclasses.asdict(cfg.rope_llama3)
        rope |= {"original_max_position_embeddings": fields.pop("original_max_positions")}
        rope |= {"rope_type": "llama3", **fields}
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=cfg.vocab_size,
            hidden_size=cfg.width,
            intermediate_size=cfg.mlp_width,
            num_hidden_layers=cfg.layers,
            num_attention_heads=cfg.heads,
            num_key_value_heads=cfg.kv_heads,
            head_dim=cfg.head_dim,
            rms_norm_eps=cfg.norm_eps,
            rope_parameters=rope,
            max_position_embeddings=cfg.max_positions,
            tie_word_embeddings=cfg.tied,
            attn_implementation="eager",
        )
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1))
    ours = nnx.eval_shape(lambda: Holder(cfg))
    tensors = {key: value.numpy() for key, value in theirs.state_dict().items()}
    engine.assign(ours, tensors, llama(cfg), ignore=TIED if cfg.tied else {})
    return torch, theirs, ours.llama


@pytest.mark.parametrize(
    "cfg",
    [
        llama_vid_golden.TINY_LLAMA,
        GQA,
        dataclasses.replace(GQA, rope_scaling=16.0, rope_theta=500.0),
        dataclasses.replace(GQA, rope_llama3=LLAMA3, head_dim=16, tied=True),
    ],
    ids=["multi-head", "grouped-query", "linear rope scaling", "tied, Llama 3.1's rope"],
)
def test_logits_are_transformers(cfg):
    torch, theirs, ours = reference(cfg)
    ids = np.random.default_rng(1).integers(0, cfg.vocab_size, (2, 11))
    mask = np.arange(11) < np.asarray([[11], [6]])  # theirs is told of the padding, ours is not
    with torch.no_grad():
        wanted = theirs(
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)
        ).logits.numpy()
    got = ours.logits(ours(ours.embed(jnp.asarray(ids)), positions=arange(2, 11)).hidden)
    assert got.dtype == jnp.float32
    assert off(np.asarray(got)[mask], wanted[mask]) < WHOLE


def test_one_layer_is_transformers():
    cfg = dataclasses.replace(GQA, layers=1)
    torch, theirs, ours = reference(cfg)
    x = embeds_of((2, 7, cfg.width))
    graphdef, state = nnx.split(ours.layers)
    layer = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[0], state))
    got, _ = layer(jnp.asarray(x), positions=arange(2, 7), cache=None, dropout_key=None)
    theirs.model.norm = torch.nn.Identity()
    with torch.no_grad():
        wanted = theirs.model(inputs_embeds=torch.from_numpy(x)).last_hidden_state.numpy()
    assert off(got, wanted) < LAYER


# --- cache -------------------------------------------------------------------------------------


def test_cached_is_uncached_at_every_step():
    """Rows of different lengths: a right-padded prefill, then token by token at slot = length."""
    model = make(GQA)
    total, lengths = 12, np.asarray([3, 7])
    steps = total - lengths.max()
    embeds = jnp.asarray(embeds_of((2, total, GQA.width)))
    wanted = model(embeds, positions=arange(2, total)).hidden
    slots = jnp.full((GQA.layers, 2, total, GQA.kv_heads * GQA.head_dim), 99.0)  # must be unseen
    prompt = jnp.where((jnp.arange(7) < lengths[:, None])[..., None], embeds[:, :7], 55.0)
    out = model(prompt, positions=arange(2, 7), cache=KVCache(k=slots, v=slots))
    for row, length in enumerate(lengths):
        assert off(out.hidden[row, :length], wanted[row, :length]) < LAYER
    graphdef, state = nnx.split(model)

    @jax.jit
    def decode(state, embeds, positions, cache):
        return nnx.merge(graphdef, state)(embeds, positions=positions, cache=cache)

    for step in range(steps):
        at = lengths + step
        token = embeds[np.arange(2), at][:, None]
        out = decode(state, token, jnp.asarray(at)[:, None], out.cache)
        assert off(out.hidden[:, 0], wanted[np.arange(2), at]) < LAYER
    assert out.cache.k.shape == slots.shape
    np.testing.assert_array_equal(out.cache.k[:, 0, lengths[0] + steps :], 99)


def test_no_positions_are_the_first_ones():
    """Without a cache, and with one: what is answered and what is written."""
    model = make(GQA)
    embeds = jnp.asarray(embeds_of((2, 6, GQA.width)))
    slots = jnp.full((GQA.layers, 2, 9, GQA.kv_heads * GQA.head_dim), 99.0)
    for cache in (None, KVCache(k=slots, v=slots)):
        wanted = model(embeds, positions=arange(2, 6), cache=cache)
        got = model(embeds, cache=cache)
        assert off(got.hidden, wanted.hidden) < LAYER
        for a, b in zip(jax.tree.leaves(got.cache), jax.tree.leaves(wanted.cache), strict=True):
            assert off(a[:, :, :6], b[:, :, :6]) < LAYER
            np.testing.assert_array_equal(a[:, :, 6:], 99)


def test_cache_takes_several_tokens_at_once():
    model = make(GQA)
    embeds = jnp.asarray(embeds_of((1, 9, GQA.width)))
    wanted = model(embeds, positions=arange(1, 9)).hidden
    slots = jnp.zeros((GQA.layers, 1, 9, GQA.kv_heads * GQA.head_dim))
    cache, parts = KVCache(k=slots, v=slots), []
    for start, stop in ((0, 4), (4, 7), (7, 9)):
        out = model(embeds[:, start:stop], positions=jnp.arange(start, stop)[None], cache=cache)
        cache = out.cache
        parts.append(out.hidden)
    assert off(jnp.concatenate(parts, 1), wanted) < LAYER


def test_a_later_token_is_not_seen():
    model = make(GQA)
    embeds = embeds_of((1, 6, GQA.width))
    changed = embeds.copy()
    changed[:, 4] += 1
    one, two = (
        np.asarray(model(jnp.asarray(x), positions=arange(1, 6)).hidden) for x in (embeds, changed)
    )
    np.testing.assert_array_equal(one[:, :4], two[:, :4])
    assert (one[:, 4:] != two[:, 4:]).any(-1).all()


# --- LoRA --------------------------------------------------------------------------------------


def lora_model():
    return make(dataclasses.replace(GQA, lora=LORA))


def test_lora_sits_on_its_targets_only():
    adapters = {
        p for p in llama_vid_golden.parameters(lora_model()) if p.endswith(("lora_A", "lora_B"))
    }
    assert adapters == {
        f"layers/{name}/lora_{end}" for name in ("q_proj", "down_proj") for end in "AB"
    }


def test_lora_is_the_merged_kernel():
    adapted, plain = lora_model(), make(GQA)
    leaves, base = llama_vid_golden.parameters(adapted), llama_vid_golden.parameters(plain)
    for path, leaf in base.items():
        leaf[...] = leaves[path][...]
    embeds = jnp.asarray(embeds_of((1, 5, GQA.width)))
    with_adapters = adapted(embeds, positions=arange(1, 5)).hidden
    assert off(plain(embeds, positions=arange(1, 5)).hidden, with_adapters) > 1e-2
    for name in LORA.targets:
        a, b = leaves[f"layers/{name}/lora_A"][...], leaves[f"layers/{name}/lora_B"][...]
        update = jnp.einsum("lir,lro->lio", a, b) * (LORA.alpha / LORA.rank)
        base[f"layers/{name}/kernel"][...] += update
    assert off(plain(embeds, positions=arange(1, 5)).hidden, with_adapters) < LAYER


def test_fresh_lora_changes_nothing():
    model = Llama(dataclasses.replace(GQA, lora=LORA), rngs=nnx.Rngs(0))
    leaves = llama_vid_golden.parameters(model)
    assert not leaves["layers/q_proj/lora_B"][...].any()
    assert (leaves["layers/q_proj/lora_A"][0] != leaves["layers/q_proj/lora_A"][1]).all()


def test_lora_dropout_needs_its_key():
    model = lora_model()
    embeds = jnp.asarray(embeds_of((1, 5, GQA.width)))

    def hidden(key):
        return np.asarray(model(embeds, positions=arange(1, 5), dropout_key=key).hidden)

    np.testing.assert_array_equal(hidden(None), hidden(None))
    np.testing.assert_array_equal(hidden(jax.random.key(1)), hidden(jax.random.key(1)))
    assert (hidden(jax.random.key(1)) != hidden(None)).any()
    assert (hidden(jax.random.key(1)) != hidden(jax.random.key(2))).any()


# --- the rest ----------------------------------------------------------------------------------


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32():
    model = make(dataclasses.replace(GQA, dtype="bfloat16"))
    out = model(model.embed(jnp.asarray([[1, 2, 3]])), positions=arange(1, 3))
    assert out.hidden.dtype == jnp.bfloat16
    assert model.logits(out.hidden).dtype == jnp.float32
    assert {leaf.dtype for leaf in llama_vid_golden.parameters(model).values()} == {
        np.dtype("float32")
    }


def test_embed():
    model = make(GQA)
    rows = np.asarray(model.embed(jnp.asarray([[5, -200, GQA.vocab_size]]))[0])
    table = np.asarray(model.embed_tokens[...])
    np.testing.assert_array_equal(rows[:2], table[[5, 0]])
    assert np.isnan(rows[2]).all()


@pytest.mark.parametrize(
    ("name", "count"), [("emollama_7b", 6_738_415_616), ("emollama_13b", 13_015_864_320)]
)
def test_real_sizes(name, count):
    """The published 6.74 B and 13.02 B, adapters beside them; axes name every dimension."""
    cfg = config.load(name).model.llama
    model = abstract(lambda rngs: Llama(cfg, rngs=rngs))
    leaves = llama_vid_golden.parameters(model)
    adapters = {p: leaf.size for p, leaf in leaves.items() if p.endswith(("lora_A", "lora_B"))}
    assert sum(leaf.size for leaf in leaves.values()) - sum(adapters.values()) == count
    assert len(adapters) == 2 * len(cfg.lora.targets) > 0
    for path, leaf in leaves.items():
        assert len(leaf.axes) == leaf.ndim, path
        assert (leaf.axes[0] == "layers") == path.startswith("layers/"), path
    hidden = jax.ShapeDtypeStruct((2, 3, cfg.width), jnp.bfloat16)
    graphdef, state = nnx.split(model)

    def run(state, embeds):
        model = nnx.merge(graphdef, state)
        return model.logits(model(embeds, positions=arange(2, 3)).hidden)

    logits = jax.eval_shape(run, state, hidden)
    assert (logits.shape, logits.dtype) == ((2, 3, 32000), jnp.float32)


def test_llama3s_wavelengths():
    """Short ones stay, long ones grow by the factor, the one between by less."""
    waves = 2 * np.pi * 10000 ** (np.arange(8) / 8)
    times = np.asarray(stretch(jnp.asarray(waves, jnp.float32), LLAMA3))
    assert [wave < 64 for wave in waves] == [True] * 3 + [False] * 5
    assert [wave > 256 for wave in waves] == [False] * 4 + [True] * 4
    np.testing.assert_allclose(times[:3], 1)
    np.testing.assert_allclose(times[4:], 8)
    share = (256 / waves[3] - 1) / 3
    np.testing.assert_allclose(times[3], 1 / ((1 - share) / 8 + share), rtol=1e-5)


def test_a_tied_head_is_no_leaf_of_its_own():
    other = dataclasses.replace(GQA, tied=True)
    tied = abstract(lambda rngs: Llama(other, rngs=rngs))
    untied = abstract(lambda rngs: Llama(GQA, rngs=rngs))
    assert llama_vid_golden.parameters(untied).keys() - llama_vid_golden.parameters(
        tied
    ).keys() == {"lm_head/kernel"}
    assert llama_vid_golden.parameters(tied)["embed_tokens"].axes == ("vocab", "embed")
    model = make(other)
    hidden = jnp.asarray(embeds_of((2, GQA.width)))
    np.testing.assert_allclose(
        model.logits(hidden), hidden @ model.embed_tokens[...].T, rtol=1e-4, atol=1e-5
    )


def test_refusals():
    with pytest.raises(UserError, match="rope_scaling is 2 beside rope_llama3, wanted 1"):
        Llama(dataclasses.replace(GQA, rope_llama3=LLAMA3, rope_scaling=2.0), rngs=nnx.Rngs(0))
    upside_down = dataclasses.replace(LLAMA3, high_freq_factor=1.0)
    with pytest.raises(UserError, match="high_freq_factor is 1, wanted more than low_freq"):
        Llama(dataclasses.replace(GQA, rope_llama3=upside_down), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="heads 6, kv_heads 4"):
        Llama(dataclasses.replace(GQA, kv_heads=4), rngs=nnx.Rngs(0))
    model = make(dataclasses.replace(GQA, max_positions=4))
    with pytest.raises(UserError, match=r"5 tokens, but positions reach 4 .* data.text_length"):
        model(jnp.zeros((1, 5, GQA.width)), positions=arange(1, 5))
    slots = jnp.zeros((GQA.layers, 1, 5, GQA.kv_heads * GQA.head_dim))
    with pytest.raises(UserError, match="5 tokens, but positions reach 4"):
        model(
            jnp.zeros((1, 1, GQA.width)),
            positions=arange(1, 1),
            cache=KVCache(k=slots, v=slots),
        )
