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
from emollama_jax.batch import IGNORE, IMAGE_TOKEN, Batch
from emollama_jax.errors import UserError
from emollama_jax.models.emollama import EmoLlama
from emollama_jax.models.eva_vit import normalise
from emollama_jax.models.pretrained import named_parameters
from emollama_jax.models.visual_tokens import content_tokens

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


def abstract(cfg):
    return nnx.eval_shape(lambda: EmoLlama(cfg, rngs=nnx.Rngs(0)))


def build(cfg, *, gates=0.0):
    """The model with weights that depend on a parameter's name and shape alone."""
    model = abstract(cfg)
    graphdef, state = nnx.split(model)

    def fill(path, leaf):
        name = "/".join(str(getattr(key, "key", key)) for key in path)
        rng = np.random.Generator(np.random.PCG64(list(name.encode())))
        value = rng.standard_normal(leaf.shape).astype(np.float32)
        if "gate/" in name:
            return jnp.full(leaf.shape, gates, jnp.float32)
        return jnp.asarray(1 + 0.1 * value if "scale" in name else 0.2 * value)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(fill, state))


def make_batch(cfg, *, rounds=ROUNDS, found=True, seed=1):
    rng = np.random.Generator(np.random.PCG64(seed))
    size, face = cfg.vision.image_size, cfg.face.swin.image_size
    visual = rounds * FRAMES * cfg.tokens_per_frame
    ids = np.concatenate(
        [
            rng.integers(3, cfg.llama.vocab_size, (EXAMPLES, 2)),
            np.full((EXAMPLES, visual), IMAGE_TOKEN),
            rng.integers(3, cfg.llama.vocab_size, (EXAMPLES, TEXT)),
        ],
        axis=1,
    ).astype(np.int32)
    landmarks = rng.uniform(-0.8, 0.8, (EXAMPLES, FRAMES, 68, 2))
    return Batch(
        frames=rng.integers(0, 256, (EXAMPLES, FRAMES, size, size, 3), np.uint8),
        faces=rng.integers(0, 256, (EXAMPLES, FRAMES, face, face, 3), np.uint8),
        face_found=np.full((EXAMPLES, FRAMES), found),
        landmarks=landmarks.astype(np.float32),
        ids=ids,
        labels=np.where(ids == IMAGE_TOKEN, IGNORE, ids),
        length=np.full(EXAMPLES, ids.shape[1], np.int32),
        questions=rng.integers(3, cfg.qformer.vocab_size, (EXAMPLES, rounds, 6), np.int32),
        question_mask=np.arange(6) < np.array([[[6]], [[4]]]) + np.zeros((1, rounds, 1)),
        weight=np.ones(EXAMPLES, np.float32),
        index=np.arange(EXAMPLES, dtype=np.int32),
    )


def run(model, function, *args):
    """`function(model, *args)` compiled."""
    graphdef, state = nnx.split(model)
    jitted = jax.jit(lambda s, args: function(nnx.merge(graphdef, s), *args))
    return jitted.lower(state, args).compile(compiler_options=QUICK)(state, args)


def visual(model, batch, rounds=ROUNDS):
    """Visual tokens [B, R, M, tokens of a frame, D]."""
    tokens = run(model, lambda m, b: m.visual(b), batch)
    return rearrange(np.asarray(tokens), "b (r m n) d -> b r m n d", r=rounds, m=FRAMES)


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
    got, want = visual(emo, batch), visual(without, batch)
    assert got.shape[3] == want.shape[3] + 2
    np.testing.assert_array_equal(got[..., :-2, :], want)
    assert np.abs(got[..., -2:, :]).max() > 0.01


@pytest.mark.parametrize("content", ["mean", "grid:2", "all"])
def test_order_of_tokens_and_rounds(content):
    cfg = small(f"model.content={content}")
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


