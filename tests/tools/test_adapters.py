"""PEFT adapters: what is read is PEFT's own model, what would be another one is refused by name."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax import imported
from emollama_jax.errors import UserError
from emollama_jax.models.parameters import named_parameters
from tests.helpers.llama_vid_golden import NO_LORA
from tests.helpers.peft_adapter import notes, refused, rewritten, small_model, write_adapter
from tests.helpers.torch_checkpoints import convert, state_dict, write_back
from tests.helpers.torch_models import Language, leaves, randomise, sized, torch, transformers
from tools.convert_torch import peft as ours
from tools.convert_torch.golden import off

WITHIN = 1e-4  # of the largest logit; as for all that runs beside PyTorch
SIZES = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=3,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)
IDS = np.random.default_rng(0).integers(0, 97, (2, 12))
LAYERS = range(SIZES["num_hidden_layers"])


# --- against PEFT --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """`transformers`' LLaMA on the disk, our config of it, and its leaves."""
    folder = tmp_path_factory.mktemp("base")
    randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)), 1).save_pretrained(
        folder
    )
    convert("llama", folder, folder / "ours", sized(llama=dict(vocab_multiple=1)))
    found = imported.read_manifest(folder / "ours").model["llama"]
    model = sized(llama=found | {"lora": NO_LORA})
    return folder, model, leaves(folder / "ours")


@pytest.fixture(scope="module")
def run(base):
    """Our LLaMA's logits by its leaves; compiled once, the adapters are merged into the kernels."""
    network = nnx.eval_shape(lambda: Language(base[1].llama))
    parameters = named_parameters(network)
    graph = nnx.graphdef(network)

    @jax.jit
    def logits(state):
        positions = jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape)
        return nnx.merge(graph, state).logits(jnp.asarray(IDS), positions)

    def run(values):
        for path, leaf in parameters.items():
            leaf.set_value(jnp.asarray(values[path]))
        return np.asarray(logits(nnx.state(network)))

    return run


def merged(kernels, folder):
    """The base's leaves with a converted adapter in them, scaled as its manifest says."""
    lora = imported.read_manifest(folder).model["lora"]
    held, values = leaves(folder), dict(kernels)
    assert {path.split("/")[2] for path in held} == set(lora["targets"])
    for target in lora["targets"]:
        a, b = (held[f"llama/layers/{target}/lora_{side}"] for side in "AB")
        update = np.einsum("lir,lro->lio", a, b) * (lora["alpha"] / lora["rank"])
        values[f"llama/layers/{target}/kernel"] = kernels[
            f"llama/layers/{target}/kernel"
        ] + update.astype(np.float32)
    return values


def plain(wrapped, folder):
    wrapped.save_pretrained(folder)


def binary(wrapped, folder, *, name: str = "default", around=lambda state: state):
    """As trainers save that call `torch.save` on the trained part of the state dict."""
    wrapped.save_pretrained(folder)
    (folder / "adapter_model.safetensors").unlink()
    state = {
        key.replace(".default.", f".{name}."): value
        for key, value in wrapped.state_dict().items()
        if ".lora_" in key
    }
    torch.save(around(state), folder / "adapter_model.bin")


def sharded(wrapped, folder):
    wrapped.save_pretrained(folder)
    from safetensors.numpy import load_file, save_file

    state = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    where = {}
    for number in (1, 2):
        file = f"adapter_model-0000{number}-of-00002.safetensors"
        part = dict(list(state.items())[number - 1 :: 2])
        save_file(part, folder / file)
        where |= dict.fromkeys(part, file)
    index = folder / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))


