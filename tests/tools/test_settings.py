"""`config.json` beside the weights: read where the model computes what ours does, refused else."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from emollama_jax import imported
from emollama_jax.config import RopeLlama3Config
from emollama_jax.errors import UserError
from tests.helpers.llama_vid_golden import NO_LORA
from tests.helpers.torch_checkpoints import convert, replaced, save, state_dict, toy, write
from tests.helpers.torch_models import (
    Language,
    assert_close,
    filled,
    randomise,
    sized,
    torch,
    transformers,
)
from tools.convert_torch.files import Opened, in_memory
from tools.convert_torch.golden import jitted
from tools.convert_torch.settings import from_transformers

IDS = np.random.default_rng(0).integers(0, 97, (2, 40))
ODD = dict(rms_norm_eps=1e-3, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
SIZES = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=16,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)


# --- against transformers ------------------------------------------------------------------------


def rewrite(folder, change):
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def as_llava(settings):
    """The same LLaMA as `llava_llama`, with the settings of `transformers` 4."""
    rope = settings.pop("rope_parameters")
    seen = {"mm_hidden_size": 9, "mm_projector_type": "linear", "mm_vision_tower": "clip"}
    return settings | seen | {"model_type": "llava_llama", "rope_theta": rope["rope_theta"]}


THEIRS = {  # name → (model, its changes, what is done to config.json)
    "mistral": ("Mistral", dict(sliding_window=None), dict),
    "mistral, a window that reaches": ("Mistral", dict(sliding_window=64), dict),
    "llava_llama": ("Llama", {}, as_llava),
}


@pytest.mark.parametrize("name", THEIRS)
def test_other_model_types_are_their_own_models(tmp_path, name):
    kind, changes, change = THEIRS[name]
    settings = getattr(transformers, f"{kind}Config")(**SIZES | ODD | changes)
    theirs = randomise(getattr(transformers, f"{kind}ForCausalLM")(settings), 1)
    theirs.save_pretrained(tmp_path / "theirs")
    rewrite(tmp_path / "theirs", change)
    convert("llama", tmp_path / "theirs", tmp_path / "ours", sized(llama=dict(vocab_multiple=1)))
    found = imported.read_manifest(tmp_path / "ours").model["llama"]
    assert (found["rope_theta"], found["norm_eps"], found["head_dim"]) == (500.0, 1e-3, 16)
    language = filled(Language, sized(llama=found | {"lora": NO_LORA}).llama, tmp_path / "ours")
    where = jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape)
    got = jitted(language, Language.logits)(jnp.asarray(IDS), where)
    with torch.no_grad():
        wanted = theirs(input_ids=torch.from_numpy(IDS)).logits.numpy()
    assert_close(np.asarray(got), wanted)


# --- fields --------------------------------------------------------------------------------------

BASE = SIZES | {"model_type": "llama", "rms_norm_eps": 1e-5}
MISTRAL = BASE | {"model_type": "mistral", "sliding_window": None}
ROPE = "rope_parameters"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
OURS = RopeLlama3Config(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=16
)


@pytest.fixture
def read(tmp_path):
    """A function of a config.json: our LLaMA's config, or its problems."""

    def read(settings, *, sections=("llama",)):
        opened = Opened(tensors={"a": in_memory(np.zeros(1, np.float32))})
        opened.settings = {tmp_path / "config.json": settings}
        cfg = from_transformers(sized(), opened, sections=sections)
        if opened.problems:
            return [p.removeprefix(f"{tmp_path / 'config.json'}: ") for p in opened.problems]
        return cfg.llama

    return read


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (BASE, dict(rope_theta=1e4, rope_scaling=1.0, norm_eps=1e-5, kv_heads=3, head_dim=16)),
        (BASE | {"rope_theta": 5e5}, dict(rope_theta=5e5)),
        (BASE | {"rope_theta": 500, ROPE: {"rope_type": "default"}}, dict(rope_theta=500.0)),
        (BASE | {ROPE: {"rope_theta": 7.0}, "rope_theta": 9.0}, dict(rope_theta=7.0)),
        (BASE | {"rope_scaling": {"type": "linear", "factor": 4}}, dict(rope_scaling=4.0)),
        (BASE | {"rope_scaling": None, "rope_theta": 2e4}, dict(rope_theta=2e4, rope_scaling=1.0)),
        (
            BASE | {"rope_scaling": LLAMA3, "tie_word_embeddings": True},
            dict(rope_scaling=1.0, rope_llama3=OURS, tied=True, reach=64),
        ),
        (BASE | {ROPE: LLAMA3 | {"rope_theta": 5e5}}, dict(rope_llama3=OURS, rope_theta=5e5)),
        (BASE, dict(rope_llama3=None, tied=False)),
        (BASE | {"head_dim": None}, dict(head_dim=8)),
        (BASE | {"num_key_value_heads": None}, dict(kv_heads=6)),
        (BASE | {"hidden_act": "swish"}, {}),
        (MISTRAL | {"rope_theta": 1e6}, dict(rope_theta=1e6)),
        (MISTRAL | {"sliding_window": 64}, {}),
        (BASE | {"sliding_window": 8, "use_sliding_window": False}, {}),
        (BASE | {"layer_types": ["full_attention"] * 2}, {}),
        (BASE | {"model_type": "llava_llama", "mm_hidden_size": 9}, dict(norm_eps=1e-5)),
        ({k: v for k, v in BASE.items() if k != "model_type"}, dict(norm_eps=1e-5)),
        ({"model_type": "video_llava", "text_config": BASE}, dict(norm_eps=1e-5, layers=2)),
        (  # as transformers writes the LLaMA of llava-1.5-7b-hf
            {
                "model_type": "llava",
                "text_config": {"model_type": "llama", "vocab_size": 32064, "rms_norm_eps": 1e-5},
            },
            dict(width=4096, mlp_width=11008, layers=32, heads=32, kv_heads=32, vocab_size=32064),
        ),
    ],
)
def test_fields_are_the_files(read, settings, wanted):
    found = read(settings)
    assert {key: getattr(found, key) for key in wanted} == wanted
    if "num_hidden_layers" in settings:
        assert (found.layers, found.width, found.heads, found.max_positions) == (2, 48, 6, 64)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        # kinds of models
        ({"model_type": "granite"}, "model_type is 'granite', wanted one of llama, mistral"),
        ({"model_type": "gemma2"}, "model_type is 'gemma2'"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"model_type": ["llama"]}, "model_type is ['llama']"),
        ({"text_config": {**BASE, "model_type": "gemma"}}, "model_type is 'gemma'"),
        ({"text_config": {"model_type": "mistral"}}, "vocab_size, hidden_size, intermediate_size"),
        ({"text_config": "llama"}, "text_config is 'llama', wanted an object"),
        # what ours does not compute
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', wanted 'silu'"),
        ({"hidden_act": None}, "hidden_act is None"),
        ({"attention_bias": True}, "attention_bias is True, wanted False"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', wanted true or false"),
        ({"use_qk_norm": True}, "use_qk_norm is True"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0, wanted None"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, wanted 1"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier is 12.0, wanted 1"),
        ({"scale_emb": 12}, "scale_emb is 12"),
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config (awq)"),
        # windows
        ({"sliding_window": 32}, "sliding_window is 32 and positions reach 64, wanted null"),
        ({"model_type": "mistral", "max_position_embeddings": 32768}, "sliding_window is 4096"),
        ({"model_type": "mistral", "sliding_window": 8, "use_sliding_window": False}, "sliding_w"),
        ({"sliding_window": "64"}, "sliding_window is '64'"),
        (
            {"sliding_window": 64, "rope_scaling": {"type": "linear", "factor": 2}},
            "sliding_window is 64 and positions reach 128",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is ["),
        # rotary angles
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_scaling is of type 'dynamic'"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8}},
            "low_freq_factor is None, wanted a number above 0",
        ),
        (
            {"rope_scaling": LLAMA3 | {"high_freq_factor": 1}},
            "high_freq_factor is 1, wanted more than low_freq_factor 1",
        ),
        (
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": None}},
            "original_max_position_embeddings is None, wanted a whole number",
        ),
        ({ROPE: {"rope_type": "yarn", "factor": 8}}, "rope_parameters is of type 'yarn', wanted"),
        ({ROPE: {"rope_type": "longrope", "rope_theta": 1.0}}, "rope_parameters is of type 'longr"),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling is of type None"),
        ({"rope_scaling": {"type": "linear"}}, "factor is None, wanted a number above 0"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor is -1"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', wanted an object"),
        (
            {ROPE: {"full_attention": {"rope_theta": 1.0}}},
            "rope_parameters has parameters for each",
        ),
        ({ROPE: {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, ROPE: {"rope_theta": 1e4}},
            "rope_scaling is {'type': 'linear', 'factor': 2} and rope_parameters",
        ),
        ({"rope_theta": "10000"}, "rope_theta is '10000', wanted a number above 0"),
        # sizes
        ({"hidden_size": "48"}, "hidden_size is '48', wanted a whole number"),
        ({"hidden_size": 48.0}, "hidden_size is 48.0"),
        ({"hidden_size": [48]}, "hidden_size is [48]"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, wanted a whole number"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4, head_dim 16: the second must divide"),
        ({"head_dim": 15}, "head_dim 15"),
        (
            {"num_attention_heads": 7, "head_dim": None},
            "is not a multiple of num_attention_heads 7",
        ),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', wanted a number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"vocab_size": None}, "vocab_size is None"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value)[:50],
)
def test_what_would_be_another_model_is_refused(read, change, said):
    (problem,) = read(BASE | change)
    assert said in problem and "\n" not in problem


@pytest.mark.parametrize("key", ["rms_norm_eps", "num_attention_heads", "max_position_embeddings"])
def test_nothing_is_taken_from_our_config_unsaid(read, key):
    (problem,) = read({k: v for k, v in BASE.items() if k != key})
    assert problem.startswith(f"{key} missing")


def test_a_config_beside_a_file_counts_and_none_is_said(tmp_path):
    model = toy()
    write("llama", tmp_path / "theirs", model)
    file = tmp_path / "theirs" / "model.safetensors"
    summary = convert("llama", file, tmp_path / "bare", model)
    assert any("sizes, rope_theta and norm_eps are those of --config" in n for n in summary.notes)
    cfg = model.llama
    settings = {
        "model_type": "llava_llama",
        "vocab_size": 70,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": cfg.max_positions,
        "rms_norm_eps": 1e-3,
        "rope_theta": 1e6,
    }
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(settings))
    summary = convert("llama", file, tmp_path / "ours", replaced(model, "llama", layers=9))
    found = imported.read_manifest(tmp_path / "ours").model["llama"]
    assert (found["layers"], found["norm_eps"], found["rope_theta"]) == (3, 1e-3, 1e6)
    (note,) = summary.notes  # nothing else is to be said
    assert note == "no tokenizer beside the weights: name one under data.llm_tokenizer"


def test_two_llamas_beside_each_other_are_refused(tmp_path):
    for name, eps in (("one", 1e-5), ("two", 1e-6)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(BASE | {"rms_norm_eps": eps}))
        save({name: np.ones(1, np.float32)}, tmp_path / name / "model.safetensors")
    with pytest.raises(UserError, match=r"two/config.json: another LLaMA than .*one/config.json"):
        convert("llama", [tmp_path / "one", tmp_path / "two"], tmp_path / "ours", toy())


def test_another_networks_config_may_lie_beside_eva(tmp_path):
    model = toy()
    write("llama-vid", tmp_path / "theirs", model)
    eva = tmp_path / "eva"
    eva.mkdir()
    save(state_dict("eva-vit", model), eva / "eva_vit_g.pth")
    (eva / "config.json").write_text(json.dumps({"model_type": "clip", "hidden_size": 9}))
    paths = [tmp_path / "theirs", eva / "eva_vit_g.pth"]
    summary = convert("llama-vid", paths, tmp_path / "ours", model)
    assert any("eva/config.json: not of a LLaMA, not read" in note for note in summary.notes)


@pytest.mark.parametrize("name", ["state_dict", "model", "module", "model_state_dict"])
def test_a_wrapped_llama_is_read(tmp_path, name):
    model = toy()
    held = {name: state_dict("llama", model), "epoch": 3}
    save(held, tmp_path / "pytorch_model.bin")
    summary = convert("llama", tmp_path, tmp_path / "ours", model)
    assert summary.tensors == len(held[name])
    assert f"pytorch_model.bin: read its {name}, left epoch" in summary.notes


@pytest.mark.parametrize(
    ("source", "settings", "said"),
    [
        ("eva-vit", {"vision_config": {"num_attention_heads": 4}}, "wanted model.vision.heads 2"),
        ("eva-vit", {"vision_config": {"layer_norm_eps": 0.1}}, "wanted model.vision.norm_eps"),
        ("eva-vit", {"vision_config": {"hidden_act": "relu"}}, "hidden_act is not 'gelu'"),
        (
            "eva-vit",
            {"model_type": "blip_2_vision_model", "num_attention_heads": 4},
            "vision's num_attention_heads is 4",
        ),
        (
            "qformer",
            {"qformer_config": {"cross_attention_frequency": 1}},
            "cross_attention_every 2",
        ),
        ("qformer", {"qformer_config": {"layer_norm_eps": 0.1}}, "wanted model.qformer.norm_eps"),
    ],
)
def test_a_towers_settings_that_no_shape_shows(tmp_path, source, settings, said):
    model = toy()
    write(source, tmp_path, model)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError) as error:
        convert(source, tmp_path, tmp_path / "ours", model)
    assert said in str(error.value)
