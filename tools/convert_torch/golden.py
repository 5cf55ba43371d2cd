"""What our networks make of the inputs of golden files, under the names of the golden arrays.

Golden files hold what the original PyTorch code computed (tests/golden/README.md describes them).
`check` and the tests compare with them; how the original's classes are wired together, and which
cuts of their outputs are kept, is here.
"""

import functools
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from emollama_jax import config_content
from emollama_jax.batch import IGNORE, IMAGE_TOKEN
from emollama_jax.config import EvaVitConfig, LlamaConfig, QFormerConfig
from emollama_jax.errors import UserError
from emollama_jax.generate.cache import init_cache
from emollama_jax.models.eva_vit import EvaVit
from emollama_jax.models.facexformer import FaceXFormer, FaceXFormerOutput
from emollama_jax.models.llama import KVCache, Llama
from emollama_jax.models.qformer import QFormer
from emollama_jax.models.visual_tokens import VisualTokens, merge_in_order

Arrays = Mapping[str, np.ndarray]

GREEDY_PROMPT = 6  # ids of `greedy_mean` that the original was given; it chose the rest
CASE = ("frames", "question", "compress_type", "label_prefix_masked")  # of `llama_vid.json`
SPARSE = 257  # visual tokens of which every 16th is kept
TINY_INPUTS = frozenset(
    [
        "meta_json",
        "input_ids",
        "labels",
        "attention_mask",
        *(f"pixel_{name}" for name in ("image", "video", "textonly")),
        *(f"bert_{what}_{of}" for what in ("ids", "mask") for of in ("turns", "video", "textonly")),
        "bert_ids_long",
    ]
)