QV = ["q_proj", "v_proj"]
READ = {  # name → (settings of PEFT's LoraConfig, how it is saved)
    "plain": (dict(target_modules=QV), plain),
    "default keys": (dict(target_modules=QV), binary),
    "keys of another name": (dict(target_modules=QV), functools.partial(binary, name="faces")),
    "default keys in a wrapper": (
        dict(target_modules=["up_proj"]),
        functools.partial(binary, around=lambda state: {"state_dict": state, "epoch": 1}),
    ),
    "default keys of DDP": (
        dict(target_modules=["o_proj"]),
        functools.partial(binary, around=lambda state: {f"module.{k}": state[k] for k in state}),
    ),
    "end of a path": (dict(target_modules=["self_attn.q_proj", "mlp.down_proj"]), plain),
    "full paths": (
        dict(target_modules=[f"model.layers.{i}.self_attn.k_proj" for i in LAYERS]),
        plain,
    ),
    "full paths of one layer": (dict(target_modules=["model.layers.1.self_attn.o_proj"]), plain),
    "regex": (dict(target_modules=r".*\.self_attn\.(q_proj|v_proj)"), plain),
    "regex of some layers": (dict(target_modules=r".*layers\.[02]\.mlp\.(up|down)_proj"), plain),
    "regex of an end": (dict(target_modules=r".*[kqvo]_proj"), binary),
    "all-linear": (dict(target_modules="all-linear"), plain),
    "rsLoRA": (dict(target_modules=QV, use_rslora=True), plain),
    "gaussian": (dict(target_modules=QV, init_lora_weights="gaussian"), plain),
    "random": (dict(target_modules=QV, init_lora_weights=False), plain),
    "orthogonal": (dict(target_modules=QV, init_lora_weights="orthogonal"), plain),
    "sharded": (dict(target_modules=["q_proj", "gate_proj"]), sharded),
}


# peft 0.21 reads an attribute that transformers 5.24 has renamed.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", READ)
def test_what_is_read_is_pefts_model(base, run, tmp_path, name):
    peft = pytest.importorskip("peft", reason="peft is the reference (extra `parity`)")
    folder, model, kernels = base
    settings, write_as = READ[name]
    settings = peft.LoraConfig(**dict(r=4, lora_alpha=10, task_type="CAUSAL_LM") | settings)
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder)
    wrapped = peft.get_peft_model(theirs, settings).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, value in wrapped.named_parameters():
            if "lora_" in key:
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
        wanted = wrapped(input_ids=torch.from_numpy(IDS)).logits.numpy()
    write_as(wrapped, tmp_path / "theirs")
    convert("peft", tmp_path / "theirs", tmp_path / "ours", model)
    got = run(merged(kernels, tmp_path / "ours"))
    assert off(run(kernels), wanted) > 100 * WITHIN  # the adapter does something
    assert off(got, wanted) < WITHIN
    if "layer" in name:
        assert "zeros there" in notes(tmp_path / "ours")
    write_back("peft", tmp_path / "ours", tmp_path / "back")
    convert("peft", tmp_path / "back", tmp_path / "again", model)
    for path, leaf in leaves(tmp_path / "ours").items():
        np.testing.assert_array_equal(leaves(tmp_path / "again")[path], leaf, path)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_a_changed_base_is_refused_and_would_be_wrong(base, run, tmp_path, init, monkeypatch):
    """The same adapter, had it been read, is another model."""
    peft = pytest.importorskip("peft", reason="peft is the reference (extra `parity`)")
    folder, model, kernels = base
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder)
    settings = peft.LoraConfig(r=4, target_modules=QV, init_lora_weights=init)
    wrapped = peft.get_peft_model(theirs, settings).eval()
    with torch.no_grad():
        wanted = wrapped(input_ids=torch.from_numpy(IDS)).logits.numpy()
    wrapped.save_pretrained(tmp_path / "theirs")
    said = refused(tmp_path / "theirs", tmp_path / "ours", model)
    assert f'adapter_config.json: init_lora_weights is "{init}", wanted true or false' in said
    assert "merge_and_unload" in said
    monkeypatch.setitem(ours.EXACT, "init_lora_weights", (init,))
    convert("peft", tmp_path / "theirs", tmp_path / "ours", model)
    assert off(run(merged(kernels, tmp_path / "ours")), wanted) > 100 * WITHIN


def test_every_default_of_peft_is_read_and_every_other_value_is_judged():
    """A field that PEFT adds has to be null, false or empty until somebody has looked at it."""
    peft = pytest.importorskip("peft", reason="its LoraConfig is the reference (extra `parity`)")
    settings = json.loads(
        json.dumps(peft.LoraConfig(target_modules="q_proj").to_dict(), default=str)
    )
    settings["peft_type"] = "LORA"
    assert ours.lora_settings(settings) == ({"rank": 8, "alpha": 8.0, "dropout": 0.0}, [])
    for key in settings.keys() - {*ours.READ, *ours.FREE}:
        fields, (problem,) = ours.lora_settings(settings | {key: {"new": 1}})
        assert not fields and problem.startswith(f'{key} is {{"new": 1}}, wanted ')


