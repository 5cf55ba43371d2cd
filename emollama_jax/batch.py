"""The typed struct that data makes and models take, the only thing they share.

Axis letters: B rows, T tokens of a row (visual ones included), F frames of a row, X frames of a row
that are asked about again, P = F + X pairs of a frame and a question, Q questions of a row,
L question tokens, E examples of a row.
"""

from typing import Any

import flax.struct
import jax
import numpy as np
from jaxtyping import Int, Int32

IMAGE_TOKEN = -200  # LLaMA-VID's IMAGE_TOKEN_INDEX: a place that a visual token takes
IGNORE = -100  # LLaMA-VID's IGNORE_INDEX: a label that bears no loss
TEXT = -1  # in `Batch.visual`: not a visual place

Array = jax.Array | np.ndarray  # NumPy's until it is placed on devices


@flax.struct.dataclass
class Batch:
    """Rows of one static shape, each of one example or of several, one after the other.

    The `<image>` of a prompt is already expanded: `ids` holds IMAGE_TOKEN once for every visual
    token, so that T is static and the merge is a gather. The visual tokens of a pair stand
    together. Pair p < F is frame p under its example's first question; those behind are frames
    `again` under a later one, so that a question that is not there costs nothing.
    """

    frames: Array  # uint8 [B, F, S, S, 3], S the vision tower's image size
    faces: Array  # uint8 [B, F, Sf, Sf, 3], the face crop at FaceXFormer's image size
    face_found: Array  # bool [B, F]; False: `faces` and `landmarks` are zeros
    landmarks: Array  # float32 [B, F, 68, 2], (x, y) in the crop, -1 … 1 (FaceXFormer's rule)
    ids: Array  # int32 [B, T], right-padded with the pad id
    labels: Array  # int32 [B, T], IGNORE where no loss is borne; not shifted
    segment: Array  # int32 [B, T], 1 + the token's example in its row, 0 for padding
    position: Array  # int32 [B, T], in the token's example
    visual: Array  # int32 [B, T], visual token of the row's pairs that stands here, or TEXT
    question: Array  # int32 [B, P], the row's question that the pair reads, -1 for padding
    again: Array  # int32 [B, X], frames of the pairs from F on
    questions: Array  # int32 [B, Q, L], the Q-Former's text, right-padded
    question_mask: Array  # bool [B, Q, L]
    weight: Array  # float32 [B, E], 0 for a sentinel that stands for broken media, and for padding
    index: Array  # int64-safe int32 [B, E], the example's position in its source, -1 for padding

    @property
    def length(self) -> Array:
        """Tokens before a row's padding, int32 [B]."""
        return (self.segment > 0).sum(axis=-1, dtype=np.int32)

    @property
    def packed(self) -> bool:
        """Whether a row may hold several examples."""
        return self.weight.shape[1] > 1


def one_a_row(
    *,
    length: Int32[np.ndarray, " b"],
    weight: np.ndarray,
    index: np.ndarray,
    **arrays: Any,
) -> Batch:
    """Rows of one example each, all of one kind.

    Args:
        length: tokens before the padding.
        weight: float32 [B].
        index: int32 [B].
        **arrays: the other fields that do not follow; questions [B, R, L] are those of R rounds, of
            which each is about all M frames. Visual tokens are taken in the order of rounds, then
            frames.
    """
    (rows, frames), rounds = arrays["frames"].shape[:2], arrays["questions"].shape[1]
    ids = arrays["ids"]
    where = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    again = max(rounds - 1, 0) * frames
    pairs = frames + again
    return Batch(
        **arrays,
        segment=(where < length[:, None]).astype(np.int32),
        position=where,
        visual=visual_places(ids),
        question=np.tile(np.arange(pairs, dtype=np.int32) // max(frames, 1), (rows, 1)),
        again=np.tile(np.arange(again, dtype=np.int32) % max(frames, 1), (rows, 1)),
        weight=weight[:, None],
        index=index[:, None],
    )


def visual_places(ids: Int[np.ndarray, "*b t"]) -> Int32[np.ndarray, "*b t"]:
    """Numbers the visual places of each row, others are TEXT."""
    places = ids == IMAGE_TOKEN
    return np.where(places, places.cumsum(axis=-1) - 1, TEXT).astype(np.int32)
