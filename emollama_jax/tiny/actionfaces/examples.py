"""Drawn pictures and clips as the stored examples of `builders/schema.py`.

This module does not import TFDS, so that the worker processes which draw start quickly.
"""

import io
import itertools
import json
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
from PIL import Image

from emollama_jax.data.action_units import EMOTIONS
from emollama_jax.data.describe import conversation
from emollama_jax.data.items import category_item
from emollama_jax.tiny.actionfaces.sample import sample_clip, sample_image

Task = tuple[str, str, range, int, int]  # config name, split, indices, seed, size

_JPEG_QUALITY = 95
# Constant quality of x264, lower is better: at 18 the folds of a 96-pixel face survive, and 24
# frames take about 15 kB.
_X264_QUALITY = "18"
_SHOWN = 256  # pixels of pictures for people
_WORDS = 0x30D5  # stream of the conversations' phrasing


def encode_picture(picture: np.ndarray) -> bytes:
    """Returns a JPEG file of uint8 [S, S, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def encode_video(frames: np.ndarray, fps: float) -> bytes:
    """Returns an MP4 file (H.264) of uint8 [F, S, S, 3]; S must be even."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=round(fps), options={"crf": _X264_QUALITY})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # more threads give other bytes
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return buffer.getvalue()


def drawn_faces() -> Iterator[tuple[str, bytes]]:
    """One JPEG picture of each emotion, of people who are in no training data, with its name."""
    left = dict.fromkeys(EMOTIONS)
    for index in itertools.count():
        if not left:
            return
        sample = sample_image("test", index, size=_SHOWN)
        name = EMOTIONS[sample.emotion]
        if name in left:
            del left[name]
            yield name, encode_picture(sample.picture)


def make_example(config_name: str, split: str, index: int, seed: int, size: int) -> dict[str, Any]:
    """Draws and encodes one example.

    Args:
        config_name: "images" or "clips".
        split: "train", "validation" or "test".
        index: Number within the split.
        seed: Of the data set.
        size: Width and height in pixels.
    """
    if config_name == "images":
        s = sample_image(split, index, seed=seed, size=size)
        kind, media, boxes = "image", encode_picture(s.picture), s.box[None]
        landmarks, pose, units = s.landmarks[None], s.pose[None], s.action_units[None]
    else:
        s = sample_clip(split, index, seed=seed, size=size)
        kind, media, boxes = "clip", encode_video(s.frames, s.fps), s.boxes
        landmarks, pose, units = s.landmarks, s.pose, s.action_units
    rng = np.random.Generator(np.random.PCG64([seed, _WORDS, *split.encode(), index]))
    items = [
        category_item(EMOTIONS, s.emotion, kind),
        conversation(s.action_units, s.emotion, kind, rng),
    ]
    return {
        "id": f"{split}-{index:06d}",
        "kind": kind,
        "media": media,
        "label": s.emotion,
        "subject": s.identity,
        "boxes": boxes,
        "landmarks": landmarks,
        "pose": pose,
        "action_units": units,
        "agr": np.array([s.age, s.gender, s.race], np.int64),
        "attributes": s.attributes,
        "items": json.dumps(items),
    }


def make_examples(task: Task) -> list[dict[str, Any]]:
    """Draws a chunk; one argument, as process pools want it."""
    config_name, split, indices, seed, size = task
    return [make_example(config_name, split, index, seed, size) for index in indices]
