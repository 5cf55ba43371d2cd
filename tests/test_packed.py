"""A packed run and `package`: there and back, who may not train in it, what is refused."""

import dataclasses
import json
import pathlib
import re

import flax.struct
import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from PIL import Image

from emollama_jax import checkpoint, cli, config, packed, runs
from emollama_jax.base import base_reference
from emollama_jax.checkpoint import Checkpoints, read_config
from emollama_jax.errors import UserError
from emollama_jax.models import parameters
from emollama_jax.models.parameters import matching, named_parameters
from emollama_jax.serve import terminal
from emollama_jax.sharding.mesh import make_mesh
from emollama_jax.testing.toy_model import toy_config
from tests.helpers.toy_runs import fit, init_model, load_for_inference, quiet
from tools import package_run

SMALLEST = 2.0**-25  # half of float16's smallest step


@flax.struct.dataclass
class Saved:
    """A train state as far as a checkpoint needs one."""

    step: jax.Array
    params: dict[str, jax.Array]


@pytest.fixture(scope="module", autouse=True)
def toy():
    """Lets the tool's command line load the toy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "load_for_inference", load_for_inference)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the toy, whose trained parameters are random numbers of many sizes."""
    path = tmp_path_factory.mktemp("run")
    cfg = toy_config()
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, dir=str(path / "data")))
    leaves = named_parameters(init_model(cfg, make_mesh(cfg.mesh)))
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.normal(size=leaves[name].shape) * 10.0 ** -rng.integers(5), "float32")
        for name in sorted(matching(cfg.train.trainable, leaves, key=""))
    }
    data = iter(grain.MapDataset.range(1).to_iter_dataset())
    with Checkpoints(path, cfg) as checkpoints:
        checkpoints.save(Saved(step=jnp.int32(2), params=params), data=data)
    data.close()
    rows = [{"step": step, "loss": 1.0, "accuracy": 0.5} for step in (1, 2)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def small(run, tmp_path, capsys):
    """The same, packed."""
    package_run.main([str(run), "--out", str(tmp_path / "small")])
    assert "parameters in float16" in capsys.readouterr().out
    return tmp_path / "small"


@pytest.fixture
def shipped(small, monkeypatch):
    monkeypatch.setattr(runs, "SHIPPED", small)
    return small


def values(model):
    return {name: np.asarray(leaf[...]) for name, leaf in named_parameters(model).items()}


def test_a_packed_run_is_the_run_within_float16(run, small):
    (cfg, before), (read, after) = load_for_inference(run), load_for_inference(small)
    assert read == toy_config() != cfg
    before, after = values(before), values(after)
    trained = matching(cfg.train.trainable, before, key="")
    assert trained
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        if name in trained:
            assert np.allclose(after[name], value, rtol=2**-11, atol=SMALLEST)
            assert np.array_equal(after[name], value.astype("float16").astype("float32"))
        else:
            assert np.array_equal(after[name], value)


def test_what_is_written_says_where_it_comes_from(run, small):
    about = json.loads((small / "run.json").read_text())
    assert about["step"] == about["training"]["step"] == 2
    assert about["learned_from"] == list(
        dict.fromkeys(f"{s.name}:{s.split}" for s in toy_config().data.sources)
    )
    assert str(run) not in (small / "run.json").read_text() + (small / "config.yaml").read_text()
    assert sorted(path.name for path in small.iterdir()) == [
        "config.yaml", "run.json", "run.safetensors",
    ]  # fmt: skip
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in small.iterdir())


