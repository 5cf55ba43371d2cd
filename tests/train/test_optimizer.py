"""The schedule, the two learning rates, decay on matrices only, clipping, and patterns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emollama_jax import config
from emollama_jax.base import chosen
from emollama_jax.errors import UserError
from emollama_jax.models.emollama import EmoLlama
from emollama_jax.models.parameters import matching, named_parameters
from emollama_jax.models.rngs import abstract
from emollama_jax.testing.toy_model import Toy, toy_config
from emollama_jax.train.optimizer import make_optimizer, warmup_cosine


@pytest.fixture(scope="module")
def leaves():
    return named_parameters(abstract(lambda rngs: Toy(toy_config().model, rngs=rngs)))


def updates(leaves, *, gradient, value=1.0, **train):
    """What the first update adds, all gradients and all values alike."""
    cfg = toy_config(**train).train
    trainable = matching(cfg.trainable, leaves, key="train.trainable")
    projector = matching(cfg.projector, leaves, key="train.projector")
    optimizer = make_optimizer(cfg, leaves, trainable=trainable, projector=projector)
    params = {name: jnp.full(leaves[name].shape, value) for name in trainable}
    state = optimizer.tx.init(params)
    grads = jax.tree.map(lambda x: jnp.full_like(x, gradient), params)
    update, _ = optimizer.tx.update(grads, state, params)
    return {name: np.asarray(x).reshape(-1)[0] for name, x in update.items()}


def test_schedule_warms_up_then_falls_as_a_cosine():
    share = warmup_cosine(toy_config(steps=100, warmup=0.2).train)
    assert share(0) == pytest.approx(1 / 20)
    assert share(9) == pytest.approx(0.5)
    assert share(19) == pytest.approx(1)
    assert share(20) == pytest.approx(1)
    assert share(60) == pytest.approx(0.5, abs=1e-6)
    assert share(80) == pytest.approx(0.5 * (1 + np.cos(0.75 * np.pi)), abs=1e-6)
    assert 0 < share(99) < 1e-3
    assert share(100) == share(101) == 0


def test_schedule_without_warm_up_starts_at_its_peak():
    assert warmup_cosine(toy_config(steps=10, warmup=0.0).train)(0) == 1


def test_two_learning_rates(leaves):
    got = updates(leaves, gradient=1.0, weight_decay=0.0, warmup=0.0, clip_norm=1e9)
    # Adam's first update is the sign of the gradient.
    assert got["llama/layers/lora_A"] == pytest.approx(-1e-2, rel=1e-5)
    assert got["fim/kernel"] == pytest.approx(-5e-3, rel=1e-5)
    assert got["fim/bias"] == pytest.approx(-5e-3, rel=1e-5)


@pytest.mark.parametrize("steps", [1, 7, 30])
def test_reported_learning_rate_is_the_one_applied(leaves, steps):
    cfg = toy_config(steps=50, weight_decay=0.0, clip_norm=1e9).train
    optimizer = make_optimizer(cfg, leaves, trainable=["llama/norm/scale"], projector=())
    params = {"llama/norm/scale": jnp.ones(16)}
    state = optimizer.tx.init(params)
    for _ in range(steps):
        update, state = optimizer.tx.update(params, state, params)
    # Adam's update of a constant gradient is its sign.
    assert update["llama/norm/scale"][0] == pytest.approx(
        -float(optimizer.learning_rate(steps - 1)), rel=1e-5
    )


def test_matrices_decay_and_vectors_do_not(leaves):
    trainable = ("llama/layers/.*", "llama/norm/scale", "fim/.*")
    got = updates(leaves, gradient=0.0, value=2.0, warmup=0.0, trainable=trainable)
    assert got["llama/layers/kernel"] == pytest.approx(-1e-2 * 0.1 * 2)
    assert got["llama/layers/lora_A"] == pytest.approx(-1e-2 * 0.1 * 2)
    assert got["fim/kernel"] == pytest.approx(-5e-3 * 0.1 * 2)
    # One vector for each layer is a matrix to look at, but not to decay.
    assert leaves["llama/layers/bias"].ndim == 2
    assert got["llama/layers/bias"] == got["llama/norm/scale"] == got["fim/bias"] == 0


def test_large_gradients_are_clipped(leaves):
    """Adam forgets a gradient's scale, but its mean over a small and a clipped one does not."""

    def second(first: float, clip: float) -> float:
        cfg = toy_config(warmup=0.0, weight_decay=0.0, clip_norm=clip).train
        optimizer = make_optimizer(cfg, leaves, trainable=["llama/norm/scale"], projector=())
        params = {"llama/norm/scale": jnp.ones(16)}
        state = optimizer.tx.init(params)
        for value in (first, 0.1):
            grads = {"llama/norm/scale": jnp.full(16, value)}
            update, state = optimizer.tx.update(grads, state, params)
        return float(update["llama/norm/scale"][0])

    # 16 equal entries of 0.25 have norm 1.
    assert second(1000.0, 1.0) == pytest.approx(second(0.25, 1.0), rel=1e-5)
    assert second(1000.0, 1e9) != pytest.approx(second(0.25, 1e9), rel=1e-2)


