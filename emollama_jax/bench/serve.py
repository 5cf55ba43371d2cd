"""`emollama bench serve`: the engine against one question at a time, and against `transformers`.

Two comparisons, each in turns, on one machine:

- whole requests, each about a drawn picture of its own: all at once through the engine, and one
  after the other through what `emollama ask` does, in one process. Both begin with decoded pixels.
  Greedy answers must be the same.
- the LLM part: the engine's own prefill and steps, and `transformers`' `generate` on batches of as
  many rows as the engine has slots, same weights, same prompts of token ids. Tokens must be equal.
  Left out where PyTorch is not installed.
"""

import asyncio
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console

from emollama_jax import config
from emollama_jax.base import init_model
from emollama_jax.bench.decode import PREFIX, TorchSide, Work
from emollama_jax.bench.options import ServeSizes
from emollama_jax.bench.torch_side import progress
from emollama_jax.checkpoint import ONE_DEVICE, load_for_inference
from emollama_jax.config import Config, GenerateConfig
from emollama_jax.data.items import standard_question
from emollama_jax.data.media import Clip
from emollama_jax.errors import UserError
from emollama_jax.models.emollama import EmoLlama
from emollama_jax.models.layers import Linear
from emollama_jax.models.llama import Llama
from emollama_jax.models.parameters import named_parameters
from emollama_jax.serve.answer import Answerer
from emollama_jax.serve.engine import BatchingEngine
from emollama_jax.serve.requests import Decoded, End, EngineSizes, Piece, Question
from emollama_jax.serve.slots import Entry, Slots
from emollama_jax.sharding.mesh import make_mesh
from emollama_jax.tiny.actionfaces.sample import sample_image

SHARES = (50, 95, 99)  # percentiles that are told


@dataclasses.dataclass(frozen=True)
class Timed:
    """One request: seconds until the first text and until the end, and what was said."""

    first: float
    whole: float
    text: str


