"""The fused loss is the plain one, its gradients too, whatever of the head trains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from emollama_jax.batch import IGNORE
from emollama_jax.train.step import next_token_sums

CHUNK = 16
EXAMPLES, LENGTH, WIDTH, VOCAB = 2, 2 * CHUNK + 7, 8, 20


@pytest.fixture
def given(rng):
    """Head, hidden states, labels (the first chunk bears none), weights."""
    labels = rng.integers(0, VOCAB, (EXAMPLES, LENGTH)).astype(np.int32)
    labels[:, : CHUNK + 5] = IGNORE
    labels[0, 2 * CHUNK :: 2] = IGNORE
    return (
        jnp.asarray(rng.standard_normal((WIDTH, VOCAB), np.float32)),
        jnp.asarray(rng.standard_normal((EXAMPLES, LENGTH, WIDTH), np.float32)),
        jnp.asarray(labels),
        jnp.asarray([1.0, 2.0])[:, None] * jnp.ones(LENGTH),
    )


def fused(head, hidden, labels, weight):
    def logits(x):
        return x @ head

    sums = next_token_sums(logits, hidden, labels=labels, weight=weight, chunk=CHUNK)
    return 3 * sums.loss


def plain(head, hidden, labels, weight):
    logits, labels = hidden[:, :-1] @ head, labels[:, 1:]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return 3 * jnp.sum(loss * (labels != IGNORE) * weight[:, 1:])


@pytest.mark.parametrize("trained", [(0, 1), (1,), (0,)], ids=["both", "hidden", "head"])
def test_gradients_are_the_plain_losss(given, trained):
    wanted, of_plain = jax.jit(jax.value_and_grad(plain, argnums=trained))(*given)
    got, of_fused = jax.jit(jax.value_and_grad(fused, argnums=trained))(*given)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    for a, b in zip(of_fused, of_plain, strict=True):
        assert np.abs(a - b).max() <= 1e-6 * np.abs(b).max()


def test_logits_are_computed_once(given):
    """Forward and backward together hold three products of the head's size when it trains."""
    program = jax.jit(jax.grad(fused, argnums=(0, 1))).lower(*given).as_text()
    assert program.count("stablehlo.dot_general") == 3


def test_correct_is_the_argmax(given):
    head, hidden, labels, weight = given
    sums = next_token_sums(lambda x: x @ head, hidden, labels=labels, weight=weight, chunk=CHUNK)
    borne = (labels[:, 1:] != IGNORE) * weight[:, 1:]
    right = (hidden[:, :-1] @ head).argmax(-1) == labels[:, 1:]
    assert float(sums.correct) == float((right * borne).sum())
    assert float(sums.tokens) == float(borne.sum())