@pytest.mark.parametrize("size", [1, 4])
def test_frames_in_chunks_equal_frames_at_once(size):
    cfg = small()
    batch = make_batch(cfg)
    assert cfg.frames_at_once >= EXAMPLES * FRAMES
    whole = visual(build(cfg, gates=0.5), batch)
    cut = visual(build(dataclasses.replace(cfg, frames_at_once=size), gates=0.5), batch)
    np.testing.assert_allclose(cut, whole, atol=1e-5 * np.abs(whole).max())


def test_embeds_put_visual_tokens_into_their_places():
    cfg = small()
    batch = make_batch(cfg)
    model = build(cfg)
    embeds, tokens = run(model, lambda m, b: (m.embeds(b), m.visual(b)), batch)
    places = batch.ids == IMAGE_TOKEN
    np.testing.assert_array_equal(
        np.asarray(embeds)[places], np.asarray(tokens).reshape(-1, cfg.llama.width)
    )
    words = np.asarray(model.llama.embed_tokens[...])[batch.ids[~places]]
    np.testing.assert_array_equal(np.asarray(embeds)[~places], words)


# ------------------------------------------------------------------ shapes and sizes


@pytest.mark.parametrize("content", ["all", "mean", "grid:2", "grid:3", "grid:4"])
@pytest.mark.parametrize("branches", ["both", "global", "local", "none"])
def test_tokens_per_frame(content, branches):
    cfg = small(f"model.content={content}", f"model.fim.branches={branches}")
    batch = make_batch(cfg)
    graphdef, state = nnx.split(abstract(cfg))
    shape = jax.eval_shape(lambda s, b: nnx.merge(graphdef, s).visual(b), state, batch).shape
    assert shape == (EXAMPLES, ROUNDS * FRAMES * cfg.tokens_per_frame, cfg.llama.width)
    assert cfg.content_tokens == content_tokens(content, cfg.vision.patches)


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


@functools.cache
def real(name):
    return abstract(config.load(name).model)


@pytest.mark.parametrize(
    ("name", "llama", "adapters"),
    [("emollama_7b", 6_738_415_616, 159_907_840), ("emollama_13b", 13_015_864_320, 250_347_520)],
)
def test_real_sizes(name, llama, adapters):
    model = real(name)
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


@pytest.mark.parametrize("name", ["emollama_7b", "emollama_13b"])
def test_real_sizes_run(name):
    cfg = config.load(name).model
    batch = jax.eval_shape(lambda: make_batch(cfg))
    graphdef, state = nnx.split(real(name))
    hidden = jax.eval_shape(lambda s, b: nnx.merge(graphdef, s).hidden(b), state, batch)
    assert hidden.shape == (*batch.ids.shape, cfg.llama.width)
    assert hidden.dtype == cfg.llama.dtype


# ------------------------------------------------------------------ every field matters

# What does not change a number of the model in evaluation, and where it matters instead.
ELSEWHERE = {
    "llama.remat": "the backward pass",
    "vision.remat": "the backward pass",
    "qformer.remat": "the backward pass",
    "face.remat": "the backward pass",
    "frames_at_once": "the program, see test_frames_in_chunks_equal_frames_at_once",
    "llama.max_positions": "the longest text that is taken, see below",
    "face.race_labels": "words of the prompt: faces/labels.py, data/prompts.py",
}

