"""Several real processes on this machine, two of four CPU devices each, joined by JAX and gloo."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from emollama_jax import config
from emollama_jax.checkpoint import load_for_inference
from emollama_jax.config import DistributedConfig, MeshConfig
from emollama_jax.errors import UserError
from emollama_jax.evaluate.protocol import read_predictions
from emollama_jax.models.parameters import named_parameters
from emollama_jax.sharding import distributed
from emollama_jax.sharding.mesh import make_mesh
from emollama_jax.train.loop import fit
from emollama_jax.train.run_log import read_metrics
from tests.helpers import multihost_worker
from tests.helpers.multihost_worker import STEPS
from tests.helpers.toy_model import quiet

pytestmark = pytest.mark.skipif(
    jax.device_count() < 8,
    reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=8, set before JAX starts",
)
ROOT = pathlib.Path(__file__).parent.parent.parent
WORKER = ROOT / "tests" / "helpers" / "multihost_worker.py"
FSDP = (1, 8, 1)
PATIENCE = 240  # seconds for a pair of processes on a busy machine
GRACE = 30  # seconds that clouds give between the notice and the end


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return multihost_worker.prepare(tmp_path_factory.mktemp("start"))


class Pair:
    """Two processes of one run, and a supervisor's part: what does not end is killed."""

    def __init__(self, out: pathlib.Path, bpe: str, *, pause: float = 0.0, evaluate: bool = False):
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{free.getsockname()[1]}"
        task = {"out": str(out), "bpe": bpe, "mesh": FSDP, "coordinator": coordinator}
        task |= {"pause": pause, "evaluate": evaluate}
        env = os.environ | {
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        }
        self.processes = []
        for number in range(2):
            with (out / f"log-{number}.txt").open("a") as log:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, WORKER, json.dumps(task | {"process": number})],
                        env=env,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def drawn(self, process: int) -> list[dict]:
        path = self.out / f"drawn-{process}.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines(keepends=True)[:-1]]

    def wait_for(self, step: int) -> None:
        """Until the second process has drawn the batch of a step and one more."""
        start = time.monotonic()
        while not any(line["step"] == step for line in self.drawn(1)):
            ended = [process.poll() for process in self.processes]
            assert ended == [None, None], f"ended before step {step}: {ended}\n{self.log()}"
            assert time.monotonic() - start < PATIENCE, self.log()
            time.sleep(0.05)

    def wait(self) -> list[int]:
        return [process.wait(PATIENCE) for process in self.processes]

    def log(self) -> str:
        return "\n".join((self.out / f"log-{i}.txt").read_text()[-3000:] for i in range(2))


def parameters(run: pathlib.Path, bpe: str) -> dict[str, np.ndarray]:
    with pytest.MonkeyPatch.context() as patch:
        multihost_worker.use(patch, bpe, run, process=0, pause=0)
        _, model = load_for_inference(run)
        return {name: np.asarray(leaf[...]) for name, leaf in named_parameters(model).items()}


def alone(out: pathlib.Path, bpe: str, mesh: tuple[int, int, int], *, until: int | None = None):
    """The same run in this one process."""
    out.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        multihost_worker.use(patch, bpe, out, process=9, pause=0)
        return fit(multihost_worker.config(bpe, mesh), out, until=until, console=quiet())


def losses(run: pathlib.Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, bpe):
    """A run of two processes that nobody disturbed."""
    out = tmp_path_factory.mktemp("pair")
    with Pair(out, bpe) as pair:
        assert pair.wait() == [0, 0], pair.log()
    return out


# ------------------------------------------------------------------ training


def test_two_processes_train_as_one(whole, tmp_path, bpe):
    alone(tmp_path, bpe, FSDP)
    assert len(losses(whole)) == STEPS
    np.testing.assert_allclose(losses(whole), losses(tmp_path), rtol=1e-5)
    found, wanted = parameters(whole, bpe), parameters(tmp_path, bpe)
    for name, value in wanted.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(found[name], value, atol=1e-5 * scale, rtol=0, err_msg=name)
    moved = found["llama/layers/lora_B"]
    assert np.abs(moved).max() > 1e-3


