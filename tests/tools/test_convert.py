"""Converting whole checkpoints of every source: round trips, refusals, sharding, a run's base."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emollama_jax import imported
from emollama_jax.config import MeshConfig
from emollama_jax.errors import UserError
from tests.helpers.torch_checkpoints import (
    DTYPES,
    EXPORTED,
    OVERRIDES,
    convert,
    read,
    replaced,
    save,
    state_dict,
    toy,
    write,
    write_back,
)
from tools.convert_torch.__main__ import main
from tools.convert_torch.convert import shapes
from tools.convert_torch.sources import SOURCES

pytest.importorskip("torch", reason="PyTorch writes the files (extra `convert`)")


@pytest.fixture(scope="module")
def model():
    return toy()


def leaf(folder, path):
    return imported.load_numpy(folder, [path])[path]


def refused(*args, **how) -> list[str]:
    """The lines of the one error."""
    with pytest.raises(UserError) as error:
        convert(*args, **how)
    return [line.strip() for line in str(error.value).splitlines()]


# --- round trips --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", EXPORTED)
def test_there_and_back_is_bit_exact(tmp_path, model, source, dtype):
    """At float32 and at the source's own dtype, every tensor that is read."""
    state = write(source, tmp_path / "theirs", model, dtype=DTYPES[dtype])
    for ours in ("source", "f32"):
        out, back = tmp_path / f"ours_{ours}", tmp_path / f"back_{ours}"
        summary = convert(source, tmp_path / "theirs", out, model, dtype=ours)
        assert summary.tensors == len(state)
        write_back(EXPORTED[source][0], out, back)
        found = read(source, back)
        for key, wanted in state.items():
            wanted = wanted if ours == "source" else wanted.astype(np.float32)
            assert found[key].dtype == wanted.dtype
            np.testing.assert_array_equal(
                found[key].view(np.uint8), wanted.view(np.uint8), err_msg=key
            )
        extra = set(found) - set(state)
        assert all("relative_position_index" in k or k.startswith("backbone.1.") for k in extra)


def test_bfloat16_rounds_to_nearest(tmp_path, model):
    write("eva-vit", tmp_path / "theirs", model)
    convert("eva-vit", tmp_path / "theirs", tmp_path / "f32", model)
    convert("eva-vit", tmp_path / "theirs", tmp_path / "bf16", model, dtype="bf16")
    path = "vision/blocks/fc1/kernel"
    whole = leaf(tmp_path / "f32", path)
    assert (leaf(tmp_path / "bf16", path) == whole.astype(jnp.bfloat16)).all()


def test_vocabulary_is_padded_and_cut_again(tmp_path, model):
    state = write("llama", tmp_path / "theirs", model)
    convert("llama", tmp_path / "theirs", tmp_path / "ours", model)
    for path, axis in (("llama/embed_tokens", 0), ("llama/lm_head/kernel", 1)):
        found = leaf(tmp_path / "ours", path)
        assert found.shape[axis] == 128
        real, padding = np.split(found, [70], axis)
        assert real.any() and not padding.any()
    sizes = imported.read_manifest(tmp_path / "ours").model["llama"]
    assert (sizes["vocab_size"], sizes["vocab_multiple"]) == (70, 64)
    write_back("llama", tmp_path / "ours", tmp_path / "back")
    assert read("llama", tmp_path / "back")["lm_head.weight"].shape == (70, 32)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["vocab_size"] == 70
    assert state["lm_head.weight"].shape == (70, 32)


def test_layouts_and_sharding_change_nothing(tmp_path, model):
    """One file or many, one device or eight: the same leaves and the same fingerprint."""
    write("llama", tmp_path / "theirs", model)
    convert("llama", tmp_path / "theirs", tmp_path / "one", model)
    write_back("llama", tmp_path / "one", tmp_path / "shards", shard_gb=2e-5)
    assert len(list((tmp_path / "shards").glob("model-*-of-*.safetensors"))) > 2
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    convert("llama", tmp_path / "shards", tmp_path / "eight", model, mesh=mesh)
    one, eight = (imported.read_manifest(tmp_path / name) for name in ("one", "eight"))
    assert one.fingerprint == eight.fingerprint and one.model == eight.model
    for path in imported.leaves_of(tmp_path / "one"):
        np.testing.assert_array_equal(leaf(tmp_path / "eight", path), leaf(tmp_path / "one", path))


