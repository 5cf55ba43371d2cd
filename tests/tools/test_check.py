"""`check`: passes on the golden files, notices what is off, unknown or absent, and says so."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.helpers import llama_vid_golden
from tools.convert_torch import check, golden, golden_files
from tools.convert_torch.__main__ import main
from tools.convert_torch.golden_sizes import llama_vid_sizes, tiny_sizes

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


def status(folder, *args):
    """The exit status of `check`."""
    pytest.importorskip("torch", reason="weights are written as PyTorch's files")
    with pytest.raises(SystemExit) as stop:
        main(["check", str(folder), *args])
    return stop.value.code


def lines(text):
    """(set, array) → the last word of its line."""
    rows = [line.split() for line in text.splitlines()[1:-1]]
    return {(row[0], row[1]): row[-1] for row in rows}


def copy(folder, *names):
    for name in names:
        shutil.copy(GOLDEN / name, folder)


def arrays_of(name):
    with np.load(GOLDEN / name) as file:
        return dict(file)


@pytest.fixture(scope="module")
def tiny_said():
    """What our networks make of the tiny inputs, computed once."""
    return golden.tiny_arrays(llama_vid_golden.tiny_model(), llama_vid_golden.tiny_arrays())


def test_tiny_passes_in_every_layout(tmp_path, capsys):
    copy(tmp_path, "llama_vid_tiny.npz")
    assert status(tmp_path) == 0
    out = capsys.readouterr().out
    named = {words[1] for words in lines(out)}
    compared = {name for name in llama_vid_golden.tiny_arrays() if not name.startswith("sd/")}
    assert named - {"layout"} == compared - golden.TINY_INPUTS
    for layout in ("bin-shards", "safetensors-shards", "safetensors"):
        assert f"layout {layout} " in out
    assert out.count("leaves the same") == 3
    assert out.splitlines()[-1].startswith("all ")


def test_facexformer_passes(tmp_path, capsys):
    copy(tmp_path, "facexformer.json", "facexformer.npz")
    assert status(tmp_path, "--layouts", "file") == 0
    out = capsys.readouterr().out
    assert {words[1] for words in lines(out)} - {"layout"} == set(arrays_of("facexformer.npz"))


def test_mtcnn_passes_with_faces_and_without(tmp_path, capsys):
    pytest.importorskip("skimage", reason="scikit-image carries astronaut.png")
    wanted = json.loads((GOLDEN / "mtcnn.json").read_text())
    del wanted["grace_hopper.jpg"]  # takes as long again
    none = {"size": [19, 12], "boxes": None, "probs": None, "landmarks": None}
    (tmp_path / "mtcnn.json").write_text(json.dumps({**wanted, "blank.png": none}))
    Image.new("RGB", (19, 12), (127, 127, 127)).save(tmp_path / "blank.png")
    assert status(tmp_path, "--images", str(tmp_path), "--layouts", "safetensors") == 0
    out = capsys.readouterr().out
    assert out.count("blank.png") == 4 and out.count("astronaut.png") == 4


def test_what_is_off_unknown_or_absent_is_named(tmp_path, capsys, monkeypatch, tiny_said):
    arrays = llama_vid_golden.tiny_arrays()
    logits = arrays["mean/logits"].copy()
    logits[0, 3, 7] += 2e-4 * np.abs(logits).max()
    labels = arrays["none/merged_labels"].copy()
    labels[2, -1] = 5
    changed = {**arrays, "mean/logits": logits, "none/merged_labels": labels}
    changed |= {"surprise": np.zeros(3, np.float32)}
    del changed["grid2/loss"]
    np.savez(tmp_path / "llama_vid_tiny.npz", **changed)
    monkeypatch.setattr(golden, "tiny_arrays", lambda network, held: tiny_said)
    assert status(tmp_path, "--layouts", "safetensors") == 1
    out = capsys.readouterr().out
    found = {array for (_, array), verdict in lines(out).items() if verdict == "OFF"}
    assert found == {"mean/logits", "none/merged_labels", "surprise", "grid2/loss"}
    assert all(f"llama_vid_tiny {name}" in out.splitlines()[-1] for name in found)


def test_weights_that_the_converter_refuses_are_a_failure(tmp_path, capsys):
    extra = {
        **llama_vid_golden.tiny_arrays(),
        "sd/model.surprise.weight": np.zeros((2, 2), np.float32),
    }
    np.savez(tmp_path / "llama_vid_tiny.npz", **extra)
    assert status(tmp_path, "--layouts", "safetensors") == 1
    assert "model.surprise.weight: no row of the table reads it" in capsys.readouterr().out


def test_another_seed_is_off(tmp_path, capsys, monkeypatch):
    """The seed reaches weights and pictures."""
    seeds = []
    monkeypatch.setattr(check, "_converted", lambda *args: {})
    monkeypatch.setattr(check, "_fill", lambda *args: None)

    def arrays(network, *, seed):
        seeds.append(seed)
        return {}

    monkeypatch.setattr(golden, "facexformer_arrays", arrays)
    made = golden.tensor
    monkeypatch.setattr(golden, "tensor", lambda *args: seeds.append(args[2]) or made("", (1,), 0))
    copy(tmp_path, "facexformer.json", "facexformer.npz")
    assert status(tmp_path, "--seed", "12", "--layouts", "file") == 1
    assert set(seeds) == {12} and len(seeds) > 400
    assert "task_tokens" in capsys.readouterr().out


def test_llama_vid_questions_of_another_seed_are_refused(tmp_path, capsys):
    copy(tmp_path, "llama_vid.npz")
    manifest = llama_vid_golden.real_manifest()
    manifest["meta"]["seed"] = 22
    (tmp_path / "llama_vid.json").write_text(json.dumps(manifest))
    assert status(tmp_path) == 2
    assert "question 'a' is not the one of meta.seed 22" in capsys.readouterr().err


REFUSED = {
    "empty": (lambda folder: None, "no golden files in it; wanted any of"),
    "half": (lambda folder: copy(folder, "facexformer.json"), "facexformer.npz: missing beside"),
    "manifest": (lambda folder: copy(folder, "llama_vid.npz"), "llama_vid.json: missing beside"),
    "json": (lambda folder: (folder / "mtcnn.json").write_text("{"), "mtcnn.json: not JSON"),
    "npz": (
        lambda folder: (folder / "llama_vid_tiny.npz").write_text("no"),
        "llama_vid_tiny.npz: not an .npz",
    ),
    "inputs": (
        lambda folder: np.savez(folder / "llama_vid_tiny.npz", labels=np.zeros(2)),
        "pixel_textonly, pixel_video missing",
    ),
    "picture": (
        lambda folder: (folder / "mtcnn.json").write_text(
            json.dumps({"nobody.png": {field: [] for field in golden_files.FACES}})
        ),
        "no picture nobody.png",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_one_line_says_what_is_wanted(what, tmp_path, capsys):
    prepare, message = REFUSED[what]
    prepare(tmp_path)
    assert status(tmp_path) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and said.out == ""


def test_no_folder(tmp_path, capsys):
    assert status(tmp_path / "nowhere") == 2
    assert "nowhere: no such folder; wanted any of" in capsys.readouterr().err


def test_arrays_are_compared_by_kind():
    wanted = {
        "close": np.float32([1, 2]),
        "far": np.float32([1, 2]),
        "nan": np.float32([1, 2]),
        "shape": np.float32([1, 2]),
        "hidden": np.float32([1, 2]),
        "zero": np.zeros(2, np.float32),
        "ids": np.array([1, 2]),
        "mask": np.array([True, False]),
    }
    ours = {
        "close": np.float32([1, 2.00009]),
        "far": np.float32([1, 2.0002]),
        "nan": np.float32([np.nan, 2]),
        "shape": np.float32([1]),
        "hidden": np.ma.masked_array([1, 9], mask=[False, True]),
        "zero": np.zeros(2, np.float32),
        "ids": np.array([1, 3]),
        "mask": np.array([True, False]),
    }
    rows = golden_files.compare_arrays(ours, wanted)
    assert {row.array for row in rows if row.ok} == {"close", "hidden", "zero", "mask"}


def test_a_layout_that_differs_in_one_bit_is_noticed():
    first = {"a": np.float32([1, 0.0]), "b": np.float32([[2]])}
    assert check._same("safetensors", first, first).ok
    row = check._same("safetensors", {**first, "a": np.float32([1, -0.0])}, first)
    assert not row.ok and "1 of 2 leaves differ (a …)" in row.difference


def test_sizes_are_those_of_the_tests():
    """Read from shapes and from the file's own words, without what weights do not depend on."""
    shapes = {
        key: tuple(of["shape"])
        for key, of in llama_vid_golden.real_manifest()["state_dict"].items()
    }
    meta = json.loads(str(llama_vid_golden.tiny_arrays()["meta_json"]))
    real = (
        dataclasses.replace(llama_vid_golden.REAL_LLAMA, max_positions=4096),
        llama_vid_golden.REAL_VISION,
        llama_vid_golden.REAL_QFORMER,
    )
    tiny = (
        llama_vid_golden.TINY_LLAMA,
        llama_vid_golden.TINY_VISION,
        llama_vid_golden.TINY_QFORMER,
    )
    for found, wanted in ((llama_vid_sizes(shapes), real), (tiny_sizes(meta), tiny)):
        llama, vision, qformer = found
        assert llama == wanted[0]
        assert vision == dataclasses.replace(wanted[1], image_mean=(0,) * 3, image_std=(1,) * 3)
        assert qformer == dataclasses.replace(wanted[2], dropout=0.0)
