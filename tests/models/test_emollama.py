"""The assembled model: LLaMA-VID before training, token order, real sizes, every config field."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

from emollama_jax import config
from emollama_jax.batch import IGNORE, IMAGE_TOKEN, one_a_row
from emollama_jax.data.prompts import agr_sentence
from emollama_jax.errors import UserError
from emollama_jax.models.emollama import EmoLlama, Mined
from emollama_jax.models.face_info_mining import FaceInfoMining
from emollama_jax.models.facexformer import FaceXFormer
from emollama_jax.models.layers import normalise
from emollama_jax.models.parameters import named_parameters
from emollama_jax.models.rngs import abstract

SMALL = (  # of the tiny model: 4 × 4 patches, a face map of 8 × 8
    "model.llama.layers=2",
    "model.llama.width=32",
    "model.llama.head_dim=8",
    "model.llama.mlp_width=48",
    "model.llama.vocab_size=64",
    "model.llama.lora.rank=2",
    "model.vision.image_size=32",
    "model.vision.patch_size=8",
    "model.vision.width=32",
    "model.vision.mlp_width=48",
    "model.vision.depth=2",
    "model.vision.heads=4",
    "model.qformer.width=16",
    "model.qformer.mlp_width=32",
    "model.qformer.encoder_width=32",
    "model.qformer.queries=4",
    "model.qformer.vocab_size=64",
    "model.face.swin.image_size=32",
    "model.face.swin.patch_size=4",
    "model.face.swin.window=4",
    "model.face.swin.width=16",
    "model.face.swin.depths=[2, 2]",
    "model.face.swin.heads=[1, 2]",
    "model.face.width=16",
    "model.face.decoder_heads=2",
    "model.face.decoder_mlp_width=32",
    "model.fim.head_dim=8",
    "model.fim.heads=2",
)
EXAMPLES, FRAMES, ROUNDS, TEXT = 2, 3, 2, 5
QUICK = {"xla_backend_optimization_level": 0}  # compiles sooner; numbers stay IEEE


def small(*overrides):
    return config.load("tiny", [*SMALL, *overrides]).model


@functools.cache
def shapes(cfg):
    return abstract(lambda rngs: EmoLlama(cfg, rngs=rngs))


def build(cfg, *, gates=0.0):
    return filled(shapes(cfg), gates=gates)


def filled(module, *, gates):
    """The module with weights that depend on a parameter's name and shape alone."""
    graphdef, state = nnx.split(module)

    def fill(path, leaf):
        name = "/".join(str(getattr(key, "key", key)) for key in path)
        rng = np.random.Generator(np.random.PCG64(list(name.encode())))
        value = rng.standard_normal(leaf.shape).astype(np.float32)
        if "gate/" in name:
            return jnp.full(leaf.shape, gates, jnp.float32)
        return jnp.asarray(1 + 0.1 * value if "scale" in name else 0.2 * value)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(fill, state))


def make_batch(cfg, *, found=True):
    rng = np.random.Generator(np.random.PCG64(1))
    size, face = cfg.vision.image_size, cfg.face.swin.image_size
    visual = ROUNDS * FRAMES * cfg.tokens_per_frame
    ids = np.concatenate(
        [
            rng.integers(3, cfg.llama.vocab_size, (EXAMPLES, 2)),
            np.full((EXAMPLES, visual), IMAGE_TOKEN),
            rng.integers(3, cfg.llama.vocab_size, (EXAMPLES, TEXT)),
        ],
        axis=1,
    ).astype(np.int32)
    landmarks = rng.uniform(-0.8, 0.8, (EXAMPLES, FRAMES, 68, 2))
    return one_a_row(
        frames=rng.integers(0, 256, (EXAMPLES, FRAMES, size, size, 3), np.uint8),
        faces=rng.integers(0, 256, (EXAMPLES, FRAMES, face, face, 3), np.uint8),
        face_found=np.full((EXAMPLES, FRAMES), found),
        landmarks=landmarks.astype(np.float32),
        ids=ids,
        labels=np.where(ids == IMAGE_TOKEN, IGNORE, ids),
        length=np.full(EXAMPLES, ids.shape[1], np.int32),
        questions=rng.integers(3, cfg.qformer.vocab_size, (EXAMPLES, ROUNDS, 6), np.int32),
        question_mask=np.arange(6) < np.array([[[6]], [[4]]]) + np.zeros((1, ROUNDS, 1)),
        weight=np.ones(EXAMPLES, np.float32),
        index=np.arange(EXAMPLES, dtype=np.int32),
    )


