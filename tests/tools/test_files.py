"""Reading PyTorch's files: both formats, lazily; nothing runs; every fault is found at once."""

import io
import json
import os
import pathlib
import pickle

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from emollama_jax.testing.toy_model import TINY
from tools.convert_torch.files import open_paths
from tools.convert_torch.inspect import inspect

torch = pytest.importorskip("torch", reason="PyTorch writes the files (extra `convert`)")

STATE = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.asarray([1.5, -2], np.float16),
    "c": np.asarray([[0.25]], ml_dtypes.bfloat16),
    "n": np.asarray(7, np.int64),
}


def to_torch(array):
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def save_torch(state, path, **how):
    torch.save({key: to_torch(value) for key, value in state.items()}, path, **how)


def problems(*paths, **how):
    return open_paths(paths, **how).problems


def the_problem(*paths, **how):
    (problem,) = problems(*paths, **how)
    return problem


WRITERS = {
    "model.safetensors": save_file,
    "pytorch_model.bin": save_torch,
    "old.pth": lambda state, path: save_torch(state, path, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("as_folder", [True, False], ids=["folder", "file"])
def test_every_format_gives_the_same_tensors(tmp_path, name, as_folder):
    WRITERS[name](STATE, tmp_path / name)
    opened = open_paths([tmp_path if as_folder else tmp_path / name])
    assert opened.problems == [] and set(opened.tensors) == set(STATE)
    assert opened.files == {tmp_path / name: (tmp_path / name).stat().st_size}
    for key, wanted in STATE.items():
        tensor = opened.tensors[key]
        assert (tensor.shape, tensor.dtype) == (wanted.shape, wanted.dtype)
        assert tensor.nbytes == wanted.nbytes and tensor.file == name
        np.testing.assert_array_equal(tensor.read(), wanted)


def shards(folder, save, stem, suffix, *, split=("a.weight",)):
    """Two files and their index."""
    names = [f"{stem}-0000{i}-of-00002{suffix}" for i in (1, 2)]
    parts = [{k: v for k, v in STATE.items() if (k in split) is first} for first in (True, False)]
    for name, part in zip(names, parts, strict=True):
        save(part, folder / name)
    where = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return names, where, index


@pytest.mark.parametrize(
    ("save", "stem", "suffix"),
    [(save_file, "model", ".safetensors"), (save_torch, "pytorch_model", ".bin")],
)
def test_shards_by_folder_and_by_index(tmp_path, save, stem, suffix):
    names, _, index = shards(tmp_path, save, stem, suffix)
    for path in (tmp_path, index):
        opened = open_paths([path])
        assert opened.problems == [] and [file.name for file in opened.files] == names
        for key, wanted in STATE.items():
            np.testing.assert_array_equal(opened.tensors[key].read(), wanted)


def test_safetensors_are_preferred_and_that_is_said(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    save_torch({"other": STATE["b"]}, tmp_path / "pytorch_model.bin")
    opened = open_paths([tmp_path])
    assert set(opened.tensors) == set(STATE)
    assert opened.notes == [f"{tmp_path}: weights that were not read: pytorch_model.bin"]


INNER = {key: to_torch(value) for key, value in STATE.items()}
WRAPPED = {  # what is saved → what is said
    "release": ({"state_dict_backbone": INNER, "optimizer": {"lr": 0.1}}, "left optimizer"),
    "state_dict": ({"state_dict": INNER, "epoch": 3, "loss": torch.ones(())}, "left epoch, loss"),
    "model": ({"model": INNER}, ""),
    "model and its mean": ({"model": INNER, "model_ema": INNER}, "left model_ema"),
    "module": ({"module": INNER, "optimizer": None, "lr_scheduler": None}, "read its module, left"),
    "model_state_dict": ({"model_state_dict": INNER, "step": 7}, "left step"),
    "nested": ({"checkpoint": {"model": INNER, "iteration": 2}}, "its checkpoint.model, left iter"),
    "unknown name": ({"ema": INNER, "decay": 0.9}, "read its ema, left decay"),
    "DDP": ({"state_dict": {f"module.{key}": value for key, value in INNER.items()}}, ""),
    "compiled DDP": ({f"_orig_mod.module.{key}": value for key, value in INNER.items()}, ""),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_state_dict_inside_a_release(tmp_path, name):
    held, said = WRAPPED[name]
    torch.save(held, tmp_path / "model.pt")
    opened = open_paths([tmp_path / "model.pt"])
    assert opened.problems == [] and set(opened.tensors) == set(STATE)
    for key, wanted in STATE.items():
        np.testing.assert_array_equal(opened.tensors[key].read(), wanted)
    assert (said in opened.notes[0]) if said else opened.notes == []


def shown(*paths):
    """What `inspect` prints."""
    console = Console(file=io.StringIO(), width=180)
    inspect(paths, source=None, model=TINY.model, console=console)
    return console.file.getvalue()


def test_names_that_look_like_markup_are_shown_as_they_are(tmp_path):
    names = ["[/red]", "a[bold", "[link=x]a"]
    save_file(dict.fromkeys(names, np.ones(3, np.float32)), tmp_path / "model.safetensors")
    said = shown(tmp_path)
    assert all(f"matches nothing: {name} 3 float32" in said for name in names)


def test_inspect_reads_what_a_release_wraps(tmp_path):
    torch.save({"state_dict_backbone": INNER, "epoch": 3}, tmp_path / "model.pt")
    assert "model.pt: read its state_dict_backbone, left epoch" in shown(tmp_path / "model.pt")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", "3", "\ud800"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_settings_and_indices_of_another_kind_are_one_problem(tmp_path, name, text):
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    said = the_problem(tmp_path)
    assert said.startswith(f"{tmp_path / name}: ") and "\n" not in said


@pytest.mark.parametrize("shard", ["a\0.safetensors", 3, None, ["a"], {"a": 1}, ""])
def test_an_index_that_names_no_files_is_none(tmp_path, shard):
    index = {"weight_map": {"a": shard}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "not an index (wanted JSON with a weight_map)" in the_problem(tmp_path)


def test_shards_may_be_wrapped_too(tmp_path):
    names, _, _ = shards(
        tmp_path,
        lambda state, path: torch.save({"state_dict": {k: INNER[k] for k in state}}, path),
        "pytorch_model",
        ".bin",
    )
    opened = open_paths([tmp_path])
    assert opened.problems == [] and set(opened.tensors) == set(STATE)
    assert [file.name for file in opened.files] == names


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"model": INNER, "state_dict": INNER}, "several state dicts (model, state_dict)"),
        ({"a": INNER, "b": INNER}, "several state dicts (a, b)"),
        ({"state": {0: {"step": 1}}, "groups": []}, "holds state, groups, wanted a dict of"),
        ({"model": "resnet50"}, "holds model, wanted a dict of tensors"),
        ({**INNER, "epoch": 3}, "'epoch' is a int, wanted a tensor"),
    ],
)
def test_no_one_state_dict_in_it(tmp_path, held, said):
    torch.save(held, tmp_path / "model.pt")
    assert said in the_problem(tmp_path / "model.pt")


# --- nothing runs -------------------------------------------------------------------------------


class Payload:
    """Unpickled with full trust, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def pickled(value, path):
    path.write_bytes(pickle.dumps(value))


@pytest.mark.parametrize(
    "save",
    [
        torch.save,
        lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
        pickled,
    ],
    ids=["zip", "before 1.6", "plain pickle"],
)
def test_a_payload_never_runs(tmp_path, save):
    ran = tmp_path / "ran"
    evil = tmp_path / "evil.bin"
    save({"w": torch.ones(2), "p": Payload(ran)}, evil)
    problem = the_problem(evil)
    assert not ran.exists()
    assert problem.startswith(f"{evil}: refused, since it holds more than tensors")
    assert "docs/convert.md" in problem
    if save is not pickled:
        assert "posix.system" in problem
    # The file is armed: with full trust it does run.
    if save is pickled:
        pickle.loads(evil.read_bytes())
    else:
        torch.load(evil, weights_only=False)
    assert ran.exists()


def test_a_whole_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pkl")
    assert "torch.nn.modules.linear.Linear" in the_problem(tmp_path / "model.pkl")


# --- faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("cut", [0, 10, 0.5, -7], ids=["empty", "start", "half", "end"])
def test_truncated(tmp_path, name, cut):
    WRITERS[name](STATE, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * cut) if 0 < cut < 1 else cut])
    problem = the_problem(tmp_path / name)
    assert problem.startswith(f"{tmp_path / name}: ")
    assert "not a complete safetensors" in problem or "truncated, or not" in problem


def test_not_weights_at_all(tmp_path):
    (tmp_path / "model.safetensors").write_text("dear friend, " * 30)
    (tmp_path / "pytorch_model.bin").write_text("dear friend, " * 30)
    assert "not a complete safetensors" in the_problem(tmp_path / "model.safetensors")
    assert "pytorch_model.bin" in the_problem(tmp_path / "pytorch_model.bin")
    assert "no such file" in the_problem(tmp_path / "absent.bin")
    assert "no path given" in the_problem()
    (tmp_path / "empty").mkdir()
    assert "no weights in it" in the_problem(tmp_path / "empty")


def test_all_faults_of_an_index_at_once(tmp_path):
    names, where, index = shards(tmp_path, save_file, "model", ".safetensors")
    where |= {"lost": names[1], "far": "model-00003-of-00003.safetensors", "up": "../x.bin"}
    index.write_text(json.dumps({"weight_map": where}))
    assert problems(tmp_path) == [
        f"{index}: names ../x.bin, which is outside its folder",
        "model.safetensors.index.json names model-00003-of-00003.safetensors, which is absent "
        "(1 tensors, far …)",
        f"lost: model.safetensors.index.json says {names[1]}, but it is not in it",
    ]
    index.write_text("{}")
    assert "not an index" in the_problem(tmp_path)


def test_a_key_in_two_files(tmp_path):
    save_file(STATE, tmp_path / "one.safetensors")
    save_file({"b": STATE["b"]}, tmp_path / "two.safetensors")
    both = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    assert problems(*both) == ["b: in one.safetensors and in two.safetensors"]
    assert "several weight files and no index" in the_problem(tmp_path)


def test_training_leftovers_are_not_weights(tmp_path):
    save_torch(STATE, tmp_path / "weights.pth")
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth"):
        (tmp_path / name).write_bytes(b"not looked at")
    assert problems(tmp_path) == []


def test_what_is_not_a_plain_tensor(tmp_path):
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "sparse.pt")
    assert "sparse or quantized" in the_problem(tmp_path / "sparse.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    assert "holds a list" in the_problem(tmp_path / "list.pt")


def test_memory_is_given_back(tmp_path):
    """A tensor's file is open only as long as its array is held."""
    save_file(STATE, tmp_path / "model.safetensors")
    array = open_paths([tmp_path]).tensors["a.weight"].read()
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux lists a process's mapped files")
    assert str(tmp_path) in maps.read_text()
    del array
    assert str(tmp_path) not in maps.read_text()
