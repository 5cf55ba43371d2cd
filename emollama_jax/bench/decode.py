"""`emollama bench decode`: tokens per second of greedy decoding, against `transformers`.

The same LLaMA, the same weights, the same prompts, on a CPU: our jitted `decode` on one side, on
the other `transformers`' `generate` (`torch_sides/torch_decode.py`, in a process of its own: the
package never imports PyTorch). They answer in turns, round after round, whole calls of prompt
and new tokens and calls of one new token: what lies between the two is the time of the tokens after
the first. The tokens must be the same, or nothing is printed but the error.
"""

import dataclasses
import json
import math
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from safetensors.numpy import save_file

from emollama_jax import config, imported
from emollama_jax.bench.options import DecodeSizes
from emollama_jax.bench.torch_side import TorchProcess, check_cpu, progress, transformers_llama
from emollama_jax.config import LlamaConfig
from emollama_jax.errors import UserError
from emollama_jax.generate.decode import decode, make_ending
from emollama_jax.generate.prompt import Prompt
from emollama_jax.models.llama import Llama
from emollama_jax.models.llama_by_token import laid_out
from emollama_jax.models.parameters import named_parameters
from emollama_jax.models.rngs import abstract

CONFIG = "emollama_135m"  # whose LLaMA is measured where no folder is named
SIDES = ("jax", "torch")
PREFIX = "llama/"  # of its paths in a folder


@dataclasses.dataclass(frozen=True)
class Round:
    """Seconds of one round, by side."""

    whole: dict[str, float]  # prompt and all new tokens
    first: dict[str, float]  # prompt and one new token

    def ratio(self) -> float:
        """PyTorch's seconds over ours."""
        return self.whole[SIDES[1]] / self.whole[SIDES[0]]


@dataclasses.dataclass(frozen=True)
class BatchComparison:
    """What was measured of one batch."""

    batch: int
    sizes: DecodeSizes
    rounds: tuple[Round, ...]

    def tokens_per_second(self, side: str) -> float:
        """New tokens over the seconds of whole calls."""
        seconds = statistics.median(each.whole[side] for each in self.rounds)
        return self.batch * self.sizes.new / seconds

    def first(self, side: str) -> float:
        """Seconds until the first token."""
        return statistics.median(each.first[side] for each in self.rounds)

    def step(self, side: str) -> float:
        """Seconds of each token after the first; NaN where there is none."""
        if self.sizes.new == 1:
            return float("nan")
        spent = (each.whole[side] - each.first[side] for each in self.rounds)
        return statistics.median(spent) / (self.sizes.new - 1)

    def to_json(self) -> dict[str, Any]:
        ratios = [each.ratio() for each in self.rounds]
        return {
            "batch": self.batch,
            "tokens_per_second": {side: self.tokens_per_second(side) for side in SIDES},
            "first_token_seconds": {side: self.first(side) for side in SIDES},
            "step_seconds": {
                side: self.step(side) if self.sizes.new > 1 else None for side in SIDES
            },
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "rounds": [dataclasses.asdict(each) for each in self.rounds],
        }

    def lines(self) -> list[str]:
        ratios = sorted(each.ratio() for each in self.rounds)
        lines = [
            f"batch {self.batch:<6}{side:<8}{self.tokens_per_second(side):8.1f} tokens/s"
            f"   first token {self.first(side) * 1e3:7.1f} ms"
            f"   each later one {self.step(side) * 1e3:6.1f} ms"
            for side in SIDES
        ]
        spread = f"({ratios[0]:.2f} to {ratios[-1]:.2f} in {len(ratios)} rounds)"
        return [*lines, f"{'':<12}{'ratio':<8}{statistics.median(ratios):8.2f} {spread}"]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What was measured."""

    source: str  # of the weights
    parameters: int
    threads: int
    sizes: DecodeSizes
    versions: dict[str, str]
    batches: tuple[BatchComparison, ...]

    def report(self, *, as_json: bool) -> str:
        """What the command prints."""
        if not as_json:
            return "\n".join(self.lines())
        told = {
            "source": self.source,
            "parameters": self.parameters,
            "threads": self.threads,
            "prompt": self.sizes.prompt,
            "new": self.sizes.new,
            "versions": self.versions,
            "batches": [each.to_json() for each in self.batches],
        }
        return json.dumps(told, indent=2)

    def lines(self) -> list[str]:
        """The table."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return [
            f"LLaMA of {self.source}, {self.parameters / 1e6:.0f} M parameters, float32; prompts "
            f"of {self.sizes.prompt} tokens, {self.sizes.new} new ones; {self.threads} threads",
            *(line for each in self.batches for line in each.lines()),
            f"all greedy tokens are the same; {versions}",
        ]


