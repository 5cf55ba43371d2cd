"""Buckets as folders, against a server on this machine; and the launch recipes of the documents."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import fsspec
import jax
import pytest
import yaml
from jax.sharding import AbstractMesh, AxisType

from emollama_jax import cli, config
from emollama_jax.checkpoint import find
from emollama_jax.data.split import Split
from emollama_jax.errors import UserError
from emollama_jax.models.parameters import matching, named_parameters
from emollama_jax.paths import as_path, is_remote, write_whole
from emollama_jax.sharding.mesh import AXES, mesh_sizes
from emollama_jax.sharding.rules import param_shardings
from emollama_jax.train import loop
from tests.helpers import multihost_worker
from tests.helpers.fake_gcs import Bucket

ROOT = pathlib.Path(__file__).parent.parent
CHIPS = 4  # of a host of a v5e slice

# ------------------------------------------------------------------ buckets


def in_bucket(bucket: Bucket, code: str, folder: pathlib.Path, *args: str) -> str:
    """Runs code in a new process whose clients know the bucket; clients read this at import."""
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        env=os.environ | bucket.environment | {"PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


TRAIN = """
import os, pathlib, sys
import numpy as np
from tests.helpers import multihost_worker as worker
from tests.helpers.toy_runs import load_for_inference
from rich.console import Console
from emollama_jax.evaluate.protocol import Prediction, read_predictions, write_predictions
from emollama_jax.models.parameters import named_parameters

bpe, mesh = sys.argv[1], (1, min(len(__import__("jax").devices()), 8), 1)
cfg = worker.config(bpe, mesh, "train.steps=5")
how = {"process": 0, "pause": 0, "console": Console(file=open(os.devnull, "w"))}
drawn = pathlib.Path.cwd()
with worker.towers(bpe):
    for until in (4, None):
        there = worker.train(cfg, "gs://bucket/runs/one", drawn=drawn, until=until, **how)
        here = worker.train(cfg, "here", drawn=drawn, until=until, **how)
    assert (there.step, there.loss) == (here.step, here.loss) == (5, here.loss)
    runs = ("gs://bucket/runs/one", "here")
    pair = [load_for_inference(run)[1] for run in runs]
    first, second = ({n: np.asarray(x[...]) for n, x in named_parameters(m).items()} for m in pair)
    assert all(np.array_equal(first[name], second[name]) for name in first)
one = Prediction(id="a", source="actionfaces/images:test", label="fear", predicted="fear",
                 parsed="exact", text="fear", scores=None, subject="1")
write_predictions("gs://bucket/runs/one/eval/predictions.jsonl", [one])
assert read_predictions("gs://bucket/runs/one/eval/predictions.jsonl") == [one]
"""


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return multihost_worker.prepare(tmp_path_factory.mktemp("start"))


def test_run_in_a_bucket_is_the_run_on_a_disk(tmp_path, bpe):
    """Trained, stopped, resumed; checkpoints, logs and predictions."""
    with Bucket() as bucket:
        in_bucket(bucket, TRAIN, tmp_path, bpe)
    names = set(bucket.objects)
    assert (
        bucket.objects["runs/one/metrics.jsonl"]
        == (tmp_path / "here" / "metrics.jsonl").read_bytes()
    )
    assert "runs/one/checkpoints/5/commit_success.txt" in names
    events = [name for name in names if name.startswith("runs/one/tensorboard/events.out.tfevents")]
    assert len(events) == 2 and all(bucket.objects[name] for name in events)
    assert "runs/one/eval/predictions.jsonl" in names
    local = {path.name for path in tmp_path.iterdir()}
    assert local == {"here", "drawn-0.jsonl"}  # no folder "gs:"


DATA = """
import json, sys
import numpy as np
from emollama_jax import config
from emollama_jax.data.split import Split
from emollama_jax.data.tokenizers import load_tokenizer

name = "actionfaces/images"
cfg = config.load("gs://bucket/tiny.yaml", ["data.dir=gs://bucket/data"])
assert cfg.data.dir == "gs://bucket/data"
here, there = (Split(folder, name, "train").examples for folder in (sys.argv[1], cfg.data.dir))
assert len(here) == len(there) == 3
for a, b in zip(here, there):
    assert a["media"] == b["media"] and a["id"] == b["id"]