def test_each_example_is_seen_once_an_epoch(whole, bpe):
    """Counted over both processes: 11 pictures, 6 clips, batches of 8, several epochs."""
    lines = [
        [json.loads(line) for line in (whole / f"drawn-{i}.jsonl").read_text().splitlines()]
        for i in range(2)
    ]
    drawn: dict[str, list[int]] = {"image": [], "clip": []}
    for left, right in zip(*lines, strict=True):
        assert (left["step"], left["kind"]) == (right["step"], right["kind"])
        assert len(left["index"]) == len(right["index"]) == 4
        drawn[left["kind"]] += left["index"] + right["index"]
    for kind, examples in (("image", 11), ("clip", 6)):
        epochs = len(drawn[kind]) // examples
        assert epochs >= 4
        for epoch in range(epochs):
            part = drawn[kind][epoch * examples : (epoch + 1) * examples]
            assert sorted(part) == list(range(examples)), (kind, epoch)


def test_stopped_and_killed_run_continues_as_if_never_disturbed(whole, tmp_path, bpe):
    # A preemption notice to one of the two: both save, after the same step, and say 143.
    with Pair(tmp_path, bpe, pause=0.2) as pair:
        pair.wait_for(1)
        pair.processes[1].send_signal(signal.SIGTERM)
        noticed = time.monotonic()
        assert pair.wait() == [143, 143], pair.log()
        assert time.monotonic() - noticed < GRACE
    stopped = len(losses(tmp_path))
    assert 2 <= stopped < 7
    assert f"stopped at step {stopped} of {STEPS}" in (tmp_path / "log-0.txt").read_text()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name == str(stopped)]
    # A machine that is gone: the last checkpoint is older than the last step.
    with Pair(tmp_path, bpe, pause=0.2) as pair:
        pair.wait_for(8)
        pair.processes[1].kill()
    with Pair(tmp_path, bpe) as pair:
        assert pair.wait() == [0, 0], pair.log()
    log = (tmp_path / "log-0.txt").read_text()
    starts = [int(line.split()[-1]) for line in log.splitlines() if "resumed at step" in line]
    assert starts[0] == stopped and starts[1] in (6, stopped)
    assert (tmp_path / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    found, wanted = parameters(tmp_path, bpe), parameters(whole, bpe)
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_checkpoint_goes_on_on_another_mesh_and_on_one_device(tmp_path, bpe):
    """Written on (1, 8, 1): the losses of the steps after it are those of the same mesh."""
    after = {}
    for name, mesh in {"same": FSDP, "tensor": (1, 2, 4), "one": (1, 1, 1)}.items():
        alone(tmp_path / name, bpe, FSDP, until=3)
        assert alone(tmp_path / name, bpe, mesh, until=5).step == 5
        after[name] = losses(tmp_path / name)
    assert len(after["same"]) == 5
    np.testing.assert_allclose(after["tensor"], after["same"], rtol=1e-5)
    np.testing.assert_allclose(after["one"], after["same"], rtol=1e-5)


def test_checkpoint_of_two_processes_goes_on_in_one(whole, tmp_path, bpe):
    """Another number of hosts, too: the step after the last checkpoint but one."""
    steps = sorted(int(path.name) for path in (whole / "checkpoints").iterdir())
    assert steps[-1] == STEPS
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / str(steps[-2])).symlink_to(whole / "checkpoints" / str(steps[-2]))
    alone(tmp_path, bpe, (1, 2, 4))
    rest = losses(tmp_path)
    np.testing.assert_allclose(rest, losses(whole)[steps[-2] :], rtol=1e-5)


# ------------------------------------------------------------------ evaluation


def test_two_processes_evaluate_as_one(tmp_path, bpe):
    """Eleven examples in batches of eight: the second process has one real row in the last."""
    with Pair(tmp_path, bpe, evaluate=True) as pair:
        assert pair.wait() == [0, 0], pair.log()
    for way, wanted in multihost_worker.evaluated(bpe, (1, 1, 1), batch=11).items():
        first, second = (read_predictions(tmp_path / f"{way}-{i}.jsonl") for i in range(2))
        assert first == second
        assert [p.id for p in first] == [p.id for p in wanted] == [f"image-{i}" for i in range(11)]
        for found, want in zip(first, wanted, strict=True):
            assert (found.label, found.subject) == (want.label, want.subject)
            if way == "score":
                pairs = [(found.scores[name], want.scores[name]) for name in want.scores]
                np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=1e-4)
            else:
                assert found.text == want.text


# ------------------------------------------------------------------ joining, and shares


