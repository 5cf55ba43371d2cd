"""Checkpoints: what is written, read back and refused, and the base below them."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from emollama_jax.checkpoint import Checkpoints, find
from emollama_jax.config import MeshConfig
from emollama_jax.errors import UserError
from emollama_jax.models import parameters
from emollama_jax.models.parameters import named_parameters
from emollama_jax.sharding.mesh import make_mesh
from emollama_jax.testing.toy_model import Toy, ToyData, toy_config
from emollama_jax.train import loop
from emollama_jax.train.setup import set_up
from tests.helpers.toy_runs import fit, init_model, load_for_inference, quiet


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 8 steps with checkpoints at 6 and 8; not to be changed."""
    path = tmp_path_factory.mktemp("run")
    fit(toy_config(), path, console=quiet())
    return path


@pytest.fixture
def copy(run, tmp_path):
    """The same, to be changed."""
    return shutil.copytree(run, tmp_path / "copy")


def values(model) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf[...]) for name, leaf in named_parameters(model).items()}


def one_device():
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=1))


def test_keeps_the_newest_and_only_what_trains(run):
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["6", "8"]
    cfg, model = load_for_inference(run)
    assert cfg == toy_config()
    names = json.loads((run / "checkpoints/8/params/_METADATA").read_text())["tree_metadata"]
    saved = {entry["key_metadata"][0]["key"] for entry in names.values()}
    assert saved == {
        "fim/bias",
        "fim/kernel",
        "llama/layers/lora_A",
        "llama/layers/lora_B",
        "llama/norm/scale",
    }
    assert saved < set(named_parameters(model))