a, b = (Split(folder, name, "train").priors for folder in (sys.argv[1], cfg.data.dir))
assert len(a) == len(b) == 3
assert all(np.array_equal(x.landmarks, y.landmarks) for x, y in zip(a, b))
tokenizer = config.override(cfg, ["data.llm_tokenizer.path=gs://bucket/bpe.json"]).data.llm_tokenizer
assert load_tokenizer(tokenizer).encode("surprise")
"""


def test_data_config_and_tokenizers_are_read_from_a_bucket(root, tmp_path, bpe, prepared):
    with Bucket() as bucket:
        for path in prepared.rglob("*"):
            if path.is_file():
                bucket.put(f"data/{path.relative_to(prepared).as_posix()}", path.read_bytes())
        bucket.put("tiny.yaml", (root / "configs" / "tiny.yaml").read_bytes())
        bucket.put("bpe.json", pathlib.Path(bpe).read_bytes())
        in_bucket(bucket, DATA, tmp_path, str(prepared))
    assert any(".array_record" in asked for asked in bucket.asked)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Three pictures with priors of a fresh FaceXFormer."""
    import numpy as np

    from emollama_jax.data.priors import PER_EXAMPLE, PER_FRAME
    from emollama_jax.tiny import builder

    folder = tmp_path_factory.mktemp("data")
    builder.prepare(
        folder,
        config_name="images",
        sizes={"train": 3, "validation": 1, "test": 1},
        size=32,
        processes=1,
    )
    priors = pathlib.Path(Split(folder, "actionfaces/images", "train").priors_folder)
    priors.mkdir(parents=True)
    shapes = {"boxes": (3, 4), "found": (3,), "landmarks": (3, 68, 2)}
    shapes |= {"agr": (3, 3), "agr_probability": (3, 3), "offsets": (4,)}
    for name in (*PER_FRAME, *PER_EXAMPLE, "offsets"):
        size = int(np.prod(shapes[name]))
        np.save(priors / f"{name}.npy", np.arange(size, dtype=np.float32).reshape(shapes[name]))
    np.save(priors / "offsets.npy", np.arange(4))
    (priors / "done.json").write_text(json.dumps({"examples": 3}))
    return folder


WEIGHTS = """
import sys
import numpy as np
from emollama_jax import imported

here, there = sys.argv[1], "gs://bucket/weights/one"
assert imported.read_manifest(there) == imported.read_manifest(here)
held = imported.leaves_of(there)
assert set(held) == {"face/a", "face/stack"}
found, wanted = (imported.load_numpy(folder, list(held)) for folder in (there, here))
assert all(np.array_equal(found[name], wanted[name]) for name in held)
"""


def test_weights_are_read_from_a_bucket(tmp_path):
    import numpy as np

    from emollama_jax import imported

    manifest = imported.Manifest("test", {"a.bin": 3}, "abc", "float32", {}, ())
    arrays = {"face/a": np.arange(6.0).reshape(2, 3)}
    arrays |= {imported.layer_key("face/stack", i): np.full((4,), i * 1.0) for i in range(3)}
    with imported.Writer(tmp_path / "one", manifest) as writer:
        writer.add({name: jax.device_put(np.float32(value)) for name, value in arrays.items()})
        writer.finish()
    with Bucket() as bucket:
        for path in (tmp_path / "one").rglob("*"):
            if path.is_file():
                name = path.relative_to(tmp_path).as_posix()
                bucket.put(f"weights/{name}", path.read_bytes())
        in_bucket(bucket, WEIGHTS, tmp_path, str(tmp_path / "one"))
    with pytest.raises(UserError, match=r"gs://bucket/new: wanted a folder on a disk"):
        imported.Writer("gs://bucket/new", manifest)


FIND = """
from emollama_jax.checkpoint import find
print(find("gs://bucket/run"))
"""


def test_unfinished_checkpoint_in_a_bucket_is_passed_over(tmp_path):
    with Bucket() as bucket:
        bucket.put("run/checkpoints/3/commit_success.txt", b"")
        bucket.put("run/checkpoints/6/params/_METADATA", b"{}")
        assert in_bucket(bucket, FIND, tmp_path).strip() == "gs://bucket/run/checkpoints/3"


def test_paths_keep_their_slashes(tmp_path):
    assert str(as_path("gs://bucket/a") / "b") == "gs://bucket/a/b"
    assert is_remote(as_path("gs://bucket/a")) and not is_remote(tmp_path)
    with pytest.raises(UserError, match=r"gs:/bucket/a: a slash is missing \(pathlib removes it\)"):
        as_path(pathlib.Path("gs://bucket/a"))
    with pytest.raises(UserError, match="no such kind of storage as what://"):
        as_path("what://bucket")
    write_whole(as_path(tmp_path / "new" / "file.txt"), "whole")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file.txt"]


def test_without_gcsfs_the_extra_is_named(monkeypatch):
    def missing(protocol):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(UserError, match=r"pip install 'emollama-jax\[gcs\]'"):
        as_path("gs://bucket/run")


class Reached(BaseException):
    """Passes the command line, which catches every Exception."""


def test_command_line_hands_on_what_was_typed(monkeypatch, tmp_path, capsys):
    """No argument becomes a pathlib.Path on its way."""
    monkeypatch.chdir(tmp_path)
    seen = []

    def note(*args, **kwargs):
        seen.append(args)
        raise Reached

    monkeypatch.setattr(loop, "fit", note)
    with pytest.raises(Reached):
        cli.main(["train", "tiny", "data.dir=gs://bucket/data", "--out", "gs://bucket/runs/x"])
    assert seen[0][0].data.dir == "gs://bucket/data"
    assert seen[0][1] == "gs://bucket/runs/x"
    seen.clear()
    monkeypatch.setattr("emollama_jax.runs.find", note)
    for args in (["eval", "gs://bucket/runs/x"], ["eval", "gs://bucket/runs/x", "mesh.fsdp=-1"]):
        with pytest.raises(Reached):
            cli.main(args)
        assert seen.pop() == ("gs://bucket/runs/x",)
    with pytest.raises(SystemExit) as stop:
        cli.main(["data", "prepare", "actionfaces/images", "--out", "gs://bucket/data"])
    assert stop.value.code == 2
    assert "gs://bucket/data: wanted a folder on a disk; prepare here" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ recipes