def tensor(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Weights of one floating-point entry of a state dict: the same on any machine.

    Args:
        key: e.g. "backbone.0.0.0.weight".
        shape: as PyTorch stores it.
        seed: seed of the golden file.

    Returns:
        float32: matrices and larger divided by the root of their fan-in, vectors named "weight"
        around 1, other vectors around 0.
    """
    rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(key.encode())]))
    x = rng.standard_normal(shape, dtype=np.float32)
    if len(shape) >= 2:
        return x / np.float32(np.sqrt(np.prod(shape[1:])))
    if key.rsplit(".", 1)[-1] == "weight":
        return 1 + np.float32(0.1) * x
    return np.float32(0.1) * x


def off(ours: Any, wanted: Any) -> float:
    """The largest difference, relative to the largest value wanted; masked places do not count.

    Raises:
        ValueError: arrays of two shapes.
    """
    hidden = np.ma.getmaskarray(ours) if np.ma.isMaskedArray(ours) else False
    ours, wanted = np.asarray(ours, np.float64), np.asarray(wanted, np.float64)
    if ours.shape != wanted.shape:
        raise ValueError(f"{ours.shape}, wanted {wanted.shape}")
    seen = ~np.broadcast_to(hidden, wanted.shape)
    largest = np.abs(wanted[seen]).max(initial=0)
    return float(np.abs(ours - wanted)[seen].max(initial=0) / (largest or 1))


def jitted(module: nnx.Module, function):
    """`function(module, *args)` compiled as one, without its first argument."""
    graphdef, state = nnx.split(module)
    compiled = jax.jit(lambda state, *args: function(nnx.merge(graphdef, state), *args))
    return functools.partial(compiled, state)


def pixels(x: np.ndarray) -> jax.Array:
    """Channels first → last."""
    return jnp.asarray(np.moveaxis(x, -3, -1))


# --- FaceXFormer ----------------------------------------------------------------------------------


def facexformer_run(
    model: FaceXFormer, image: Float[Array, "b s s 3"]
) -> tuple[FaceXFormerOutput, Float[Array, "b 11 s s"]]:
    """Everything but parsing, and parsing."""

    def both(model: FaceXFormer, image: jax.Array):
        output = model(image)
        return output, model.parsing(output)

    return jitted(model, both)(image)


def facexformer_arrays(model: FaceXFormer, *, seed: int) -> dict[str, np.ndarray]:
    """What the release's sizes make of the two pictures of `facexformer.npz`."""
    generator = np.random.Generator(np.random.PCG64([seed, 1]))
    image = generator.standard_normal((2, 3, 224, 224), dtype=np.float32)
    output, parsing = facexformer_run(model, pixels(image))
    height, width = output.fused.shape[1:3]
    positions = model.positions(height, width).reshape(1, height, width, -1)

    def cut(x: jax.Array, every: int, step: int) -> np.ndarray:
        return np.asarray(x).transpose(0, 3, 1, 2)[:, ::every, ::step, ::step]

    arrays = {f"stage{i}_slice": cut(stage, 16, 4) for i, stage in enumerate(output.stages)}
    heads = ("headpose", "attributes", "visibility", "age", "gender", "race")
    return arrays | {
        "fused_slice": cut(output.fused, 16, 8),
        "pe_slice": cut(positions, 16, 8),
        "task_tokens": np.asarray(output.task_tokens),
        "landmarks": np.asarray(output.landmarks.reshape(2, 136)),
        "parsing_slice": np.asarray(parsing[:, :, ::16, ::16]),
        **{name: np.asarray(getattr(output, name)) for name in heads},
    }


# --- LLaMA-VID ------------------------------------------------------------------------------------


class LlamaVid(nnx.Module):
    """The networks under the names that `EmoLlama` gives them."""

    def __init__(self, llama: LlamaConfig, vision: EvaVitConfig, qformer: QFormerConfig):
        rngs = nnx.Rngs(0)
        self.llama = Llama(llama, rngs=rngs)
        self.vision = EvaVit(vision, rngs=rngs)
        self.qformer = QFormer(qformer, rngs=rngs)
        self.visual_tokens = VisualTokens(
            qformer,
            visual_width=vision.width,
            llm_width=llama.width,
            dtype=llama.dtype,
            rngs=rngs,
        )

    def queries(
        self,
        visual: Float[Array, "f p d"],
        text: Int[Array, "f l"],
        text_mask: Bool[Array, "f l"],
    ) -> Float[Array, "f q e"]:
        """What the Q-Former sees in each frame under its question."""
        return self.qformer(self.visual_tokens.ln(visual), text=text, text_mask=text_mask)

    def frame_tokens(self, visual, text, text_mask, *, kind: str) -> Float[Array, "f n h"]:
        """Context and content tokens of frames [F, 1 + P, D] under questions [F, L]."""
        return self._tokens(visual[:, 1:], self.queries(visual, text, text_mask), kind)

    def feature_tokens(self, features, text, text_mask, *, kind: str) -> Float[Array, "f n h"]:
        """The same of features without the class token, [F, P, D]: the path of long videos."""
        return self._tokens(features, self.queries(features, text, text_mask), kind)

    def _tokens(self, patches: jax.Array, queries: jax.Array, kind: str) -> jax.Array:
        context = self.visual_tokens.context(patches, queries)
        return jnp.concatenate([context, self.visual_tokens.content(patches, kind=kind)], axis=1)

    def read(self, ids: Int[Array, "b t"], visual: Float[Array, "b v h"]) -> Float[Array, "b t v"]:
        """Expanded ids and visual tokens → logits."""
        embeds = merge_in_order(self.llama.embed(ids), ids, visual)
        return self.llama.logits(self.llama(embeds).hidden)


def expand(ids: np.ndarray, values: np.ndarray, tokens: int) -> np.ndarray:
    """Repeats what stands beside an IMAGE_TOKEN, once per visual token of its block."""
    return np.repeat(values, np.where(ids == IMAGE_TOKEN, tokens, 1))


def expand_labels(ids: np.ndarray, labels: np.ndarray, tokens: int) -> np.ndarray:
    """Labels of the expanded ids: none on visual tokens."""
    return expand(ids, np.where(ids == IMAGE_TOKEN, IGNORE, labels), tokens)


def loss(logits: Any, labels: np.ndarray) -> float:
    """Mean cross-entropy of the next token over what is not ignored, in float64."""
    logits, labels = np.asarray(logits, np.float64)[:, :-1], labels[:, 1:]
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    kept = labels != IGNORE
    chosen = np.take_along_axis(log_p, np.where(kept, labels, 0)[..., None], -1)[..., 0]
    return float(-chosen[kept].mean())


def llama_vid_inputs(meta: Mapping[str, Any], *, image_size: int) -> Float[np.ndarray, "n 3 s s"]:
    """The pictures of `llama_vid.npz`: the image, then the video's frames.

    Args:
        meta: meta of `llama_vid.json`.
        image_size: picture side of the vision tower, pixels.

    Raises:
        UserError: the questions that were drawn before them are others than `meta` has.
    """
    rng = np.random.Generator(np.random.PCG64([meta["seed"], 2]))
    for name, ids in sorted(meta["question_ids"].items()):
        if [101, *rng.integers(1000, 30000, len(ids) - 2).tolist(), 102] != ids:
            raise UserError(
                f"llama_vid.json: question {name!r} is not the one of meta.seed {meta['seed']}"
            )
    frames = max(about["frames"] for about in llama_vid_cases(meta).values())
    return rng.standard_normal((1 + frames, 3, image_size, image_size), dtype=np.float32)


def llama_vid_cases(meta: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The cases in a `meta`, e.g. "video_mean"."""
    return {
        name: about
        for name, about in meta.items()
        if isinstance(about, Mapping) and "frames" in about
    }


def llama_vid_arrays(model: LlamaVid, meta: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What our networks make of the cases of `llama_vid.npz`."""
    pictures = llama_vid_inputs(meta, image_size=model.vision.cfg.image_size)
    visual = jitted(model.vision, EvaVit.__call__)(pixels(pictures))
    arrays = {"vision_slice": np.asarray(visual[:, ::16, ::32])}
    for name, about in llama_vid_cases(meta).items():
        case = llama_vid_case(model, meta, about, visual)
        arrays |= {f"{name}.{key}": value for key, value in case.items()}
    return arrays


def llama_vid_case(
    model: LlamaVid,
    meta: Mapping[str, Any],
    about: Mapping[str, Any],
    visual: Float[Array, "n p d"],
) -> dict[str, np.ndarray]:
    """One case, from what the vision tower sees to the loss."""
    frames = about["frames"]
    visual = visual[:1] if frames == 1 else visual[1 : 1 + frames]
    text = jnp.asarray([meta["question_ids"][about["question"]]] * frames)
    kind = about["compress_type"] or "all"
    look = jitted(model, functools.partial(LlamaVid.frame_tokens, kind=kind))
    blocks = look(visual, text, jnp.ones_like(text, bool))
    tokens = blocks.reshape(1, -1, blocks.shape[-1])  # [1, F · (1 + n), H]
    count = tokens.shape[1]
    prompt = np.asarray(meta["ids_image" if frames == 1 else "ids_video"])
    labels = np.where(np.arange(len(prompt)) < about["label_prefix_masked"], IGNORE, prompt)
    ids = expand(prompt, prompt, count)[None]
    logits = jitted(model, LlamaVid.read)(jnp.asarray(ids), tokens)
    return {
        "visual_tokens": np.asarray(tokens[:, :: 16 if count == SPARSE else 1]),
        "logits": np.asarray(logits[:, -(len(prompt) - 8) :]),
        "loss": np.asarray(loss(logits, expand_labels(prompt, labels, count)[None])),
    }


# --- the tiny LLaMA-VID: a batch of an image with two turns, a text, and a video ------------------


def kind_of(name: str) -> str:
    """The compression's name in `llama_vid_tiny.npz` → ours, e.g. grid2 → grid:2."""
    return {"none": "all"}.get(name, re.sub(r"grid(\d+)", r"grid:\1", name))


def tiny_groups(held: Arrays) -> list[str]:
    """The compressions that a `llama_vid_tiny.npz` has arrays of."""
    found = [re.match(r"(none|mean|grid\d+)/", key) for key in held]
    return list(dict.fromkeys(match[1] for match in found if match))


def image_tokens(model: LlamaVid, held: Arrays, kinds: Sequence[str]) -> dict[str, jax.Array]:
    """Kind → the image's tokens, once under each turn's question: [2, 1 + n, H]."""
    ids, mask = held["bert_ids_turns"], held["bert_mask_turns"]
    return _see(model, np.repeat(held["pixel_image"][None], len(ids), 0), ids, mask, kinds)


def video_tokens(model: LlamaVid, held: Arrays, kinds: Sequence[str]) -> dict[str, jax.Array]:
    """Kind → the tokens of the video's frames under their one question: [1, F · (1 + n), H]."""
    frames = held["pixel_video"]
    ids, mask = (np.repeat(held[f"bert_{name}_video"], len(frames), 0) for name in ("ids", "mask"))
    tokens = _see(model, frames, ids, mask, kinds)
    return {kind: blocks.reshape(1, -1, blocks.shape[-1]) for kind, blocks in tokens.items()}


def _see(
    model: LlamaVid, pictures: np.ndarray, ids: np.ndarray, mask: np.ndarray, kinds: Sequence[str]
) -> dict[str, jax.Array]:
    """Pictures [F, 3, S, S], each under its question [F, L] → [F, 1 + n, H] of each kind."""

    def run(model: LlamaVid, pictures: jax.Array, text: jax.Array, text_mask: jax.Array):
        visual = model.vision(pictures)
        return {kind: model.frame_tokens(visual, text, text_mask, kind=kind) for kind in kinds}

    text, text_mask = jnp.asarray(ids, jnp.int32), jnp.asarray(mask, bool)
    return jitted(model, run)(pixels(pictures), text, text_mask)


def tiny_batch(
    held: Arrays, kind: str, *, patches: int
) -> tuple[Int[np.ndarray, "3 t"], Int[np.ndarray, "3 t"], Bool[np.ndarray, "3 t"]]:
    """Expanded ids, labels and validity of the batch of three, right-padded."""
    n = 1 + config_content.tokens(kind, patches)
    blocks = (n, n, n * len(held["pixel_video"]))
    rows = list(zip(held["input_ids"], held["labels"], held["attention_mask"], blocks, strict=True))
    columns = (
        ([expand(ids, ids, block) for ids, _, _, block in rows], 0),
        ([expand_labels(ids, labels, block) for ids, labels, _, block in rows], IGNORE),
        ([expand(ids, mask, block) for ids, _, mask, block in rows], False),
    )
    longest = max(len(ids) for ids in columns[0][0])
    ids, labels, valid = (
        np.stack([np.pad(x, (0, longest - len(x)), constant_values=fill) for x in column])
        for column, fill in columns
    )
    return ids, labels, valid


def visual_rows(
    turns: Float[Array, "t n h"], video: Float[Array, "1 v h"]
) -> Float[Array, "3 w h"]:
    """The batch's visual tokens: the image's blocks; none; the video's. W is the longest."""
    image = turns.reshape(-1, turns.shape[-1])
    longest = max(image.shape[0], video.shape[1])
    rows = [image, jnp.zeros((0, image.shape[1])), video[0]]
    return jnp.stack([jnp.pad(row, ((0, longest - row.shape[0]), (0, 0))) for row in rows])


def greedy(
    model: LlamaVid, prompt: Int[np.ndarray, " t"], video: Float[Array, "1 v h"], *, steps: int
) -> list[int]:
    """The ids that continue a prompt with a video's tokens, the most probable each time."""
    ids = jnp.asarray(expand(prompt, prompt, video.shape[1]))[None]
    cfg, start = model.llama.cfg, ids.shape[1]
    cache = init_cache(cfg, rows=1, slots=start + steps)

    def advance(llama: Llama, embeds: jax.Array, positions: jax.Array, cache: KVCache):
        out = llama(embeds, positions=positions, cache=cache)
        return llama.logits(out.hidden[:, -1]).argmax(), out.cache

    run = jitted(model.llama, advance)
    chosen, cache = run(
        merge_in_order(model.llama.embed(ids), ids, video), jnp.arange(start)[None], cache
    )
    got = [int(chosen)]
    for position in range(start, start + steps - 1):
        embeds = model.llama.embed(jnp.asarray([got[-1:]]))
        chosen, cache = run(embeds, jnp.asarray([[position]]), cache)
        got.append(int(chosen))
    return got


def tiny_arrays(model: LlamaVid, held: Arrays) -> dict[str, np.ndarray]:
    """What our networks make of the inputs in a `llama_vid_tiny.npz`.

    Padding is masked out of the logits: nobody reads what stands there, and the original's
    attention from there differs from ours.
    """
    kinds = {name: kind_of(name) for name in tiny_groups(held)}
    turns = image_tokens(model, held, list(kinds.values()))
    video = video_tokens(model, held, [*kinds.values(), "mean"])
    prompt, said = np.split(held["greedy_mean"][0], [GREEDY_PROMPT])
    answer = greedy(model, prompt, video["mean"], steps=len(said))
    arrays = tiny_towers(model, held)
    arrays["greedy_mean"] = np.asarray([[*prompt.tolist(), *answer]])
    batches = {
        name: tiny_batch(held, kind, patches=model.vision.cfg.patches)
        for name, kind in kinds.items()
    }
    longest = max((ids.shape[1] for ids, _, _ in batches.values()), default=0)
    read = jitted(model, LlamaVid.read)
    for name, (ids, labels, valid) in batches.items():
        visual = visual_rows(turns[kinds[name]], video[kinds[name]])
        # All to one length, so that one program reads them; padding on the right reaches nothing.
        visual = jnp.pad(visual, ((0, 0), (0, longest - visual.shape[1]), (0, 0)))
        padded = jnp.pad(jnp.asarray(ids), ((0, 0), (0, longest - ids.shape[1])))
        logits = np.asarray(read(padded, visual))[:, : ids.shape[1]]
        hidden = np.broadcast_to(~valid[..., None], logits.shape)
        arrays |= {
            f"{name}/visual_image_2turns": np.asarray(turns[kinds[name]]),
            f"{name}/visual_video": np.asarray(video[kinds[name]]),
            f"{name}/merged_mask": valid,
            f"{name}/merged_labels": labels,
            f"{name}/logits": np.ma.masked_array(logits, mask=hidden),
            f"{name}/loss": np.asarray(loss(logits, labels)),
        }
    return arrays


def tiny_towers(model: LlamaVid, held: Arrays) -> dict[str, np.ndarray]:
    """The vision tower and the Q-Former over the video, and the path of long videos."""
    frames = len(held["pixel_video"])

    def text_of(name: str) -> jax.Array:
        return jnp.asarray(np.repeat(held[name], frames, 0), jnp.int32)  # [F, L]

    def run(model: LlamaVid, pictures: jax.Array, ids: jax.Array, mask: jax.Array, long: jax.Array):
        visual = model.vision(pictures)
        tokens = model.feature_tokens(visual[:, 1:], long, jnp.ones_like(long, bool), kind="mean")
        return {
            "eva_video": visual,
            "qformer_video": model.queries(visual, ids, mask),
            "longvideo_tokens_mean": tokens.reshape(1, -1, tokens.shape[-1]),
        }

    ids, mask, long = map(text_of, ("bert_ids_video", "bert_mask_video", "bert_ids_long"))
    said = jitted(model, run)(pixels(held["pixel_video"]), ids, mask.astype(bool), long)
    return {name: np.asarray(array) for name, array in said.items()}
