"""LLaMA-VID as a whole against what the original classes computed, and what must be detected."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import llama_vid_golden as lv
import numpy as np
import pytest
from flax import nnx
from llama_vid_golden import WHOLE, off

from emollama_jax import config
from emollama_jax.errors import UserError
from emollama_jax.models import eva_vit, qformer, visual_tokens
from emollama_jax.models.eva_vit import EvaVit
from emollama_jax.models.llama import KVCache, Llama
from emollama_jax.models.qformer import QFormer
from emollama_jax.models.visual_tokens import VisualTokens, content_tokens, merge

KINDS = {"none": "all", "mean": "mean", "grid2": "grid:2"}


# --- real width, weights made from keys -------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    """The model, what the golden file holds, and the tower's output of the five pictures."""
    model = lv.build(lv.REAL_LLAMA, lv.REAL_VISION, lv.REAL_QFORMER, lv.real_state_dict())
    with np.load(lv.FOLDER / "llama_vid.npz") as file:
        wanted = dict(file)
    rng = np.random.Generator(np.random.PCG64([21, 2]))
    questions = {"a": rng.integers(1000, 30000, 9), "b": rng.integers(1000, 30000, 14)}
    pictures = rng.standard_normal((5, 3, 224, 224), dtype=np.float32)
    meta = lv.real_manifest()["meta"]
    for name, ids in questions.items():
        assert [101, *ids.tolist(), 102] == meta["question_ids"][name]
    visual = lv.jitted(model.vision, lambda vision, x: vision(x))(lv.pixels(pictures))
    return model, wanted, meta, visual


def test_vision_tower(real):
    _, wanted, _, visual = real
    assert off(visual[:, ::16, ::32], wanted["vision_slice"]) < WHOLE


@pytest.mark.parametrize("case", ["image", "image_grid4", "video_mean", "video_grid2"])
def test_from_pictures_to_loss(real, case):
    model, wanted, meta, visual = real
    about = meta[case]
    visual = visual[:1] if about["frames"] == 1 else visual[1:]
    text = jnp.asarray([meta["question_ids"][about["question"]]] * visual.shape[0])
    kind = about["compress_type"] or "all"
    look = lv.jitted(model, functools.partial(lv.LlamaVid.frame_tokens, kind=kind))
    blocks = look(visual, text, jnp.ones_like(text, bool))
    tokens = blocks.reshape(1, -1, blocks.shape[-1])
    assert tokens.shape[1] == about["n_visual_tokens"]
    step = 16 if tokens.shape[1] == 257 else 1
    assert off(tokens[:, ::step], wanted[f"{case}.visual_tokens"]) < WHOLE

    prompt = np.asarray(meta["ids_image" if about["frames"] == 1 else "ids_video"])
    labels = np.where(np.arange(len(prompt)) < about["label_prefix_masked"], -100, prompt)
    ids = lv.expand(prompt, prompt, tokens.shape[1])[None]
    logits = lv.jitted(model, lv.LlamaVid.read)(jnp.asarray(ids), tokens)
    assert off(logits[:, -(len(prompt) - 8) :], wanted[f"{case}.logits"]) < WHOLE
    expanded = lv.expand_labels(prompt, labels, tokens.shape[1])[None]
    assert lv.loss(logits, expanded) == pytest.approx(float(wanted[f"{case}.loss"]), rel=WHOLE)


# --- tiny: a batch of an image with two turns, a text, and a video ------------------------------


@pytest.fixture(scope="module")
def tiny():
    return lv.tiny_model()


def see(model, pictures, ids, mask, kind):
    """Pictures [F, 3, S, S], each under its question [F, L] → [F, 1 + n, H]."""

    def run(model, pixels, text, text_mask):
        return model.frame_tokens(model.vision(pixels), text, text_mask, kind=kind)

    text, text_mask = jnp.asarray(ids, jnp.int32), jnp.asarray(mask, bool)
    return lv.jitted(model, run)(lv.pixels(pictures), text, text_mask)