# --- refused -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def adapter(tmp_path, model):
    return write_adapter(tmp_path / "theirs", model)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"init_lora_weights": "loftq", "loftq_config": {}}, 'init_lora_weights is "loftq"'),
        ({"init_lora_weights": "corda"}, 'init_lora_weights is "corda"'),
        ({"init_lora_weights": "eva"}, 'init_lora_weights is "eva"'),
        ({"init_lora_weights": "lora_ga"}, 'init_lora_weights is "lora_ga"'),
        ({"init_lora_weights": "of 2030"}, 'init_lora_weights is "of 2030"'),
        ({"init_lora_weights": None}, "init_lora_weights is null"),
        ({"use_dora": True}, "use_dora is true, wanted false"),
        ({"use_qalora": True}, "use_qalora is true, wanted false"),
        ({"lora_bias": True}, "lora_bias is true"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is true"),
        ({"bias": "all"}, 'bias is "all", wanted "none"'),
        ({"bias": "lora_only"}, 'bias is "lora_only"'),
        ({"modules_to_save": ["lm_head"]}, 'modules_to_save is ["lm_head"], wanted null'),
        ({"rank_pattern": {"q_proj": 3}}, 'rank_pattern is {"q_proj": 3}'),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"layers_to_transform": [0, 1]}, "layers_to_transform is [0, 1]"),
        ({"layers_to_transform": 1}, "layers_to_transform is 1"),
        ({"layers_pattern": "layers"}, "layers_pattern"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication is [[0, 2], [1, 3]]"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is [1, 2]"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices is [5]"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
        ({"exclude_modules": ["q_proj"]}, "exclude_modules"),
        ({"megatron_config": {"tp": 2}}, "megatron_config"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config"),
        ({"eva_config": {"rho": 2.0}}, "eva_config"),
        ({"corda_config": {"corda_method": "ipm"}}, "corda_config"),
        ({"peft_type": "ADALORA"}, 'peft_type is "ADALORA", wanted "LORA"'),
        ({"peft_type": "IA3"}, 'peft_type is "IA3"'),
        ({"use_something_new": True}, "use_something_new is true, wanted false"),
        ({"temperature": 0.5}, "temperature is 0.5, wanted null"),
        ({"threshold": 0}, "threshold is 0, wanted null"),
        ({"r": "2"}, 'r is "2", wanted a whole number'),
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is true"),
        ({"r": [2]}, "r is [2]"),
        ({"r": 4}, "r is 4, but the tensors have rank 2"),
        ({"lora_alpha": "16"}, 'lora_alpha is "16", wanted a number'),
        ({"lora_alpha": math.nan}, "lora_alpha is NaN"),
        ({"lora_alpha": None}, "lora_alpha is null"),
        ({"lora_dropout": 3}, "lora_dropout is 3"),
        ({"use_rslora": "yes"}, 'use_rslora is "yes", wanted true or false'),
        ({"target_modules": {"q_proj": 1}}, "target_modules is {"),
        ({"target_modules": ["q_proj", 3]}, "target_modules is ["),
        ({"target_modules": "(q_proj"}, 'target_modules is "(q_proj", which is not a pattern'),
    ],
    ids=lambda value: None if isinstance(value, str) else json.dumps(value)[:40],
)
def test_a_setting_that_is_not_known_is_refused_by_name(adapter, tmp_path, model, change, said):
    line = refused(adapter(**change), tmp_path / "ours", model)
    assert line.startswith(f"peft: nothing was written, adapter_config.json: {said}")


