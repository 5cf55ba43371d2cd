"""Contact sheets of pictures and film strips of clips, to look at."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from emollama_jax.data.action_units import EMOTIONS
from emollama_jax.tiny.actionfaces.sample import ClipSample, Sample

_CAPTION = 14  # pixels below each picture
_PAPER, _INK = (250, 250, 250), (20, 20, 20)


def contact_sheet(samples: Sequence[Sample], columns: int, *, scale: int = 1) -> Image.Image:
    """Returns pictures in rows, the emotion below each.

    Args:
        samples: At least one, all of one size.
        columns: Pictures in a row.
        scale: Each picture is enlarged this many times.
    """
    return _grid(
        [s.picture for s in samples], [EMOTIONS[s.emotion] for s in samples], columns, scale
    )


def film_strip(clip: ClipSample, *, columns: int = 12, scale: int = 1) -> Image.Image:
    """Returns a clip's frames in rows, below them the emotion and the seconds."""
    captions = [f"{frame / clip.fps:.2f} s" for frame in range(len(clip.frames))]
    captions[0] = EMOTIONS[clip.emotion]
    return _grid(list(clip.frames), captions, columns, scale)


def _grid(pictures: list[np.ndarray], captions: list[str], columns: int, scale: int) -> Image.Image:
    side = pictures[0].shape[0] * scale
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * side, rows * (side + _CAPTION)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = number % columns * side, number // columns * (side + _CAPTION)
        image = Image.fromarray(picture)
        sheet.paste(image.resize((side, side), Image.Resampling.BICUBIC), (x, y))
        pen.text((x + 3, y + side + 1), caption, fill=_INK)
    return sheet