COMPILED = {}


def run(model, function, *args):
    """`function(model, *args)`, compiled once for each config."""
    graphdef, state = nnx.split(model)
    key = model.cfg, function
    if key not in COMPILED:
        jitted = jax.jit(lambda s, args: function(nnx.merge(graphdef, s), *args))
        COMPILED[key] = jitted.lower(state, args).compile()
    return COMPILED[key](state, args)


def visual(model, batch):
    """Visual tokens [B, R, M, tokens of a frame, D]."""
    tokens = run(model, EmoLlama.visual, batch)
    return rearrange(np.asarray(tokens), "b (r m n) d -> b r m n d", r=ROUNDS, m=FRAMES)


# ------------------------------------------------------------------ LLaMA-VID before training


def llama_vid(model, batch):
    """What LLaMA-VID computes for context and content, written out example by example."""
    cfg = model.cfg
    rows = []
    for b, r, m in itertools.product(range(EXAMPLES), range(ROUNDS), range(FRAMES)):
        pixels = normalise(batch.frames[b, m][None], cfg.vision.image_mean, cfg.vision.image_std)
        x = model.vision(pixels)
        queries = model.qformer(
            model.visual_tokens.ln(x),
            text=batch.questions[b, r][None],
            text_mask=batch.question_mask[b, r][None],
        )
        context = model.visual_tokens.context(x[:, 1:], queries)
        content = model.visual_tokens.content(x[:, 1:], kind=cfg.content)
        rows.append(jnp.concatenate([context, content], axis=1))
    return rearrange(
        jnp.concatenate(rows), "(b r m) n d -> b r m n d", b=EXAMPLES, r=ROUNDS, m=FRAMES
    )


@pytest.mark.parametrize("content", ["mean", "grid:2", "all"])
def test_untrained_is_llama_vid_bit_for_bit(content):
    cfg = small(f"model.content={content}")
    batch = make_batch(cfg)
    emo = build(cfg)
    without = build(dataclasses.replace(cfg, fim=dataclasses.replace(cfg.fim, branches="none")))
    mined, plain = run(emo, mine, batch), run(without, mine, batch)
    np.testing.assert_array_equal(mined.visual, plain.visual)
    np.testing.assert_array_equal(mined.tokens[:, :-2], plain.tokens)
    got, want = (run(without, context, batch, x.visual) for x in (mined, plain))
    np.testing.assert_array_equal(got, want)
    assert np.abs(mined.tokens[:, -2:]).max() > 0.01
    # In one program the compiler fuses the sums of a norm with what comes before them.
    got, want = visual(emo, batch), visual(without, batch)
    assert got.shape[3] == want.shape[3] + 2
    np.testing.assert_array_equal(got[..., 1:-2, :], want[..., 1:, :])
    np.testing.assert_allclose(got[..., 0, :], want[..., 0, :], atol=1e-6 * np.abs(want).max())


def mine(model, batch):
    """What of the frames' features does not depend on the question."""
    frames, faces = (rearrange(x, "b f ... -> (b f) ...") for x in (batch.frames, batch.faces))
    landmarks, found = (jnp.concatenate([*x]) for x in (batch.landmarks, batch.face_found))
    return model.mine(model.see(frames, faces), landmarks=landmarks, found=found)


def context(model, batch, visual):
    """The context tokens of frames' features."""
    return model.asked(
        Mined(visual, jnp.zeros((len(visual), 1, model.cfg.llama.width))),
        questions=batch.questions,
        question_mask=batch.question_mask,
        question=batch.question,
        again=batch.again,
    )


def test_order_of_tokens_and_rounds():
    cfg = small("model.content=grid:2")
    batch = make_batch(cfg)
    model = build(cfg)
    got = visual(model, batch)
    want = np.asarray(run(model, llama_vid, batch))
    np.testing.assert_allclose(got[..., :-2, :], want, atol=2e-5 * np.abs(want).max())
    assert np.abs(got[:, 0, :, 0] - got[:, 1, :, 0]).max() > 1e-3  # each round asks its own


