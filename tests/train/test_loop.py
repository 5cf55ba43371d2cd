"""The run: resume bit for bit, signals, and what it refuses."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from emollama_jax import disk
from emollama_jax.checkpoint import Checkpoints
from emollama_jax.errors import UserError
from emollama_jax.models.parameters import named_parameters
from emollama_jax.sharding.mesh import make_mesh
from emollama_jax.testing.toy_model import ToyData, toy_config
from emollama_jax.train import loop
from emollama_jax.train.optimizer import warmup_cosine
from tests.helpers.toy_runs import fit, init_model, load_for_inference, quiet, read


def parameters(run: pathlib.Path) -> dict[str, np.ndarray]:
    _, model = load_for_inference(run)
    return {name: np.asarray(leaf[...]) for name, leaf in named_parameters(model).items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    path = tmp_path_factory.mktemp("whole")
    result = fit(toy_config(), path, console=quiet())
    assert result.step == result.steps == 8 and result.exit_status == 0
    return path


@pytest.mark.parametrize("stops", [(4,), (3, 5), (1, 2, 7)])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(whole, tmp_path, stops):
    for stop in stops:
        result = fit(toy_config(), tmp_path, until=stop, console=quiet())
        assert (result.step, result.stopped_by) == (stop, None)
    fit(toy_config(), tmp_path, console=quiet())
    assert read(tmp_path) == read(whole)
    assert same(parameters(tmp_path), parameters(whole))


def test_loss_falls_and_every_step_is_logged(whole):
    rows = [json.loads(line) for line in read(whole).splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert [row["frames"] for row in rows[:3]] == [8, 8, 16]
    assert rows[0]["learning_rate"] == pytest.approx(0.5e-2)  # first of two warm-up steps


def test_what_is_frozen_stays_frozen(whole):
    start = init_model(toy_config(), make_mesh(toy_config().mesh))
    before = {name: np.asarray(leaf[...]) for name, leaf in named_parameters(start).items()}
    after = parameters(whole)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {
        "fim/kernel",
        "fim/bias",
        "llama/layers/lora_A",
        "llama/layers/lora_B",
        "llama/norm/scale",
    }


def test_a_lost_tail_of_metrics_is_written_again(whole, tmp_path):
    """Killed between two saves: lines after the checkpoint, the last one torn."""
    fit(toy_config(), tmp_path, until=3, console=quiet())
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    fit(toy_config(), tmp_path, console=quiet())
    assert read(tmp_path) == read(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_finishes_the_step_saves_and_continues(whole, tmp_path, number):
    class Interrupted(ToyData):
        def __next__(self):
            if self.step == 4:
                os.kill(os.getpid(), number)
            return super().__next__()

    before = signal.getsignal(number)
    console = quiet()
    result = fit(toy_config(), tmp_path, console=console, data=Interrupted)
    assert (result.step, result.stopped_by, result.exit_status) == (5, number, 128 + number)
    assert "stopped at step 5 of 8: re-run the command to resume" in console.file.getvalue()
    assert signal.getsignal(number) is before
    fit(toy_config(), tmp_path, console=quiet())
    assert read(tmp_path) == read(whole)


SCRIPT = """
import sys, time
from emollama_jax import fit
from emollama_jax.testing.toy_model import Toy, ToyData, toy_config

class Slow(ToyData):
    def __next__(self):
        print("drawing", self.step, flush=True)
        time.sleep(float(sys.argv[2]))
        return super().__next__()