def test_fingerprint_follows_the_numbers(tmp_path, model):
    state = write("eva-vit", tmp_path / "theirs", model)
    convert("eva-vit", tmp_path / "theirs", tmp_path / "one", model)
    state["blocks.1.mlp.fc2.bias"][0] += 1
    save(state, tmp_path / "theirs" / "eva_vit_g.pth")
    convert("eva-vit", tmp_path / "theirs", tmp_path / "two", model)
    one, two = (imported.read_manifest(tmp_path / name).fingerprint for name in ("one", "two"))
    assert one != two


# --- what checkpoints are like ------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model."])
def test_prefixes_of_llama_are_found(tmp_path, model, prefix):
    head = {"language_model.model.": "language_model.lm_head."}.get(prefix, "lm_head.")
    renamed = {
        (prefix + key.removeprefix("model.")).replace(f"{prefix}lm_head.", head): value
        for key, value in state_dict("llama", model).items()
    }
    save(renamed, tmp_path / "model.safetensors")
    convert("llama", tmp_path, tmp_path / "ours", model)
    assert len(imported.leaves_of(tmp_path / "ours")) == len(shapes(SOURCES["llama"], model))


def test_eva_beside_llama_vid_is_read_instead_of_the_tower_inside(tmp_path, model):
    write("llama-vid", tmp_path / "theirs", model)
    eva = {key: value + 1 for key, value in state_dict("eva-vit", model).items()}
    eva |= {"blocks.2.norm1.weight": np.ones(32, np.float32), "norm.bias": np.ones(32, np.float32)}
    save(eva, tmp_path / "eva_vit_g.pth")
    paths = [tmp_path / "theirs", tmp_path / "eva_vit_g.pth"]
    summary = convert("llama-vid", paths, tmp_path / "ours", model)
    bias = leaf(tmp_path / "ours", "vision/patch_embed/bias")
    np.testing.assert_array_equal(bias, eva["patch_embed.proj.bias"])
    notes = "\n".join(summary.notes)
    assert "the checkpoint's own tower" in notes
    assert "left out 1 tensor: EVA's block 3" in notes and "EVA's last norm and head" in notes


