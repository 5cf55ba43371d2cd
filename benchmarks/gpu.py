"""Parts of `benchmarks/gpu.sh`, one a call; each writes a JSON file.

The models are LLaMA-2-7B's shape with random weights; `--small` takes a toy and float32, on a CPU.
Rows hold no padding, so that tokens a second are real ones. The step trains adapters of rank 64 on
all seven products and runs each layer again in its backward pass, as `emollama_7b` does; PyTorch's
side does the same with PEFT and gradient checkpointing (`torch_sides/torch_gpu.py`).
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

SIDES = pathlib.Path(__file__).parent / "torch_sides"
# Dense bfloat16 FLOP/s, from NVIDIA's data sheets.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
NEAR = 0.02  # of the largest value, between bfloat16 and float32


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured."""

    layers: int
    width: int
    mlp_width: int
    heads: int
    vocab: int
    rank: int
    examples: int  # of a step
    tokens: int  # of a row
    prompt: int  # tokens of a prompt
    new: int  # tokens of an answer
    rows: tuple[int, ...]  # of a decode
    dtype: str
    times: int  # that each is timed

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def step_flops(self) -> float:
        """Model FLOPs of a step: frozen kernels have no gradient of their own, adapters have."""
        layer = 4 * self.width**2 + 3 * self.width * self.mlp_width
        frozen = self.layers * layer + self.width * self.vocab
        adapters = self.layers * self.rank * (11 * self.width + 3 * self.mlp_width)
        seen = self.tokens * (self.tokens + 1) / 2
        attention = 3 * 4 * self.layers * seen * self.width
        return self.examples * (self.tokens * (4 * frozen + 6 * adapters) + attention)


WHOLE = Sizes(
    layers=32,
    width=4096,
    mlp_width=11008,
    heads=32,
    vocab=32000,
    rank=64,
    examples=2,
    tokens=2048,
    prompt=512,
    new=64,
    rows=(1, 8, 32),
    dtype="bfloat16",
    times=5,
)
SMALL = Sizes(
    layers=2,
    width=64,
    mlp_width=96,
    heads=4,
    vocab=128,
    rank=4,
    examples=2,
    tokens=64,
    prompt=8,
    new=4,
    rows=(1, 3),
    dtype="float32",
    times=2,
)


def median_seconds(run: Callable[[], Any], times: int) -> float:
    """Median of several runs, after one that is not timed; `run` waits for its result."""
    run()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


# ------------------------------------------------------------------ ours


def model_config(sizes: Sizes, frozen: str) -> Any:
    """A run of these sizes that trains adapters."""
    from emollama_jax import config

    on_gpu = sizes.dtype == "bfloat16"
    llama = {
        "layers": sizes.layers,
        "width": sizes.width,
        "mlp_width": sizes.mlp_width,
        "heads": sizes.heads,
        "kv_heads": sizes.heads,
        "head_dim": sizes.head_dim,
        "vocab_size": sizes.vocab,
        "dtype": sizes.dtype,
        "attention": "cudnn" if on_gpu else "xla",
        "frozen": frozen,
        "remat": "full",
        "lora.rank": sizes.rank,
        "lora.dropout": 0.0,
    }
    changes = [f"model.llama.{key}={value}" for key, value in llama.items()]
    changes += [f"train.frozen_dtype={sizes.dtype}", "train.loss_chunk=256", "weights=none"]
    changes += ['train.trainable=["llama/.*lora_[AB]"]', "train.projector=[]", "xla=[]"]
    changes += ["mesh.data=1", "mesh.fsdp=1", "mesh.tensor=1", "train.accumulation=1"]
    return config.load("emollama_7b", changes)


def peak_memory() -> int | None:
    """Bytes of the device that were in use at once; None where JAX does not count them."""
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def device() -> str:
    """Kind of the device, as JAX names it."""
    import jax

    return jax.devices()[0].device_kind