def test_settings_without_weight_are_read(adapter, tmp_path, model):
    convert("peft", adapter(), tmp_path / "plain", model)
    folder = adapter(
        revision="main",
        auto_mapping={"base_model_class": "LlavaLlamaForCausalLM"},
        runtime_config={"ephemeral_gpu_offload": False},
        of_the_future={},
        also_of_it=False,
        merge_weights=None,
    )
    convert("peft", folder, tmp_path / "ours", model)
    wanted, found = leaves(tmp_path / "plain"), leaves(tmp_path / "ours")
    assert found.keys() == wanted.keys() and found
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, wanted[path], path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("{", "adapter_config.json: not JSON"),
        ("[1]", "adapter_config.json: holds a list, wanted an object"),
        ("[" * 100_000, "adapter_config.json: not JSON"),
        ("{}", "2 problems:"),
        ('{"r": 2}', "adapter_config.json: lora_alpha is missing"),
        (None, "no adapter_config.json beside the weights: it holds r and lora_alpha"),
    ],
    ids=["broken", "list", "deep", "empty", "without alpha", "absent"],
)
def test_settings_that_are_none(adapter, tmp_path, model, settings, said):
    path = adapter() / "adapter_config.json"
    path.unlink() if settings is None else path.write_text(settings)
    with pytest.raises(UserError) as error:
        convert("peft", path.parent, tmp_path / "ours", model)
    assert said in str(error.value)


START = "base_model.model.model.layers"
ODD = {
    "a key on the head": (
        {"base_model.model.lm_head.lora_A.weight": np.ones((2, 32), np.float32)},
        "base_model.model.lm_head.lora_A.weight: no row of the table reads it",
    ),
    "keys of DoRA": (
        {f"{START}.{i}.self_attn.q_proj.lora_magnitude_vector": np.ones(32) for i in range(3)},
        f"{START}.{{0..2}}.self_attn.q_proj.lora_magnitude_vector: no row of the table reads it",
    ),
    "an embedding": (
        {"base_model.model.model.embed_tokens.weight": np.ones((70, 32), np.float32)},
        "base_model.model.model.embed_tokens.weight: no row of the table reads it",
    ),
    "a tower's": (
        {
            "base_model.model.model.vision_tower.layers.0.self_attn.q_proj.lora_A.weight": np.ones(
                (2, 8), np.float32
            )
        },
        "vision_tower.layers.0.self_attn.q_proj.lora_A.weight: no row of the table reads it",
    ),
    "a layer too many": (
        {f"{START}.3.self_attn.q_proj.lora_{side}.weight": np.ones((2, 2)) for side in "AB"},
        "the adapter has a layer 3, the LLaMA layers 0 to 2: put its config.json beside",
    ),
    "two models": (
        {"base_model.model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((2, 32), np.float32)},
        "adapters of several models (base_model.model., base_model.model.model.)",
    ),
    "two adapters": (
        {f"{START}.0.self_attn.q_proj.lora_A.other.weight": np.ones((2, 32), np.float32)},
        "several adapters in one file (one without a name, other): save only one of them",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_a_key_without_a_place_is_named(adapter, tmp_path, model, name):
    more, said = ODD[name]
    rewritten(adapter(), lambda state: state | more)
    assert said in refused(adapter(), tmp_path / "ours", model)


def test_a_missing_half_is_named(adapter, tmp_path, model):
    gone = f"{START}.1.self_attn.v_proj.lora_B.weight"
    rewritten(adapter(), lambda state: {k: v for k, v in state.items() if k != gone})
    assert f"{gone}: missing" in refused(adapter(), tmp_path / "ours", model)
    # A layer that target_modules names and that has neither half is not one left alone.
    layer = f"{START}.1.self_attn.v_proj."
    rewritten(adapter(), lambda state: {k: v for k, v in state.items() if not k.startswith(layer)})
    with pytest.raises(UserError, match=r"1\.self_attn\.v_proj\.lora_A\.weight: missing"):
        convert("peft", adapter(), tmp_path / "ours", model)


def test_keys_decide_over_target_modules(adapter, tmp_path, model):
    convert("peft", adapter(target_modules=["q_proj", "lm_head"]), tmp_path / "ours", model)
    assert imported.read_manifest(tmp_path / "ours").model["lora"]["targets"] == [
        "q_proj",
        "v_proj",
    ]
    said = notes(tmp_path / "ours")
    assert "no tensor for lm_head of target_modules" in said
    assert "target_modules does not name self_attn.v_proj: read anyway" in said


def test_no_adapter_at_all(adapter, tmp_path, model):
    folder = adapter()
    rewritten(folder, lambda state: state_dict("llama", model))
    line = refused(folder, tmp_path / "ours", model)
    assert "none named as in PEFT; these look like the source llama" in line
    rewritten(folder, lambda state: {"base_model.model.score.weight": np.ones(3, np.float32)})
    assert "none named as in PEFT" in refused(folder, tmp_path / "ours", model)
