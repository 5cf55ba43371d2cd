"""`emollama bench train`: tokens per second of the LoRA train step, against PyTorch.

The same LLaMA, the same weights, the same batch, on a CPU: our jitted `train_step` on one side, on
the other `transformers`' LLaMA with PEFT's adapters (`torch_sides/torch_train.py`, in a process of
its own, because the package never imports PyTorch). Both train, step after step in turns, with
AdamW, the same learning rates and clipping; neither recomputes activations. Their losses must
agree at every step, or nothing is printed but the error.

Beside the ratio stands the share of the machine's float32 matrix rate that each side reaches: the
products that the step cannot do without, over its seconds and the rate of one large product; and
the rate at which each side's library does the products of a forward pass alone, one after another:
what the step would reach if all the rest took no time.
"""

import dataclasses
import json
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
from jaxtyping import Int
from rich.console import Console
from safetensors.numpy import save_file

from emollama_jax.batch import IGNORE, Batch, one_a_row
from emollama_jax.bench.options import TrainSizes
from emollama_jax.bench.torch_side import TorchProcess, check_cpu, progress, transformers_llama
from emollama_jax.checkpoint import ONE_DEVICE
from emollama_jax.config import Config, EmoLlamaConfig, LlamaConfig, LoraConfig, load
from emollama_jax.errors import UserError
from emollama_jax.models.llama import Llama
from emollama_jax.models.rngs import Rngs
from emollama_jax.sharding.mesh import make_mesh
from emollama_jax.terms import LANDMARKS
from emollama_jax.train.optimizer import ADAM_EPS
from emollama_jax.train.setup import Setup, set_up

AGREE = 1e-4  # by how much the losses of the two float32 sides may differ
LARGE = 2048  # side of the square product that tells the machine's rate
RUNS = 10  # of each product that is timed
SIDES = ("jax float32", "torch float32", "torch bfloat16")


def llama_config(sizes: TrainSizes) -> LlamaConfig:
    """The model; float32, nothing recomputed."""
    return LlamaConfig(
        vocab_size=sizes.vocab,
        vocab_multiple=1,
        width=sizes.width,
        mlp_width=sizes.mlp_width,
        layers=sizes.layers,
        heads=sizes.heads,
        kv_heads=sizes.heads,
        head_dim=sizes.width // sizes.heads,
        norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=1.0,
        rope_llama3=None,
        max_positions=sizes.length,
        tied=False,
        dtype="float32",
        remat="none",
        attention="xla",
        lora=LoraConfig(
            rank=sizes.rank,
            alpha=2.0 * sizes.rank,
            dropout=0.0,
            targets=("q_proj", "k_proj", "v_proj", "o_proj"),
        ),
    )


class TextModel(nnx.Module):
    """The LLM alone, as `train_step` asks for it."""

    def __init__(self, cfg: EmoLlamaConfig, *, rngs: Rngs):
        self.llama = Llama(cfg.llama, rngs=rngs)

    def hidden(self, batch: Batch, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """Final hidden states [B, T, D] of the text."""
        return self.llama(self.llama.embed(batch.ids), dropout_key=dropout_key).hidden


@dataclasses.dataclass(frozen=True)
class Work:
    """What both sides do."""

    sizes: TrainSizes
    setup: Setup
    params: dict[str, np.ndarray]  # by path, float32
    ids: np.ndarray  # int32 [B, T]
    labels: np.ndarray  # int32 [B, T]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What was measured."""

    sizes: TrainSizes
    threads: int
    matmul: float  # float32 FLOP per second of one large product, the better of both sides
    seconds: dict[str, list[float]]  # side → of each step; warm-up left out
    products: dict[str, float]  # float32 side → FLOP per second of a forward pass's products alone
    difference: float  # of the float32 sides' losses, at most

    def tokens_per_second(self, side: str) -> float:
        return self.sizes.batch * self.sizes.length / statistics.median(self.seconds[side])

    def ratios(self) -> list[float]:
        """PyTorch's float32 seconds over ours, step by step."""
        pairs = zip(self.seconds[SIDES[1]], self.seconds[SIDES[0]], strict=True)
        return sorted(theirs / ours for theirs, ours in pairs)

    def share(self, side: str) -> float:
        """Of the matrix rate."""
        return self.sizes.flops() / statistics.median(self.seconds[side]) / self.matmul

    def to_json(self) -> dict[str, Any]:
        """Everything, for a program."""
        return {
            "parameters": self.sizes.parameters(),
            "sizes": dataclasses.asdict(self.sizes),
            "threads": self.threads,
            "flops": self.sizes.flops(),
            "matmul_flops_per_second": self.matmul,
            "products_flops_per_second": self.products,
            "tokens_per_second": {side: self.tokens_per_second(side) for side in self.seconds},
            "share_of_matmul": {side: self.share(side) for side in SIDES[:2]},
            "ratio": statistics.median(self.ratios()),
            "seconds": self.seconds,
            "loss_difference": self.difference,
        }

    def report(self, *, as_json: bool) -> str:
        """What the command prints."""
        return json.dumps(self.to_json(), indent=2) if as_json else "\n".join(self.lines())

    def lines(self) -> list[str]:
        """The table."""
        sizes, ratios = self.sizes, self.ratios()
        answer = "all" if sizes.answer is None else f"the last {sizes.answer}"
        return [
            f"LLaMA, {sizes.parameters() / 1e6:.0f} M parameters, LoRA r {sizes.rank} on q, k, v, "
            f"o; {sizes.batch} × {sizes.length} tokens, loss on {answer}; {self.threads} threads",
            *(
                f"{side:<16}{self.tokens_per_second(side):8.1f} tokens/s"
                + (f"   {self.share(side):4.0%} of the matrix rate" if side in SIDES[:2] else "")
                for side in SIDES
            ),
            f"{'ratio':<16}{statistics.median(ratios):8.2f} float32 against float32 "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f} in {len(ratios)} steps)",
            f"matrix rate {self.matmul / 1e9:.0f} GFLOP/s float32; a step takes "
            f"{sizes.flops() / 1e12:.2f} TFLOP",
            "products of a forward pass alone: "
            + ", ".join(f"{side} {rate / 1e9:.0f}" for side, rate in self.products.items())
            + " GFLOP/s",
            f"losses differ by {self.difference:.1e} at most",
        ]


