"""`bench serve`: the sides do the same work, the numbers are counted right."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax import cli, config
from emollama_jax.bench import decode, serve
from emollama_jax.bench.options import ServeSizes
from emollama_jax.models.llama import Llama

SIZES = ServeSizes(requests=5, new=4, slots=3, loop=2, rounds=2)


@pytest.fixture(scope="module")
def llama():
    """A toy with adapters that change its answers."""
    cfg = config.load("tiny").model.llama
    small = {"vocab_size": 61, "width": 32, "mlp_width": 48, "layers": 2, "head_dim": 8}
    llama = Llama(dataclasses.replace(cfg, **small), rngs=nnx.Rngs(0))
    llama.layers.o_proj.kernel[...] *= 12
    for name in ("q_proj", "gate_proj"):
        update = getattr(llama.layers, name).lora_B
        update[...] = jnp.sin(jnp.arange(update[...].size)).reshape(update.shape)
    return llama


def test_slots_answer_as_a_batch_does(llama):
    """More prompts than slots; the other side has the adapters merged."""
    prompts = np.random.default_rng(0).integers(0, 61, (SIZES.requests, 7)).astype(np.int32)
    found, seconds = serve._SlotsSide(llama, SIZES, 7).run(prompts)
    lora = dataclasses.replace(llama.cfg.lora, rank=0)
    work = serve.work_of(llama)
    merged = dataclasses.replace(work, cfg=dataclasses.replace(work.cfg, lora=lora))
    wanted, _ = decode.jax_side(merged)(prompts, SIZES.new)
    np.testing.assert_array_equal(found, wanted)
    assert seconds > 0 and len(np.unique(found)) > 5


def load(seconds, *requests):
    timed = tuple(serve.Timed(first, whole, "") for first, whole in requests)
    return serve.Load(seconds, 2 * seconds, timed)


def result(**changes):
    numbers = {
        "source": "a run",
        "sizes": SIZES,
        "opening": 9.0,
        "loops": (load(4.0, (0.4, 2.0), (0.4, 2.0)), load(5.0, (0.5, 2.5), (0.5, 2.5))),
        "alone": (load(4.0, (0.5, 2.0), (0.5, 2.0)), load(5.0, (0.4, 2.5), (0.4, 2.5))),
        "crowds": (load(2.5, *[(1.0, 2.0)] * 5), load(2.0, *[(1.0, 2.0)] * 5)),
        "different": 0,
        "compilations": 0,
        "memory": (100.0, 101.0),
        "tokens": serve.Tokens(7, 4, 3, (20.0, 30.0), (10.0, 10.0), (6.0, 9.0), {"jax": "1"}),
        "busy": (0.1, 2.0),
    }
    return serve.Result(**numbers | changes)


def test_numbers_are_counted_right():
    found = result()
    # 5/2.5 over 2/4, and 5/2 over 2/5.
    assert found.speedup == pytest.approx((4.0 + 6.25) / 2)
    assert found.first_ratio == pytest.approx(1.0)
    assert found.cpu_speedup == pytest.approx((18 / 4) / (9 / 10))
    assert (found.tokens.ratio, found.tokens.cpu_ratio) == (2.5, 1.5)
    told = json.loads(found.report(as_json=True))
    assert told["request_seconds"]["loop"] == pytest.approx({"p50": 2.25, "p95": 2.5, "p99": 2.5})
    assert told["requests_per_second"]["crowd"] == [2.0, 2.5]
    lines = found.report(as_json=False).splitlines()
    assert lines[3].startswith("engine, 5 at once ") and " 2.25 requests/s " in lines[3]
    assert lines[4].startswith("throughput 5.12 × ask's")
    assert "ratio 2.50, by CPU seconds 1.50; all tokens are the same" in lines[-1]
    assert "extra parity" in result(tokens=None).report(as_json=False)


def test_what_makes_no_sense_is_refused(capsys):
    for words, wanted in (
        (["--run", "package", "--config", "tiny"], "give one of them"),
        (["--config", "tniy"], "did you mean tiny"),
        (["--run", "nowhere"], "no such folder"),
        (["--slots", "0"], "--slots is 0, wanted at least 1"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(["bench", "serve", *words])
        assert end.value.code == 2
        assert wanted in capsys.readouterr().err