sys.exit(fit(toy_config(), sys.argv[1], build=Toy, data=Slow).exit_status)
"""


def test_sigterm_from_outside(whole, tmp_path):
    def start(pause: float) -> subprocess.Popen:
        root = pathlib.Path(__file__).parent.parent.parent
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path), str(pause)],
            env=os.environ | {"PYTHONPATH": str(root)},
            stdout=subprocess.PIPE,
            text=True,
        )

    with start(0.2) as process:
        for line in process.stdout:
            if line.startswith("drawing 2"):
                process.terminate()
        assert process.wait(60) == 143
    done = len(read(tmp_path).splitlines())
    assert 3 <= done < 8
    with start(0) as process:
        assert f"resumed at step {done}" in process.stdout.read()
        assert process.wait(60) == 0
    assert read(tmp_path) == read(whole)


def test_finished_run_returns_at_once(whole):
    result = fit(toy_config(), whole, console=quiet())
    assert result.step == 8 and result.loss == json.loads(read(whole).splitlines()[-1])["loss"]


def test_more_steps_stretch_the_schedule_and_say_so(tmp_path):
    fit(toy_config(steps=4), tmp_path, console=quiet())
    console = quiet()
    assert fit(toy_config(steps=5), tmp_path, console=console).step == 5
    said = console.file.getvalue()
    rate = json.loads(read(tmp_path).splitlines()[-1])["learning_rate"]
    assert "train.steps was 4 and is now 5" in said and f"changes from 0 to {rate:.3g};" in said
    assert rate > 0
    console = quiet()
    fit(toy_config(steps=5), tmp_path, console=console)  # the same again changes nothing
    assert "schedule" not in console.file.getvalue() and "is 5 now" not in console.file.getvalue()


@pytest.mark.parametrize("steps", [3, 7])
def test_fewer_steps_than_are_done_are_refused(whole, steps):
    with pytest.raises(
        UserError, match=rf"train\.steps is {steps}, but the run is already at step 8"
    ):
        fit(toy_config(steps=steps), whole, console=quiet())


def test_a_schedule_that_changes_before_its_end_is_told():
    cfg = toy_config(steps=16).train
    said = loop._schedule_change(cfg, before=8, step=5)
    old, new = (
        cfg.learning_rate * float(warmup_cosine(dataclasses.replace(cfg, steps=steps))(5))
        for steps in (8, 16)
    )
    assert f"from {old:.3g} to {new:.3g};" in said and old < new
    assert loop._schedule_change(cfg, before=16, step=5) is None


def test_one_process_trains_in_a_folder(tmp_path):
    refused = []

    class Second(ToyData):
        """While the first trains, a second one tries."""

        def __next__(self):
            if self.step == 1:
                with pytest.raises(UserError) as caught:
                    fit(toy_config(steps=2), tmp_path, console=quiet())
                refused.append(str(caught.value))
            return super().__next__()

    assert fit(toy_config(steps=2), tmp_path, console=quiet(), data=Second).step == 2
    assert len(refused) == 1 and f"{tmp_path}: in use by process {os.getpid()} " in refused[0]
    assert refused[0].endswith("wait for it to end, or choose another --out")
    assert [json.loads(line)["step"] for line in read(tmp_path).splitlines()] == [1, 2]


def test_log_every_leaves_lines_out_but_the_last(tmp_path):
    result = fit(toy_config(log_every=3, steps=7), tmp_path, console=quiet())
    rows = [json.loads(line) for line in read(tmp_path).splitlines()]
    assert [row["step"] for row in rows] == [3, 6, 7]
    assert result.loss == rows[-1]["loss"]


def test_checkpoint_of_another_config_is_refused(whole):
    cfg = toy_config(learning_rate=1e-3)
    with pytest.raises(UserError, match=r"train\.learning_rate: checkpoint 0\.01, now 0\.001"):
        fit(cfg, whole, console=quiet())
    llama = dataclasses.replace(cfg.model.llama, width=32)
    other = dataclasses.replace(toy_config(), model=dataclasses.replace(cfg.model, llama=llama))
    with pytest.raises(UserError, match=r"model\.llama\.width: checkpoint 16, now 32"):
        fit(other, whole, console=quiet())


def test_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"train\.image_batch is 8, wanted a multiple of 3"):
        fit(toy_config(accumulation=3), tmp_path, console=quiet())


def test_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path):
    cfg = toy_config(learning_rate=1e30, projector_learning_rate=1e30, save_every=1)
    with pytest.raises(UserError, match=r"step \d: loss is (nan|inf)"):
        fit(cfg, tmp_path, console=quiet())
    rows = [json.loads(line) for line in read(tmp_path).splitlines()]
    assert all(np.isfinite(row["loss"]) for row in rows)
    with Checkpoints(tmp_path, cfg) as checkpoints:
        assert checkpoints.latest is None or checkpoints.latest <= len(rows)


def test_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="run: cannot be the output's folder"):
        fit(toy_config(), tmp_path / "run", console=quiet())


def test_a_full_disk_is_one_line_and_leaves_nothing(whole, tmp_path, monkeypatch):
    cfg = toy_config()  # saves after 3 and 6 of 8 steps
    room = [10**9]
    monkeypatch.setattr(disk, "free", lambda folder: room[0])

    def shrinks(self, state, **how):
        room[0] = 10_000 if int(state.step) == 6 else 10**9
        saves(self, state, **how)

    saves = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", shrinks)
    with pytest.raises(UserError) as caught:
        fit(cfg, tmp_path / "run", console=quiet())
    assert re.fullmatch(
        rf"{tmp_path}/run/checkpoints: No space left on device: [\d,]+ bytes wanted, 10,000 free: "
        "free some space, then re-run the command to resume",
        str(caught.value),
    )
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["3"]
    monkeypatch.setattr(Checkpoints, "save", saves)
    room[0] = 10**9
    assert fit(cfg, tmp_path / "run", console=quiet()).step == 8
    assert read(tmp_path / "run") == read(whole)


def test_a_disk_that_fills_up_during_a_save_leaves_nothing(tmp_path):
    """What Orbax raises in the background comes out at the next save, or at the end."""
    with Checkpoints(tmp_path, toy_config()) as checkpoints:
        (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir()
        (tmp_path / "checkpoints" / "1").mkdir()
        with pytest.raises(UserError, match="bytes wanted"), checkpoints._room(7):
            raise ValueError("RESOURCE_EXHAUSTED: x: No space left on device [28]")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