def attention(sizes: Sizes) -> dict[str, Any]:
    """Every implementation, whole rows and rows that examples share, against `xla` in float32:
    the largest error of result and gradients as a share of the largest value, and seconds."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from emollama_jax.models.attention import attention as ours

    rng = np.random.default_rng(0)
    shape = (sizes.examples, sizes.tokens, sizes.heads, sizes.head_dim)
    whole = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(4)]
    cuts = np.sort(rng.integers(1, sizes.tokens, (sizes.examples, 9)))
    places = np.arange(sizes.tokens)
    segments = jnp.asarray((places[None, :, None] >= cuts[:, None]).sum(-1), jnp.int32)

    def with_gradients(implementation: str, segments: jax.Array | None):
        def run(q, k, v, g):
            shared = {} if segments is None else {"segments": segments}
            how = functools.partial(ours, causal=True, implementation=implementation, **shared)
            out, pull = jax.vjp(how, q, k, v)
            return out, *pull(g)

        return jax.jit(run)

    found: dict[str, Any] = {"device": device()}
    implementations = ["xla", "cudnn"] if sizes.dtype == "bfloat16" else ["xla"]
    for name, cut in {"whole rows": None, "packed rows": segments}.items():
        with jax.default_matmul_precision("highest"):
            wanted = with_gradients("xla", cut)(*whole)
        for implementation in implementations:
            run, given = with_gradients(implementation, cut), [x.astype(sizes.dtype) for x in whole]
            errors = [
                float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max())
                for a, b in zip(run(*given), wanted, strict=True)
            ]
            seconds = median_seconds(lambda: jax.block_until_ready(run(*given)), sizes.times)  # noqa: B023
            found[f"{implementation}, {name}"] = {
                "error": max(errors),
                "agrees": max(errors) <= NEAR,
                "seconds": seconds,
            }
    return found


def train(sizes: Sizes, frozen: str) -> dict[str, Any]:
    """Our LoRA step."""
    import jax
    import numpy as np

    from emollama_jax.base import base_values
    from emollama_jax.bench.train import TextModel, text_batch
    from emollama_jax.sharding.mesh import make_mesh
    from emollama_jax.train.setup import set_up

    cfg = model_config(sizes, frozen)
    mesh = make_mesh(cfg.mesh)
    ids = np.random.default_rng(0).integers(0, sizes.vocab, (sizes.examples, sizes.tokens))
    batch = jax.device_put(text_batch(ids.astype(np.int32), ids.astype(np.int32)), jax.devices()[0])
    with jax.set_mesh(mesh):
        setup = set_up(cfg, mesh, build=TextModel)
        values = base_values(setup.model)
        parameters = {path: values[path] for path in setup.frozen}
        state = setup.start({path: values[path] for path in sorted(setup.model.trainable)})
        del values
        loss = 0.0

        def step() -> None:
            nonlocal state, loss
            state, metrics = setup.step(parameters, state, batch)
            loss = float(metrics.loss)

        seconds = median_seconds(step, sizes.times)
    return {"seconds": seconds, "loss": loss, "peak_bytes": peak_memory(), "device": device()}


def decode(sizes: Sizes, frozen: str) -> dict[str, Any]:
    """Our greedy decoding: seconds of whole calls by rows."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from emollama_jax.base import init_model
    from emollama_jax.bench.train import TextModel
    from emollama_jax.generate import decode as loop
    from emollama_jax.generate.prompt import Prompt
    from emollama_jax.models.llama_by_token import laid_out
    from emollama_jax.sharding.mesh import make_mesh

    cfg = model_config(sizes, frozen)
    llama = laid_out(init_model(cfg, make_mesh(cfg.mesh), build=TextModel).llama)
    graphdef, state = nnx.split(llama)
    embed = jax.jit(lambda state, ids: nnx.merge(graphdef, state).embed(ids))
    found: dict[str, Any] = {}
    for rows in sizes.rows:
        ids = np.random.default_rng(0).integers(0, sizes.vocab, (rows, sizes.prompt))
        length = jnp.full(rows, sizes.prompt, jnp.int32)
        prompt = Prompt(embeds=embed(state, ids.astype(np.int32)), length=length)
        given = (graphdef, state, prompt, None, loop.make_ending((), 0))
        run = functools.partial(loop.decode, *given, max_new_tokens=sizes.new)
        seconds = median_seconds(lambda: jax.block_until_ready(run()), sizes.times)  # noqa: B023
        found[str(rows)] = seconds
    return {"seconds": found, "peak_bytes": peak_memory(), "device": device()}