@dataclasses.dataclass(frozen=True)
class Load:
    """Requests that were measured together."""

    seconds: float  # of all
    cpu: float  # CPU seconds of this process: what other programs on its cores distort least
    requests: tuple[Timed, ...]

    @property
    def rate(self) -> float:
        """Requests a second."""
        return len(self.requests) / self.seconds

    @property
    def cpu_each(self) -> float:
        """CPU seconds a request."""
        return self.cpu / len(self.requests)

    def percentiles(self, name: str) -> dict[str, float]:
        """Of `first` or `whole`, in seconds."""
        values = [getattr(one, name) for one in self.requests]
        return {f"p{share}": float(np.percentile(values, share)) for share in SHARES}


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The LLM part: new tokens a second of each side, round by round."""

    prompt: int
    new: int
    rows: int
    engine: tuple[float, ...]
    transformers: tuple[float, ...]
    cpu: tuple[float, float]  # CPU seconds of each side, all rounds together
    versions: dict[str, str]

    @property
    def ratio(self) -> float:
        pairs = zip(self.engine, self.transformers, strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)

    @property
    def cpu_ratio(self) -> float:
        """CPU seconds of `transformers` over the engine's."""
        return self.cpu[1] / self.cpu[0]


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured."""

    source: str
    sizes: ServeSizes
    opening: float  # seconds
    loops: tuple[Load, ...]  # one at a time, through `ask`
    alone: tuple[Load, ...]  # one at a time, through the engine
    crowds: tuple[Load, ...]  # all at once, through the engine
    different: int  # answers of the last crowd that are not the loop's about the same picture
    compilations: int  # since the engine opened, those of `ask` left out
    memory: tuple[float, float]  # MiB resident after opening, and at the end
    tokens: Tokens | None
    busy: tuple[float, float]  # load average of the last minute, before and after

    @property
    def speedup(self) -> float:
        """Requests a second of a crowd over those of a loop."""
        return statistics.median(
            crowd.rate / loop.rate for crowd, loop in zip(self.crowds, self.loops, strict=True)
        )

    @property
    def cpu_speedup(self) -> float:
        """CPU seconds a request of a loop over those of a crowd."""
        return _joined(self.loops).cpu_each / _joined(self.crowds).cpu_each

    @property
    def first_ratio(self) -> float:
        """Seconds to the first text of a lone request: the engine's over `ask`'s."""
        ours, theirs = (
            statistics.median(one.first for load in loads for one in load.requests)
            for loads in (self.alone, self.loops)
        )
        return ours / theirs

    def report(self, *, as_json: bool) -> str:
        """What the command prints."""
        return json.dumps(self.to_json(), indent=2) if as_json else "\n".join(self.lines())

    def to_json(self) -> dict[str, Any]:
        loads = {"loop": self.loops, "alone": self.alone, "crowd": self.crowds}
        return {
            "source": self.source,
            **dataclasses.asdict(self.sizes),
            "opening_seconds": self.opening,
            "requests_per_second": {
                name: [load.rate for load in each] for name, each in loads.items()
            },
            "first_text_seconds": {
                name: _joined(each).percentiles("first") for name, each in loads.items()
            },
            "request_seconds": {
                name: _joined(each).percentiles("whole") for name, each in loads.items()
            },
            "cpu_seconds_per_request": {
                name: _joined(each).cpu_each for name, each in loads.items()
            },
            "speedup": self.speedup,
            "cpu_speedup": self.cpu_speedup,
            "first_text_ratio": self.first_ratio,
            "different_answers": self.different,
            "compilations": self.compilations,
            "resident_mib": list(self.memory),
            "llm": None
            if self.tokens is None
            else {
                **dataclasses.asdict(self.tokens),
                "ratio": self.tokens.ratio,
                "cpu_ratio": self.tokens.cpu_ratio,
            },
            "load_average": list(self.busy),
        }

    def lines(self) -> list[str]:
        sizes, told = self.sizes, []
        for name, loads in (
            ("ask, one at a time", self.loops),
            ("engine, one at a time", self.alone),
            (f"engine, {sizes.requests} at once", self.crowds),
        ):
            whole = _joined(loads)
            rate = statistics.median(load.rate for load in loads)
            words = [
                f"{what} " + " ".join(f"{x:7.2f}" for x in whole.percentiles(field).values())
                for what, field in (("first text", "first"), ("whole", "whole"))
            ]
            told.append(f"{name:<24}{rate:7.2f} requests/s   {'   '.join(words)} s")
        return [
            f"{self.source}: pictures of their own, at most {sizes.new} new tokens, {sizes.slots} "
            f"slots, {os.cpu_count()} CPUs; seconds as {', '.join(f'p{x}' for x in SHARES)}",
            *told,
            f"throughput {self.speedup:.2f} × ask's, by CPU seconds {self.cpu_speedup:.2f} ×; a "
            f"lone request's first text after {self.first_ratio:.2f} × ask's time (median)",
            f"{self.different} of {min(sizes.loop, sizes.requests)} answers at once differ from "
            f"ask's; {self.compilations} compilations since "
            f"it opened, which took {self.opening:.1f} s; {self.memory[0]:,.0f} MiB resident then, "
            f"{self.memory[1]:,.0f} at the end; load average {self.busy[0]:.1f}, "
            f"{self.busy[1]:.1f}",
            *self._llm(),
        ]

    def _llm(self) -> list[str]:
        if self.tokens is None:
            return ["the LLM part was not compared: torch and transformers (extra parity) needed"]
        found = self.tokens
        versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
        return [
            f"LLM part, {found.rows} rows, prompts of {found.prompt} tokens, {found.new} new: "
            f"engine {statistics.median(found.engine):.1f} tokens/s, transformers "
            f"{statistics.median(found.transformers):.1f}, ratio {found.ratio:.2f}, by CPU seconds "
            f"{found.cpu_ratio:.2f}; all tokens are the same; {versions}"
        ]


def load_run(run: str) -> tuple[Config, EmoLlama, str]:
    """A trained run."""
    return *load_for_inference(run), run


def load_base(name: str) -> tuple[Config, EmoLlama, str]:
    """The base of a config: its weights, and random numbers for what they lack."""
    cfg = config.load(name)
    return cfg, init_model(cfg, make_mesh(ONE_DEVICE)), f"{name}, untrained"


def run(loaded: tuple[Config, EmoLlama, str], sizes: ServeSizes, *, console: Console) -> Result:
    """Measures all in turns, an untimed round first.

    Args:
        loaded: from `load_run` or `load_base`.
        sizes: sizes of the load.
        console: terminal for progress.
    """
    cfg, model, source = loaded
    pictures = [_decoded(number) for number in range(sizes.requests)]
    busy, began = os.getloadavg()[0], time.perf_counter()
    engine = BatchingEngine(cfg, model, EngineSizes(sizes.slots, waiting=sizes.requests))
    with progress(console) as bars:
        task = bars.add_task("opening the engine", total=None)
        engine.open(lambda what, done, total: bars.update(task, completed=done, total=total))
        opening, memory = time.perf_counter() - began, _resident()
        bars.update(task, description="measuring", completed=0, total=1 + sizes.rounds)
        how = dataclasses.replace(cfg.generate, temperature=0.0, max_new_tokens=sizes.new)
        sides = _Sides(engine, Answerer(cfg, model), how)
        rounds, compiled = [], 0
        for number in range(1 + sizes.rounds):
            count = sizes.loop if number else 2
            loop = sides.loop(pictures[:count])
            if number == 0:  # `ask` compiles its own programs at its first question
                compiled = engine.figures().compilations
            rounds.append((loop, sides.alone(pictures[:count]), sides.crowd(pictures)))
            bars.advance(task)
        different = sides.different(pictures)
        compilations = engine.figures().compilations - compiled
        engine.close()
        bars.update(task, description="the LLM part")
        tokens = compare_tokens(cfg, model, sizes)
    loops, alone, crowds = zip(*rounds[1:], strict=True)
    return Result(
        source=source,
        sizes=sizes,
        opening=opening,
        loops=loops,
        alone=alone,
        crowds=crowds,
        different=different,
        compilations=compilations,
        memory=(memory, _resident()),
        tokens=tokens,
        busy=(busy, os.getloadavg()[0]),
    )


class _Sides:
    """The two ways of answering about pictures."""

    def __init__(self, engine: BatchingEngine, answerer: Answerer, how: GenerateConfig):
        self._engine, self._answerer, self._how = engine, answerer, how
        self._said: dict[str, str] = {}  # the loop's answer, by picture
        self._number = itertools.count()

    def loop(self, pictures: Sequence[Decoded]) -> Load:
        """As `emollama ask` does, one after the other."""
        clock, told = _Clock(), []
        for picture in pictures:
            start = time.perf_counter()
            clip = Clip(picture.frames, picture.indices, picture.count, None)
            media = self._answerer.see("image", clip, self._answerer.search([clip])[0])
            pieces = self._answerer.ask(media, standard_question("image"), how=self._how)
            text = next(pieces, "")
            first = time.perf_counter() - start
            text += "".join(pieces)
            told.append(Timed(first, time.perf_counter() - start, text))
            self._said[picture.digest] = text
        return clock.load(told)

    def alone(self, pictures: Sequence[Decoded]) -> Load:
        """Through the engine, one after the other."""

        async def ask() -> list[Timed]:
            return [await self._ask(picture) for picture in pictures]

        return _timed(ask)

    def crowd(self, pictures: Sequence[Decoded]) -> Load:
        """Through the engine, all at once."""

        async def ask() -> list[Timed]:
            return await asyncio.gather(*map(self._ask, pictures))

        load = _timed(ask)
        self._last = load
        return load

    def different(self, pictures: Sequence[Decoded]) -> int:
        """How many answers of the last crowd are not the loop's about the same picture."""
        pairs = zip(pictures, self._last.requests, strict=True)
        return sum(self._said.get(picture.digest, one.text) != one.text for picture, one in pairs)

    async def _ask(self, picture: Decoded) -> Timed:
        start, first, text = time.perf_counter(), None, ""
        new = dataclasses.replace(picture, digest=str(next(self._number)))  # nothing is kept of it
        asked = Question(new, standard_question("image"), self._how, agr=True)
        async for event in self._engine.ask(asked):
            if first is None:
                first = time.perf_counter() - start
            if isinstance(event, Piece):
                text += event.text
            assert isinstance(event, Piece | End)
        return Timed(first or 0.0, time.perf_counter() - start, text)


