"""What decoder layers keep for the backward pass: the same gradients, whatever it is."""

import dataclasses
import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax import config, terms
from emollama_jax.errors import UserError
from emollama_jax.models.llama import Llama
from emollama_jax.models.parameters import is_adapter
from emollama_jax.models.remat import POLICIES, Policy, checkpointed, keeps, policy_of
from emollama_jax.models.rngs import abstract
from tests.helpers import llama_vid_golden

LORA = config.LoraConfig(rank=2, alpha=4.0, dropout=0.25, targets=("q_proj", "o_proj", "down_proj"))
CFG = dataclasses.replace(
    llama_vid_golden.TINY_LLAMA, heads=4, kv_heads=2, head_dim=8, lora=LORA, remat="full"
)
ADDED = {"remat_keep": ("attention", "gate_proj"), "remat_offload": ("q_proj",)}
WORDS = [word for word in get_args(terms.LlamaRemat) if word != "none"]
# A backward pass never reads what `down_proj` gave.
READ = set(get_args(terms.Kept)) - {"down_proj"}


def make(**changes) -> Llama:
    cfg = dataclasses.replace(CFG, **changes)
    return llama_vid_golden.fill(abstract(lambda rngs: Llama(cfg, rngs=rngs)), 1)


def batch(cfg) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, cfg.width), np.float32))


def traced(**changes):
    """Loss and gradients of the adapters and the input, as a traced function of both."""
    model = make(**changes)
    graphdef, adapters, rest = nnx.split(model, lambda path, leaf: is_adapter(str(path[-1])), ...)

    def loss(adapters, x):
        llama = nnx.merge(graphdef, adapters, rest)
        return (llama(x, dropout_key=jax.random.key(3)).hidden ** 2).sum()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).trace(adapters, batch(CFG))


@functools.cache
def plain():
    return run(traced(remat="none"))


def run(program):
    model = make()
    _, adapters, _ = nnx.split(model, lambda path, leaf: is_adapter(str(path[-1])), ...)
    return program.lower().compile()(adapters, batch(CFG))


@pytest.mark.parametrize("changes", [*({"remat": word} for word in WORDS), ADDED], ids=str)
def test_no_policy_changes_a_gradient(changes):
    program = traced(**changes)
    for got, wanted in zip(jax.tree.leaves(run(program)), jax.tree.leaves(plain()), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    assert "remat" in str(program.jaxpr)
    offloads = policy_of(make(**changes).cfg)
    offloads = isinstance(offloads, Policy) and bool(offloads.offload)
    assert ("<host>" in str(program.jaxpr)) == offloads


def kept(capsys, **changes) -> tuple[int, int]:
    """How many arrays one layer keeps for its backward pass, on the device and on the host."""
    llama = make(**changes)
    graphdef, state = nnx.split(llama.layers)
    first = jax.tree.map(lambda leaf: leaf[0], state)

    def layer(first, x):
        y, _ = nnx.merge(graphdef, first)(x, positions=None, cache=None, dropout_key=None)
        return y

    jax.ad_checkpoint.print_saved_residuals(checkpointed(layer, llama.policy), first, batch(CFG))
    lines = capsys.readouterr().out.splitlines()
    made = [line for line in lines if "from a constant" not in line and "argument" not in line]
    host = sum("<host>" in line for line in made)
    return len(made) - host, host


def arrays(names) -> int:
    """Of attention, its result and its softmax' denominators; of all else that is read, one."""
    return sum(1 + (name == "attention") for name in names if name in READ)


@pytest.mark.parametrize("word", POLICIES)
def test_a_policy_keeps_what_it_names(word, capsys):
    policy = POLICIES[word]
    assert kept(capsys, remat=word) == (arrays(policy.keep), arrays(policy.offload))


def test_names_come_on_top(capsys):
    llama = make(remat="save_qkv_proj", **ADDED)
    assert llama.policy == Policy(
        keep=("k_proj", "v_proj", "attention", "gate_proj"), offload=("q_proj",)
    )
    assert kept(capsys, remat="save_qkv_proj", **ADDED) == (5, 1)
    assert keeps(llama.policy, "q_proj") and not keeps(llama.policy, "o_proj")
    assert keeps("none", "o_proj") and not keeps("dots", "attention")


def test_names_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="remat dots beside names to keep or offload"):
        make(remat="dots", remat_keep=("q_proj",))
    with pytest.raises(UserError, match="q_proj both in remat_keep and in remat_offload"):
        make(remat_keep=("q_proj",), remat_offload=("q_proj",))
    with pytest.raises(UserError, match=r"model\.llama\.remat_keep\.0: .*'q'"):
        config.load("tiny", ["model.llama.remat_keep=[q]"])


def test_configs_of_before_read_as_they_were():
    tree = config.to_dict(config.load("tiny", ["model.llama.remat=dots"]))
    del tree["model"]["llama"]["remat_keep"], tree["model"]["llama"]["remat_offload"]
    assert policy_of(config.from_dict(tree, origin="old").model.llama) == "dots"