def test_alone_without_a_cluster():
    distributed.start(DistributedConfig(), saves_on_notice=True)  # JAX runs already here
    distributed.start(DistributedConfig(coordinator="none"), saves_on_notice=True)
    assert jax.process_count() == 1 and distributed.leads()
    assert distributed.gather({"a": 1}) == [{"a": 1}]
    distributed.alone("emollama demo")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coordinator": "here"}, "'here' is neither auto nor none nor host:port"),
        ({"coordinator": ":80"}, "neither auto nor none"),
        ({"coordinator": "a:80", "processes": 2, "process_id": 2}, "process_id is 2"),
    ],
)
def test_addresses_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        distributed.start(DistributedConfig(**fields), saves_on_notice=True)


def test_auto_leaves_a_process_alone_where_there_is_no_cluster():
    code = (
        "import jax\n"
        "from emollama_jax.config import DistributedConfig\n"
        "from emollama_jax.sharding import distributed\n"
        "distributed.start(DistributedConfig(), saves_on_notice=True)\n"
        "print(jax.process_count(), jax.distributed.is_initialized())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["1", "False"], done.stderr


def test_overrides_of_a_trained_run_say_how_to_run_it():
    found = config.how_to_run(["distributed.coordinator=a:80", "mesh.fsdp=-1"])
    assert found == DistributedConfig(coordinator="a:80")
    with pytest.raises(UserError, match=r"model\.content=mean: training fixed this"):
        config.how_to_run(["model.content=mean"])
    with pytest.raises(UserError, match=r"processes.*'many'"):
        config.how_to_run(["distributed.processes=many"])


class Hosted:
    """A batch sharding whose devices belong to several hosts."""

    def __init__(self, parts: int, hosts: list[list[int]]):
        self.places = {
            FakeDevice(process): (slice(part, part + 1),)
            for process, held in enumerate(hosts)
            for part in held
        }
        self.parts = parts

    def devices_indices_map(self, shape):
        assert shape == (self.parts,)
        return self.places


class FakeDevice:
    def __init__(self, process: int):
        self.process_index = process


@pytest.mark.parametrize(
    ("hosts", "index", "count", "rows"),
    [
        ([[0, 1], [2, 3]], 0, 2, [0, 1, 2, 3]),
        ([[2, 3], [0, 1]], 1, 2, [4, 5, 6, 7]),
        ([[0, 2], [1, 3]], 0, 2, [0, 1, 4, 5]),  # a host's chips need not be neighbours
        ([[0, 1, 2, 3], [0, 1, 2, 3]], 0, 1, list(range(8))),  # tensor joins both hosts
    ],
)
def test_share_of_a_host(monkeypatch, hosts, index, count, rows):
    monkeypatch.setattr(distributed, "batch_shards", lambda mesh: 4)
    monkeypatch.setattr(distributed, "batch_sharding", lambda mesh: Hosted(4, hosts))
    found = distributed.share(None)
    assert (found.index, found.count) == (index, count)
    assert found.rows(8).tolist() == rows


def test_hosts_that_overlap_in_part_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "batch_shards", lambda mesh: 3)
    monkeypatch.setattr(distributed, "batch_sharding", lambda mesh: Hosted(3, [[0, 1], [1, 2]]))
    with pytest.raises(UserError, match="tensor 1 puts parts of a batch on hosts"):
        distributed.share(make_mesh(MeshConfig(data=1, fsdp=1, tensor=1)))


def test_every_host_takes_the_same_evaluation_steps(bpe):
    """Eleven examples over four hosts: every example once, the same number of batches."""
    from emollama_jax.data.pipeline import make_eval_batches
    from tests.helpers.sets_in_memory import Store, make_config

    store, cfg = Store(), make_config(bpe)
    seen, steps = [], []
    for host in range(4):
        batches = list(
            make_eval_batches(
                cfg,
                store.splits(cfg)[0],
                batch=8,
                host_index=host,
                host_count=4,
            )
        )
        steps.append(len(batches))
        assert {len(b.batch.weight) for b in batches} == {2}
        assert [int(b.batch.weight.sum()) for b in batches] == [len(b.examples) for b in batches]
        seen += [example["id"] for b in batches for example in b.examples]
    assert steps == [2] * 4
    assert sorted(seen) == sorted(f"image-{i}" for i in range(11))
