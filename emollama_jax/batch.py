"""The typed struct that data makes and models take, the only thing they share.

Axis letters: B examples, M frames, T text tokens (visual ones included), R rounds (human turns with
an `<image>`), L question tokens.
"""

import flax.struct
import jax
import numpy as np

IMAGE_TOKEN = -200  # LLaMA-VID's IMAGE_TOKEN_INDEX: a place that a visual token takes
IGNORE = -100  # LLaMA-VID's IGNORE_INDEX: a label that bears no loss

Array = jax.Array | np.ndarray  # NumPy's until it is placed on devices


@flax.struct.dataclass
class Batch:
    """One static shape: an image batch has M = 1, a clip batch M = `data.clip_frames`.

    The `<image>` of a prompt is already expanded: `ids` holds IMAGE_TOKEN once for every visual
    token, frame after frame, so that T is static and the merge is a gather.
    """

    frames: Array  # uint8 [B, M, S, S, 3], S the vision tower's image size
    faces: Array  # uint8 [B, M, Sf, Sf, 3], the face crop at FaceXFormer's image size
    face_found: Array  # bool [B, M]; False: `faces` and `landmarks` are zeros
    landmarks: Array  # float32 [B, M, 68, 2], (x, y) in the crop, -1 … 1 (FaceXFormer's rule)
    ids: Array  # int32 [B, T], right-padded with the pad id
    labels: Array  # int32 [B, T], IGNORE where no loss is borne; not shifted
    length: Array  # int32 [B], tokens before the padding
    questions: Array  # int32 [B, R, L], the Q-Former's text, right-padded
    question_mask: Array  # bool [B, R, L]
    weight: Array  # float32 [B], 0 for a sentinel that stands for broken media
    index: Array  # int64-safe int32 [B], the example's position in its source