# ------------------------------------------------------------------ PyTorch's, and the table


def torch_side(kind: str, sizes: Sizes) -> dict[str, Any]:
    """The same in PyTorch, which this process does not import."""
    command = [sys.executable, str(SIDES / "torch_gpu.py"), kind]
    given = json.dumps(dataclasses.asdict(sizes))
    told = subprocess.run(command, input=given, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(told.stdout)


def table(folder: pathlib.Path) -> None:
    """Joins the parts to gpu.json and gpu.md."""
    parts = {
        path.stem: json.loads(path.read_text())
        for path in sorted(folder.glob("*.json"))
        if path.stem != "gpu"
    }
    kinds = {part["device"] for part in parts.values() if "device" in part}
    lines = [f"One {', '.join(sorted(kinds)) or 'unknown device'}.", ""]
    lines += ["| attention | error | ms, forward and backward |", "|---|---|---|"]
    for name, row in parts.get("attention", {}).items():
        if isinstance(row, dict) and "agrees" in row:
            verdict = "" if row["agrees"] else " (too much)"
            lines.append(f"| {name} | {row['error']:.1e}{verdict} | {1e3 * row['seconds']:.2f} |")
    columns = ("LoRA step", "s", "tokens/s", "peak, GiB", "MFU")
    lines += ["", f"| {' | '.join(columns)} |", "|---|---|---|---|---|"]
    for name, part in parts.items():
        if name.startswith("train_") and "seconds" in part:
            lines.append(_step_line(name.removeprefix("train_"), part))
    rows = next(
        (part["seconds"] for name, part in parts.items() if "decode" in name and "seconds" in part),
        {},
    )
    lines += [
        "",
        f"| decoding, tokens/s by rows | {' | '.join(rows)} |",
        "|---" * (1 + len(rows)) + "|",
    ]
    for name, part in parts.items():
        if name.startswith("decode_") and "seconds" in part:
            new = part["sizes"]["new"]
            speeds = (f"{int(n) * new / s:.1f}" for n, s in part["seconds"].items())
            lines.append(f"| {name.removeprefix('decode_')} | {' | '.join(speeds)} |")
    failed = [f"{name}: {part['failed']}" for name, part in parts.items() if "failed" in part]
    lines += ["", *(f"Failed: {line}." for line in failed)] if failed else []
    (folder / "gpu.json").write_text(json.dumps(parts, indent=1) + "\n")
    (folder / "gpu.md").write_text("\n".join(lines) + "\n")


def _step_line(name: str, part: dict[str, Any]) -> str:
    sizes = Sizes(**part["sizes"])
    peak = next((peak for kind, peak in PEAKS.items() if kind in part["device"]), None)
    mfu = "" if peak is None else f"{sizes.step_flops() / part['seconds'] / peak:.1%}"
    memory = "" if part["peak_bytes"] is None else f"{part['peak_bytes'] / 2**30:.1f}"
    speed = sizes.examples * sizes.tokens / part["seconds"]
    return f"| {name} | {part['seconds']:.3f} | {speed:,.0f} | {memory} | {mfu} |"


def main() -> None:
    """Runs a part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("attention")
    kinds.add_parser("table")
    for kind in ("train", "decode"):
        one = kinds.add_parser(kind)
        one.add_argument("--torch", action="store_true")
        one.add_argument("--frozen", default="float")
    args = parser.parse_args()
    sizes = SMALL if args.small else WHOLE
    if args.kind == "table":
        table(args.out)
        return
    if args.kind == "attention":
        found = attention(sizes)
    elif args.torch:
        found = torch_side(args.kind, sizes)
    else:
        found = {"train": train, "decode": decode}[args.kind](sizes, args.frozen)
    args.out.write_text(json.dumps({**found, "sizes": dataclasses.asdict(sizes)}) + "\n")


if __name__ == "__main__":
    main()
