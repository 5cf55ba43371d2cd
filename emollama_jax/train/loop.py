"""The training run: restore → [save → draw a batch → step → log], as kauldron orders it.

The data iterator is touched only after a save, so that a checkpoint's iterator stands exactly where
its parameters do. Ctrl-C or SIGTERM lets the step finish, saves and returns; called again, it
resumes, and the loss curve is the one of an uninterrupted run, bit for bit.

One process (or the hosts of one run) at a time: the run's folder is locked.

On several hosts every process runs this same loop. A notice to any of them (SIGTERM, which is how
clouds announce a preemption) stops all after the same step.
"""

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import grain
import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console

from emollama_jax.base import Build, base_values
from emollama_jax.batch import Batch
from emollama_jax.checkpoint import Checkpoints
from emollama_jax.config import Config, TrainConfig
from emollama_jax.data.pipeline import TrainIterator, make_train_iterator
from emollama_jax.data.rows import real
from emollama_jax.errors import UserError
from emollama_jax.models.emollama import EmoLlama
from emollama_jax.paths import as_path
from emollama_jax.runs import refuse_packed
from emollama_jax.sharding.distributed import Share, hold_together, leads, place_batch, share
from emollama_jax.sharding.mesh import batch_shards, make_mesh
from emollama_jax.train.optimizer import warmup_cosine
from emollama_jax.train.run_log import RunLog, Size
from emollama_jax.train.setup import Setup, set_up
from emollama_jax.train.step import Metrics, Params, TrainState


@dataclasses.dataclass(frozen=True)
class FitResult:
    """How a run ended."""

    step: int  # updates done
    steps: int  # updates wanted
    loss: float | None  # of the last logged step; None: none was
    seconds: float  # of this call
    stopped_by: signal.Signals | None  # None: it reached its end, or `until`

    @property
    def exit_status(self) -> int:
        """As a shell reports a signal: 130 for Ctrl-C, 143 for SIGTERM."""
        return 0 if self.stopped_by is None else 128 + self.stopped_by


