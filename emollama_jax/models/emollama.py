"""EMO-LLaMA: LLaMA-VID with Face Info Mining (arXiv 2408.11424), assembled.

    frames ─► EVA-ViT ─► X ─► FIM ─► X' ─► Q-Former (the question's text) ─► context token
    faces ─► FaceXFormer ─┘     └──► content tokens, face tokens
    per frame [context | content… | face_global | face_local] ─► LLaMA

Everything but Face Info Mining mirrors LLaMA-VID; where a face was not found, or before training,
the context and content tokens are exactly LLaMA-VID's.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from emollama_jax.batch import Batch
from emollama_jax.config import EmoLlamaConfig
from emollama_jax.models.eva_vit import EvaVit
from emollama_jax.models.face_info_mining import FaceInfoMining
from emollama_jax.models.facexformer import FaceXFormer
from emollama_jax.models.layers import normalise, split_keys, with_again
from emollama_jax.models.llama import Llama, examples_of
from emollama_jax.models.qformer import QFormer
from emollama_jax.models.rngs import Rngs
from emollama_jax.models.visual_tokens import VisualTokens, merge
from emollama_jax.sharding.points import constrain, parts, within


@flax.struct.dataclass
class FaceHeads:
    """FaceXFormer's outputs for the face in each of F frames: the priors, float32."""

    landmarks: jax.Array  # [F, 68, 2], (x, y) in the crop, -1 … 1
    age: jax.Array  # [F, 8], logits
    gender: jax.Array  # [F, 2], logits
    race: jax.Array  # [F, 5], logits


@flax.struct.dataclass
class Seen:
    """Outputs of the frozen towers for F frames."""

    visual: jax.Array  # [F, 1 + P, D_v], the class token first
    face_map: jax.Array  # [F, h, w, D_f]
    task_tokens: jax.Array  # [F, 18, D_f]
    heads: FaceHeads


@flax.struct.dataclass
class Mined:
    """Features of F frames that do not depend on the question."""

    visual: jax.Array  # [F, 1 + P, D_v], after Face Info Mining
    tokens: jax.Array  # [F, n, D], a frame's tokens that do not depend on the question


@flax.struct.dataclass
class Sight:
    """Features of an example's F frames, before any question."""

    mined: Mined
    landmarks: jax.Array  # [F, 68, 2], zeros where no face was found
    age: jax.Array  # [F, 8], probabilities
    gender: jax.Array  # [F, 2], probabilities
    race: jax.Array  # [F, 5], probabilities