def test_patterns_of_the_tiny_config():
    cfg = config.load("tiny")
    paths = named_parameters(abstract(lambda rngs: EmoLlama(cfg.model, rngs=rngs)))
    trainable = chosen(cfg, "trainable", paths)
    towers = {path.split("/")[0] for path in trainable}
    assert towers == {"llama", "fim", "qformer", "visual_tokens"}
    assert all("lora_" in path for path in trainable if path.startswith("llama/"))
    projector = chosen(cfg, "projector", paths)
    assert make_optimizer(cfg.train, paths, trainable=trainable, projector=projector)
    # Seven projections with two adapter matrices each.
    assert sum(path.startswith("llama/") for path in trainable) == 14


def test_pattern_that_matches_nothing_names_near_paths(leaves):
    with pytest.raises(UserError) as error:
        matching(["fim/kernell"], leaves, key="train.trainable")
    assert str(error.value).startswith("train.trainable: 'fim/kernell' matches no parameter (near:")
    assert "fim/kernel" in str(error.value).partition("near:")[2]


def test_pattern_matches_whole_paths_only(leaves):
    with pytest.raises(UserError, match="matches no parameter"):
        matching(["kernel"], leaves, key="train.trainable")
    assert matching([".*kernel"], leaves, key="train.trainable")


def test_pattern_that_is_no_regular_expression(leaves):
    with pytest.raises(UserError, match=r"train\.projector: .*'\(' is no regular expression"):
        chosen(toy_config(projector=("(",)), "projector", leaves, build=Toy)


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        (["model.fim.branches=none"], "fim/"),
        (["model.fim.branches=local", "train.projector=['fim/global_branch/.*']"], "fim/global"),
        (["model.llama.lora.rank=0"], "llama/"),
    ],
)
def test_patterns_of_a_part_that_the_model_does_without(changes, gone):
    """One switch is enough; what no model could match stays an error."""
    cfg = config.load("tiny", changes)
    paths = named_parameters(abstract(lambda rngs: EmoLlama(cfg.model, rngs=rngs)))
    for key in ("trainable", "projector"):
        assert not any(path.startswith(gone) for path in chosen(cfg, key, paths))
    wrong = config.override(cfg, ["train.trainable=['qformer/.*', 'fimm/.*']"])
    with pytest.raises(UserError, match=r"train\.trainable: 'fimm/\.\*' matches no parameter"):
        chosen(wrong, "trainable", paths)


def test_something_must_train():
    cfg = config.load("tiny", ["model.fim.branches=none", "train.trainable=['fim/.*']"])
    paths = named_parameters(abstract(lambda rngs: EmoLlama(cfg.model, rngs=rngs)))
    with pytest.raises(UserError, match=r"train\.trainable: fim/\.\*: .* nothing would train"):
        chosen(cfg, "trainable", paths)