class StopSignals:
    """Notes SIGINT and SIGTERM instead of dying; a context manager.

    The first one is noted, and gives the signal back its default: a second Ctrl-C kills. Outside
    the main thread, where Python cannot take signals, none is noted.

    On several hosts SIGTERM belongs to JAX's preemption service: it tells every host of a notice in
    the background, and they agree on the step to stop after without a collective. Ctrl-C is handed
    on as SIGTERM there.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._asked = 0

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            own = self.SIGNALS if jax.process_count() == 1 else (signal.SIGINT,)
            self._before = {number: signal.getsignal(number) for number in own}
            for number in own:
                signal.signal(number, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        for other in self._before:
            signal.signal(other, signal.SIG_DFL)
        if jax.process_count() == 1:
            self._received = signal.Signals(number)
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    def agreed(self) -> signal.Signals | None:
        """The signal of any host, or None; call exactly once per step so that all hosts agree."""
        # The service compares how often the hosts asked, which it counts from 0: not steps, since
        # a notice may come before a resumed run asks for the first time.
        self._asked += 1
        if self._received is None and multihost_utils.reached_preemption_sync_point(self._asked):
            self._received = signal.SIGTERM
        return self._received

    @property
    def stopped_by(self) -> signal.Signals | None:
        """What `agreed` said last."""
        return self._received


Data = Callable[[Config, Share], grain.DatasetIterator]


def prepared_data(cfg: Config, part: Share) -> TrainIterator:
    """This host's part of the batches of a run's prepared sets."""
    return make_train_iterator(cfg, host_index=part.index, host_count=part.count)


def fit(
    cfg: Config,
    out: epath.PathLike,
    *,
    until: int | None = None,
    console: Console | None = None,
    build: Build = EmoLlama,
    data: Data = prepared_data,
) -> FitResult:
    """Trains the run in a folder, from its start or its newest checkpoint.

    Args:
        cfg: the run.
        out: folder for `checkpoints/`, `metrics.jsonl` and `tensorboard/`, on a disk that all
            hosts share, or in a bucket.
        until: last step of this call, saved as after a signal; the next call resumes.
        console: terminal for progress; standard output by default.
        build: makes the model; see `base.py`.
        data: opens this host's part of the batches; its state must be the same on all hosts.

    Raises:
        UserError: a config or folder that does not fit, a folder in use, a loss that is not finite.
    """
    start = time.monotonic()
    out, mesh = as_path(out), make_mesh(cfg.mesh)
    console = (console or Console()) if leads() else Console(quiet=True)
    _check_batches(cfg, mesh)
    part = share(mesh)
    steps = cfg.train.steps if until is None else min(until, cfg.train.steps)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        refuse_packed(out)
        hold_together(out, stack, instead="choose another --out")
        stop = stack.enter_context(StopSignals())
        batches = data(cfg, part)
        stack.callback(batches.close)
        checkpoints = stack.enter_context(Checkpoints(out, cfg))
        setup = set_up(cfg, mesh, build=build)
        frozen, state = begin(setup, checkpoints, batches, console)
        step = saved = int(state.step)
        log = stack.enter_context(RunLog(out, console, steps=cfg.train.steps, done=step))

        while step < steps and stop.agreed() is None:
            if step % cfg.train.save_every == 0 and step != saved:
                log.keep()
                checkpoints.save(state, data=batches)
                saved = step
            batch = next(batches)
            state, metrics = _advance(setup, frozen, state, batch)
            step += 1
            logged = step % cfg.train.log_every == 0 or step == cfg.train.steps
            values = _floats(metrics, step=step, saved=saved) if logged else None
            log.step(step, values, _size(batch, part.count))
        if step != saved:
            log.keep()
            checkpoints.save(state, data=batches)
        seconds = time.monotonic() - start
    stopped = step < cfg.train.steps
    if stopped:
        console.print(f"stopped at step {step} of {cfg.train.steps}: re-run the command to resume")
    return FitResult(step, cfg.train.steps, log.loss, seconds, stop.stopped_by if stopped else None)


def _advance(
    setup: Setup, frozen: Params, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
    """One step; nothing but the batch moves to the devices."""
    placed = place_batch(batch, setup.model.mesh)
    with jax.transfer_guard("disallow"):
        return setup.step(frozen, state, placed)


def begin(
    setup: Setup, checkpoints: Checkpoints, data: grain.DatasetIterator, console: Console
) -> tuple[Params, TrainState]:
    """Frozen parameters and state at the newest checkpoint, or at the start.

    Args:
        setup: setup of the run; its mesh is entered.
        checkpoints: checkpoints of the run.
        data: iterator, moved to the checkpoint's position.
        console: told what is unusual.
    """
    model, cfg = setup.model, setup.model.cfg
    if model.replicated:
        console.print(
            f"{len(model.replicated)} dimensions are replicated on every device, e.g. "
            f"{model.replicated[0]}"
        )
    resumes = checkpoints.latest is not None
    values = base_values(model, given=model.trainable if resumes else ())
    frozen = {path: values[path] for path in setup.frozen}
    if not resumes:
        return frozen, setup.start({path: values[path] for path in sorted(model.trainable)})
    state = checkpoints.restore(setup.state, data=data)
    console.print(f"resumed at step {int(state.step)}")
    before = checkpoints.saved_config()["train"]["steps"]
    if change := _schedule_change(cfg.train, before, int(state.step)):
        console.print(change, soft_wrap=True, highlight=False)
    return frozen, state


def _schedule_change(cfg: TrainConfig, before: int, step: int) -> str | None:
    """What another number of steps does to the learning rate; None if it is the same number.

    Args:
        cfg: current config.
        before: `train.steps` that the checkpoint was trained for.
        step: step of the checkpoint.

    Raises:
        UserError: the checkpoint lies behind the last step.
    """
    if step > cfg.steps:
        raise UserError(
            f"train.steps is {cfg.steps}, but the run is already at step {step}: raise it, or "
            "choose another --out"
        )
    if before == cfg.steps:
        return None
    schedules = [
        warmup_cosine(dataclasses.replace(cfg, steps=steps)) for steps in (before, cfg.steps)
    ]
    old, new = (cfg.learning_rate * float(schedule(np.int32(step))) for schedule in schedules)
    return (
        f"train.steps was {before} and is now {cfg.steps}: from here on, warm-up and cosine "
        f"follow {cfg.steps} steps, and the learning rate changes from {old:.3g} to {new:.3g}; "
        "the result differs from a run with that many steps from the start"
    )


def _check_batches(cfg: Config, mesh: Mesh) -> None:
    parts = batch_shards(mesh) * cfg.train.accumulation
    kinds = {source.kind for source in cfg.data.sources}
    if cfg.data.packed is not None:
        sizes = {"data.packed.rows": cfg.data.packed.rows}
    else:
        of_kind = {"image": cfg.train.image_batch, "clip": cfg.train.clip_batch}
        sizes = {f"train.{kind}_batch": of_kind[kind] for kind in of_kind if kind in kinds}
    for name, size in sizes.items():
        if size % parts:
            raise UserError(
                f"{name} is {size}, wanted a multiple of {parts}: mesh.data × mesh.fsdp × "
                "train.accumulation"
            )


def _size(batch: Batch, hosts: int) -> Size:
    """Of the global batch, by this host's part; every host's has the same shape."""
    rows, places = batch.ids.shape
    held = {name: count * hosts for name, count in real(batch).items()}
    return Size(
        **held, places=rows * places * hosts, frame_places=rows * batch.frames.shape[1] * hosts
    )


def _floats(metrics: Metrics, *, step: int, saved: int) -> dict[str, float]:
    """Metrics as plain floats; float32 fits into them without loss."""
    values = {name: float(x) for name, x in vars(jax.device_get(metrics)).items()}
    if not np.isfinite(values["loss"]):
        raise UserError(
            f"step {step}: loss is {values['loss']}: lower train.learning_rate or "
            f"train.clip_norm and start again (the last checkpoint is step {saved})"
        )
    return values
