"""Runs of the toy: training, loading, and what both say."""

import functools
import io
import pathlib

from rich.console import Console

from emollama_jax import base, checkpoint
from emollama_jax.testing.toy_model import Toy, ToyData
from emollama_jax.train import loop

fit = functools.partial(loop.fit, build=Toy, data=ToyData)
init_model = functools.partial(base.init_model, build=Toy)
load_for_inference = functools.partial(checkpoint.load_for_inference, build=Toy)


def quiet() -> Console:
    """A console that keeps what it is told."""
    return Console(file=io.StringIO(), width=200)


def read(path: pathlib.Path) -> str:
    return (path / "metrics.jsonl").read_text()