def image_tokens(model, kind, **changes):
    """The image under its two questions: [2, 1 + n, H]."""
    a = {**lv.tiny_arrays(), **changes}
    image = np.repeat(a["pixel_image"][None], 2, 0)
    return see(model, image, a["bert_ids_turns"], a["bert_mask_turns"], kind)


def video_tokens(model, kind):
    """The video's three frames under their one question: [1, 3 · (1 + n), H]."""
    a = lv.tiny_arrays()
    ids, mask = (np.repeat(a[f"bert_{name}_video"], 3, 0) for name in ("ids", "mask"))
    tokens = see(model, a["pixel_video"], ids, mask, kind)
    return tokens.reshape(1, -1, tokens.shape[-1])


def tiny_batch(kind):
    """Expanded ids, labels and validity of the batch of three, right-padded."""
    a = lv.tiny_arrays()
    n = 1 + content_tokens(kind, 16)
    rows = list(zip(a["input_ids"], a["labels"], a["attention_mask"], (n, n, 3 * n), strict=True))
    columns = (
        ([lv.expand(ids, ids, block) for ids, _, _, block in rows], 0),
        ([lv.expand_labels(ids, labels, block) for ids, labels, _, block in rows], -100),
        ([lv.expand(ids, mask, block) for ids, _, mask, block in rows], False),
    )
    longest = max(len(ids) for ids in columns[0][0])
    return [
        np.stack([np.pad(x, (0, longest - len(x)), constant_values=fill) for x in column])
        for column, fill in columns
    ]


def tiny_visual_rows(turns, video):
    """[3, V, H]: the image's two blocks; none; the video's. V is the longest."""
    image = turns.reshape(-1, turns.shape[-1])
    longest = max(image.shape[0], video.shape[1])
    rows = [image, jnp.zeros((0, image.shape[1])), video[0]]
    return jnp.stack([jnp.pad(row, ((0, longest - row.shape[0]), (0, 0))) for row in rows])


@pytest.mark.parametrize("name", KINDS)
def test_tiny_batch_of_three(tiny, name):
    a, kind = lv.tiny_arrays(), KINDS[name]
    turns, video = image_tokens(tiny, kind), video_tokens(tiny, kind)
    assert off(turns, a[f"{name}/visual_image_2turns"]) < WHOLE
    assert off(video, a[f"{name}/visual_video"]) < WHOLE
    ids, labels, valid = tiny_batch(kind)
    np.testing.assert_array_equal(valid, a[f"{name}/merged_mask"])
    np.testing.assert_array_equal(labels, a[f"{name}/merged_labels"])
    read = lv.jitted(tiny, lv.LlamaVid.read)
    logits = read(jnp.asarray(ids), tiny_visual_rows(turns, video))
    assert off(np.asarray(logits)[valid], a[f"{name}/logits"][valid]) < WHOLE
    assert lv.loss(logits, labels) == pytest.approx(float(a[f"{name}/loss"]), rel=WHOLE)


def test_padding_reaches_nothing(tiny):
    """What fills the padding, ids or visual rows, leaves the valid logits bit for bit."""
    ids, _, valid = tiny_batch("mean")
    a, read = lv.tiny_arrays(), lv.jitted(tiny, lv.LlamaVid.read)
    rows = tiny_visual_rows(a["mean/visual_image_2turns"], a["mean/visual_video"])
    plain = np.asarray(read(jnp.asarray(ids), rows))
    other = np.asarray(read(jnp.asarray(np.where(valid, ids, 77)), rows))
    np.testing.assert_array_equal(plain[valid], other[valid])
    assert (plain[~valid] != other[~valid]).any()