# A changed value for each field that is not just a number to be increased.
CHANGED = {
    "llama.heads": 8,
    "llama.kv_heads": 4,
    "llama.head_dim": 16,
    "llama.max_positions": 8,
    "llama.lora.rank": 4,
    "llama.lora.dropout": 0.5,
    "llama.lora.targets": ("q_proj",),
    "vision.image_size": 40,
    "vision.patch_size": 16,
    "vision.heads": 2,
    "vision.image_mean": (0.4, 0.4578275, 0.40821073),
    "vision.image_std": (0.3, 0.26130258, 0.27577711),
    "vision.width": 64,
    "qformer.width": 32,
    "qformer.heads": 2,
    "qformer.cross_attention_every": 1,
    "qformer.layers": 4,
    "qformer.dropout": 0.5,
    "qformer.encoder_width": 64,
    "face.swin.image_size": 64,
    "face.swin.patch_size": 8,
    "face.swin.depths": (2, 4),
    "face.swin.heads": (2, 2),
    "face.swin.width": 32,
    "face.swin.window": 2,
    "face.width": 32,
    "face.decoder_heads": 4,
    "face.upscale_widths": (8, 8),
    "face.race_labels": "as_published",
    "face.image_mean": (0.4, 0.456, 0.406),
    "face.image_std": (0.3, 0.224, 0.225),
    "fim.branches": "local",
    "fim.pool": 2,
    "fim.heads": 4,
    "content": "grid:2",
    "frames_at_once": 4,
}
TOGETHER = {  # what has to move with a field
    "vision.width": {"qformer.encoder_width": 64},
    "qformer.encoder_width": {"vision.width": 64},
    "vision.patch_size": {"vision.image_size": 32},
}


def fields(cls, prefix=""):
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from fields(field.type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def get(cfg, path):
    return functools.reduce(getattr, path.split("."), cfg)


def put(cfg, path, value):
    first, _, rest = path.partition(".")
    if rest:
        value = put(getattr(cfg, first), rest, value)
    return dataclasses.replace(cfg, **{first: value})


def perturbed(cfg, path):
    old = get(cfg, path)
    if path in CHANGED:
        new = CHANGED[path]
    elif path.endswith(".dtype"):
        new = "bfloat16"
    elif path.endswith(".remat"):
        new = "full"
    elif path.endswith("eps"):
        new = 1e-2
    else:
        new = 2 * old
    assert new != old
    for other, value in {path: new, **TOGETHER.get(path, {})}.items():
        cfg = put(cfg, other, value)
    return cfg


def tree(cfg):
    return {name: leaf.shape for name, leaf in named_parameters(abstract(cfg)).items()}


def everything(model, batch):
    """All that the model says, with dropout."""
    cfg = model.cfg.face
    faces = rearrange(batch.faces, "b m ... -> (b m) ...")
    face = model.face(normalise(faces, cfg.image_mean, cfg.image_std))
    hidden = model.hidden(batch, dropout_key=jax.random.key(3))
    return model.llama.logits(hidden), model.face.parsing(face)


def program(cfg, batch):
    """The forward and backward program as text."""
    graphdef, state = nnx.split(abstract(cfg))
    loss = jax.grad(lambda s: jnp.sum(nnx.merge(graphdef, s).hidden(batch)))
    return str(jax.make_jaxpr(loss)(state))


@functools.cache
def base():
    cfg = small("model.qformer.dropout=0.1", "model.llama.lora.dropout=0.1")
    batch = make_batch(cfg)
    out = run(build(cfg, gates=0.5), everything, batch)
    return cfg, batch, tree(cfg), [np.asarray(x) for x in out]


MODEL_FIELDS = tuple(fields(config.EmoLlamaConfig))


def test_exceptions_name_fields_that_exist():
    for name in (*ELSEWHERE, *CHANGED, *TOGETHER):
        assert name in MODEL_FIELDS


@pytest.mark.parametrize("path", MODEL_FIELDS)
def test_every_field_matters(path):
    cfg, batch, shapes, before = base()
    changed = perturbed(cfg, path)
    if path == "llama.max_positions":
        with pytest.raises(UserError, match="max_positions"):
            run(build(changed), everything, batch)
    elif path == "face.race_labels":
        assert ELSEWHERE[path]
    elif path in ELSEWHERE:
        assert program(changed, batch) != program(cfg, batch)
    elif tree(changed) == shapes and changed.tokens_per_frame == cfg.tokens_per_frame:
        after = run(build(changed, gates=0.5), everything, batch)
        change = max(np.abs(a - np.asarray(b)).max() for a, b in zip(before, after, strict=True))
        assert change > 1e-4
    else:
        assert (tree(changed), changed.tokens_per_frame) != (shapes, cfg.tokens_per_frame)
