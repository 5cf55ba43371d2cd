"""What the converter makes of `transformers`' models, against those models run by PyTorch."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from emollama_jax import imported
from emollama_jax.errors import UserError
from tests.helpers.llama_vid_golden import LAYER, NO_LORA
from tests.helpers.torch_models import (
    MODEL,
    Language,
    assert_close,
    assert_same,
    convert,
    filled,
    qformer_settings,
    randomise,
    run_queries,
    run_tower,
    sized,
    text_settings,
    torch,
    transformers,
    vision_settings,
)
from tools.convert_torch import positions
from tools.convert_torch.golden import jitted, off

REACH = 2001  # tokens of the long sequence: positions up to 2,000


def refusal(source, path, out, model=MODEL) -> str:
    """The one error; nothing is left beside what was there."""
    before = set(out.parent.iterdir())
    with pytest.raises(UserError) as error:
        convert(source, path, out, model)
    assert set(out.parent.iterdir()) == before
    return str(error.value)


def notes(folder) -> str:
    return "\n".join(imported.read_manifest(folder).notes)


# --- LLaMA ---------------------------------------------------------------------------------------

# Nothing is as in the config that the converter starts from.
SIZES = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=6,
    rms_norm_eps=1e-3,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
    attn_implementation="eager",
)
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
CASES = {  # name → (what differs, how it is saved)
    "multi-head": ({}, "shards"),
    "grouped-query": (dict(num_key_value_heads=2, head_dim=16), "bin"),
    "linear": (dict(num_key_value_heads=3, rope_parameters=LINEAR), "shards"),
    "linear, transformers 4": (dict(num_key_value_heads=1, rope_parameters=LINEAR), "bin 4"),
}


def save_llama(model, folder, how: str) -> None:
    """In shards as `transformers` 5 writes, or as one `.bin`, also with the settings of 4."""
    if how == "shards":
        model.save_pretrained(folder, max_shard_size="40KB")
        assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
        return
    model.config.save_pretrained(folder)
    state = dict(model.state_dict())
    if how == "bin 4":
        path = folder / "config.json"
        settings = json.loads(path.read_text())
        rope = settings.pop("rope_parameters")
        settings["rope_theta"] = rope["rope_theta"]
        settings["rope_scaling"] = {"type": rope["rope_type"], "factor": rope["factor"]}
        path.write_text(json.dumps(settings))
        for layer in range(model.config.num_hidden_layers):  # of its early versions
            state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(state, folder / "pytorch_model.bin")


@pytest.fixture(scope="module", params=CASES)
def llama(request, tmp_path_factory):
    """`transformers`' model, the folder made from it, and ours as the folder's manifest says."""
    changes, how = CASES[request.param]
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | changes))
    randomise(theirs, 1)
    folder = tmp_path_factory.mktemp("llama")
    save_llama(theirs, folder, how)
    base = sized(llama=dict(vocab_multiple=64))
    convert("llama", folder, folder / "ours", base)
    found = imported.read_manifest(folder / "ours").model["llama"]
    cfg = sized(llama=found | {"lora": NO_LORA}).llama
    return theirs, filled(Language, cfg, folder / "ours"), found


def tokens(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(2).integers(0, SIZES["vocab_size"], (batch, length))


def logits(language, ids, where) -> np.ndarray:
    run = jitted(language, Language.logits)
    got = np.asarray(run(jnp.asarray(ids), jnp.asarray(where)))
    real = SIZES["vocab_size"]
    assert got.shape[-1] == 128 and (got[..., real:] == -np.inf).all()
    return got[..., :real]


def their_logits(theirs, ids, mask) -> np.ndarray:
    """With the positions that their `generate` takes out of a mask."""
    ids, mask = torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))
    where = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    with torch.no_grad():
        return theirs(input_ids=ids, attention_mask=mask, position_ids=where).logits.numpy()


def test_manifest_has_the_sizes_of_config_json(llama):
    theirs, _, found = llama
    cfg = theirs.config
    wanted = {
        "vocab_size": cfg.vocab_size,
        "vocab_multiple": 64,
        "width": cfg.hidden_size,
        "mlp_width": cfg.intermediate_size,
        "layers": cfg.num_hidden_layers,
        "heads": cfg.num_attention_heads,
        "kv_heads": cfg.num_key_value_heads,
        "head_dim": cfg.head_dim,
        "norm_eps": cfg.rms_norm_eps,
        "rope_theta": cfg.rope_parameters["rope_theta"],
        "rope_scaling": cfg.rope_parameters.get("factor", 1.0),
        "rope_llama3": None,
        "max_positions": cfg.max_position_embeddings,
        "tied": False,
    }
    assert found == wanted


def test_long_sequence(llama):
    theirs, ours, _ = llama
    ids = tokens(1, REACH)
    wanted = their_logits(theirs, ids, np.ones_like(ids))
    assert_close(logits(ours, ids, np.arange(REACH)[None]), wanted)


def test_right_padding(llama):
    theirs, ours, _ = llama
    ids = tokens(3, 13)
    mask = np.arange(13) < np.asarray([[13], [7], [1]])
    wanted = their_logits(theirs, ids, mask)
    got = logits(ours, ids, np.broadcast_to(np.arange(13), ids.shape))
    assert_close(got[mask], wanted[mask])


def test_left_padding(llama):
    """A key is seen at its own position and later: padding is put behind all that is real."""
    theirs, ours, _ = llama
    ids = tokens(3, 13)
    mask = np.arange(13) >= 13 - np.asarray([[13], [7], [1]])
    wanted = their_logits(theirs, ids, mask)
    where = np.where(mask, mask.cumsum(-1) - 1, 13 + np.arange(13))
    got = logits(ours, ids, where)
    assert_close(got[mask], wanted[mask])
    step = theirs.generate(
        torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask.astype(np.int64)),
        max_new_tokens=1,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert_close(got[:, -1], step.logits[0].numpy())


# --- EVA-ViT -------------------------------------------------------------------------------------


def pictures(size: int = MODEL.vision.image_size) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((2, 3, size, size), dtype=np.float32)


def their_tower(tower, x, **how):
    """What enters their last norm, and what leaves it."""
    with torch.no_grad():
        out = tower(pixel_values=torch.from_numpy(x), output_hidden_states=True, **how)
    return out.hidden_states[-1].numpy(), out.last_hidden_state


def towers(name: str):
    kinds = {
        "BLIP-2": (transformers.Blip2VisionModel, transformers.Blip2VisionConfig),
        "InstructBLIP": (
            transformers.InstructBlipVisionModel,
            transformers.InstructBlipVisionConfig,
        ),
    }
    model, settings = kinds[name]
    return randomise(model(settings(**vision_settings(MODEL.vision))), 4)


@pytest.mark.parametrize("name", ["BLIP-2", "InstructBLIP"])
def test_tower_alone(tmp_path, name):
    theirs = towers(name)
    theirs.save_pretrained(tmp_path)
    convert("eva-vit", tmp_path, tmp_path / "ours")
    x = pictures()
    got, (wanted, normed) = run_tower(tmp_path / "ours", MODEL.vision, x), their_tower(theirs, x)
    assert_close(got, wanted)
    assert np.abs(got - normed.numpy()).max() > 0.1  # the last norm is not ours
    assert "left out 2 tensors: the source qformer" in notes(tmp_path / "ours")


def test_a_bias_of_k_is_refused(tmp_path):
    theirs = towers("BLIP-2")
    key = "encoder.layers.1.self_attn.qkv.bias"
    with torch.no_grad():
        theirs.get_parameter(key)[MODEL.vision.width + 3] = 1e-3
    theirs.save_pretrained(tmp_path / "theirs")
    said = refusal("eva-vit", tmp_path / "theirs", tmp_path / "ours")
    assert re.search(rf"{re.escape(key)}: qv_bias: the bias of k is not zero", said)


@pytest.mark.parametrize(("old", "new"), [(16, 24), (24, 16), (4, 6)])
def test_positions_are_torchs_bicubic(old, new):
    table = np.random.default_rng(5).standard_normal((1, 1 + old * old, 10), dtype=np.float32)
    got = positions.interpolate(table, new * new)
    grid = torch.from_numpy(table[:, 1:].reshape(1, old, old, 10)).permute(0, 3, 1, 2)
    how = dict(size=(new, new), mode="bicubic", align_corners=False)
    wanted = torch.nn.functional.interpolate(grid, **how).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(got[:, :1], table[:, :1])
    assert got.dtype == np.float32
    assert off(got[:, 1:], wanted.reshape(1, new * new, 10).numpy()) < LAYER


@pytest.mark.parametrize("size", [42, 21])
def test_another_picture_size(tmp_path, size):
    """4 × 4 patches become 6 × 6 or 3 × 3, as their `interpolate_pos_encoding` has it."""
    theirs = towers("InstructBLIP")
    theirs.save_pretrained(tmp_path)
    model = sized(vision=vars(MODEL.vision) | {"image_size": size}, qformer=vars(MODEL.qformer))
    convert("eva-vit", tmp_path, tmp_path / "ours", model)
    x = pictures(size)
    wanted, _ = their_tower(theirs, x, interpolate_pos_encoding=True)
    assert_close(run_tower(tmp_path / "ours", model.vision, x), wanted)
    side = size // 7
    said = f"embeddings.position_embedding: interpolated from 4 × 4 to {side} × {side} patches"
    assert said in notes(tmp_path / "ours")


# --- InstructBLIP as a whole ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def instruct_blip(tmp_path_factory):
    """The model, the folder it is saved in, and in it the two converted ones."""
    settings = transformers.InstructBlipConfig(
        vision_config=transformers.InstructBlipVisionConfig(**vision_settings(MODEL.vision)),
        qformer_config=transformers.InstructBlipQFormerConfig(**qformer_settings(MODEL.qformer)),
        text_config=text_settings(),
        num_query_tokens=MODEL.qformer.queries,
    )
    theirs = randomise(transformers.InstructBlipForConditionalGeneration(settings), 6)
    folder = tmp_path_factory.mktemp("instruct_blip")
    theirs.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    for source in ("eva-vit", "qformer"):
        convert(source, folder, folder / source)
    return theirs, folder


def questions(cfg):
    """Two questions, of 9 and 4 tokens."""
    text = np.random.default_rng(7).integers(0, cfg.vocab_size, (2, 9))
    return text, np.arange(9) < np.asarray([[9], [4]])


def seen(mask, queries: int):
    """Their mask: the queries before the text."""
    whole = np.concatenate([np.ones((len(mask), queries), bool), mask], 1)
    return torch.from_numpy(whole.astype(np.int64))


def test_whole_instruct_blip(instruct_blip):
    """Both sources out of one folder: pixels and questions to queries."""
    theirs, folder = instruct_blip
    cfg = MODEL.qformer
    x, (text, mask) = pictures(), questions(cfg)
    before, normed = their_tower(theirs.vision_model, x)
    visual = run_tower(folder / "eva-vit", MODEL.vision, x)
    assert_close(visual, before)
    with torch.no_grad():
        wanted = theirs.qformer(
            input_ids=torch.from_numpy(text),
            attention_mask=seen(mask, cfg.queries),
            query_embeds=theirs.query_tokens.expand(2, -1, -1),
            encoder_hidden_states=normed,
        ).last_hidden_state[:, : cfg.queries]
    assert_close(run_queries(folder / "qformer", cfg, visual, text, mask), wanted.numpy())
    assert "another LLM" in notes(folder / "eva-vit") and "another LLM" in notes(folder / "qformer")


def test_lavis_names_of_the_qformer(instruct_blip, tmp_path):
    theirs, folder = instruct_blip
    state = {"Qformer.bert.embeddings.position_ids": torch.arange(16)[None]}
    for key, value in theirs.state_dict().items():
        if key.startswith("qformer."):
            key = re.sub(r"attention\.attention\.", "attention.self.", key)
            key = key.replace("embeddings.layernorm", "embeddings.LayerNorm")
            state[key.replace("qformer.", "Qformer.bert.", 1)] = value
        elif "post_layernorm" in key:
            state[key.replace("vision_model.post_layernorm", "ln_vision")] = value
        elif key == "query_tokens":
            state[key] = value
    state |= {"llm_proj.weight": torch.ones(8, 24), "llm_proj.bias": torch.ones(8)}
    torch.save({"model": state}, tmp_path / "instruct_blip_trimmed.pth")
    convert("qformer", tmp_path / "instruct_blip_trimmed.pth", tmp_path / "ours")
    assert_same(tmp_path / "ours", folder / "qformer")
    assert "left out 2 tensors: leads to another LLM" in notes(tmp_path / "ours")
    assert "left out 1 tensor: buffer" in notes(tmp_path / "ours")


LAVIS_TOWER = {  # `transformers`' names → EVA's
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "encoder.layers.": "blocks.",
    "layer_norm": "norm",
    "self_attn.qkv": "attn.qkv",
    "self_attn.projection": "attn.proj",
}


def test_lavis_names_of_the_tower(instruct_blip, tmp_path):
    """`eva_vit_g.pth`: flat, with a block more than is read, and a head."""
    theirs, folder = instruct_blip
    state = {}
    for key, value in theirs.vision_model.state_dict().items():
        for old, new in LAVIS_TOWER.items():
            key = key.replace(old, new)
        if key.endswith("qkv.bias"):
            q, _, v = value.chunk(3)
            state[key.replace("qkv.bias", "q_bias")] = q.clone()
            state[key.replace("qkv.bias", "v_bias")] = v.clone()
        elif not key.startswith("post_layernorm"):
            state[key] = value
    depth, width = MODEL.vision.depth, MODEL.vision.width
    extra = {
        key.replace("blocks.0.", f"blocks.{depth}."): value + 1
        for key, value in state.items()
        if key.startswith("blocks.0.")
    }
    head = {
        "norm.weight": torch.ones(width),
        "norm.bias": torch.ones(width),
        "head.weight": torch.ones(7, width),
        "head.bias": torch.ones(7),
    }
    torch.save(state | extra | head, tmp_path / "eva_vit_g.pth")
    summary = convert("eva-vit", tmp_path / "eva_vit_g.pth", tmp_path / "ours")
    assert summary.tensors == len(state)
    assert_same(tmp_path / "ours", folder / "eva-vit")
    said = notes(tmp_path / "ours")
    assert f"left out {len(extra)} tensors: EVA's block {depth + 1}" in said
    assert "left out 4 tensors: EVA's last norm and head" in said


# --- BLIP-2 --------------------------------------------------------------------------------------

# Groups of three layers, unlike InstructBLIP's above.
BLIP2 = sized(
    vision=vars(MODEL.vision),
    qformer=vars(MODEL.qformer) | {"layers": 3, "cross_attention_every": 3},
)


def blip2(model: str, **qformer):
    settings = transformers.Blip2Config(
        vision_config=transformers.Blip2VisionConfig(**vision_settings(BLIP2.vision)),
        qformer_config=transformers.Blip2QFormerConfig(**qformer_settings(BLIP2.qformer) | qformer),
        text_config=text_settings(),
        num_query_tokens=BLIP2.qformer.queries,
        image_text_hidden_size=20,
    )
    return randomise(getattr(transformers, model)(settings), 8)


def test_blip2_with_text(tmp_path):
    """Its image-text retrieval has all of the Q-Former, its words outside."""
    theirs, cfg = blip2("Blip2ForImageTextRetrieval", use_qformer_text_input=True), BLIP2.qformer
    theirs.save_pretrained(tmp_path)
    for source in ("eva-vit", "qformer"):
        convert(source, tmp_path, tmp_path / source, BLIP2)
    x, (text, mask) = pictures(), questions(cfg)
    before, normed = their_tower(theirs.vision_model, x)
    visual = run_tower(tmp_path / "eva-vit", BLIP2.vision, x)
    assert_close(visual, before)
    query = theirs.query_tokens.expand(2, -1, -1)
    with torch.no_grad():
        wanted = theirs.qformer(
            query_embeds=theirs.embeddings(input_ids=torch.from_numpy(text), query_embeds=query),
            query_length=cfg.queries,
            attention_mask=seen(mask, cfg.queries),
            encoder_hidden_states=normed,
            encoder_attention_mask=torch.ones(normed.shape[:2], dtype=torch.long),
        ).last_hidden_state[:, : cfg.queries]
    assert_close(run_queries(tmp_path / "qformer", cfg, visual, text, mask), wanted.numpy())
    assert "left out 6 tensors: head of a pretraining task" in notes(tmp_path / "qformer")


def test_blip2_without_text_is_refused(tmp_path):
    blip2("Blip2Model").save_pretrained(tmp_path / "theirs")
    said = refusal("qformer", tmp_path / "theirs", tmp_path / "ours", BLIP2)
    for key in (
        "embeddings.word_embeddings.weight",
        "embeddings.position_embeddings.weight",
        "qformer.encoder.layer.0.intermediate.dense.weight",
        "qformer.encoder.layer.1.output.dense.bias",
    ):
        assert f"{key}: missing" in said
    missing = 2 + 6 * BLIP2.qformer.layers
    assert said.count(": missing (for ") == 12
    assert f"… and {missing - 12} more: inspect shows them" in said
    assert f"nothing was written, {missing} problems" in said
