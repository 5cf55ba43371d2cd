"""The decoder laid out for many answers: the same ones, and nothing copied for a token."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax import config
from emollama_jax.generate import decode
from emollama_jax.generate.prompt import Prompt
from emollama_jax.models import llama_by_token
from emollama_jax.models.llama import Llama
from emollama_jax.models.parameters import is_adapter, named_parameters
from emollama_jax.models.rngs import abstract

STEPS = 8
LORA = config.LoraConfig(rank=2, alpha=6.0, dropout=0.5, targets=("q_proj", "down_proj"))
ENDING = decode.make_ending([-1], 0)


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    monkeypatch.setattr(llama_by_token, "LEAST", 0)


def make(**changes) -> Llama:
    tiny = config.load("tiny").model.llama
    small = {"vocab_size": 97, "width": 32, "mlp_width": 48, "layers": 2}
    cfg = dataclasses.replace(tiny, **{**small, **changes})
    llama, rng = abstract(lambda rngs: Llama(cfg, rngs=rngs)), np.random.default_rng(0)
    for path, leaf in named_parameters(llama).items():
        scale = 1.0 if path.endswith("scale") else 0.5
        leaf.set_value(jnp.asarray(scale * rng.standard_normal(leaf.shape), jnp.float32))
    return llama


def prompts(llama: Llama, lengths=(5, 9, 2)) -> Prompt:
    ids = np.random.default_rng(7).integers(0, 97, (len(lengths), max(lengths)))
    return Prompt(embeds=llama.embed(jnp.asarray(ids)), length=jnp.asarray(lengths, jnp.int32))


def answers(llama: Llama) -> list[list[int]]:
    found = decode.decode(*nnx.split(llama), prompts(llama), None, ENDING, max_new_tokens=STEPS)
    return found.ids.tolist()


def streamed(llama: Llama) -> list[str]:
    prompt = prompts(llama, lengths=(5,))
    settings = {"how": None, "max_new_tokens": STEPS, "stop": [-1], "pad": 0}
    return list(decode.stream(nnx.split(llama), prompt, str, **settings))


@pytest.mark.parametrize("tied", [False, True])
def test_answers_are_the_same(tied):
    """Adapters and all."""
    plain = make(lora=LORA, tied=tied)
    fast = llama_by_token.laid_out(plain)
    assert fast.by_token is not None
    assert plain.by_token is None
    assert answers(fast) == answers(plain)
    without = nnx.clone(plain)
    without.layers.down_proj.lora_B[...] *= 0
    assert answers(without) != answers(plain)


def test_a_stream_is_the_same():
    plain = make()
    assert streamed(llama_by_token.laid_out(plain)) == streamed(plain)


def test_only_what_gains_is_laid_out(monkeypatch):
    plain = make()
    assert llama_by_token.laid_out(plain) is not plain
    for name, size in (("MOST", 0.01), ("LEAST", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(llama_by_token, name, size)
            assert llama_by_token.laid_out(plain) is plain
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for leaf in named_parameters(plain).values():
        leaf.set_value(jax.device_put(leaf[...], whole))
    assert llama_by_token.laid_out(plain) is plain


def test_in_bfloat16_adapters_are_narrow_once_and_for_all():
    """Their products are those of before; what trains keeps its digits."""
    plain = make(dtype="bfloat16", lora=LORA)
    fast = llama_by_token.laid_out(plain)
    assert fast.by_token is None
    dtypes = {path: leaf.dtype for path, leaf in named_parameters(fast).items()}
    assert {dtypes[path] for path in dtypes if is_adapter(path)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in named_parameters(plain).values()} == {jnp.dtype("float32")}
    x = jnp.ones((1, 3, plain.cfg.width), "bfloat16")
    np.testing.assert_array_equal(fast(x).hidden, plain(x).hidden)


def test_neither_kernels_nor_cache_are_copied():
    """By the compiler: kernels are on the left of their products, and beside a layer's kernels and
    slots a token needs little memory."""
    rows, slots = 3, 900
    plain = make(mlp_width=2000, max_positions=slots)
    llama, cfg = nnx.split(llama_by_token.laid_out(plain)), plain.cfg
    prompt = Prompt(
        embeds=jax.ShapeDtypeStruct((rows, slots - STEPS, cfg.width), cfg.dtype),
        length=jax.ShapeDtypeStruct((rows,), jnp.int32),
    )
    first = functools.partial(decode.first_token.under({}), llama[0], max_new_tokens=STEPS)
    loop = jax.eval_shape(first, llama[1], prompt, None, ENDING)
    compiled = decode.next_token.under({}).lower(*llama, loop, None, ENDING).compile()
    products = set(re.findall(r"f32\[([\d,]+)\]\S* dot\(", compiled.as_text()))
    assert {f"2000,{rows}", f"97,{rows}"} <= products
    assert not {f"{rows},2000", f"{rows},97"} & products
    cache = [x.size * x.dtype.itemsize for x in jax.tree.leaves(loop.cache)]
    used = compiled.memory_analysis()
    assert used.alias_size_in_bytes >= sum(cache)  # written in its place
    assert used.temp_size_in_bytes < min(*cache, 4 * cfg.width * cfg.mlp_width)