def test_a_config_beside_the_weights_gives_llamas_sizes(tmp_path, model):
    write("llama", tmp_path, model)
    settings = {
        "model_type": "llama",
        "vocab_size": 70,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-3,
        "max_position_embeddings": 64,
        "rope_scaling": {"type": "linear", "factor": 16.0},
        "head_dim": 4,
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    convert("llama", tmp_path, tmp_path / "ours", replaced(model, "llama", layers=9, width=8))
    sizes = imported.read_manifest(tmp_path / "ours").model["llama"]
    assert (sizes["heads"], sizes["kv_heads"], sizes["head_dim"]) == (8, 4, 4)
    assert (sizes["norm_eps"], sizes["rope_scaling"], sizes["max_positions"]) == (1e-3, 16.0, 64)
    bad = settings | {"attention_bias": True, "hidden_act": "gelu"}
    (tmp_path / "config.json").write_text(
        json.dumps(bad | {"rope_scaling": {"rope_type": "yarn", "factor": 2}})
    )
    lines = refused("llama", tmp_path, tmp_path / "two", model)
    assert lines[0] == "llama: nothing was written, 3 problems:"
    for word in ("attention_bias", "hidden_act is 'gelu', wanted 'silu'", "'yarn'"):
        assert any(word in line for line in lines)


# --- refusals -----------------------------------------------------------------------------------


def test_everything_wrong_is_in_one_error_and_nothing_is_left(tmp_path, model, capsys):
    state = state_dict("llama", model)
    del state["model.norm.weight"]
    state["model.layers.1.mlp.up_proj.weight"] = np.zeros((48, 31), np.float32)
    state["model.layers.2.mlp.up_proj.weight"] = np.zeros((48, 32), np.int8)
    state["model.layers.3.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)
    state["lm_head.weight"] = state["lm_head.weight"].astype(np.float64)
    save(state, tmp_path / "model.safetensors")
    with pytest.raises(SystemExit) as stop:
        main(
            [
                *("llama", "--src", str(tmp_path), "--out", str(tmp_path / "ours")),
                *("--config", "tiny", "--set"),
                *(f"model.{line}" for line in OVERRIDES),
            ]
        )
    assert stop.value.code == 2
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == "convert_torch: llama: nothing was written, 5 problems:"
    assert sorted(lines[1:]) == [
        "lm_head.weight: dtype float64, wanted float32 or float16 or bfloat16",
        "model.layers.1.mlp.up_proj.weight: shape (48, 31) gives (31, 48) by transpose, "
        "llama/layers/up_proj/kernel wants (32, 48)",
        "model.layers.2.mlp.up_proj.weight: dtype int8, wanted float32 or float16 or bfloat16",
        "model.layers.3.mlp.up_proj.weight: no row of the table reads it",
        "model.norm.weight: missing (for llama/norm/scale)",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_fault_found_while_writing_leaves_nothing(tmp_path, model, monkeypatch):
    """The file shrinks between looking and reading."""
    write("eva-vit", tmp_path / "theirs", model)
    path = tmp_path / "theirs" / "eva_vit_g.pth"
    add = imported.Writer.add

    def spoil(self, leaves):
        add(self, leaves)
        assert list(tmp_path.glob("ours*"))  # something is there by now
        raise OSError("disk full")

    monkeypatch.setattr(imported.Writer, "add", spoil)
    with pytest.raises(OSError, match="disk full"):
        convert("eva-vit", path, tmp_path / "ours", model)
    assert list(tmp_path.glob("ours*")) == []


def test_an_unfinished_folder_is_cleared_and_a_whole_one_kept(tmp_path, model):
    write("eva-vit", tmp_path / "theirs", model)
    left = tmp_path / "ours.partial_save"
    left.mkdir()
    (left / "half").write_text("of an earlier conversion that was killed")
    with pytest.raises(UserError, match="no such folder"):
        imported.read_manifest(tmp_path / "ours")
    convert("eva-vit", tmp_path / "theirs", tmp_path / "ours", model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]
    assert "already exists" in refused("eva-vit", tmp_path / "theirs", tmp_path / "ours", model)[0]


def test_the_wrong_source_is_told_the_right_one(tmp_path, model):
    write("llama-vid", tmp_path / "theirs", model)
    lines = refused("llama", tmp_path / "theirs", tmp_path / "ours", model)
    assert lines == ["llama: nothing was written, these tensors look like the source llama-vid"]
    (line,) = refused("facexformer", tmp_path / "theirs", tmp_path / "ours", model)
    assert "none named as in the release; these look like the source llama-vid" in line


def test_another_size_is_refused(tmp_path, model):
    write("eva-vit", tmp_path / "theirs", model)
    other = replaced(model, "vision", depth=3, mlp_width=44)
    lines = refused("eva-vit", tmp_path / "theirs", tmp_path / "ours", other)
    assert any("blocks.2.norm1.weight: missing" in line for line in lines)
    assert any(line.startswith("blocks.{0, 1}.mlp.fc1.weight: shape (40, 32)") for line in lines)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["llama", "--src", "{tmp}/none", "--out", "{tmp}/x"], "none: no such file or folder"),
        (["llama", "--src", "--out", "{tmp}/x"], "no path given"),
        (["llama", "--src", "{tmp}", "--out", "{tmp}/x", "--config", "nope"], "no such config"),
        (["export", "onnx", "--src", "{tmp}", "--out", "{tmp}/x"], "export onnx: unknown format"),
        (["export", "llama", "--src", "{tmp}", "--out", "{tmp}/x"], "holds no imported weights"),
        (["export", "llama", "--src", "{tmp}/none", "--out", "{tmp}/x"], "no such folder"),
        (["inspect", "{tmp}/none"], "none: no such file or folder"),
        (["inspect", "{tmp}", "--source", "onnx"], "--source onnx: unknown"),
    ],
)
def test_bad_input_is_status_2(tmp_path, capsys, args, said):
    with pytest.raises(SystemExit) as stop:
        main([arg.format(tmp=tmp_path) for arg in args])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_inspect_shows_both_sides_and_what_matches_nothing(tmp_path, model, capsys):
    state = state_dict("llama", model)
    state |= {"model.layers.0.extra.weight": np.ones(3, np.float32)}
    state |= {"model.layers.1.extra.weight": np.ones(3, np.float32)}
    del state["model.norm.weight"]
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save(state, tmp_path / "model.safetensors")
    main(["inspect", str(tmp_path), "--config", "tiny"])
    out = capsys.readouterr().out
    assert "source llama, named as in transformers" in out
    for both in (("model.embed_tokens.weight", "llama/embed_tokens"), ("mlp.up_proj", "up_proj/k")):
        assert any(all(part in line for part in both) for line in out.splitlines())
    assert "matches nothing: model.layers.{i}.extra.weight (2 tensors) 3 float32" in out
    assert "missing model.norm.weight (for llama/norm/scale)" in out
    assert "left out: model.layers.{i}.self_attn.rotary_emb.inv_freq: buffer" in out