def make_work(sizes: TrainSizes, *, seed: int = 0) -> Work:
    """Random weights and ids, and the optimizer.

    Raises:
        UserError: an answer longer than the text, or heads that do not divide the width.
    """
    if sizes.width % (2 * sizes.heads):
        raise UserError(f"--width {sizes.width}: must be an even multiple of --heads {sizes.heads}")
    if sizes.answer is not None and not 0 < sizes.answer < sizes.length:
        raise UserError(f"--answer {sizes.answer}: must be between 0 and --length {sizes.length}")
    setup = set_up(_config(sizes), make_mesh(ONE_DEVICE), build=TextModel)
    rng = np.random.Generator(np.random.PCG64(seed))

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if path.endswith("scale"):
            return np.ones(shape, np.float32)
        if path.endswith("lora_B"):
            return np.zeros(shape, np.float32)
        return rng.standard_normal(shape, np.float32) * np.float32(0.02)

    ids = rng.integers(0, sizes.vocab, (sizes.batch, sizes.length)).astype(np.int32)
    labels = ids.copy()
    if sizes.answer is not None:
        labels[:, : -sizes.answer] = IGNORE
    return Work(
        sizes=sizes,
        setup=setup,
        params={path: draw(path, leaf.shape) for path, leaf in setup.model.params.items()},
        ids=ids,
        labels=labels,
    )


def _config(sizes: TrainSizes) -> Config:
    """A run that trains the adapters."""
    cfg = load("tiny")
    training = dataclasses.replace(
        cfg.train,
        steps=1000,
        seed=0,
        accumulation=1,
        loss_chunk=64,
        trainable=(".*lora_[AB]",),
        learning_rate=1e-3,
        projector=(),
        warmup=0.0,
        frozen_dtype="float32",
    )
    model = dataclasses.replace(cfg.model, llama=llama_config(sizes))
    return dataclasses.replace(cfg, model=model, train=training, mesh=ONE_DEVICE, xla=())


def text_batch(ids: Int[np.ndarray, "b t"], labels: Int[np.ndarray, "b t"]) -> Batch:
    """A batch of text: no frames, no questions."""
    examples, length = ids.shape
    return one_a_row(
        frames=np.zeros((examples, 0, 1, 1, 3), np.uint8),
        faces=np.zeros((examples, 0, 1, 1, 3), np.uint8),
        face_found=np.zeros((examples, 0), bool),
        landmarks=np.zeros((examples, 0, LANDMARKS, 2), np.float32),
        ids=ids,
        labels=labels,
        length=np.full(examples, length, np.int32),
        questions=np.zeros((examples, 0, 1), np.int32),
        question_mask=np.zeros((examples, 0, 1), bool),
        weight=np.ones(examples, np.float32),
        index=np.arange(examples, dtype=np.int32),
    )


def jax_side(work: Work) -> Callable[[], tuple[float, float]]:
    """Our step: each call is one more, and gives (loss before the update, seconds)."""
    setup, mesh = work.setup, work.setup.model.mesh
    params = {path: jax.device_put(work.params[path], s) for path, s in setup.model.places.items()}
    frozen = {path: params[path] for path in setup.frozen}
    batch = jax.device_put(text_batch(work.ids, work.labels), jax.devices()[0])
    with jax.set_mesh(mesh):
        state = setup.start({path: params[path] for path in setup.state.params})

    def run() -> tuple[float, float]:
        nonlocal state
        start = time.perf_counter()
        with jax.set_mesh(mesh):
            state, metrics = setup.step(frozen, state, batch)
        jax.block_until_ready(state)
        return float(metrics.loss), time.perf_counter() - start

    return run


