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
from einops import rearrange, repeat
from flax import nnx
from jaxtyping import Array, Float, UInt8

from emollama_jax.batch import Batch
from emollama_jax.config import EmoLlamaConfig
from emollama_jax.models.eva_vit import EvaVit, normalise
from emollama_jax.models.face_info_mining import FaceInfoMining
from emollama_jax.models.facexformer import FaceXFormer
from emollama_jax.models.layers import split_keys
from emollama_jax.models.llama import Llama
from emollama_jax.models.qformer import QFormer
from emollama_jax.models.visual_tokens import VisualTokens, merge


@flax.struct.dataclass
class Seen:
    """What the frozen towers see in F frames."""

    visual: jax.Array  # [F, 1 + P, D_v], the class token first
    face_map: jax.Array  # [F, h, w, D_f]
    task_tokens: jax.Array  # [F, 18, D_f]


class EmoLlama(nnx.Module):
    """The assembled model."""

    def __init__(self, cfg: EmoLlamaConfig, *, rngs: nnx.Rngs):
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

    def see(self, frames: UInt8[Array, "f s s 3"], faces: UInt8[Array, "f t t 3"]) -> Seen:
        """Both frozen towers, at most `frames_at_once` frames together."""

        def towers(pair: tuple[jax.Array, jax.Array]) -> Seen:
            frame, face = pair
            vision, face_cfg = self.cfg.vision, self.cfg.face
            visual = self.vision(normalise(frame, vision.image_mean, vision.image_std))
            if self.fim is None:
                empty = jnp.zeros((frame.shape[0], 0), visual.dtype)
                return Seen(visual=visual, face_map=empty, task_tokens=empty)
            seen = self.face(normalise(face, face_cfg.image_mean, face_cfg.image_std))
            return Seen(visual=visual, face_map=seen.fused, task_tokens=seen.task_tokens)

        return _in_chunks(towers, (frames, faces), self.cfg.frames_at_once)

    def visual(
        self, batch: Batch, *, dropout_key: jax.Array | None = None
    ) -> Float[Array, "b v d"]:
        """Visual tokens in the prompt's order: rounds, then frames, then a frame's tokens."""
        examples, frames = batch.frames.shape[:2]
        rounds = batch.questions.shape[1]
        seen = self.see(
            rearrange(batch.frames, "b m ... -> (b m) ..."),
            rearrange(batch.faces, "b m ... -> (b m) ..."),
        )
        tail = []  # of each frame's tokens: what does not depend on the question
        visual = seen.visual
        if self.fim is not None:
            mined = self.fim(
                visual[:, 1:],
                face_map=seen.face_map,
                task_tokens=seen.task_tokens,
                landmarks=rearrange(batch.landmarks, "b m ... -> (b m) ..."),
                found=rearrange(batch.face_found, "b m -> (b m)"),
            )
            visual = jnp.concatenate([visual[:, :1], mined.visual], axis=1)
            tail.append(mined.tokens)
        patches = visual[:, 1:]
        tail.insert(0, self.visual_tokens.content(patches, kind=self.cfg.content))
        context = self._context(batch, visual, dropout_key=dropout_key)  # [(B R M), 1, D]
        rest = jnp.concatenate(tail, axis=1)
        rest = repeat(rest, "(b m) n d -> (b r m) n d", b=examples, r=rounds)
        tokens = jnp.concatenate([context, rest.astype(context.dtype)], axis=1)
        return rearrange(tokens, "(b v) n d -> b (v n) d", b=examples, v=rounds * frames)

    def _context(
        self, batch: Batch, visual: Float[Array, "f p d"], *, dropout_key: jax.Array | None
    ) -> Float[Array, "g 1 d"]:
        """The context token of every (example, round, frame): the question's view of the frame."""
        rounds, frames = batch.questions.shape[1], batch.frames.shape[1]
        many = repeat(visual, "(b m) p d -> (b r m) p d", m=frames, r=rounds)
        text = repeat(batch.questions, "b r l -> (b r m) l", m=frames)
        mask = repeat(batch.question_mask, "b r l -> (b r m) l", m=frames)
        queries = self.qformer(
            self.visual_tokens.ln(many), text=text, text_mask=mask, dropout_key=dropout_key
        )
        return self.visual_tokens.context(many[:, 1:], queries)

    def embeds(
        self, batch: Batch, *, dropout_key: jax.Array | None = None
    ) -> Float[Array, "b t d"]:
        """Text embeddings with the visual tokens in their places."""
        visual = self.visual(batch, dropout_key=dropout_key)
        return merge(self.llama.embed(batch.ids), batch.ids, visual)

    def hidden(
        self, batch: Batch, *, dropout_key: jax.Array | None = None
    ) -> Float[Array, "b t d"]:
        """Final-norm hidden states of the LLM over the merged sequence."""
        visual_key, llm_key = split_keys(dropout_key, 2)
        embeds = self.embeds(batch, dropout_key=visual_key)
        positions = jnp.broadcast_to(jnp.arange(batch.ids.shape[1]), batch.ids.shape)
        return self.llama(embeds, positions=positions, dropout_key=llm_key).hidden


def _in_chunks(function: Callable, xs, size: int):
    """`function` over the leading axis in chunks of `size`; one call where that is enough."""
    total = jax.tree.leaves(xs)[0].shape[0]
    if total <= size:
        return function(xs)
    chunks = -(-total // size)

    def cut(x: jax.Array) -> jax.Array:
        rest = [(0, chunks * size - total)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, rest).reshape(chunks, size, *x.shape[1:])

    ys = jax.lax.map(function, jax.tree.map(cut, xs))
    return jax.tree.map(lambda y: y.reshape(chunks * size, *y.shape[2:])[:total], ys)
