"""Imported weights, trained, exported: `transformers` and `peft` compute our logits with them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from emollama_jax.checkpoint import init_model, load_for_inference
from emollama_jax.data.pipeline import make_train_iterator
from emollama_jax.errors import UserError
from emollama_jax.models.parameters import named_parameters
from emollama_jax.sharding.mesh import make_mesh
from emollama_jax.train import loop
from tests.helpers.sets_in_memory import Store, make_config, small_bpe
from tests.helpers.torch_checkpoints import OVERRIDES, convert, read, write, write_back
from tests.helpers.toy_model import quiet
from tools.convert_torch.golden import off

torch = pytest.importorskip("torch", reason="PyTorch is the reference (extra `parity`)")
transformers = pytest.importorskip("transformers")
WITHIN = 1e-4  # of the largest logit; as for all that runs beside PyTorch


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three steps of LoRA on imported LLaMA-VID and FaceXFormer."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "bpe.json").write_text(small_bpe())
    cfg = make_config(
        str(folder / "bpe.json"),
        *(f"model.{line}" for line in OVERRIDES),
        *("model.llama.vocab_size=450", "model.qformer.vocab_size=450"),
        *("data.sources=[{name: more, split: train, kind: image, weight: 1}]", "train.steps=3"),
        *("train.frozen_dtype=float32", "train.learning_rate=0.05", "train.image_batch=2"),
    )
    for source in ("llama-vid", "facexformer"):
        write(source, folder / f"theirs-{source}", cfg.model)
        convert(source, folder / f"theirs-{source}", folder / source, cfg.model)
    imported = tuple(str(folder / source) for source in ("llama-vid", "facexformer"))
    cfg = dataclasses.replace(cfg, weights=imported)
    store = Store()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            loop,
            "make_train_iterator",
            lambda cfg, **how: make_train_iterator(cfg, store.splits(cfg), **how),
        )
        assert loop.fit(cfg, folder / "run", console=quiet()).step == 3
    return folder / "run"


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, 450, (2, 12))


@pytest.fixture(scope="module")
def ours(run, ids):
    """The trained model and its logits of a text."""
    _, model = load_for_inference(run)
    tokens = jnp.asarray(ids)
    positions = jnp.broadcast_to(jnp.arange(12), tokens.shape)
    hidden = model.llama(model.llama.embed(tokens), positions=positions).hidden
    return model, np.asarray(model.llama.logits(hidden))[:, :, :450]


def theirs(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=torch.from_numpy(ids)).logits.numpy()


def test_a_run_starts_from_imported_weights_and_moves(run, ours):
    cfg, _ = load_for_inference(run)
    start = named_parameters(init_model(cfg, make_mesh(cfg.mesh)))
    after = named_parameters(ours[0])
    moved = {path for path in start if not np.array_equal(start[path], after[path])}
    assert any(path.endswith("lora_B") for path in moved)
    assert not any(path.startswith(("face/", "vision/")) for path in moved)
    assert "llama/layers/q_proj/kernel" not in moved


def test_merged_export_is_our_model_in_transformers(run, ids, ours, tmp_path):
    said = write_back("llama", run, tmp_path / "hf", shard_gb=1e-4)
    assert "LoRA is folded into the kernels" in said and "no place for face, fim" in said
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    hf, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert off(theirs(hf, ids), ours[1]) < WITHIN


# peft 0.21 reads an attribute that transformers 5.24 has renamed.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapter_export_is_our_model_in_peft(run, ids, ours, tmp_path):
    peft = pytest.importorskip("peft", reason="peft reads the adapter (extra `parity`)")
    said = write_back("llama", run, tmp_path / "base", merge=False)
    assert "LoRA is left out" in said
    write_back("peft", run, tmp_path / "adapter")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    assert off(theirs(base, ids), ours[1]) > 100 * WITHIN  # the adapter does something
    whole = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert off(theirs(whole, ids), ours[1]) < WITHIN


def test_an_exported_adapter_comes_back(run, ours, tmp_path):
    cfg, _ = load_for_inference(run)
    write_back("peft", run, tmp_path / "adapter")
    convert("peft", tmp_path / "adapter", tmp_path / "ours", cfg.model)
    again = dataclasses.replace(cfg, weights=(*cfg.weights, str(tmp_path / "ours")))
    found = named_parameters(init_model(again, make_mesh(cfg.mesh)))
    trained = named_parameters(ours[0])
    adapters = [path for path in trained if "/lora_" in path]
    assert adapters
    for path in adapters:
        np.testing.assert_array_equal(found[path], trained[path])


def test_llama_vid_export_of_a_run_can_be_converted_again(run, ours, tmp_path):
    cfg, _ = load_for_inference(run)
    said = write_back("llama-vid", run, tmp_path / "back", shard_gb=1e-4)
    assert "no place for face, fim: left out" in said
    convert("llama-vid", tmp_path / "back", tmp_path / "again", cfg.model)
    facexformer = cfg.weights[1]
    again = dataclasses.replace(cfg, weights=(str(tmp_path / "again"), facexformer))
    found = named_parameters(init_model(again, make_mesh(cfg.mesh)))
    trained = named_parameters(ours[0])
    for path in trained:
        if path.startswith(("qformer/", "visual_tokens/", "vision/")):
            np.testing.assert_array_equal(found[path], trained[path], err_msg=path)


def test_a_run_on_other_weights_of_the_same_shape_is_refused(run, tmp_path, monkeypatch):
    """A checkpoint's adapters belong to the base that they were trained on."""
    import emollama_jax.checkpoint as checkpoint

    read = checkpoint.weights.read_manifest
    monkeypatch.setattr(
        checkpoint.weights,
        "read_manifest",
        lambda folder: dataclasses.replace(read(folder), fingerprint="another"),
    )
    with pytest.raises(UserError, match="trained on other base weights"):
        load_for_inference(run)


def test_a_merge_keeps_its_digits_in_float32(run, tmp_path):
    """Over kernels held in bfloat16."""
    cfg, _ = load_for_inference(run)
    for source in ("llama", "peft"):
        write_back(source, run, tmp_path / source, merge=False)
    convert("llama", tmp_path / "llama", tmp_path / "base", cfg.model, dtype="bf16")
    convert("peft", tmp_path / "peft", tmp_path / "adapter", cfg.model)
    found = {}
    for dtype in ("f32", "source"):
        out = tmp_path / f"merged_{dtype}"
        write_back("llama", tmp_path / "base", out, base=(tmp_path / "adapter",), dtype=dtype)
        found[dtype] = read("llama", out)["model.layers.1.self_attn.q_proj.weight"]
    assert (found["f32"].dtype, found["source"].dtype) == (np.float32, jnp.bfloat16)
    assert (found["f32"].astype(jnp.bfloat16) == found["source"]).all()
    assert (found["f32"] != found["source"].astype(np.float32)).any()
