"""What lies beside an adapter: its base's `config.json`, LLaVA's other weights, all other files."""

import json

import numpy as np
import pytest

from emollama_jax import config, imported
from tests.helpers.peft_adapter import notes, refused, rewritten, small_model, write_adapter
from tests.helpers.torch_checkpoints import (
    convert,
    read,
    replaced,
    save,
    state_dict,
    write,
    write_back,
)
from tests.helpers.torch_models import leaves
from tools.convert_torch import llama_vid
from tools.convert_torch.__main__ import main


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def adapter(tmp_path, model):
    return write_adapter(tmp_path / "theirs", model)


# --- sizes ---------------------------------------------------------------------------------------


def llama_settings(model, **change) -> dict:
    cfg = model.llama
    return {
        "model_type": "llama",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.width,
        "intermediate_size": cfg.mlp_width,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "rms_norm_eps": cfg.norm_eps,
        "max_position_embeddings": cfg.max_positions,
    } | change


def test_config_json_beside_an_adapter_counts(adapter, tmp_path, model):
    """Also where the file of the adapter is named, and not its folder."""
    folder = adapter()
    other = config.load("emollama_7b").model
    line = refused(folder, tmp_path / "ours", other)
    assert "the adapter's q_proj reads 32, the LLaMA's 4096: put its config.json beside" in line
    settings = llama_settings(model, rope_theta=5e5, rms_norm_eps=1e-3)
    (folder / "config.json").write_text(json.dumps(settings))
    for path, out in ((folder, "one"), (folder / "adapter_model.safetensors", "two")):
        convert("peft", path, tmp_path / out, other)
        sizes = imported.read_manifest(tmp_path / out).model["llama"]
        assert (sizes["width"], sizes["layers"], sizes["heads"]) == (32, 3, 4)
        assert (sizes["rope_theta"], sizes["norm_eps"]) == (5e5, 1e-3)
        assert "--config" not in notes(tmp_path / out)
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 5}))
    line = refused(folder, tmp_path / "ours", other)
    assert "the adapter has layers 0 to 2, the LLaMA 0 to 4" in line
    (folder / "config.json").write_text(json.dumps(settings | {"hidden_act": "gelu"}))
    assert "hidden_act is 'gelu', wanted 'silu'" in refused(folder, tmp_path / "ours", other)


def test_the_base_may_have_been_quantized(adapter, tmp_path, model):
    folder = adapter()
    settings = llama_settings(model, quantization_config={"quant_method": "bitsandbytes"})
    (folder / "config.json").write_text(json.dumps(settings))
    convert("peft", folder, tmp_path / "ours", model)
    assert "the base was quantized by bitsandbytes in training" in notes(tmp_path / "ours")


# --- what lies beside ----------------------------------------------------------------------------


def projector(model) -> dict[str, np.ndarray]:
    """All that LLaMA-VID's projector and Q-Former have, as PEFT wraps it."""
    rows = [*llama_vid.projectors(), *llama_vid.qformer(2, llama_vid.LLAMA_VID)]
    state = state_dict("llama-vid", model)
    return {
        f"base_model.model.{key}": value
        for key, value in state.items()
        if any(row.matches(key) for row in rows)
    }


LEFT = {
    "base_model.model.model.image_newline": np.ones(32, np.float32),
    "base_model.model.model.vision_tower.proj.weight": np.ones((2, 2), np.float32),
}


@pytest.mark.parametrize("name", ["non_lora_trainables.bin", "mm_projector.bin"])
def test_projector_and_qformer_beside_an_adapter_are_read(adapter, tmp_path, model, name):
    folder, state = adapter(), projector(model)
    if name == "mm_projector.bin":
        state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    save(state | LEFT, folder / name)
    summary = convert("peft", folder, tmp_path / "ours", model)
    assert summary.tensors == 12 + len(state)
    write("llama-vid", tmp_path / "whole", model)
    convert("llama-vid", tmp_path / "whole", tmp_path / "base", model)
    wanted, got = leaves(tmp_path / "base"), leaves(tmp_path / "ours")
    visual = {path for path in wanted if path.startswith(("qformer/", "visual_tokens/"))}
    assert {path for path in got if "lora_" not in path} == visual
    for path in visual:
        np.testing.assert_array_equal(got[path], wanted[path], path)
    said = notes(tmp_path / "ours")
    assert f"read {len(state)} tensors of {name} into projector and Q-Former" in said
    assert f"left out 2 tensors of {name} (model.image_newline, model.vision_tower.proj" in said
    write_back("peft", tmp_path / "ours", tmp_path / "back")
    assert len(read("peft", tmp_path / "back")) == 12


