"""LLaMA-VID as a whole against what the original classes computed, and what must be detected."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax import config
from emollama_jax.errors import UserError
from emollama_jax.models import eva_vit, qformer, visual_tokens
from emollama_jax.models.eva_vit import EvaVit
from emollama_jax.models.layers import normalise
from emollama_jax.models.llama import Llama
from emollama_jax.models.qformer import QFormer
from emollama_jax.models.rngs import abstract
from emollama_jax.models.visual_tokens import VisualTokens
from tests.helpers import llama_vid_golden
from tests.helpers.llama_vid_golden import WHOLE
from tools.convert_torch import golden
from tools.convert_torch.golden import off

# --- real width, weights made from keys -------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    """What we make of the golden inputs, and what the golden file holds."""
    model = llama_vid_golden.build(
        llama_vid_golden.REAL_LLAMA,
        llama_vid_golden.REAL_VISION,
        llama_vid_golden.REAL_QFORMER,
        llama_vid_golden.real_state_dict(),
    )
    with np.load(llama_vid_golden.FOLDER / "llama_vid.npz") as file:
        wanted = dict(file)
    return golden.llama_vid_arrays(model, llama_vid_golden.real_manifest()["meta"]), wanted


CASES = ("image", "image_grid4", "video_mean", "video_grid2")
PARTS = ("visual_tokens", "logits", "loss")


@pytest.mark.parametrize(
    "name", ["vision_slice", *(f"{case}.{part}" for case in CASES for part in PARTS)]
)
def test_from_pictures_to_loss(real, name):
    said, wanted = real
    assert off(said[name], wanted[name]) < WHOLE


def test_every_golden_array_is_compared(real):
    said, wanted = real
    assert set(said) == set(wanted)


# --- tiny: a batch of an image with two turns, a text, and a video ------------------------------


@pytest.fixture(scope="module")
def tiny():
    return llama_vid_golden.tiny_model()


@pytest.fixture(scope="module")
def said(tiny):
    """What we make of the tiny inputs, under the golden arrays' names."""
    return golden.tiny_arrays(tiny, llama_vid_golden.tiny_arrays())


@pytest.mark.parametrize("group", ["none", "mean", "grid2"])
def test_tiny_batch_of_three(said, group):
    a = llama_vid_golden.tiny_arrays()
    for name in ("merged_mask", "merged_labels"):
        np.testing.assert_array_equal(said[f"{group}/{name}"], a[f"{group}/{name}"])
    for name in ("visual_image_2turns", "visual_video", "logits", "loss"):
        assert off(said[f"{group}/{name}"], a[f"{group}/{name}"]) < WHOLE


@pytest.mark.parametrize("name", ["eva_video", "qformer_video", "longvideo_tokens_mean"])
def test_tiny_video(said, name):
    """Long videos are the same maths without the class token (the features' loader drops it)."""
    assert off(said[name], llama_vid_golden.tiny_arrays()[name]) < WHOLE


def test_greedy_continuation(said):
    """The original's greedy ids of the video under `mean`, by our cache."""
    np.testing.assert_array_equal(
        said["greedy_mean"], llama_vid_golden.tiny_arrays()["greedy_mean"]
    )


def test_padding_is_not_compared_and_nothing_else_is_left_out(said):
    for group in ("none", "mean", "grid2"):
        hidden = np.ma.getmaskarray(said[f"{group}/logits"])
        np.testing.assert_array_equal(
            ~hidden[..., 0], llama_vid_golden.tiny_arrays()[f"{group}/merged_mask"]
        )
    assert set(said) | golden.TINY_INPUTS == {
        name for name in llama_vid_golden.tiny_arrays() if not name.startswith("sd/")
    }


