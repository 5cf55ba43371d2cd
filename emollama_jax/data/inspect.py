"""`emollama data inspect`: what is in a prepared split, as counts and as a contact sheet."""

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from emollama_jax.data.emotions import label_space
from emollama_jax.data.media import read_image, read_video
from emollama_jax.data.pipeline import open_source

TILE = 120  # pixels
STRIP = 10  # frames shown of a clip
COLUMNS = 10


def count_classes(
    folder: str | os.PathLike, name: str, split: str
) -> Iterator[tuple[str, int, float]]:
    """(class, examples, share) in the set's native order.

    Raises:
        UserError: not prepared.
    """
    data = open_source(str(folder), name, split)
    labels = [int(data[i]["label"]) for i in range(len(data))]
    for number, label in enumerate(label_space(name).classes):
        count = labels.count(number)
        yield label, count, count / len(labels)


def contact_sheet(
    folder: str | os.PathLike, name: str, split: str, *, most: int = 80
) -> Image.Image:
    """The first examples with their labels: pictures side by side, a clip as a strip of frames."""
    data = open_source(str(pathlib.Path(folder)), name, split)
    classes = label_space(name).classes
    tiles = [_tile(data[i], classes[int(data[i]["label"])]) for i in range(min(most, len(data)))]
    columns = COLUMNS if tiles[0].width <= TILE else 1
    tiles = tiles if columns > 1 else tiles[: most // 4]
    rows = -(-len(tiles) // columns)
    width, height = tiles[0].size
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * width, i // columns * height))
    return sheet


def _tile(example: Mapping[str, Any], label: str) -> Image.Image:
    if example["kind"] == "image":
        frames = [read_image(example["media"])]
    else:
        clip = list(read_video(example["media"]))
        frames = [clip[i] for i in np.linspace(0, len(clip) - 1, STRIP).astype(int)]
        label = f"{label}, {len(clip)} frames"
    tile = Image.new("RGB", (TILE * len(frames), TILE + 16), "white")
    for i, frame in enumerate(frames):
        picture = Image.fromarray(frame)
        picture.thumbnail((TILE - 4, TILE - 4))
        scale = (TILE - 4) / max(picture.size)
        size = tuple(round(side * scale) for side in picture.size)
        tile.paste(picture.resize(size, Image.Resampling.BICUBIC), (i * TILE + 2, 2))
    ImageDraw.Draw(tile).text((4, TILE), label, fill="black")
    return tile