@dataclasses.dataclass(frozen=True)
class Work:
    """What both sides do."""

    cfg: LlamaConfig
    params: dict[str, np.ndarray]  # by path, float32
    source: str


def load_folder(folder: pathlib.Path) -> Work:
    """The LLaMA of a folder that `tools.convert_torch` wrote.

    Raises:
        UserError: a folder of something else.
    """
    sizes = imported.read_manifest(folder).model.get("llama")
    if sizes is None:
        raise UserError(f"{folder}: holds no LLaMA: convert one (docs/convert.md)")
    cfg = _float32(sizes, origin=str(folder))
    paths = [PREFIX + path for path in named_parameters(_abstract(cfg))]
    values = imported.load_numpy(folder, paths)
    params = {
        path.removeprefix(PREFIX): np.asarray(value, np.float32) for path, value in values.items()
    }
    return Work(cfg=cfg, params=params, source=folder.name)


def random_work(cfg: LlamaConfig, *, source: str, seed: int = 0) -> Work:
    """Random weights; scales of norms are 1.

    Kernels are large beside the embedding: a tied LLaMA would repeat its last token otherwise, and
    equal answers would prove little.
    """
    rng = np.random.Generator(np.random.PCG64(seed))

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if path.endswith("scale"):
            return np.ones(shape, np.float32)
        scale = 2 / math.sqrt(shape[-2]) if path.endswith("kernel") else 0.02
        return rng.standard_normal(shape, np.float32) * np.float32(scale)

    leaves = named_parameters(_abstract(cfg))
    params = {path: draw(path, leaf.shape) for path, leaf in sorted(leaves.items())}
    return Work(cfg=cfg, params=params, source=source)


def random_model() -> Work:
    """The shape of `CONFIG`'s LLaMA with random weights."""
    sizes = config.to_dict(config.load(CONFIG))["model"]["llama"]
    return random_work(_float32(sizes, origin=CONFIG), source=f"random weights, as {CONFIG}")


def _float32(sizes: dict[str, Any], *, origin: str) -> LlamaConfig:
    """A LLaMA of some sizes, without adapters."""
    tree = config.to_dict(config.load("tiny"))
    tree["model"]["llama"].update(sizes)
    tree["model"]["llama"] |= {"dtype": "float32", "remat": "none", "attention": "xla"}
    tree["model"]["llama"]["lora"] |= {"rank": 0}
    return config.from_dict(tree, origin=origin).model.llama


def _abstract(cfg: LlamaConfig) -> Llama:
    return abstract(lambda rngs: Llama(cfg, rngs=rngs))


def jax_side(work: Work) -> Callable[[np.ndarray, int], tuple[np.ndarray, float]]:
    """Ours: (prompts int32 [B, T], new tokens) → (tokens int32 [B, N], seconds)."""
    model = _abstract(work.cfg)
    for path, leaf in named_parameters(model).items():
        leaf.set_value(jnp.asarray(work.params[path]))
    llama = nnx.split(laid_out(model))
    embed = jax.jit(lambda state, ids: nnx.merge(llama[0], state).embed(ids))
    ending = make_ending((), 0)

    def run(prompts: np.ndarray, new: int) -> tuple[np.ndarray, float]:
        start = time.perf_counter()
        length = jnp.full(prompts.shape[0], prompts.shape[1], jnp.int32)
        prompt = Prompt(embeds=embed(llama[1], prompts), length=length)
        found = decode(*llama, prompt, None, ending, max_new_tokens=new)
        ids = np.asarray(found.ids)
        return ids, time.perf_counter() - start

    return run