# --- as a run's base ----------------------------------------------------------------------------


def test_sharded_reading_is_whole_reading(tmp_path, model):
    write("llama", tmp_path / "theirs", model)
    convert("llama", tmp_path / "theirs", tmp_path / "ours", model)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    path = "llama/layers/up_proj/kernel"
    wanted = jax.ShapeDtypeStruct((3, 32, 48), jnp.bfloat16, sharding=place)
    found = imported.load(tmp_path / "ours", {path: wanted})[path]
    assert found.sharding == place and found.dtype == jnp.bfloat16
    whole = leaf(tmp_path / "ours", path)
    np.testing.assert_array_equal(found, whole.astype(jnp.bfloat16))


def test_base_of_another_config_is_refused(tmp_path, model):
    write("llama", tmp_path / "theirs", model)
    convert("llama", tmp_path / "theirs", tmp_path / "ours", model)
    leaves = shapes(SOURCES["llama"], model)
    assert imported.check_base([tmp_path / "ours"], model, leaves) == dict.fromkeys(
        leaves, tmp_path / "ours"
    )
    for change in ({"norm_eps": 1e-2}, {"heads": 8}, {"rope_theta": 5.0}):
        with pytest.raises(UserError, match=f"made for model.llama.{next(iter(change))}"):
            imported.check_base([tmp_path / "ours"], replaced(model, "llama", **change), leaves)
    with pytest.raises(UserError, match="both in"):
        imported.check_base([tmp_path / "ours"] * 2, model, leaves)
    with pytest.raises(UserError, match="has no place in this model"):
        imported.check_base([tmp_path / "ours"], model, {})


@pytest.mark.parametrize("how", ["cut short", "absent"])
def test_a_broken_folder_is_refused(tmp_path, model, how):
    """A missing file would otherwise read as zeros."""
    write("eva-vit", tmp_path / "theirs", model)
    convert("eva-vit", tmp_path / "theirs", tmp_path / "ours", model)
    (numbers,) = (tmp_path / "ours").glob("**/fc1/kernel@1/c/0/0")
    if how == "absent":
        numbers.unlink()
    else:
        numbers.write_bytes(numbers.read_bytes()[:-9])
    with pytest.raises(UserError, match="a file in it is missing or broken: convert it again"):
        leaf(tmp_path / "ours", "vision/blocks/fc1/kernel")
    assert leaf(tmp_path / "ours", "vision/blocks/fc2/kernel").any()