def test_long_video_tokens(tiny):
    """Long videos are the same maths without the class token (the features' loader drops it)."""
    a = lv.tiny_arrays()
    visual = tiny.vision(lv.pixels(a["pixel_video"]))[:, 1:]
    frames = visual.shape[0]
    text = jnp.asarray(np.repeat(a["bert_ids_long"], frames, 0), jnp.int32)
    queries = tiny.qformer(
        tiny.visual_tokens.ln(visual), text=text, text_mask=jnp.ones(text.shape, bool)
    )
    context = tiny.visual_tokens.context(visual, queries)
    content = tiny.visual_tokens.content(visual, kind="mean")
    tokens = jnp.concatenate([context, content], 1).reshape(1, 2 * frames, -1)
    assert off(tokens, a["longvideo_tokens_mean"]) < WHOLE


# --- what a wrong implementation would do must show ---------------------------------------------


SENSITIVE = ("padding mask", "class token", "token order", "another question", "tanh GELU")


@pytest.mark.parametrize("what", SENSITIVE)
def test_a_mistake_is_detected(what, monkeypatch):
    a = lv.tiny_arrays()
    model, changes = lv.tiny_model(), {}
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
    turns = image_tokens(model, "mean", **changes)
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
    "llama": dataclasses.replace(lv.TINY_LLAMA, lora=LORA, max_positions=9),
    "vision": lv.TINY_VISION,
    "qformer": lv.TINY_QFORMER,
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
        "max_positions": 8,
        "dtype": "bfloat16",
        "remat": "full",
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
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
        "dtype": "bfloat16",
        "remat": "dots",
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
    model = lv.fill(nnx.eval_shape(lambda: Llama(cfg, rngs=nnx.Rngs(0))), 3)
    ids = jnp.arange(9)[None]

    def run(model):
        out = model(model.embed(ids), positions=ids, dropout_key=jax.random.key(0))
        return model.logits(out.hidden)

    return model, run


def observe_vision(cfg):
    model = lv.fill(nnx.eval_shape(lambda: EvaVit(cfg, rngs=nnx.Rngs(0))), 3)
    size = cfg.image_size
    frames = (jnp.arange(size * size * 3).reshape(1, size, size, 3) % 251).astype(jnp.uint8)
    # The statistics belong to the tower's weights, but it takes normalised pixels.
    return model, lambda model: model(eva_vit.normalise(frames, cfg.image_mean, cfg.image_std))


def observe_qformer(cfg):
    class Both(nnx.Module):  # `encoder_norm_eps` belongs to the norm before the Q-Former
        def __init__(self, rngs):
            self.qformer = QFormer(cfg, rngs=rngs)
            self.tokens = VisualTokens(
                cfg, visual_width=cfg.encoder_width, llm_width=8, dtype="float32", rngs=rngs
            )

    model = lv.fill(nnx.eval_shape(lambda: Both(nnx.Rngs(0))), 3)
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
    return {path: leaf.shape for path, leaf in lv.parameters(model).items()}


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
    for section, cfg in BASE.items():
        assert {field.name for field in dataclasses.fields(cfg)} == set(CHANGES[section])


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


# --- greedy decoding, with the cache ------------------------------------------------------------


def test_greedy_continuation(tiny):
    """The original's greedy ids of the video under `mean`, by our cache."""
    a = lv.tiny_arrays()
    video = jnp.asarray(a["mean/visual_video"])
    prompt, wanted = np.split(a["greedy_mean"][0], [6])
    cfg = tiny.llama.cfg
    ids = jnp.asarray(lv.expand(prompt, prompt, video.shape[1]))[None]
    slots = ids.shape[1] + len(wanted)
    shape = (cfg.layers, 1, slots, cfg.kv_heads, cfg.head_dim)
    cache = KVCache(k=jnp.zeros(shape), v=jnp.zeros(shape))
    embeds = merge(tiny.llama.embed(ids), ids, video)
    out = tiny.llama(embeds, positions=jnp.arange(ids.shape[1])[None], cache=cache)
    got = []
    for position in range(ids.shape[1], slots):
        got.append(int(tiny.llama.logits(out.hidden[:, -1]).argmax()))
        embeds = tiny.llama.embed(jnp.asarray([got[-1:]]))
        out = tiny.llama(embeds, positions=jnp.asarray([[position]]), cache=out.cache)
    assert got == wanted.tolist()