def test_face_tokens_stand_last_global_first():
    cfg = small()
    batch = make_batch(cfg)
    model = build(cfg, gates=0.5)
    before = visual(model, batch)
    after = visual(model, batch.replace(landmarks=batch.landmarks * 0.5))
    np.testing.assert_array_equal(before[..., -2, :], after[..., -2, :])
    assert np.abs(before[..., -1, :] - after[..., -1, :]).max() > 1e-3


def test_a_frame_changes_its_own_tokens_only():
    cfg = small("model.content=grid:2")
    batch = make_batch(cfg)
    model = build(cfg, gates=0.5)
    frames, faces = batch.frames.copy(), batch.faces.copy()
    frames[1, 2] = 255 - frames[1, 2]
    faces[1, 2] = 255 - faces[1, 2]
    difference = np.abs(
        visual(model, batch) - visual(model, batch.replace(frames=frames, faces=faces))
    ).max(-1)
    own = np.zeros(difference.shape, bool)
    own[1, :, 2] = True
    assert (difference[own] > 1e-3).all()
    assert (difference[~own] < 1e-5).all()


def test_no_face_is_llama_vid_after_training_too():
    cfg = small()
    batch = make_batch(cfg, found=False)
    model = build(cfg, gates=0.5)
    without = build(dataclasses.replace(cfg, fim=dataclasses.replace(cfg.fim, branches="none")))
    got = visual(model, batch)
    np.testing.assert_array_equal(got[..., :-2, :], visual(without, batch))
    no_face = np.asarray(model.fim.no_face[...])
    np.testing.assert_array_equal(
        got[..., -2:, :], np.broadcast_to(no_face, got[..., -2:, :].shape)
    )


def test_frames_in_chunks_equal_frames_at_once():
    cfg, size = small(), 4  # the last chunk is not full
    batch = make_batch(cfg)
    assert cfg.frames_at_once >= EXAMPLES * FRAMES
    whole = visual(build(cfg, gates=0.5), batch)
    cut = visual(build(dataclasses.replace(cfg, frames_at_once=size), gates=0.5), batch)
    np.testing.assert_allclose(cut, whole, atol=1e-5 * np.abs(whole).max())


def test_embeds_put_visual_tokens_into_their_places():
    cfg = small()
    batch = make_batch(cfg)
    model = build(cfg)
    embeds, tokens = run(model, EmoLlama.embeds, batch), visual(model, batch)
    places = batch.ids == IMAGE_TOKEN
    np.testing.assert_array_equal(np.asarray(embeds)[places], tokens.reshape(-1, cfg.llama.width))
    words = np.asarray(model.llama.embed_tokens[...])[batch.ids[~places]]
    np.testing.assert_array_equal(np.asarray(embeds)[~places], words)


# ------------------------------------------------------------------ shapes and sizes


@pytest.mark.parametrize(
    ("content", "branches"),
    [
        ("all", "both"),
        ("mean", "global"),
        ("grid:2", "local"),
        ("grid:3", "none"),  # windows of 4 // 3 = 1: all 16 patches
        ("grid:4", "both"),
    ],
)
def test_tokens_per_frame(content, branches):
    cfg = small(f"model.content={content}", f"model.fim.branches={branches}")
    batch = make_batch(cfg)
    graphdef, state = nnx.split(shapes(cfg))
    shape = jax.eval_shape(lambda s, b: nnx.merge(graphdef, s).visual(b), state, batch).shape
    assert shape == (EXAMPLES, ROUNDS * FRAMES * cfg.tokens_per_frame, cfg.llama.width)


def test_a_grid_finer_than_the_patches_is_refused():
    cfg = small("model.content=grid:5")
    with pytest.raises(UserError, match=r"model\.content: grid:5.*4 × 4"):
        _ = cfg.content_tokens


def count(module, *, lora=False):
    return sum(
        leaf.size
        for name, leaf in named_parameters(module).items()
        if name.endswith(("lora_A", "lora_B")) == lora
    )