def test_a_part_of_them_is_read_and_half_a_stack_is_named(tmp_path, model):
    """Two groups of the Q-Former's layers, one of them trained."""
    model = replaced(model, "qformer", layers=4)
    write("peft", tmp_path / "theirs", model)
    state = projector(model)
    some = [key for key in state if "mm_projector.0" in key or "vlm_att_query" in key]
    half = "base_model.model.model.vlm_att_encoder.bert.encoder.layer.2.output.dense.weight"
    file = tmp_path / "theirs" / "non_lora_trainables.bin"
    save({key: state[key] for key in [*some, half]}, file)
    convert("peft", tmp_path / "theirs", tmp_path / "ours", model)
    held = {path for path in leaves(tmp_path / "ours") if "lora_" not in path}
    mlp = "visual_tokens/mm_projector_in"
    assert held == {f"{mlp}/kernel", f"{mlp}/bias", "qformer/query"}
    said = notes(tmp_path / "ours")
    assert "read 3 tensors of non_lora_trainables.bin" in said
    assert "layer.2.output.dense.weight): without 1 of its layers" in said


def test_of_another_size_all_of_them_are_left_out(adapter, tmp_path, model):
    state = projector(model)
    state["base_model.model.model.mm_projector.0.weight"] = np.ones((32, 9), np.float32)
    save(state, adapter() / "non_lora_trainables.bin")
    convert("peft", adapter(), tmp_path / "ours", model)
    assert all("lora_" in path for path in leaves(tmp_path / "ours"))
    said = notes(tmp_path / "ours")
    assert f"left out {len(state)} tensors of non_lora_trainables.bin" in said
    assert "of another size than --config says (shape (32, 9)" in said


@pytest.mark.parametrize(
    "key", ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
def test_trained_weights_of_llama_beside_it_are_refused(adapter, tmp_path, model, key):
    state = {f"base_model.model.{key}": np.ones((70, 32), np.float32)}
    save(state, adapter() / "non_lora_trainables.bin")
    line = refused(adapter(), tmp_path / "ours", model)
    assert f"non_lora_trainables.bin: 1 weights of LLaMA itself ({key})" in line


def test_every_file_that_was_not_read_is_named(adapter, tmp_path, model):
    folder = adapter()
    for name in ("README.md", "optimizer.pt", "training_args.bin", "tokenizer.json", "extra.bin"):
        (folder / name).write_bytes(b"not looked at")
    for rank in range(4):
        (folder / f"rng_state_{rank}.pth").write_bytes(b"not looked at")
    (folder / "checkpoint-10").mkdir()
    save({"a": np.ones(1, np.float32)}, folder / "adapter_model.bin")
    convert("peft", folder, tmp_path / "ours", model)
    said = notes(tmp_path / "ours")
    assert f"{folder}: weights that were not read: adapter_model.bin, extra.bin" in said
    assert (
        f"{folder}: also not read: README.md, checkpoint-10/, optimizer.pt, rng_state_*.pth (4), "
        "tokenizer.json, training_args.bin"
    ) in said


def test_over_a_llama_vid_the_trained_projector_is_read_instead(tmp_path, model):
    """`llama-vid --src BASE non_lora_trainables.bin`, as LLaVA's loader does it."""
    write("llama-vid", tmp_path / "theirs", model)
    state = {key: value + 1 for key, value in projector(model).items() if "mm_projector" in key}
    save(state, tmp_path / "non_lora_trainables.bin")
    paths = [tmp_path / "theirs", tmp_path / "non_lora_trainables.bin"]
    convert("llama-vid", paths, tmp_path / "ours", model)
    got = leaves(tmp_path / "ours")["visual_tokens/mm_projector_in/bias"]
    np.testing.assert_array_equal(got, state["base_model.model.model.mm_projector.0.bias"])
    assert "left out 4 tensors: the checkpoint's own; non_lora_trainables.bin is read" in notes(
        tmp_path / "ours"
    )


def test_inspect_shows_an_adapter(adapter, model, capsys):
    folder = adapter(target_modules=".*_proj")
    rewritten(
        folder,
        lambda state: {
            k.replace("_A.w", "_A.me.w").replace("_B.w", "_B.me.w"): state[k] for k in state
        },
    )
    save(projector(model), folder / "non_lora_trainables.bin")
    (folder / "config.json").write_text(json.dumps(llama_settings(model)))
    main(["inspect", str(folder), "--config", "tiny"])
    out = capsys.readouterr().out
    assert "source peft, named as in PEFT" in out and "matches nothing" not in out
    assert "self_attn.q_proj.lora_A.weight" in out and "targets [q_proj, v_proj]" in out
    assert "note: left out 71 tensors of non_lora_trainables.bin" in out  # of tiny's size


@pytest.mark.parametrize("change", [{"use_dora": True}, {"r": "8"}])
def test_the_command_line_says_it_in_one_line(adapter, tmp_path, model, capsys, change):
    args = ["peft", "--src", str(adapter(**change)), "--out", str(tmp_path / "ours")]
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("convert_torch: peft: nothing was written, adapter_config.json: ")
