"""`benchmarks/gpu.sh` in small, on a CPU: every part runs, and the table holds them all."""

import dataclasses
import importlib.util
import json
import subprocess

import pytest

from emollama_jax.config import load
from emollama_jax.scale import flops


@pytest.fixture(scope="module")
def gpu(root):
    """`benchmarks/gpu.py` as a module."""
    path = root / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_part_of_ours_runs_and_stands_in_the_table(gpu, tmp_path):
    sizes = dataclasses.replace(gpu.SMALL, times=1)
    parts = {
        "attention": gpu.attention(sizes),
        "train_int8": gpu.train(sizes, "int8"),
        "decode_int8": gpu.decode(sizes, "int8"),
        "decode_torch": {"failed": "exit status 124"},
    }
    for name, part in parts.items():
        kept = part if "failed" in part else {**part, "sizes": dataclasses.asdict(sizes)}
        (tmp_path / f"{name}.json").write_text(json.dumps(kept))
    gpu.table(tmp_path)
    said = (tmp_path / "gpu.md").read_text()
    rows = [row for row in parts["attention"].values() if isinstance(row, dict)]
    assert rows and all(row["agrees"] and row["error"] < 1e-4 for row in rows)
    assert 0 < parts["train_int8"]["loss"] < 10
    for line in (
        "One cpu.",
        "| xla, whole rows |",
        "| int8 |",
        "Failed: decode_torch: exit status",
    ):
        assert line in said
    assert set(json.loads((tmp_path / "gpu.json").read_text())) == set(parts)


def test_every_part_of_pytorchs_runs(gpu):
    pytest.importorskip("peft", reason="PyTorch's side needs peft (extra `parity`)")
    sizes = dataclasses.replace(gpu.SMALL, times=1)
    assert gpu.torch_side("train", sizes)["loss"] > 0
    assert set(gpu.torch_side("decode", sizes)["seconds"]) == {str(n) for n in sizes.rows}


def test_flops_of_a_step_are_those_of_the_plan(gpu):
    sizes, cfg = gpu.WHOLE, load("emollama_7b")
    tokens = sizes.examples * sizes.tokens
    products = list(flops._llm(cfg, tokens, sizes.heads * tokens * (sizes.tokens + 1) / 2))
    # Forward and the gradient for the input; of attention two products for two, of adapters one
    # for the kernel too.
    wanted = sum(p.forward * (3 if p.attention or "lora" in p.kernel else 2) for p in products)
    head = 4 * tokens * sizes.width * sizes.vocab
    assert sizes.step_flops() == pytest.approx(wanted + head, rel=1e-3)


def test_an_unknown_word_is_refused(root):
    said = subprocess.run(
        ["sh", "benchmarks/gpu.sh", "--dry"], cwd=root, stderr=subprocess.PIPE, text=True
    )
    assert said.returncode == 2 and "unknown (known: --dry-run" in said.stderr
