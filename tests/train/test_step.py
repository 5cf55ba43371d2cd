"""The pure step: loss, accumulation, what trains and what does not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax.base import base_values
from emollama_jax.batch import IGNORE
from emollama_jax.models.parameters import named_parameters
from emollama_jax.sharding.mesh import make_mesh
from emollama_jax.testing.toy_model import LENGTH, VOCAB, Toy, make_batch, toy_config
from emollama_jax.train.setup import set_up
from emollama_jax.train.step import merge, micro_batches, next_token_sums, train_step

CHUNK = 64  # of the loss


@pytest.fixture(autouse=True)
def _mesh():
    with jax.set_mesh(make_mesh(toy_config().mesh)):
        yield


@functools.cache
def setting(**train):
    """A toy before its first step: (frozen, state, the jitted step)."""
    cfg = toy_config(**train)
    setup = set_up(cfg, make_mesh(cfg.mesh), build=Toy)
    values = base_values(setup.model)
    frozen = {path: values[path] for path in setup.frozen}
    graphdef = nnx.graphdef(setup.model.module)

    @jax.jit  # that of the set-up gives the state away
    def step(frozen, state, batch):
        return train_step(
            graphdef,
            setup.optimizer,
            frozen,
            state,
            batch,
            accumulation=cfg.train.accumulation,
            loss_chunk=cfg.train.loss_chunk,
        )

    return frozen, setup.start({path: values[path] for path in setup.state.params}), step


CHUNK = 64  # of the loss


def plain_loss(logits, labels, weight):
    """Σ loss, Σ tokens, Σ correct by loops over NumPy arrays."""
    loss = tokens = correct = 0.0
    for row, row_labels, row_weight in zip(logits, labels, weight, strict=True):
        for t in range(len(row_labels) - 1):
            label = row_labels[t + 1]
            if label != IGNORE:
                y = row[t].astype(np.float64)
                loss += row_weight * (np.log(np.exp(y - y.max()).sum()) + y.max() - y[label])
                tokens += row_weight
                correct += row_weight * (y.argmax() == label)
    return loss, tokens, correct


@pytest.mark.parametrize("length", [2, CHUNK, CHUNK + 1, 2 * CHUNK + 9])
def test_loss_is_the_plain_one(rng, length):
    hidden = rng.normal(size=(3, length, VOCAB)).astype(np.float32)
    labels = rng.integers(0, VOCAB, (3, length))
    labels[rng.random(labels.shape) < 0.6] = IGNORE
    labels[0, -1] = 5
    weight = np.array([1.0, 0.0, 2.0], np.float32)
    sums = next_token_sums(
        lambda x: 3 * x,
        jnp.asarray(hidden),
        labels=jnp.asarray(labels),
        weight=jnp.broadcast_to(weight[:, None], labels.shape),
        chunk=CHUNK,
    )
    loss, tokens, correct = plain_loss(3 * hidden, labels, weight)
    assert sums.loss == pytest.approx(loss, rel=1e-6)
    assert sums.tokens == tokens > 0
    assert sums.correct == correct


def test_chunks_without_labels_are_skipped():
    """Their logits are never asked for: NaN there would poison the sum."""
    length = 2 * CHUNK + 1
    labels = jnp.full((1, length), IGNORE).at[0, -1].set(1)
    # The one token that predicts a label comes first, with as many of the others as fill a chunk.
    hidden = jnp.ones((1, length, 4)).at[:, CHUNK - 1 : -2].set(jnp.nan)
    weight = jnp.ones((1, length))
    sums = next_token_sums(lambda x: x, hidden, labels=labels, weight=weight, chunk=CHUNK)
    assert sums.tokens == 1 and sums.loss == pytest.approx(np.log(4))


def test_metrics_of_a_step(rng):
    frozen, state, step = setting()
    batch = make_batch(rng, examples=4, frames=1)
    _, metrics = step(frozen, state, batch)
    # Labels up to each example's length, none at position 0.
    assert metrics.tokens == ((batch.labels != IGNORE).sum(1) * batch.weight[:, 0]).sum()
    assert metrics.loss == pytest.approx(np.log(VOCAB), abs=0.3)
    assert 0 <= metrics.accuracy < 0.3 and metrics.grad_norm > 0
    assert metrics.learning_rate == pytest.approx(0.5e-2)


def test_four_micro_batches_equal_one_batch(rng):
    batch = make_batch(rng, examples=8, frames=1)
    results = []
    for accumulation in (1, 4):
        frozen, state, step = setting(accumulation=accumulation, dropout=0.0)
        state, metrics = step(frozen, state, batch)
        # Adam's first moment after one step is the gradient times 1 - b1.
        results.append((state.opt_state[1].mu, vars(metrics)))
    assert results[0][1]["grad_norm"] > 0.01
    for one, four in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1]), strict=True):
        np.testing.assert_allclose(one, four, rtol=1e-6, atol=1e-6 * np.abs(one).max())


def test_micro_batches_hold_every_example_once(rng):
    batch = make_batch(rng, examples=6, frames=1)
    micro = micro_batches(batch, 3)
    assert micro.ids.shape == (3, 2, LENGTH)
    assert micro.index[..., 0].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_only_what_trains_moves_and_has_moments(rng):
    frozen, state, step = setting()
    after, _ = step(frozen, state, make_batch(rng, examples=4, frames=1))
    assert sorted(after.params) == [
        "fim/bias",
        "fim/kernel",
        "llama/layers/lora_A",
        "llama/layers/lora_B",
        "llama/norm/scale",
    ]
    assert not set(frozen) & set(after.params)
    moments = after.opt_state[1]
    assert set(moments.mu) == set(moments.nu) == set(after.params)
    moved = {n for n in after.params if (after.params[n] != state.params[n]).any()}
    # lora_A has no gradient while lora_B is zero; weight decay moves it all the same.
    assert moved == set(after.params)
    assert after.step == 1


def test_frozen_bfloat16_stays_and_trains_float32(rng):
    frozen, state, step = setting()
    frozen = {name: leaf.astype(jnp.bfloat16) for name, leaf in frozen.items()}
    after, metrics = step(frozen, state, make_batch(rng, examples=4, frames=1))
    assert {leaf.dtype for leaf in after.params.values()} == {jnp.dtype(jnp.float32)}
    assert np.isfinite(metrics.loss)


def test_batch_of_sentinels_alone_has_no_gradient(rng):
    frozen, state, step = setting(weight_decay=0.0)
    batch = make_batch(rng, examples=4, frames=1).replace(weight=np.zeros((4, 1), np.float32))
    after, metrics = step(frozen, state, batch)
    assert metrics.loss == metrics.tokens == metrics.grad_norm == 0
    assert all((after.params[n] == state.params[n]).all() for n in state.params)


def test_weightless_example_changes_nothing(rng):
    frozen, state, step = setting()
    batch = make_batch(rng, examples=4, frames=1)
    batch = batch.replace(weight=np.array([[1], [1], [1], [0]], np.float32))
    other = batch.replace(frames=batch.frames.copy(), labels=batch.labels.copy())
    other.frames[3] = 0
    other.labels[3] = IGNORE
    one, two = step(frozen, state, batch), step(frozen, state, other)
    assert all(map(np.array_equal, jax.tree.leaves(vars(one[1])), jax.tree.leaves(vars(two[1]))))


def test_dropout_depends_on_key_and_step(rng):
    # While lora_B is zero, dropout changes only lora_B's gradient.
    frozen, state, step = setting()
    batch = make_batch(rng, examples=4, frames=1)

    def norm(seed: int, number: int) -> float:
        begun = state.replace(step=jnp.int32(number), key=jax.random.key(seed))
        return float(step(frozen, begun, batch)[1].grad_norm)

    assert norm(0, 0) == norm(0, 0)
    assert len({norm(0, 0), norm(0, 1), norm(1, 0)}) == 3


def test_merge_rebuilds_lists():
    model = Toy(toy_config().model, rngs=nnx.Rngs(0))
    params = {name: leaf[...] for name, leaf in named_parameters(model).items()}
    assert "vision/1/kernel" in params
    again = merge(nnx.graphdef(model), params)
    assert (again.vision[1].kernel[...] == params["vision/1/kernel"]).all()
    assert again.llama.layers.lora_A.axes == ("layers", "embed", "rank")