def test_inference_model_is_the_base_with_what_trained(run):
    base = values(init_model(toy_config(), one_device()))
    _, model = load_for_inference(run)
    trained = values(model)
    assert np.array_equal(base["vision/0/kernel"], trained["vision/0/kernel"])
    assert not np.array_equal(base["fim/kernel"], trained["fim/kernel"])
    _, older = load_for_inference(run / "checkpoints" / "6")
    assert not np.array_equal(values(older)["fim/kernel"], trained["fim/kernel"])
    # Eight steps of training moved lora_B away from zero.
    assert np.abs(trained["llama/layers/lora_B"]).max() > 1e-3


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight CPU devices, see conftest.py")
def test_checkpoint_of_one_device_loads_on_eight(run):
    _, one = load_for_inference(run)
    _, eight = load_for_inference(run, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    pairs = zip(values(one).values(), values(eight).values(), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    assert len(named_parameters(eight)["fim/kernel"][...].sharding.device_set) == 8


def test_run_continues_on_another_mesh(copy):
    if jax.device_count() < 8:
        pytest.skip("needs eight CPU devices, see conftest.py")
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    cfg = dataclasses.replace(toy_config(steps=9), mesh=mesh)
    assert fit(cfg, copy, console=quiet()).step == 9


def test_init_is_a_function_of_the_seed():
    mesh = one_device()
    one, same = values(init_model(toy_config(), mesh)), values(init_model(toy_config(), mesh))
    other = values(init_model(toy_config(seed=1), mesh))
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not np.array_equal(one["vision/0/kernel"], other["vision/0/kernel"])
    plain = values(Toy(toy_config().model, rngs=nnx.Rngs(0)))
    assert all(np.allclose(one[name], plain[name], atol=1e-6) for name in one)


def test_given_parameters_stay_abstract_and_the_rest_is_as_ever():
    full = values(init_model(toy_config(), one_device()))
    given = [name for name in full if name.startswith("fim/")]
    assert given
    leaves = named_parameters(init_model(toy_config(), one_device(), given=given))
    for name in given:
        leaf = leaves.pop(name).get_value()
        assert isinstance(leaf, jax.ShapeDtypeStruct)
        assert leaf.shape == full[name].shape and leaf.sharding is not None
    assert leaves
    assert all(np.array_equal(full[name], leaf[...]) for name, leaf in leaves.items())


def test_frozen_parameters_are_born_in_their_dtype():
    model = init_model(toy_config(frozen_dtype="bfloat16"), one_device())
    dtypes = {name: str(leaf.dtype) for name, leaf in named_parameters(model).items()}
    assert dtypes["vision/0/kernel"] == dtypes["llama/lm_head/kernel"] == "bfloat16"
    assert dtypes["fim/kernel"] == dtypes["llama/layers/lora_A"] == "float32"


@pytest.fixture
def tiny_base(tmp_path, monkeypatch):
    """The toy's parts as the package's weights, and a config that starts from them."""
    monkeypatch.setattr(parameters, "WEIGHTS", tmp_path / "weights")
    model = Toy(toy_config(seed=7).model, rngs=nnx.Rngs(7))
    parameters.save(model.llama, tmp_path / "weights" / "tiny_llama.safetensors")
    return dataclasses.replace(toy_config(steps=2), weights=("tiny:llama",)), model


def test_base_towers_are_loaded_below_the_adapters(tiny_base, tmp_path):
    cfg, towers = tiny_base
    fit(cfg, tmp_path / "run", console=quiet())
    _, model = load_for_inference(tmp_path / "run")
    want = np.asarray(towers.llama.embed_tokens[...]).astype("float16").astype("float32")
    assert np.array_equal(model.llama.embed_tokens[...], want)
    assert np.abs(model.llama.layers.lora_B[...]).max() > 0
    start = init_model(cfg, one_device())
    fresh = values(init_model(dataclasses.replace(cfg, weights="none"), one_device()))
    assert np.array_equal(start.llama.layers.lora_A[...], fresh["llama/layers/lora_A"])


def test_other_base_weights_are_refused(tiny_base, tmp_path):
    cfg, _ = tiny_base
    fit(cfg, tmp_path / "run", console=quiet())
    other = Toy(cfg.model, rngs=nnx.Rngs(8))
    parameters.save(other.llama, parameters.WEIGHTS / "tiny_llama.safetensors")
    with pytest.raises(UserError, match="trained on other base weights"):
        load_for_inference(tmp_path / "run")
    with pytest.raises(UserError, match=r"trained on other base weights.*sha256\.tiny_llama"):
        fit(cfg, tmp_path / "run", console=quiet())
    (parameters.WEIGHTS / "tiny_llama.safetensors").unlink()
    with pytest.raises(UserError, match="weights are missing"):
        load_for_inference(tmp_path / "run")


@pytest.mark.parametrize("folder", ["", "checkpoints"])
def test_find_takes_a_run_or_a_checkpoint(run, folder):
    assert find(run / folder) == run / "checkpoints" / "8"
    assert find(run / "checkpoints" / "6") == run / "checkpoints" / "6"


def test_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        load_for_inference(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no checkpoint here \(wanted: a run"):
        load_for_inference(tmp_path)
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(UserError, match=r"checkpoints/5: not a checkpoint of this program"):
        load_for_inference(tmp_path)


def test_save_that_was_cut_short_is_passed_over(copy):
    """What a killed process leaves: a folder that was never renamed."""
    half = copy / "checkpoints" / "9.orbax-checkpoint-tmp"
    shutil.copytree(copy / "checkpoints" / "8", half)
    shutil.rmtree(half / "training")
    assert find(copy).name == "8"
    console = quiet()
    assert fit(toy_config(steps=9), copy, console=console).step == 9
    assert "resumed at step 8" in console.file.getvalue()
    assert find(copy).name == "9" and not half.exists()


# What Orbax' other reads complain of after the first failed comes from its threads, at any time.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_broken_checkpoint_is_refused_and_the_older_one_named(copy):
    for file in (copy / "checkpoints/8/params").rglob("*"):
        if file.parent.name == "d":
            file.write_bytes(b"no")
    with pytest.raises(
        UserError, match=r"8: broken checkpoint: params/d/.* is damaged: .* step 6 "
    ):
        fit(toy_config(steps=9), copy, console=quiet())
    with pytest.raises(UserError, match="broken checkpoint"):
        load_for_inference(copy)
    shutil.rmtree(copy / "checkpoints/8")
    assert fit(toy_config(), copy, console=quiet()).step == 8


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("_CHECKPOINT_METADATA", "damaged"),
        ("params/_METADATA", "damaged"),
        ("params/_METADATA", "missing"),
        ("params/array_metadatas/process_0", "damaged"),
        ("params/manifest.ocdbt", "damaged"),
        ("params/manifest.ocdbt", "missing"),
        ("params/d/*", "missing"),
    ],
)
def test_broken_file_of_a_checkpoint_is_named(copy, name, fault):
    (path,) = (copy / "checkpoints/8").glob(name)
    if fault == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError) as caught:
        load_for_inference(copy)
    said = str(caught.value)
    relative = path.relative_to(copy / "checkpoints/8")
    assert f"{copy}/checkpoints/8: " in said and f"{relative} is {fault}: " in said
    assert "handler" not in said and "\n" not in said
    assert "delete this folder to go back to step 6 (earlier steps there: 6)" in said


def test_data_iterator_comes_back(copy):
    data = ToyData(toy_config())
    with jax.set_mesh(one_device()), Checkpoints(copy, toy_config()) as checkpoints:
        setup = set_up(toy_config(), one_device(), build=Toy)
        _, state = loop.begin(setup, checkpoints, data, quiet())
    assert data.step == int(state.step) == 8
