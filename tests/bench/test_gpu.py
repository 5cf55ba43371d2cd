"""`benchmarks/gpu.sh`: what it counts, and what it refuses."""

import importlib.util
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