def test_numbers_of_an_evaluation_are_repeated(run, tmp_path, capsys):
    tree = {"source": "ferplus", "war": 0.5, "uar": 0.4, "n": 9, "command": "c", "confusion": []}
    (tmp_path / "evaluation.json").write_text(json.dumps(tree))
    args = [str(run), "--out", str(tmp_path / "s"), "--evaluation", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        package_run.main(args)
    assert stop.value.code == 2 and "no evaluation.json" in capsys.readouterr().err
    package_run.main([*args[:-1], str(tmp_path / "evaluation.json")])
    (told,) = json.loads((tmp_path / "s" / "run.json").read_text())["evaluations"]
    assert told == {key: tree[key] for key in ("source", "war", "uar", "n", "command")}


def test_package_is_the_shipped_run_and_a_folder_of_that_name_is_not(
    shipped, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("package").mkdir()
    assert runs.find("package") == runs.find(shipped)
    assert read_config("package") == read_config(shipped)
    with pytest.raises(UserError, match="no checkpoint here"):
        runs.find("./package")


def test_a_missing_shipped_run_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "SHIPPED", tmp_path)
    picture = tmp_path / "face.png"
    Image.new("RGB", (8, 8)).save(picture)
    for args in (["ask", str(picture), "Who?"], ["eval", "package"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(args)
        err = capsys.readouterr().err
        assert (stop.value.code, err.count("\n")) == (2, 1)
        assert "package: this installation has no trained run" in err


def test_nobody_trains_in_a_packed_run(shipped, capsys):
    for out in ("package", str(shipped)):
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", "tiny", "--out", out])
        assert stop.value.code == 2
        assert f"--out {out}: a packed run is read-only" in capsys.readouterr().err
        with pytest.raises(UserError, match="read-only"):
            fit(toy_config(steps=3), out, console=quiet())
    assert not pathlib.Path("package").exists()


def broken(folder, file):
    with pytest.raises(UserError) as error:
        load_for_inference(folder)
    assert file in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_a_broken_packed_run_is_one_line(small):
    whole = {path.name: path.read_bytes() for path in small.iterdir()}
    about = json.loads(whole["run.json"])
    for text in ("{", "[]", "{}", json.dumps({**about, "base": 1, "format": None})):
        (small / "run.json").write_text(text)
        broken(small, "run.json" if "format" not in text else "format")
    (small / "run.json").write_text(json.dumps({**about, "format": 2}))
    assert "packed in format 2, this version reads 1" in broken(small, str(small))
    (small / "run.json").write_text(json.dumps({**about, "base": {"weights": "none", "seed": 5}}))
    assert "trained on other base weights" in broken(small, str(small))
    (small / "run.json").write_bytes(whole["run.json"])
    (small / "run.safetensors").write_bytes(whole["run.safetensors"][:-1])
    assert "not the file that was packed" in broken(small, "run.safetensors")
    (small / "run.safetensors").write_bytes(whole["run.safetensors"])
    (small / "config.yaml").unlink()
    broken(small, "config.yaml")


def test_what_float16_cannot_hold_is_refused(run, tmp_path):
    cfg = read_config(run)
    tensors = {"fim/bias": np.array([1e5], np.float32)}
    with pytest.raises(UserError, match=r"fim/bias: largest value 100000, float16 ends at 65504"):
        packed.write(
            tmp_path / "x", tensors, cfg, base=base_reference(cfg), learned_from=[], about={}
        )
    assert not (tmp_path / "x").exists()


def test_a_packed_run_is_not_packed_again(small, tmp_path, capsys):
    with pytest.raises(SystemExit):
        package_run.main([str(small), "--out", str(tmp_path / "again")])
    assert "already packed" in capsys.readouterr().err


def test_only_a_run_on_the_packages_towers_is_shipped(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "SHIPPED", tmp_path / "shipped")
    with pytest.raises(SystemExit):
        package_run.main([str(run), "--out", str(tmp_path / "shipped")])
    assert "its weights are none, wanted the package's own" in capsys.readouterr().err
    assert not (tmp_path / "shipped").exists()


def test_a_demo_of_ones_own_is_pointed_at(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (terminal.default_run(), capsys.readouterr().err) == ("package", "")
    pathlib.Path("demo_out/run").mkdir(parents=True)
    assert terminal.default_run() == "package"
    assert capsys.readouterr().err.count("--run demo_out/run") == 1
    asked = []
    monkeypatch.setattr(terminal, "ask", lambda wish, console: asked.append(wish.run))
    cli.main(["ask", "face.png", "Who?", "--run", "demo_out/run"])
    cli.main(["ask", "face.png", "Who?"])
    assert asked == ["demo_out/run", "package"]
    assert capsys.readouterr().err.count("\n") == 1


# ------------------------------------------------------------------ what the package carries


def test_the_shipped_run_fits_this_version_and_its_towers(abstract_model):
    """It cannot be loaded as the toy: that its names and sizes fit is seen without a program."""
    about, cfg = packed.read_about(runs.SHIPPED), config.load("tiny_real")
    shipped = config.from_dict(about["config"], origin="package")
    assert about["base"] == base_reference(shipped) and shipped.weights == "tiny"
    assert shipped.data.dir == "data" and shipped.model == cfg.model
    leaves = named_parameters(abstract_model("tiny"))
    trained = matching(shipped.train.trainable, leaves, key="")
    shapes = {name: leaves[name].shape for name in trained}
    read = packed.load(runs.SHIPPED, shapes, sha256=about["sha256"])
    assert read.keys() == trained and all(np.isfinite(value).all() for value in read.values())


def test_towers_and_run_stay_small_and_name_nobodys_folder():
    files = [*parameters.WEIGHTS.glob("tiny_*"), *runs.SHIPPED.iterdir()]
    assert sum(file.stat().st_size for file in files) <= package_run.LIMIT
    text = (runs.SHIPPED / "config.yaml").read_text() + (runs.SHIPPED / "run.json").read_text()
    assert not re.search(r"/(tmp|home|work|root|Users)\b", text)
    assert yaml.safe_load((runs.SHIPPED / "config.yaml").read_text())["weights"] == "tiny"
