"""`bench train`: both sides train the same, the numbers are counted right."""

import dataclasses
import importlib.util
import io
import json

import numpy as np
import pytest
from rich.console import Console

from emollama_jax import cli
from emollama_jax.batch import IGNORE
from emollama_jax.bench import train
from emollama_jax.bench.options import TrainSizes
from emollama_jax.errors import UserError

SMALL = TrainSizes(
    width=32, mlp_width=48, layers=2, heads=2, vocab=50, rank=2, batch=2, length=70, answer=20
)


def quiet():
    return Console(file=io.StringIO())


def test_parameters_are_the_models():
    leaves = train.make_work(SMALL).setup.model.leaves
    adapters = sum(leaf.size for path, leaf in leaves.items() if "lora" in path)
    assert SMALL.parameters() + adapters == sum(leaf.size for leaf in leaves.values())
    assert round(TrainSizes().parameters() / 1e6) == 162


def test_flops_count_what_the_step_needs():
    """Two products forward and one backward … by hand, for one layer and one token's labels."""
    sizes = TrainSizes(
        width=4, mlp_width=6, layers=1, heads=1, vocab=10, rank=1, batch=1, length=2, answer=1
    )
    matrices = 4 * 4 * 4 + 3 * 4 * 6
    forward = 2 * 2 * matrices + 2 * 4 * 10 + 2 * 2 * (4 * 2 * 4) + 2 * 2 * 3 * 4
    to_activations = forward
    to_adapters = 2 * 2 * (4 * 2 * 4)
    attention_again = 2 * 2 * 3 * 4  # both of its products have two gradients
    assert sizes.flops() == forward + to_activations + to_adapters + attention_again
    frozen = sum(2 * times * m * k * n for times, m, k, n in sizes.products())
    assert frozen == 2 * 2 * matrices + 2 * 4 * 10


def test_both_sides_train_the_same():
    pytest.importorskip("torch", reason="torch is the other side (extra `parity`)")
    pytest.importorskip("peft", reason="its adapters (extra `parity`)")
    result = train.run(SMALL, steps=2, warm=1, console=quiet())
    assert 0 <= result.difference <= train.AGREE
    assert [len(seconds) for seconds in result.seconds.values()] == [2, 2, 2]
    told = json.loads(result.report(as_json=True))
    ours, theirs = (told["seconds"][side] for side in train.SIDES[:2])
    wanted = np.median([b / a for a, b in zip(ours, theirs, strict=True)])
    assert told["ratio"] == pytest.approx(wanted)
    assert told["tokens_per_second"][train.SIDES[0]] == pytest.approx(140 / np.median(ours))
    assert set(told["products_flops_per_second"]) == set(train.SIDES[:2])
    lines = result.report(as_json=False).splitlines()
    assert f"ratio           {told['ratio']:8.2f}" in lines[4]


def test_another_learning_rate_is_found_out(monkeypatch):
    """The check on the losses is a check: PyTorch is told another rate."""
    pytest.importorskip("torch", reason="torch is the other side (extra `parity`)")
    pytest.importorskip("peft", reason="its adapters (extra `parity`)")
    step = train.TorchSide.step
    monkeypatch.setattr(
        train.TorchSide, "step", lambda self, dtype, rate: step(self, dtype, 3 * rate)
    )
    with pytest.raises(UserError, match="do not do the same work"):
        train.run(SMALL, steps=6, warm=0, console=quiet())


def test_our_side_learns_and_keeps_what_is_frozen():
    work = train.make_work(dataclasses.replace(SMALL, answer=None))
    assert (work.labels == work.ids).all()
    run = train.jax_side(work)
    losses = [run()[0] for _ in range(12)]
    assert losses[-1] < losses[0]


def test_only_the_answer_bears_loss():
    work = train.make_work(SMALL)
    assert (work.labels[:, :-20] == IGNORE).all()
    assert (work.labels[:, -20:] == work.ids[:, -20:]).all()


def test_refusals(monkeypatch, capsys):
    for words, message in (
        (["--answer", "600"], "--answer 600: must be between 0 and --length 512"),
        (["--width", "100"], "--width 100: must be an even multiple of --heads 12"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["bench", "train", *words])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"torch, peft not found: pip install -e '.\[parity\]'"):
        train.run(SMALL, steps=1, warm=0, console=quiet())
