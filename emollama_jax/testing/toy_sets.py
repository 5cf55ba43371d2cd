"""Small data sets with face priors in memory, as the real pipeline reads them, and a config."""

import dataclasses
import io
import json

import av
import numpy as np
from PIL import Image

from emollama_jax import config
from emollama_jax.batch import Batch
from emollama_jax.data.pipeline import make_train_iterator
from emollama_jax.data.priors import Prior
from emollama_jax.data.sets import label_space
from emollama_jax.data.split import InMemory
from emollama_jax.data.templates import SYSTEM
from emollama_jax.data.tokenizers import train_bpe

FIELDS = [field.name for field in dataclasses.fields(Batch)]
CLASSES = label_space("actionfaces/images").classes
FRAMES = (5, 24)  # of the two kinds of clips: fewer and more than M = 16


def picture(level: int, size: int = 40) -> np.ndarray:
    """A grey picture with a bright square, which is the face."""
    pixels = np.full((size, size, 3), level, np.uint8)
    pixels[10:30, 10:30] = 255
    return pixels


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def clip(levels: list[int]) -> bytes:
    """A clip whose frame i is grey level levels[i], but for the face."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=12, options={"crf": "4"})
        stream.width = stream.height = 40
        stream.pix_fmt = "yuv420p"
        for level in levels:
            frame = av.VideoFrame.from_ndarray(picture(level), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def example(index: int, media: bytes, kind: str) -> dict:
    medium = {"image": "image", "clip": "video"}[kind]
    question = (
        f"<image>\nWhat is the facial expression of the person in the {medium}? Choose one from "
        f"the following options: {{{', '.join(CLASSES)}}}."
    )
    label = index % len(CLASSES)
    category = [
        {"from": "human", "value": question},
        {"from": "gpt", "value": CLASSES[label]},
    ]
    free = [
        {"from": "human", "value": "<image>\nDescribe the face."},
        {"from": "gpt", "value": f"The brows of {index} are raised."},
        {"from": "human", "value": "Why?"},
        {"from": "gpt", "value": "I can only say what I see."},
    ]
    return {
        "id": f"{kind}-{index}",
        "kind": kind,
        "media": media,
        "label": label,
        "items": json.dumps([category, free]),
    }


def prior(frames: int, *, found: bool = True) -> Prior:
    boxes = np.tile(np.array([10, 10, 30, 30], np.float32), (frames, 1))
    landmarks = np.linspace(-1, 1, frames * 136).reshape(frames, 68, 2).astype(np.float32)
    return Prior(
        boxes,
        np.full(frames, found),
        landmarks,
        np.array([2, 1, 2]),
        np.array([0.9, 0.8, 0.7], np.float32),
    )


class Store:
    """Prepared data sets and their priors, in memory."""

    def __init__(self):
        images = [example(i, png(picture(i * 5)), "image") for i in range(11)]
        levels = [list(range(0, 10 * count, 10)) for count in FRAMES]
        media = [clip(x) for x in levels]
        clips = [example(i, media[i % 2], "clip") for i in range(6)]
        self.data = {"actionfaces/images": images, "actionfaces/clips": clips, "more": images[:4]}
        self.priors = {
            "actionfaces/images": [prior(1) for _ in images],
            "actionfaces/clips": [prior(FRAMES[i % 2]) for i in range(6)],
            "more": [prior(1, found=False) for _ in images[:4]],
        }

    def split(self, name: str, split: str = "train") -> InMemory:
        return InMemory(name, split, self.data[name], self.priors[name])

    def splits(self, cfg: config.Config) -> list[InMemory]:
        """Splits of a config's sources."""
        return [self.split(source.name, source.split) for source in cfg.data.sources]


def small_bpe() -> str:
    """The JSON of a small tokenizer."""
    words = " ".join(CLASSES)
    texts = [SYSTEM, f"USER: ASSISTANT: the facial expression {words} Choose one from"] * 9
    return train_bpe(texts, 420)


SOURCES = (
    "data.sources=[{name: actionfaces/images, split: train, kind: image, weight: 0.6}, "
    "{name: actionfaces/clips, split: train, kind: clip, weight: 0.4}]"
)


def make_config(bpe: str, *overrides: str) -> config.Config:
    both = f"{{kind: bpe, path: {bpe}}}"
    return config.load(
        "tiny",
        [
            SOURCES,
            f"data.llm_tokenizer={both}",
            f"data.question_tokenizer={both}",
            "data.text_length=260",
            "data.clip_text_length=340",
            "data.question_length=32",
            "data.clip_frames=16",
            "data.sampling=segments",
            "data.rounds=1",
            "data.workers=0",
            "data.blank_share=0",
            "data.broken_share=1",
            "model.vision.image_size=64",
            "model.face.swin.image_size=48",
            "data.packed=null",
            "train.image_batch=4",
            "train.clip_batch=2",
            *overrides,
        ],
    )


def iterator(cfg: config.Config, store: Store, **kwargs):
    return make_train_iterator(cfg, store.splits(cfg), **kwargs)


def assert_equal(first: Batch, second: Batch) -> None:
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)