class TorchSide(TorchProcess):
    """PyTorch's LLaMA with adapters, in a process of its own."""

    def __init__(self, work: Work, folder: pathlib.Path, *, threads: int):
        super().__init__("torch_train.py", command="bench train", needs=("torch", "peft"))
        self._setup = _torch_setup(work, folder, threads=threads)

    def build(self, dtype: str) -> None:
        """Makes the model that computes in a dtype."""
        self.ask(do="build", name=dtype, dtype=dtype, **self._setup)

    def step(self, dtype: str, learning_rate: float) -> tuple[float, float]:
        """One training step: (loss before the update, seconds)."""
        answer = self.ask(do="step", name=dtype, learning_rate=learning_rate)
        return answer["loss"], answer["seconds"]


def _torch_setup(work: Work, folder: pathlib.Path, *, threads: int) -> dict[str, Any]:
    """A `build` request but for its name and dtype; weights and batch as files in a folder."""
    cfg, training = llama_config(work.sizes), work.setup.model.cfg.train
    save_file(work.params, folder / "weights.safetensors")
    save_file({"input_ids": work.ids, "labels": work.labels}, folder / "batch.safetensors")
    return {
        "weights": str(folder / "weights.safetensors"),
        "batch": str(folder / "batch.safetensors"),
        "threads": threads,
        "clip_norm": training.clip_norm,
        "optimizer": {
            "betas": [training.b1, training.b2],
            "eps": ADAM_EPS,
            "weight_decay": training.weight_decay,
        },
        "lora": {
            "r": cfg.lora.rank,
            "lora_alpha": cfg.lora.alpha,
            "lora_dropout": cfg.lora.dropout,
            "target_modules": list(cfg.lora.targets),
        },
        "model": transformers_llama(cfg),
    }


def product_rate(products: Sequence[tuple[int, int, int, int]]) -> float:
    """float32 FLOP per second of products (times, m, k, n), each at its best of several runs."""
    product = jax.jit(jnp.matmul)
    flops = seconds = 0.0
    for times, m, k, n in products:
        a, b = jnp.ones((m, k), jnp.float32), jnp.ones((k, n), jnp.float32)
        product(a, b).block_until_ready()
        best = float("inf")
        for _ in range(RUNS):
            start = time.perf_counter()
            product(a, b).block_until_ready()
            best = min(best, time.perf_counter() - start)
        flops, seconds = flops + times * 2.0 * m * k * n, seconds + times * best
    return flops / seconds


def run(sizes: TrainSizes, *, steps: int, warm: int, console: Console) -> Comparison:
    """Measures all sides in turns, step after step.

    Args:
        sizes: sizes of model and batch.
        steps: timed steps per side.
        warm: steps before them, in which programs are compiled and memory is first touched.
        console: terminal for progress.

    Raises:
        UserError: PyTorch is missing, sizes that do not fit, or losses that differ.
    """
    check_cpu("bench train")
    work, threads = make_work(sizes), len(os.sched_getaffinity(0))
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    difference = 0.0
    with tempfile.TemporaryDirectory() as folder, progress(console) as bars:
        task = bars.add_task("building the models", total=len(SIDES) * (warm + steps))
        torch = TorchSide(work, pathlib.Path(folder), threads=threads)
        try:
            torch.build("float32")
            torch.build("bfloat16")
            large, forward = [(1, LARGE, LARGE, LARGE)], sizes.products()
            rates = [
                {
                    SIDES[0]: product_rate(products),
                    SIDES[1]: torch.ask(do="rate", products=products, runs=RUNS)["rate"],
                }
                for products in (large, forward)
            ]
            ours = jax_side(work)
            for i in range(warm + steps):
                losses = {}
                rate = float(work.setup.optimizer.learning_rate(jnp.int32(i)))
                for side in SIDES:
                    bars.update(task, description=f"{'warm-up' if i < warm else 'step'}, {side}")
                    call = ours if side == SIDES[0] else None
                    losses[side], took = call() if call else torch.step(side.split()[1], rate)
                    if i >= warm:
                        seconds[side].append(took)
                    bars.advance(task)
                difference = max(difference, abs(losses[SIDES[0]] - losses[SIDES[1]]))
                if not difference <= AGREE:  # NaN is no agreement either
                    raise UserError(
                        f"step {i}: loss {losses[SIDES[0]]:.6f} here, {losses[SIDES[1]]:.6f} in "
                        f"PyTorch; they may differ by {AGREE}: the sides do not do the same work"
                    )
        finally:
            torch.close()
    return Comparison(sizes, threads, max(rates[0].values()), seconds, rates[1], difference)
