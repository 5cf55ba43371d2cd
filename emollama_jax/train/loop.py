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
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console

from emollama_jax.batch import Batch
from emollama_jax.checkpoint import Checkpoints, init_model, matching
from emollama_jax.config import Config, TrainConfig
from emollama_jax.data.pipeline import make_train_iterator
from emollama_jax.errors import UserError
from emollama_jax.locks import hold
from emollama_jax.models.parameters import named_parameters
from emollama_jax.paths import as_path
from emollama_jax.runs import refuse_packed
from emollama_jax.sharding.distributed import gather, leads, place_batch, share
from emollama_jax.sharding.mesh import batch_shards, make_mesh
from emollama_jax.sharding.rules import param_shardings
from emollama_jax.train.optimizer import make_optimizer, warmup_cosine
from emollama_jax.train.run_log import RunLog
from emollama_jax.train.step import (
    Metrics,
    Params,
    TrainState,
    compile_step,
    init_state,
    state_shardings,
)


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
        """What any host received; to be asked once before every step, then all hear the same."""
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


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a run steps with."""

    step: Callable[[Params, TrainState, Batch], tuple[TrainState, Metrics]]
    frozen: Params
    state: TrainState  # to start from: new, or restored


def fit(
    cfg: Config,
    out: epath.PathLike,
    *,
    until: int | None = None,
    console: Console | None = None,
) -> FitResult:
    """Trains the run in a folder, from its start or its newest checkpoint.

    Args:
        cfg: the run.
        out: gets `checkpoints/`, `metrics.jsonl` and `tensorboard/`; on a disk that all hosts
            share, or in a bucket.
        until: stop after this step as a signal would; the next call resumes.
        console: where progress goes; the terminal by default.

    Raises:
        UserError: a batch or mesh that does not divide, a pattern that matches nothing, a folder
            that another process trains in or that holds a checkpoint of another config, a loss
            that is no longer finite.
    """
    start = time.monotonic()
    out = as_path(out)
    console = Console() if console is None else console
    mesh = make_mesh(cfg.mesh)
    console = console if leads() else Console(quiet=True)
    _check_batches(cfg, mesh)
    part = share(mesh)
    end = cfg.train.steps if until is None else min(until, cfg.train.steps)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        refuse_packed(out)
        _hold(out, stack)
        stop = stack.enter_context(StopSignals())
        data = make_train_iterator(
            cfg,
            host_index=part.index,
            host_count=part.count,
        )
        stack.callback(data.close)
        checkpoints = stack.enter_context(Checkpoints(out, cfg))
        machine = assemble(cfg, mesh, checkpoints=checkpoints, data=data, console=console)
        state = machine.state
        step = saved = int(state.step)
        log = stack.enter_context(RunLog(out, console, steps=cfg.train.steps, done=step))

        while step < end and stop.agreed() is None:
            if step % cfg.train.save_every == 0 and step != saved:
                log.keep()
                checkpoints.save(state, data=data)
                saved = step
            batch = next(data)
            placed = place_batch(batch, mesh)
            with jax.transfer_guard("disallow"):
                state, metrics = machine.step(machine.frozen, state, placed)
            step += 1
            logged = step % cfg.train.log_every == 0 or step == cfg.train.steps
            values = _read(metrics, step=step, saved=saved) if logged else None
            log.step(step, values, **_size(batch, part.count))
        if step != saved:
            log.keep()
            checkpoints.save(state, data=data)
        stopped_by = stop.stopped_by if step < cfg.train.steps else None
        result = FitResult(
            step=step,
            steps=cfg.train.steps,
            loss=log.loss,
            seconds=time.monotonic() - start,
            stopped_by=stopped_by,
        )
    if step < cfg.train.steps:
        console.print(f"stopped at step {step} of {cfg.train.steps}: re-run the command to resume")
    return result


def assemble(
    cfg: Config,
    mesh: Mesh,
    *,
    checkpoints: Checkpoints,
    data: grain.DatasetIterator,
    console: Console,
) -> Machine:
    """Model, optimizer and compiled step, at the newest checkpoint or at the start.

    Args:
        cfg: the run.
        mesh: already entered.
        checkpoints: of the run.
        data: moved to where the checkpoint stands.
        console: told what is unusual.
    """
    resumes = checkpoints.latest is not None
    model = init_model(cfg, mesh, given=cfg.train.trainable if resumes else ())
    leaves = named_parameters(model)
    trainable = matching(cfg.train.trainable, leaves, key="train.trainable")
    where = param_shardings(leaves, mesh, preset=cfg.mesh.preset)
    if where.replicated:
        console.print(
            f"{len(where.replicated)} dimensions stay whole on every device, e.g. "
            f"{where.replicated[0]}"
        )
    params = {name: leaves[name].get_value() for name in sorted(trainable)}
    frozen = {name: leaf.get_value() for name, leaf in leaves.items() if name not in trainable}
    optimizer = make_optimizer(cfg.train, leaves, trainable=trainable)

    def start(params: Params) -> TrainState:
        return init_state(optimizer, params, seed=cfg.train.seed)

    abstract = jax.eval_shape(start, params)
    shardings = state_shardings(abstract, where.params, mesh)
    if resumes:
        wanted = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
        )
        state = checkpoints.restore(wanted, data=data)
        console.print(f"resumed at step {int(state.step)}")
        before = checkpoints.saved_config()["train"]["steps"]
        if change := _schedule_change(cfg.train, before, int(state.step)):
            console.print(change, soft_wrap=True, highlight=False)
    else:
        state = jax.jit(start, out_shardings=shardings)(params)
    step = compile_step(
        nnx.graphdef(model),
        optimizer,
        frozen={name: where.params[name] for name in frozen},
        state=shardings,
        mesh=mesh,
        accumulation=cfg.train.accumulation,
        loss_chunk=cfg.train.loss_chunk,
        xla=cfg.xla_flags,
    )
    return Machine(step=step, frozen=frozen, state=state)


def _hold(out: epath.Path, stack: contextlib.ExitStack) -> None:
    """Locks the run's folder until the stack ends. The first host does; if it cannot, all raise.

    Raises:
        UserError: another process trains in it, or it cannot be made.
    """
    refusal = None
    if leads():
        try:
            stack.enter_context(hold(out, instead="choose another --out"))
        except UserError as error:
            refusal = str(error)
        except OSError as error:
            refusal = f"{out}: cannot be a run's folder: {error.strerror}"
    for said in gather(refusal):
        if said is not None:
            raise UserError(said)


def _schedule_change(cfg: TrainConfig, before: int, step: int) -> str | None:
    """What another number of steps does to the learning rate; None if it is the same number.

    Args:
        cfg: of now.
        before: `train.steps` that the checkpoint was trained for.
        step: of the checkpoint.

    Raises:
        UserError: the checkpoint lies behind the last step.
    """
    if step > cfg.steps:
        raise UserError(
            f"train.steps is {cfg.steps}, but the run is at step {step} already: raise it, or "
            "choose another --out"
        )
    if before == cfg.steps:
        return None
    schedules = [
        warmup_cosine(dataclasses.replace(cfg, steps=steps)) for steps in (before, cfg.steps)
    ]
    old, new = (cfg.learning_rate * float(schedule(np.int32(step))) for schedule in schedules)
    return (
        f"train.steps was {before} and is {cfg.steps} now: warm-up and cosine are those of "
        f"{cfg.steps} steps from here on, and the learning rate goes from {old:.3g} to {new:.3g}; "
        "the result differs from that of a run given so many steps from the start"
    )


def _check_batches(cfg: Config, mesh: Mesh) -> None:
    parts = batch_shards(mesh) * cfg.train.accumulation
    kinds = {source.kind for source in cfg.data.sources}
    for kind, size in (("image", cfg.train.image_batch), ("clip", cfg.train.clip_batch)):
        if kind in kinds and size % parts:
            raise UserError(
                f"train.{kind}_batch is {size}, wanted a multiple of {parts}: mesh.data × "
                "mesh.fsdp × train.accumulation"
            )


def _size(batch: Batch, hosts: int) -> dict[str, int]:
    """Tokens and frames of the global batch; every host's part has the same shape."""
    examples, frames = batch.frames.shape[:2]
    return {"tokens": int(batch.length.sum()) * hosts, "frames": examples * frames * hosts}


def _read(metrics: Metrics, *, step: int, saved: int) -> dict[str, float]:
    """Metrics as plain floats; float32 fits into them without loss."""
    values = {name: float(x) for name, x in vars(jax.device_get(metrics)).items()}
    if not np.isfinite(values["loss"]):
        raise UserError(
            f"step {step}: loss is {values['loss']}: lower train.learning_rate or "
            f"train.clip_norm and start anew (the last checkpoint is step {saved})"
        )
    return values