class _Clock:
    """Seconds since it was made."""

    def __init__(self):
        self._began = time.perf_counter(), time.process_time()

    def load(self, told: Sequence[Timed]) -> Load:
        """The requests of this time."""
        began, cpu = self._began
        return Load(time.perf_counter() - began, time.process_time() - cpu, tuple(told))


def _timed(ask: Callable[[], Any]) -> Load:
    clock = _Clock()
    return clock.load(asyncio.run(ask()))


def compare_tokens(cfg: Config, model: EmoLlama, sizes: ServeSizes) -> Tokens | None:
    """The LLM part of both sides; None without PyTorch, or beside another device than a CPU.

    Raises:
        UserError: tokens that differ.
    """
    there = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    if not there or jax.default_backend() != "cpu" or cfg.model.llama.dtype != "float32":
        return None
    work, prompt = work_of(model.llama), cfg.data.text_length
    rng = np.random.Generator(np.random.PCG64(0))
    shape = (sizes.requests, prompt)
    prompts = rng.integers(0, cfg.model.llama.vocab_size, shape).astype(np.int32)
    ours = _SlotsSide(model.llama, sizes, prompt)
    rates: tuple[list[float], list[float]] = ([], [])
    cpu = np.zeros(2)
    with tempfile.TemporaryDirectory() as folder:
        torch = TorchSide(work, pathlib.Path(folder), threads=len(os.sched_getaffinity(0)))
        try:
            for number in range(1 + sizes.rounds):
                some = prompts if number else prompts[: sizes.slots]
                before = np.array([time.process_time(), torch.cpu_seconds()])
                found, seconds = ours.run(some)
                parts = [
                    torch.run(some[i : i + sizes.slots], sizes.new)
                    for i in range(0, len(some), sizes.slots)
                ]
                if (found != np.concatenate([ids for ids, _ in parts])).any():
                    raise UserError("the LLM part: greedy tokens differ: not the same work")
                spent = seconds, sum(seconds for _, seconds in parts)
                if number:
                    cpu += [time.process_time(), torch.cpu_seconds()] - before
                for rate, each in zip(rates, spent, strict=True):
                    rate.append(some.shape[0] * sizes.new / each)
        finally:
            torch.close()
    versions = {"jax": jax.__version__, **torch.versions}
    ours_, theirs = (tuple(rate[1:]) for rate in rates)
    spent = float(cpu[0]), float(cpu[1])
    return Tokens(prompt, sizes.new, sizes.slots, ours_, theirs, spent, versions)