class EmoLlama(nnx.Module):
    """The assembled model."""

    def __init__(self, cfg: EmoLlamaConfig, *, rngs: Rngs):
        self.cfg = cfg
        self.vision = EvaVit(cfg.vision, rngs=rngs)
        self.face = FaceXFormer(cfg.face, rngs=rngs)
        self.fim = (
            None
            if cfg.fim.branches == "none"
            else FaceInfoMining(
                cfg.fim,
                visual_width=cfg.vision.width,
                face_width=cfg.face.width,
                llm_width=cfg.llama.width,
                dtype=cfg.llama.dtype,
                rngs=rngs,
            )
        )
        self.qformer = QFormer(cfg.qformer, rngs=rngs)
        self.visual_tokens = VisualTokens(
            cfg.qformer,
            visual_width=cfg.vision.width,
            llm_width=cfg.llama.width,
            dtype=cfg.llama.dtype,
            rngs=rngs,
        )
        self.llama = Llama(cfg.llama, rngs=rngs)

    @property
    def _point(self) -> str:
        """Where the towers' frames lie, see `sharding/points.py`."""
        return "frames" if self.cfg.frames_over == "mesh" else "batch"

    def see(self, frames: UInt8[Array, "f s s 3"], faces: UInt8[Array, "f t t 3"]) -> Seen:
        """Both frozen towers, at most `frames_at_once` frames of a device together."""

        def towers(pair: tuple[jax.Array, jax.Array]) -> Seen:
            frame, face = pair
            vision, face_cfg = self.cfg.vision, self.cfg.face
            with jax.named_scope("vision"):
                visual = self.vision(normalise(frame, vision.image_mean, vision.image_std))
            with jax.named_scope("face"):
                seen = self.face(normalise(face, face_cfg.image_mean, face_cfg.image_std))
            heads = FaceHeads(seen.landmarks, seen.age, seen.gender, seen.race)
            return Seen(
                visual=visual,
                face_map=seen.fused,
                task_tokens=seen.task_tokens,
                heads=heads,
            )

        return _in_chunks(towers, (frames, faces), self.cfg.frames_at_once, point=self._point)

    def sight(
        self,
        frames: UInt8[Array, "f s s 3"],
        faces: UInt8[Array, "f t t 3"],
        *,
        found: Bool[Array, " f"],
    ) -> Sight:
        """Everything about frames whose priors are not known yet, FaceXFormer run once."""
        with within(self._point):
            seen = self.see(frames, faces)
            heads = seen.heads
            landmarks = jnp.where(found[:, None, None], heads.landmarks, 0)
            mined = self.mine(seen, landmarks=landmarks, found=found)
        age, gender, race = map(jax.nn.softmax, (heads.age, heads.gender, heads.race))
        return Sight(mined, landmarks, age, gender, race)

    def visual(
        self, batch: Batch, *, dropout_key: jax.Array | None = None
    ) -> Float[Array, "b v d"]:
        """Visual tokens of the rows' pairs of a frame and a question, pair after pair."""
        with within(self._point):
            return self._visual(batch, dropout_key=dropout_key)

    def _visual(self, batch: Batch, *, dropout_key: jax.Array | None) -> Float[Array, "b v d"]:
        def of_frames(x: jax.Array) -> jax.Array:
            return constrain(rearrange(x, "b f ... -> (b f) ..."), self._point)

        seen = self.see(of_frames(batch.frames), of_frames(batch.faces))
        mined = self.mine(
            seen, landmarks=of_frames(batch.landmarks), found=of_frames(batch.face_found)
        )
        tokens = self.asked(
            mined,
            questions=batch.questions,
            question_mask=batch.question_mask,
            question=batch.question,
            again=batch.again,
            dropout_key=dropout_key,
        )
        tokens = rearrange(tokens, "(b p) n d -> b p n d", b=batch.ids.shape[0])
        return rearrange(constrain(tokens, "batch"), "b p n d -> b (p n) d")

    def mine(
        self, seen: Seen, *, landmarks: Float[Array, "f 68 2"], found: Bool[Array, " f"]
    ) -> Mined:
        """Face Info Mining, and what of a frame's tokens does not depend on the question."""
        tail = []
        visual = seen.visual
        if self.fim is not None:
            with jax.named_scope("fim"):
                mined = self.fim(
                    visual[:, 1:],
                    face_map=seen.face_map,
                    task_tokens=seen.task_tokens,
                    landmarks=landmarks,
                    found=found,
                )
            visual = jnp.concatenate([visual[:, :1], mined.visual], axis=1)
            tail.append(mined.tokens)
        with jax.named_scope("visual_tokens"):
            tail.insert(0, self.visual_tokens.content(visual[:, 1:], kind=self.cfg.content))
        return Mined(visual=visual, tokens=jnp.concatenate(tail, axis=1))

    def asked(
        self,
        mined: Mined,
        *,
        questions: Int[Array, "b q l"],
        question_mask: Bool[Array, "b q l"],
        question: Int[Array, "b p"],
        again: Int[Array, "b x"],
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "bp n d"]:
        """All visual tokens of every pair of a frame and a question, the context token first.

        Args:
            mined: features of the frames of all rows.
            questions: the Q-Former's text.
            question_mask: False where it is padding.
            question: index into `questions`, of each pair; a row's frames first, then `again`.
            again: frames that have another question.
            dropout_key: key of the Q-Former's dropout; None in evaluation.
        """

        def of_pairs(x: jax.Array) -> jax.Array:  # [B, Q, L] → [B · P, L]
            taken = jnp.take_along_axis(x, jnp.maximum(question, 0)[..., None], axis=1)
            return constrain(rearrange(taken, "b p l -> (b p) l"), self._point)

        with jax.named_scope("qformer"):
            queries = self.qformer(
                self.visual_tokens.ln(mined.visual),
                text=of_pairs(questions),
                text_mask=of_pairs(question_mask),
                again=again,
                dropout_key=dropout_key,
            )
        with jax.named_scope("visual_tokens"):
            context = self.visual_tokens.context(mined.visual[:, 1:], queries, again=again)
            rest = with_again(mined.tokens, again)
        return jnp.concatenate([context, rest.astype(context.dtype)], axis=1)

    def embeds(
        self, batch: Batch, *, dropout_key: jax.Array | None = None
    ) -> Float[Array, "b t d"]:
        """Text embeddings with the visual tokens in their places."""
        visual = self.visual(batch, dropout_key=dropout_key)
        with jax.named_scope("llm"):
            return constrain(merge(self.llama.embed(batch.ids), batch.visual, visual), "batch")

    def hidden(
        self, batch: Batch, *, dropout_key: jax.Array | None = None
    ) -> Float[Array, "b t d"]:
        """Final-norm hidden states of the LLM over the merged sequence."""
        visual_key, llm_key = split_keys(dropout_key, 2)
        embeds = self.embeds(batch, dropout_key=visual_key)
        with within("batch"), jax.named_scope("llm"):
            return self.llama(embeds, examples=examples_of(batch), dropout_key=llm_key).hidden


def _in_chunks(function: Callable, xs, size: int, *, point: str):
    """`function` over frames, `size` of each device at a time; one call where that is enough."""
    total = jax.tree.leaves(xs)[0].shape[0]
    devices = parts(point, total)
    here = total // devices
    if here <= size:
        return function(xs)
    chunks = -(-here // size)

    def cut(x: jax.Array) -> jax.Array:  # each device's frames stay on it
        x = x.reshape(devices, here, *x.shape[1:])
        rest = [(0, 0), (0, chunks * size - here)] + [(0, 0)] * (x.ndim - 2)
        return jnp.moveaxis(jnp.pad(x, rest).reshape(devices, chunks, size, *x.shape[2:]), 1, 0)

    def one(chunk):
        flat = jax.tree.map(lambda x: x.reshape(devices * size, *x.shape[2:]), chunk)
        return function(jax.tree.map(lambda x: constrain(x, point), flat))

    def join(y: jax.Array) -> jax.Array:
        y = jnp.moveaxis(y.reshape(chunks, devices, size, *y.shape[2:]), 0, 1)
        y = y.reshape(devices, chunks * size, *y.shape[3:])[:, :here]
        return constrain(y.reshape(total, *y.shape[2:]), point)

    return jax.tree.map(join, jax.lax.map(one, jax.tree.map(cut, xs)))
