"""`bench decode`: both sides answer the same, the numbers are counted right."""

import dataclasses
import importlib.util
import io
import json
import pathlib

import numpy as np
import pytest
from rich.console import Console

from emollama_jax import cli, config
from emollama_jax.bench import decode
from emollama_jax.bench.options import DecodeSizes
from emollama_jax.bench.torch_side import transformers_llama
from emollama_jax.errors import UserError

SIZES = DecodeSizes(prompt=9, new=12)


def work(**changes) -> decode.Work:
    """A toy: grouped heads, rows of padding in the vocabulary."""
    cfg = decode._float32(config.to_dict(config.load(decode.CONFIG).model.llama), origin="toy")
    small = {"vocab_size": 61, "vocab_multiple": 8, "width": 32, "mlp_width": 48, "layers": 2}
    heads = {"heads": 4, "kv_heads": 2, "head_dim": 8}
    cfg = dataclasses.replace(cfg, **{**small, **heads, **changes})
    return decode.random_work(cfg, source="a toy")


def quiet():
    return Console(file=io.StringIO())


def needs_torch():
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason="the other side (extra `parity`)")


def test_both_sides_answer_the_same():
    needs_torch()
    result = decode.run(work(), SIZES, batches=[1, 3], rounds=2, console=quiet())
    told = json.loads(result.report(as_json=True))
    for each, batch in zip(told["batches"], (1, 3), strict=True):
        assert each["batch"] == batch
        ours, theirs = ([r["whole"][side] for r in each["rounds"]] for side in decode.SIDES)
        assert each["ratios"] == [b / a for a, b in zip(ours, theirs, strict=True)]
        assert len(ours) == 2
        assert each["ratio"] == pytest.approx(np.mean(each["ratios"]))
        wanted = batch * SIZES.new / np.median(ours)
        assert each["tokens_per_second"]["jax"] == pytest.approx(wanted)
    lines = result.report(as_json=False).splitlines()
    assert lines[0].startswith("LLaMA of a toy, 0 M parameters, float32; prompts of 9 tokens, 12")
    assert f"ratio   {told['batches'][1]['ratio']:8.2f}" in lines[6]


def test_answers_are_no_repetition():
    """Else equal tokens would prove little."""
    prompts = np.arange(18, dtype=np.int32).reshape(2, 9)
    ids, _ = decode.jax_side(work())(prompts, 12)
    assert min(len(set(row)) for row in ids.tolist()) > 4


def test_other_weights_are_found_out(monkeypatch):
    needs_torch()
    made = work(tied=False)
    params = made.params | {"lm_head/kernel": -made.params["lm_head/kernel"]}
    other = decode.jax_side(dataclasses.replace(made, params=params))
    monkeypatch.setattr(decode, "jax_side", lambda work: other)
    with pytest.raises(UserError, match="batch 2: greedy tokens differ"):
        decode.run(made, SIZES, batches=[2], rounds=1, console=quiet())


def test_rope_is_told():
    cfg = config.load("tiny").model.llama
    assert transformers_llama(cfg)["rope_parameters"]["rope_type"] == "default"
    linear = transformers_llama(dataclasses.replace(cfg, rope_scaling=4.0))["rope_parameters"]
    assert linear == {"rope_theta": cfg.rope_theta, "rope_type": "linear", "factor": 4.0}
    llama3 = config.RopeLlama3Config(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    )
    told = transformers_llama(dataclasses.replace(cfg, rope_llama3=llama3))["rope_parameters"]
    assert told["rope_type"] == "llama3"
    assert told["original_max_position_embeddings"] == 8192


def test_refusals(monkeypatch, capsys, tmp_path):
    for words, message in (
        (["--new", "0"], "--new is 0, wanted at least 1"),
        (["--batch", "1", "0"], "--batch is 0, wanted at least 1"),
        (["--folder", str(tmp_path / "none")], "no such folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["bench", "decode", *words])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"bench decode compares .* torch, transformers not found"):
        decode.TorchSide(work(), pathlib.Path(tmp_path), threads=1)