def test_padding_reaches_nothing(tiny):
    """What fills the padding, ids or visual rows, leaves the valid logits bit for bit."""
    a, read = llama_vid_golden.tiny_arrays(), golden.jitted(tiny, golden.LlamaVid.read)
    ids, _, valid = golden.tiny_batch(a, "mean", patches=16)
    rows = golden.visual_rows(a["mean/visual_image_2turns"], a["mean/visual_video"])
    plain = np.asarray(read(jnp.asarray(ids), rows))
    other = np.asarray(read(jnp.asarray(np.where(valid, ids, 77)), rows))
    np.testing.assert_array_equal(plain[valid], other[valid])
    assert (plain[~valid] != other[~valid]).any()


# --- what a wrong implementation would do must show ---------------------------------------------


SENSITIVE = ("padding mask", "class token", "token order", "another question", "tanh GELU")


@pytest.mark.parametrize("what", SENSITIVE)
def test_a_mistake_is_detected(what, monkeypatch):
    a = llama_vid_golden.tiny_arrays()
    model, changes = llama_vid_golden.tiny_model(), {}
    call = QFormer.__call__
    if what == "padding mask":
        changes = {"bert_mask_turns": np.ones_like(a["bert_mask_turns"])}
    elif what == "class token":
        monkeypatch.setattr(
            QFormer, "__call__", lambda self, x, **rest: call(self, x[:, 1:], **rest)
        )
    elif what == "another question":
        changes = {"bert_ids_turns": a["bert_ids_turns"][::-1]}
        changes["bert_mask_turns"] = a["bert_mask_turns"][::-1]
    elif what == "tanh GELU":
        for module in (eva_vit, qformer, visual_tokens):
            monkeypatch.setattr(module, "gelu", jax.nn.gelu)
    turns = golden.image_tokens(model, {**a, **changes}, ["mean"])["mean"]
    if what == "token order":
        turns = turns[:, ::-1]
    assert off(turns, a["mean/visual_image_2turns"]) > 2 * WHOLE


def test_norm_eps_of_the_real_sizes():
    """Too small to show at float32's tolerance (up to 2e-5), so held by name."""
    for name in ("emollama_7b", "emollama_13b"):
        model = config.load(name).model
        assert model.vision.norm_eps == 1e-6
        assert model.qformer.encoder_norm_eps == 1e-5
        assert model.qformer.norm_eps == 1e-12
        assert model.llama.norm_eps == 1e-5


# --- every field of the four configs matters ----------------------------------------------------

LORA = config.LoraConfig(rank=2, alpha=4.0, dropout=0.5, targets=("q_proj", "down_proj"))
BASE = {
    "llama": dataclasses.replace(llama_vid_golden.TINY_LLAMA, lora=LORA, max_positions=9),
    "vision": llama_vid_golden.TINY_VISION,
    "qformer": llama_vid_golden.TINY_QFORMER,
    "lora": LORA,
}
CHANGES = {
    "llama": {
        "vocab_size": 208,
        "vocab_multiple": 64,
        "width": 60,
        "mlp_width": 80,
        "layers": 3,
        "heads": 8,
        "kv_heads": 2,
        "head_dim": 8,
        "norm_eps": 1e-2,
        "rope_theta": 500.0,
        "rope_scaling": 4.0,
        "rope_llama3": config.RopeLlama3Config(
            factor=4.0, low_freq_factor=1.0, high_freq_factor=2.0, original_max_positions=16
        ),
        "max_positions": 8,
        "tied": True,
        "dtype": "bfloat16",
        "remat": "full",
        "frozen": "int8_weights",
        "attention": "cudnn",
        "lora": dataclasses.replace(LORA, rank=0),
    },
    "lora": {"rank": 3, "alpha": 8.0, "dropout": 0.25, "targets": ("q_proj",)},
    "vision": {
        "image_size": 35,
        "patch_size": 4,
        "width": 48,
        "depth": 3,
        "heads": 4,
        "mlp_width": 64,
        "norm_eps": 1e-2,
        "last_norm": True,
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
        "dtype": "bfloat16",
        "remat": "dots",
        "frozen": "int8_weights",
        "attention": "cudnn",
    },
    "qformer": {
        "vocab_size": 70,
        "width": 32,
        "layers": 6,
        "heads": 6,
        "mlp_width": 48,
        "max_positions": 32,
        "encoder_width": 40,
        "encoder_norm_eps": 1e-1,
        "cross_attention_every": 4,
        "queries": 5,
        "norm_eps": 1e-2,
        "dropout": 0.3,
        "dtype": "bfloat16",
        "remat": "full",
    },
}