@pytest.mark.parametrize(
    ("name", "llama", "adapters"),
    [("emollama_7b", 6_738_415_616, 159_907_840), ("emollama_13b", 13_015_864_320, 250_347_520)],
)
def test_real_sizes(name, llama, adapters, abstract_model):
    model = abstract_model(name)
    assert count(model.llama) == llama  # LLaMA 2's published 6.74 and 13.02 billion
    assert count(model.llama, lora=True) == adapters
    # 39 of EVA-CLIP's 40 blocks, and no final norm.
    width, mlp = 1408, 6144
    block = 4 * width**2 + 3 * width + 2 * width * mlp + mlp + width + 4 * width
    assert count(model.vision) == 39 * block + 258 * width + (3 * 14**2 + 1) * width
    # FaceXFormer's 91,985,943 count the final norm of its Swin, which nothing reads, and leave out
    # the Fourier frequencies, a buffer.
    assert count(model.face) - model.face.pe.size + 2048 == 91_985_943
    # BERT-base with a cross-attention in every second layer, and 32 queries.
    bert = 12 * (4 * (768**2 + 768) + 2 * 768)
    cross = 6 * (2 * (768**2 + 768) + 2 * (1408 * 768 + 768) + 2 * 768)
    feed = 2 * 12 * (2 * 768 * 3072 + 3072 + 768 + 2 * 768)
    words = (30523 + 512 + 32 + 2) * 768
    assert count(model.qformer) == bert + cross + feed + words


def test_free_parts_have_their_sizes(abstract_model):
    model = abstract_model("emollama_135m")
    assert count(model.llama) == 134_515_008  # SmolLM2-135M's published 134.5 million, tied
    # ViT-S/14 at 224 pixels: 12 blocks with LayerScale folded and no bias for k, and the last norm.
    block = 12 * 384**2 + 3 * 384 + 1536 + 384 + 4 * 384
    assert count(model.vision) == 12 * block + (258 + 3 * 14**2 + 1 + 2) * 384


@pytest.mark.parametrize("name", ["emollama_135m", "emollama_7b", "emollama_13b"])
def test_real_sizes_run(name, abstract_model):
    cfg = config.load(name).model
    batch = jax.eval_shape(lambda: make_batch(cfg))
    graphdef, state = nnx.split(abstract_model(name))
    hidden = jax.eval_shape(lambda s, b: nnx.merge(graphdef, s).hidden(b), state, batch)
    assert hidden.shape == (*batch.ids.shape, cfg.llama.width)
    assert hidden.dtype == cfg.llama.dtype


# ------------------------------------------------------------------ every field matters

# Fields of `llama`, `vision` and `qformer` are changed one by one in test_llama_vid_parity.py; here
# are the rest. Values of fields that cannot just be doubled:
CHANGED = {
    "face.swin.image_size": 64,
    "face.swin.patch_size": 8,
    "face.swin.depths": (2, 4),
    "face.swin.heads": (2, 2),
    "face.swin.window": 2,
    "face.swin.norm_eps": 1e-2,
    "face.decoder_heads": 4,
    "face.upscale_widths": (8, 8),
    "face.norm_eps": 1e-2,
    "face.parsing_norm_eps": 1e-2,
    "face.race_labels": "as_published",
    "face.image_mean": (0.4, 0.456, 0.406),
    "face.image_std": (0.3, 0.224, 0.225),
    "face.dtype": "bfloat16",
    "face.remat": "full",
    "face.frozen": "int8",
    "fim.branches": "local",
    "fim.pool": 4,
    "fim.norm_eps": 1e-2,
}