def _without_padding(work: Work) -> dict[str, np.ndarray]:
    """The parameters without the vocabulary's rows of padding, which our side never chooses."""
    words, params = work.cfg.vocab_size, dict(work.params)
    params["embed_tokens"] = params["embed_tokens"][:words]
    if not work.cfg.tied:
        params["lm_head/kernel"] = np.ascontiguousarray(params["lm_head/kernel"][:, :words])
    return params


class TorchSide(TorchProcess):
    """`transformers`, in a process of its own."""

    def __init__(self, work: Work, folder: pathlib.Path, *, threads: int):
        super().__init__("torch_decode.py", command="bench decode", needs=("torch", "transformers"))
        file = folder / "weights.safetensors"
        save_file(_without_padding(work), file)
        setup = {"weights": str(file), "model": transformers_llama(work.cfg), "threads": threads}
        self.versions = dict(self.ask(do="build", **setup))
        file.unlink()

    def run(self, prompts: np.ndarray, new: int) -> tuple[np.ndarray, float]:
        """As `jax_side`'s."""
        answer = self.ask(do="generate", prompts=prompts.tolist(), new=new)
        return np.array(answer["ids"], np.int32), answer["seconds"]


def run(
    work: Work, sizes: DecodeSizes, *, batches: Sequence[int], rounds: int, console: Console
) -> Comparison:
    """Measures both sides in turns.

    Args:
        work: the model.
        sizes: sizes of prompts and answers.
        batches: numbers of prompts answered at once.
        rounds: timed rounds per batch size; an untimed one before them compiles the programs and
            touches memory first.
        console: terminal for progress.

    Raises:
        UserError: PyTorch is missing, or answers that differ.
    """
    check_cpu("bench decode")
    threads = len(os.sched_getaffinity(0))
    rng = np.random.Generator(np.random.PCG64(0))
    found = []
    with tempfile.TemporaryDirectory() as folder, progress(console) as bars:
        task = bars.add_task("building the models", total=len(batches) * (1 + rounds))
        torch = TorchSide(work, pathlib.Path(folder), threads=threads)
        try:
            sides = dict(zip(SIDES, (jax_side(work), torch.run), strict=True))
            for batch in batches:
                bars.update(task, description=f"batch {batch}")
                shape = (batch, sizes.prompt)
                prompts = rng.integers(0, work.cfg.vocab_size, shape).astype(np.int32)
                measured = []
                for _ in range(1 + rounds):
                    measured.append(_round(sides, prompts, sizes.new))
                    bars.advance(task)
                found.append(BatchComparison(batch, sizes, tuple(measured[1:])))
        finally:
            torch.close()
    parameters = sum(value.size for value in work.params.values())
    versions = {"jax": jax.__version__, **torch.versions}
    return Comparison(work.source, parameters, threads, sizes, versions, tuple(found))


def _round(sides: dict[str, Callable], prompts: np.ndarray, new: int) -> Round:
    """One round; compares the tokens."""
    seconds: dict[int, dict[str, float]] = {}
    for count in (1, new):
        answers = {}
        seconds[count] = {}
        for side, call in sides.items():
            answers[side], seconds[count][side] = call(prompts, count)
        ours, theirs = (answers[side] for side in SIDES)
        if ours.shape != theirs.shape or (ours != theirs).any():
            apart = np.argwhere(ours != theirs)[0].tolist() if ours.shape == theirs.shape else None
            raise UserError(
                f"batch {len(prompts)}: greedy tokens differ (first at [row, token] {apart}): the "
                "sides do not do the same work"
            )
    return Round(whole=seconds[new], first=seconds[1])