def recipes(root) -> dict[str, tuple[int, list[str]]]:
    """Heading → devices, and the words of each training command below it."""
    text = (root / "docs" / "cloud_tpu.md").read_text()
    found = {}
    for part in text.split("\n## ")[1:]:
        heading, body = part.split("\n", 1)
        devices = re.search(r"\((\d+) devices\)", heading)
        if devices is None:
            continue
        joined = body.replace("\\\n", " ")
        commands = [line for line in re.findall(r'^TRAIN="(.*)"$', joined, re.M)]
        jobset = re.search(r"```yaml\n(.*?)```", body, re.S)
        if jobset:
            container = jobset_container(yaml.safe_load(jobset[1]))
            commands.append(" ".join(container["args"]))
        found[heading] = int(devices[1]), [shlex.split(line) for line in commands]
    return found


def jobset_container(jobset: dict) -> dict:
    (job,) = jobset["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    return container


def training(root) -> list[tuple[int, config.Config]]:
    found = []
    for devices, commands in recipes(root).values():
        assert commands
        for words in commands:
            assert words[:2] == ["emollama", "train"]
            overrides = [word for word in words[3:] if re.match(r"[a-z_.]+=", word)]
            assert any("--out" in word for word in words)
            found.append((devices, config.load(words[2], overrides)))
    return found


def test_every_recipe_is_there(root):
    assert [devices for devices, _ in recipes(root).values()] == [8, 256, 256, 512, 8]


def test_recipes_fit_their_devices(root, abstract_model):
    for devices, cfg in training(root):
        sizes = mesh_sizes(cfg.mesh, devices)
        assert sizes[0] * sizes[1] * sizes[2] == devices
        parts = sizes[0] * sizes[1] * cfg.train.accumulation
        hosts = max(1, devices // CHIPS)
        assert cfg.data.packed.rows % parts == 0 and cfg.data.packed.rows % hosts == 0
        leaves = named_parameters(abstract_model(cfg.name))
        trained = matching(cfg.train.trainable, leaves, key="train.trainable")
        projector = matching(cfg.train.projector, leaves, key="train.projector")
        assert projector < trained < set(leaves)
        mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)
        found = param_shardings(leaves, mesh, preset=cfg.mesh.preset)
        # Of LoRA, the sides of feed-forward and heads stay whole where `tensor` is 1.
        whole = [n for n, place in found.params.items() if not any(place.spec)]
        share = sum(leaves[n].size for n in whole) / sum(leaf.size for leaf in leaves.values())
        assert share < 0.02, (devices, cfg.name, found.replicated[:3])


def test_recipes_read_and_write_the_bucket(root):
    for _, cfg in training(root):
        paths = [cfg.data.dir, *cfg.weights]
        paths += [cfg.data.llm_tokenizer.path, cfg.data.question_tokenizer.path]
        assert all(path.startswith("gs://my-bucket/") for path in paths)


def test_slices_of_the_multi_slice_recipe(root):
    slices = [cfg.mesh.slices for devices, cfg in training(root) if devices == 512]
    assert slices == [2]


def test_jobset_restarts_what_a_restart_heals(root):
    text = (root / "docs" / "cloud_tpu.md").read_text()
    jobset = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.S)[1])
    spec = jobset["spec"]
    (job,) = spec["replicatedJobs"]
    pods = job["template"]["spec"]
    assert spec["failurePolicy"]["maxRestarts"] > 0
    assert spec["failurePolicy"]["rules"][0]["action"] == "FailJobSet"
    (rule,) = pods["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
    assert rule["onExitCodes"]["containerName"] == jobset_container(jobset)["name"]
    assert (pods["backoffLimit"], pods["parallelism"], pods["completions"]) == (0, 64, 64)
    pod = pods["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = jobset_container(jobset)["resources"]["limits"]["google.com/tpu"]
    assert int(topology[0]) * int(topology[1]) == chips * pods["parallelism"] == 256
    args = jobset_container(jobset)["args"]
    assert args[:3] == ["emollama", "train", "emollama_7b"]


def test_configs_for_pods_use_every_device():
    for name in ("emollama_7b", "emollama_13b"):
        mesh = config.load(name).mesh
        assert mesh_sizes(mesh, 1) == (1, 1, 1)
        assert mesh_sizes(mesh, 8) == (1, 8, 1)


def test_find_on_a_disk_takes_the_newest(tmp_path):
    for step in ("3", "12"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    assert find(tmp_path).name == "12"