def fields(cls, prefix=""):
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from fields(field.type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def put(cfg, path, change):
    first, _, rest = path.partition(".")
    old = getattr(cfg, first)
    return dataclasses.replace(cfg, **{first: put(old, rest, change) if rest else change(old)})


def observe_face(cfg):
    """The words for race, then FaceXFormer: parameters, program, all that it says."""
    yield prompt_words(cfg)
    size = cfg.face.swin.image_size
    faces = np.random.Generator(np.random.PCG64(2)).integers(0, 256, (1, size, size, 3), np.uint8)

    def call(model):
        seen = model(normalise(faces, cfg.face.image_mean, cfg.face.image_std))
        return seen.stages, seen.landmarks, model.parsing(seen)

    yield from observe(lambda rngs: FaceXFormer(cfg.face, rngs=rngs), call)


def prompt_words(cfg):
    return agr_sentence(
        kind="image",
        age=2,
        gender=1,
        race=2,
        probability=(1.0, 1.0, 1.0),
        threshold=0.5,
        race_labels=cfg.face.race_labels,
    )


def observe_fim(cfg):
    """Face Info Mining: parameters, program, all that it says."""
    rng = np.random.Generator(np.random.PCG64(3))
    visual, face_map, task_tokens = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((1, 4, 32), (1, 8, 8, 16), (1, 18, 16))
    )
    landmarks = jnp.asarray(rng.uniform(-1, 1, (1, 68, 2)), jnp.float32)

    def call(model):
        mined = model(
            visual,
            face_map=face_map,
            task_tokens=task_tokens,
            landmarks=landmarks,
            found=jnp.array([True]),
        )
        return mined.visual, mined.tokens

    def make(rngs):
        widths = {"visual_width": 32, "face_width": 16, "llm_width": 32}
        return FaceInfoMining(cfg.fim, **widths, dtype="float32", rngs=rngs)

    yield from observe(make, call)


def observe(make, call):
    """What a field can change, the cheapest first."""
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    yield [(path, leaf.shape) for path, leaf in named_parameters(model).items()]
    graphdef, state = nnx.split(filled(model, gates=0.5))
    traced = jax.jit(lambda s: call(nnx.merge(graphdef, s))).trace(state)
    yield [leaf.shape for leaf in jax.tree.leaves(traced.out_info)]
    yield str(traced.jaxpr).count("remat")
    outputs = traced.lower().compile(compiler_options=QUICK)(state)
    yield [np.asarray(leaf, np.float32).tobytes() for leaf in jax.tree.leaves(outputs)]


OBSERVERS = {"face": observe_face, "fim": observe_fim}
SECTIONS = {"face": config.FaceXFormerConfig, "fim": config.FaceInfoMiningConfig}
FACE_FIELDS = [path for name, cls in SECTIONS.items() for path in fields(cls, f"{name}.")]


@functools.cache
def before(section):
    return list(OBSERVERS[section](small("model.fim.pool=2")))


@pytest.mark.parametrize("path", FACE_FIELDS)
def test_every_field_matters(path):
    cfg = small("model.fim.pool=2")
    changed = put(cfg, path, lambda old: CHANGED[path] if path in CHANGED else 2 * old)
    assert changed != cfg
    section = path.partition(".")[0]
    after = OBSERVERS[section](changed)
    assert any(a != b for a, b in zip(after, before(section), strict=True))


def test_observations_repeat():
    for section, observer in OBSERVERS.items():
        assert list(observer(small("model.fim.pool=2"))) == before(section)


def test_sections_reach_their_networks():
    cfg = small()
    model = shapes(cfg)
    for section in ("llama", "vision", "qformer", "face", "fim"):
        assert getattr(model, section).cfg == getattr(cfg, section)
    others = {field.name for field in dataclasses.fields(config.EmoLlamaConfig)} - {
        "llama",
        "vision",
        "qformer",
        "face",
        "fim",
    }
    # test_tokens_per_frame, test_frames_in_chunks_equal_frames_at_once and
    # test_presets.test_frames_of_the_towers_lie_as_asked change these.
    assert others == {"content", "frames_at_once", "frames_over"}


@pytest.mark.parametrize("field", ["image_mean", "image_std"])
def test_pictures_are_normalised_as_the_config_says(field):
    cfg = small()
    batch = make_batch(cfg)

    def see(cfg):
        seen = run(build(cfg), EmoLlama.see, batch.frames[:, 0], batch.faces[:, 0])
        return np.asarray(seen.visual), np.asarray(seen.face_map)

    changed = cfg
    for section in ("vision", "face"):
        changed = put(changed, f"{section}.{field}", lambda old: (2 * old[0], *old[1:]))
    for a, b in zip(see(cfg), see(changed), strict=True):
        assert np.abs(a - b).max() > 1e-3
