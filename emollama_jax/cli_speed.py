"""The verbs about speed: plans for a TPU slice, and measurements against PyTorch."""

import dataclasses
import pathlib

import tyro

from emollama_jax import compile_cache
from emollama_jax.bench.options import DecodeSizes, ServeSizes, TrainSizes
from emollama_jax.cli_words import ConfigName, Overrides, load_config, new_console
from emollama_jax.errors import UserError
from emollama_jax.preflight import at_least
from emollama_jax.runs import PACKAGE, find
from emollama_jax.scale.options import Planned

Inline = tyro.conf.OmitArgPrefixes


def plan(
    config: ConfigName,
    overrides: Overrides = (),
    *,
    topology: str,
    planned: Inline[Planned] = Planned(),  # noqa: B008
    json: bool = False,
    search: bool = False,
) -> None:
    """Compiles the real step for a TPU slice, without that TPU, and reports memory, FLOPs,
    collectives and estimated time. Needs the extra `plan` (libtpu).

    No weights are read. A 7B model takes minutes to compile on the CPU.

    Args:
        config: a name in configs/ or a .yaml file.
        overrides: changes of the config, e.g. mesh.fsdp=-1 model.llama.remat=dots.
        topology: TPU slice, e.g. v5e:2x4 (8 chips) or v5p:4x4x4; an unknown one lists them all.
        planned: the step, and what it works on.
        json: print JSON instead of tables.
        search: find the largest batch that fits, the best preset and the best rematerialisation;
            many compilations.
    """
    from emollama_jax.scale import topologies

    topologies.chip_of(topology)  # a wrong one is refused at once
    at_least(1, batch=planned.batch)
    if planned.tokens is not None and planned.tokens <= 0:
        raise UserError(f"--tokens is {planned.tokens:g}, wanted more than 0")
    cfg = load_config(config, overrides)
    topologies.prepare()  # before JAX starts
    from emollama_jax.scale.command import run

    run(
        cfg,
        topology,
        planned,
        as_json=json,
        searching=search,
        console=new_console(),
    )


def bench_data(
    config: str = "emollama_7b", clips: int = 8, batch: int = 4, batches: int = 10, rounds: int = 5
) -> None:
    """Frames per second of the input pipeline (decode, sample, crop, resize, tokenise, batch) on
    drawn clips, against PyTorch's DataLoader with PyAV, two workers each, measured in turns.

    Args:
        config: config of the shapes: a name in configs/ or a .yaml file.
        clips: clips to draw: H.264 in MP4, 640 × 360, 4 s.
        batch: clips per batch.
        batches: batches per timing.
        rounds: timings per side.
    """
    at_least(1, clips=clips, batch=batch, batches=batches, rounds=rounds)
    load_config(config)
    from emollama_jax.bench import data

    cfg = data.bench_config(config, batch=batch)
    speeds = data.run(cfg, clips=clips, batches=batches, rounds=rounds, console=new_console())
    print(data.table(speeds))


def bench_train(
    sizes: Inline[TrainSizes], steps: int = 5, warm: int = 2, json: bool = False
) -> None:
    """Tokens per second of a LoRA train step on this CPU, against the same model, weights and batch
    in PyTorch, measured in turns; needs the extra `parity`. Losses must agree.

    Args:
        sizes: sizes of the LLaMA and its batch.
        steps: timed steps per side.
        warm: warm-up steps per side.
        json: print JSON instead of the table.
    """
    at_least(1, steps=steps)
    at_least(0, warm=warm)
    compile_cache.start()
    from emollama_jax.bench import train

    result = train.run(sizes, steps=steps, warm=warm, console=new_console())
    print(result.report(as_json=json))


def bench_decode(
    folder: pathlib.Path | None = None,
    sizes: Inline[DecodeSizes] = DecodeSizes(),  # noqa: B008
    batch: tuple[int, ...] = (1, 8),
    rounds: int = 5,
    json: bool = False,
) -> None:
    """Tokens per second of greedy decoding on this CPU, against the same LLaMA, weights and prompts
    in `transformers`, measured in turns; needs the extra `parity`. Tokens must be equal.

    Args:
        folder: LLaMA that tools.convert_torch wrote; random weights of emollama_135m's shape by
            default.
        sizes: tokens of prompts and answers.
        batch: batch sizes to measure, one after the other.
        rounds: timed rounds per batch size.
        json: print JSON instead of the table.
    """
    at_least(1, prompt=sizes.prompt, new=sizes.new, rounds=rounds)
    for each in batch:
        at_least(1, batch=each)
    compile_cache.start()
    from emollama_jax.bench import decode

    work = decode.random_model() if folder is None else decode.load_folder(folder)
    result = decode.run(work, sizes, batches=batch, rounds=rounds, console=new_console())
    print(result.report(as_json=json))


def bench_serve(
    run: str | None = None,
    config: str | None = None,
    sizes: Inline[ServeSizes] = ServeSizes(),  # noqa: B008
    json: bool = False,
) -> None:
    """Requests per second of the serving engine on this machine, against `emollama ask`'s way, one
    at a time; and of its LLM part against `transformers`' batched `generate`, where the extra
    `parity` is installed. Answers must be equal.

    Args:
        run: trained run; the one that ships with the package by default.
        config: config to measure untrained instead, e.g. emollama_135m after python -m tools.parts.
        sizes: requests, tokens, slots and rounds.
        json: print JSON instead of the lines.
    """
    at_least(1, **dataclasses.asdict(sizes))
    if run is not None and config is not None:
        raise UserError("--run and --config: give one of them")
    if config is None:
        find(PACKAGE if run is None else run)
    else:
        load_config(config)
    compile_cache.start()
    from emollama_jax.bench import serve

    loaded = serve.load_base(config) if config else serve.load_run(run or PACKAGE)
    result = serve.run(loaded, sizes, console=new_console())
    print(result.report(as_json=json))