def observe_llama(cfg):
    model = llama_vid_golden.fill(abstract(lambda rngs: Llama(cfg, rngs=rngs)), 3)
    ids = jnp.arange(9)[None]

    def run(model):
        out = model(model.embed(ids), positions=ids, dropout_key=jax.random.key(0))
        return model.logits(out.hidden)

    return model, run


def observe_vision(cfg):
    model = llama_vid_golden.fill(abstract(lambda rngs: EvaVit(cfg, rngs=rngs)), 3)
    size = cfg.image_size
    frames = (jnp.arange(size * size * 3).reshape(1, size, size, 3) % 251).astype(jnp.uint8)
    # The statistics belong to the tower's weights, but it takes normalised pixels.
    return model, lambda model: model(normalise(frames, cfg.image_mean, cfg.image_std))


def observe_qformer(cfg):
    class Both(nnx.Module):  # `encoder_norm_eps` belongs to the norm before the Q-Former
        def __init__(self, rngs):
            self.qformer = QFormer(cfg, rngs=rngs)
            self.tokens = VisualTokens(
                cfg, visual_width=cfg.encoder_width, llm_width=8, dtype="float32", rngs=rngs
            )

    model = llama_vid_golden.fill(nnx.eval_shape(lambda: Both(nnx.Rngs(0))), 3)
    encoded = jnp.sin(jnp.arange(5.0 * cfg.encoder_width)).reshape(1, 5, -1)
    text = jnp.arange(6)[None]

    def run(model):
        return model.qformer(
            model.tokens.ln(encoded),
            text=text,
            text_mask=text < 5,
            dropout_key=jax.random.key(0),
        )

    return model, run


def build(section, cfg):
    """A model, and a function of it that shows all that it computes."""
    if section == "lora":
        section, cfg = "llama", dataclasses.replace(BASE["llama"], lora=cfg)
    observers = {"llama": observe_llama, "vision": observe_vision, "qformer": observe_qformer}
    return observers[section](cfg)


def parameter_shapes(section, cfg):
    model, _ = build(section, cfg)
    return {path: leaf.shape for path, leaf in llama_vid_golden.parameters(model).items()}


def behaviour(section, cfg):
    """The refusal, or the numbers, their dtype and what is recomputed in the backward pass."""
    model, run = build(section, cfg)
    graphdef, state = nnx.split(model)
    try:
        traced = jax.jit(lambda state: run(nnx.merge(graphdef, state))).trace(state)
    except UserError as error:
        return str(error)
    y = traced.lower().compile()(state)
    return y.dtype, np.asarray(y, np.float32).tobytes(), str(traced.jaxpr).count("remat")


@functools.cache
def base_behaviour(section):
    return behaviour(section, BASE[section])


def test_every_field_is_perturbed():
    elsewhere = {"remat_keep", "remat_offload"}  # in test_remat.py: they need `remat`
    for section, cfg in BASE.items():
        fields = {field.name for field in dataclasses.fields(cfg)}
        assert fields - elsewhere == set(CHANGES[section])


@pytest.mark.parametrize(
    ("section", "field"), [(section, field) for section in CHANGES for field in CHANGES[section]]
)
def test_every_field_matters(section, field):
    base = BASE[section]
    changed = dataclasses.replace(base, **{field: CHANGES[section][field]})
    if parameter_shapes(section, changed) == parameter_shapes(section, base):
        assert behaviour(section, changed) != base_behaviour(section)


def test_the_observation_repeats():
    """Otherwise every change above would show, whether it matters or not."""
    for section, cfg in BASE.items():
        assert parameter_shapes(section, cfg) == parameter_shapes(section, cfg)
        assert behaviour(section, cfg) == base_behaviour(section)