class _SlotsSide:
    """The engine's slots without the engine: prompts of token ids, all answered to their length."""

    def __init__(self, llama: Llama, sizes: ServeSizes, prompt: int):
        self._new = sizes.new
        self._slots = Slots(llama, count=sizes.slots, texts=[prompt], flags={}, top=1)
        self._nothing = np.zeros((0, llama.cfg.width), llama.cfg.dtype)

    def run(self, prompts: np.ndarray) -> tuple[np.ndarray, float]:
        """Tokens [B, N] and seconds."""
        began, slots = time.perf_counter(), self._slots
        how = GenerateConfig(max_new_tokens=self._new, temperature=0.0, top_p=1.0, seed=0)
        waiting = list(range(len(prompts)))
        owner: dict[int, int] = {}
        found: list[list[int]] = [[] for _ in prompts]
        while waiting or owner:
            if waiting and slots.free():
                entries = [self._entry(prompts[row], how) for row in waiting]
                chosen = slots.group(entries)
                begun = slots.begin([entries[i] for i in chosen])
                for i, number, token in zip(chosen, begun.slots, begun.drawn.token, strict=False):
                    owner[number] = waiting[i]
                    found[waiting[i]].append(int(token))
                waiting = [row for i, row in enumerate(waiting) if i not in chosen]
                continue  # prompts first: all rows then go together, as a batch does
            drawn = slots.advance()
            for number, row in list(owner.items()):
                found[row].append(int(drawn.token[number]))
                if len(found[row]) == self._new:
                    slots.leave(number)
                    del owner[number]
        return np.array(found, np.int32), time.perf_counter() - began

    def _entry(self, ids: np.ndarray, how: GenerateConfig) -> Entry:
        signature = ids.astype(np.int64)
        return Entry(ids, self._nothing, signature, how, told=False, follows=False, alone=False)


def work_of(llama: Llama) -> Work:
    """A decoder's weights as the other side takes them, adapters merged."""
    params: dict[str, np.ndarray] = {}
    for path, leaf in named_parameters(llama).items():
        if not path.endswith(("lora_A", "lora_B")):
            params[path] = np.asarray(leaf[...], np.float32)
    for name, child in vars(llama.layers).items():
        if isinstance(child, Linear) and child.lora is not None:
            update = child.lora_A[...] @ child.lora_B[...]
            scale = child.lora.alpha / child.lora.rank
            path = f"layers/{name}/kernel"
            params[path] = params[path] + np.asarray(update * scale, np.float32)
    return Work(cfg=llama.cfg, params=params, source=PREFIX)


def _decoded(number: int) -> Decoded:
    pixels = sample_image("test", number).picture
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()
    return Decoded("image", [pixels], np.zeros(1, int), 1, digest)


def _joined(loads: Sequence[Load]) -> Load:
    requests = tuple(one for load in loads for one in load.requests)
    return Load(sum(load.seconds for load in loads), sum(load.cpu for load in loads), requests)


def _resident() -> float:
    """MiB of memory of this process."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
