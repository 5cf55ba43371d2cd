"""Pictures as upright RGB of 8 bits: Pillow's formats, HEIF, and animations frame by frame.

Sixteen bits. A file of 16 bits a channel often holds 8, 10, 12 or 14, right-aligned: shown as they
are, such pictures are almost black. How many bits are meant is taken from the file where it says
so: `BitsPerSample` or a maximum sample value of a TIFF, `sBIT` of a PNG whose values fit into it,
PPM and JPEG 2000 by their headers. Elsewhere it is the smallest of 8, 10, 12, 14 and 16 that holds
the picture's own maximum, so that a 16-bit picture whose brightest value is under a quarter comes
out brighter, unless the file declares 16 bits, or every value is a multiple of 257, as of 8 bits
that were widened.
"""

import functools
import importlib.util
import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import UInt8, UInt16
from PIL import Image, ImageFile, TiffImagePlugin

from emollama_jax.data.file_kinds import HOW_TO_CONVERT, one_line
from emollama_jax.errors import UserError

Picture = UInt8[np.ndarray, "h w 3"]

MAX_PIXELS = 89_478_485  # Pillow's own bound against decompression bombs; 9,459 × 9,459
MAX_FRAME = 2**25  # pixels of one frame of a clip; 8K video has 33,177,600
MAX_ANIMATION = 2**27  # pixels of all frames of an animation, each of which has to be decoded
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM")
ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")
BITS = (8, 10, 12, 14, 16)

_ORIENTATION = 0x0112  # EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# TIFF
_SUBFILE, _BITS, _PHOTOMETRIC, _MAXIMUM, _PLANES, _SUB_IFDS, _S_MAXIMUM, _DNG = (
    254, 258, 262, 281, 284, 330, 341, 50706,
)  # fmt: skip
_RAW_PHOTOMETRIC = (32803, 34892)  # colour filter array, linear raw

# Pillow's own words about a file reach nobody: what matters is one line of ours.
logging.getLogger("PIL").setLevel(logging.CRITICAL)


class CameraRaw(UserError):
    """A raw file, of which Pillow would read the thumbnail."""


_SILENCE = ("ignore", None, Warning, re.compile(r"(PIL|pillow_heif)\."), 0)


def _quiet() -> None:
    # Not `catch_warnings`: it would let threads, which all read pictures, mix up their filters.
    if _SILENCE not in warnings.filters:
        warnings.filterwarnings("ignore", module=_SILENCE[3].pattern)


@contextmanager
def opened(file: BinaryIO, name: str) -> Iterator[ImageFile.ImageFile]:
    """An open picture; whatever goes wrong with it becomes one line.

    Raises:
        UserError: not a picture, a camera's raw file, broken, or over MAX_PIXELS.
    """
    _quiet()
    try:
        with Image.open(file, formats=FORMATS) as image:
            _check_size(image.size, name)
            if image.format == "TIFF":
                _refuse_raw(image, name)
            yield image
    except (UserError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise UserError(f"{name}: broken picture, or of a rare kind; convert it to PNG") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(too_large(name, "more")) from None
    except Exception as error:  # a broken file makes Pillow's plugins raise whatever they trip over
        raise UserError(f"{name}: broken picture ({one_line(error)})") from None


def decode(data: bytes, name: str) -> Picture:
    """The picture in a file of one of FORMATS; the first frame of an animation."""
    with opened(io.BytesIO(data), name) as image:
        if _is_deep(image, data):
            return _deep_rgb(image, data, name)
        return _rgb(image, name)


def decode_heif(data: bytes, name: str) -> Picture:
    """The primary picture of a HEIF file, all tiles of a grid. Turned as the container says.

    The turn in its EXIF data is a copy of the container's (ISO 23008-12), and is left alone.
    """
    need_heif(name)
    import pillow_heif

    _quiet()
    try:
        file = pillow_heif.open_heif(io.BytesIO(data))
        _check_size(file.size, name)
        image = file.to_pillow()
        if image.mode.startswith("I"):  # 10 and 12 bits of grey, scaled to 16
            return _grey(np.asarray(image), None, bits=16, name=name)
        if image.mode == "La":  # grey, multiplied by its opacity
            image = image.convert("LA")
        return _flatten(image)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # as of Pillow's plugins
        raise UserError(f"{name}: broken HEIC picture ({one_line(error)})") from None


def heif_size(data: bytes, name: str) -> tuple[int, int]:
    """Width and height of a HEIF file's primary picture, by its header.

    Raises:
        UserError: broken, or the library is not installed.
    """
    need_heif(name)
    import pillow_heif

    _quiet()
    try:
        width, height = pillow_heif.open_heif(io.BytesIO(data)).size
        return width, height
    except Exception as error:  # as of Pillow's plugins
        raise UserError(f"{name}: broken HEIC picture ({one_line(error)})") from None


@functools.cache
def _has_heif() -> bool:
    return importlib.util.find_spec("pillow_heif") is not None


def need_heif(name: str) -> None:
    """Raises UserError where the library that reads HEIF is not installed."""
    if not _has_heif():
        raise UserError(
            f"{name}: HEIC is not supported without the extra `heif`: "
            f"pip install 'emollama-jax[heif]', or convert it: {HOW_TO_CONVERT}"
        )


def is_animation(file: BinaryIO, name: str) -> bool:
    """Whether a file of one of FORMATS moves; a broken one does not: `decode` says what it is.

    Raises:
        UserError: a camera's raw file.
    """
    try:
        with opened(file, name) as image:
            return count_frames(image) > 1
    except CameraRaw:
        raise
    except UserError:
        return False


def count_frames(image: Image.Image) -> int:
    """Frames of an animation; 1 of a picture."""
    if image.format not in ANIMATED:  # pages of a TIFF, a camera's second view
        return 1
    return max(getattr(image, "n_frames", 1) - getattr(image, "default_image", False), 1)


def check_animation(image: Image.Image, frames: int, name: str) -> None:
    """Raises UserError where a frame is over MAX_FRAME, or all together over MAX_ANIMATION."""
    check_frame(image.size, name)
    pixels = frames * image.width * image.height
    if pixels > MAX_ANIMATION:
        raise UserError(
            f"{name}: {frames} frames of {image.width}×{image.height} are {pixels:,} pixels, "
            f"wanted at most {MAX_ANIMATION:,}; shrink it first"
        )


def animation_frame(image: Image.Image, index: int, name: str) -> Picture:
    """A frame as it is shown, with those before it underneath where the file says so."""
    _seek(image, index)
    return _rgb(image, name)


def _seek(image: Image.Image, index: int) -> None:
    # A PNG may begin with a picture for readers that know no animations.
    image.seek(index + getattr(image, "default_image", False))


def _rgb(image: Image.Image, name: str) -> Picture:
    image.load()
    image = _upright(image)
    if image.mode.startswith("I"):
        # PPM and JPEG 2000 say how many bits they have, and Pillow scales them to 16.
        return _grey(np.asarray(image), None, bits=16, name=name)
    if image.mode == "F":
        raise UserError(f"{name}: floating-point picture without a range, wanted 8 or 16 bits")
    return _flatten(image)


def _flatten(image: Image.Image) -> Picture:
    """RGB; what is transparent shows white."""
    if image.mode == "LAB":
        from PIL import ImageCms

        profiles = (ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"))
        image = ImageCms.buildTransform(*profiles, "LAB", "RGB").apply(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _upright(image: Image.Image) -> Image.Image:
    """Turned as EXIF or XMP say; what cannot be read says nothing."""
    try:
        turn = image.getexif().get(_ORIENTATION)
    except Exception:
        return image
    method = _TURNS.get(turn) if isinstance(turn, int) else None
    if method is None:
        return image
    turned = image.transpose(method)
    turned.info = image.info  # a transparent colour
    return turned


# --- sixteen bits ---


def _is_deep(image: ImageFile.ImageFile, data: bytes) -> bool:
    if image.format == "PNG":
        return data[24] == 16
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        deep = np.max(image.tag_v2.get(_BITS, 1)) > 8
        return deep and image.mode not in ("F", "CMYK")  # dark ink is light: 16 bits are 16
    return False


def _deep_rgb(image: ImageFile.ImageFile, data: bytes, name: str) -> Picture:
    declared = _declared_bits(image, data)
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    clear = image.info.get("transparency")
    if image.mode.startswith("I"):
        image.load()
        levels = np.asarray(_upright(image))
        opaque = None if clear is None else levels != clear
        inverted = tags.get(_PHOTOMETRIC) == 0
        return _grey(levels, opaque, bits=declared, name=name, inverted=inverted)
    planes = tags.get(_PLANES) == 2
    mixed = planes and image.tile[0][0] == "raw"  # Pillow takes both bytes for pixels
    if clear is None and declared in (None, 16) and not mixed:
        image.load()
        high = _upright(image)
        if np.asarray(high)[..., :3].max() >= 1 << BITS[-2] - 8:  # of sixteen bits: eight will do
            return _flatten(high)
    if planes:
        raise UserError(
            f"{name}: 16-bit TIFF with a plane for each colour, wanted interleaved; save it as PNG"
        )
    levels = _deep_colours(image, data, name)
    colours, alpha = levels, None
    if levels.shape[2] in (2, 4):
        colours, alpha = levels[:, :, :-1], levels[:, :, -1]
    elif clear is not None:
        alpha = (levels != np.asarray(clear)).any(-1) * np.uint16(65535)
    bits = _bits(colours, declared)
    rgb = _eight(colours, bits)
    rgb = np.repeat(rgb, 3, axis=2) if rgb.shape[2] == 1 else rgb
    if alpha is None:
        return rgb
    alpha = _eight(alpha, 16 if bits == 16 else _bits(alpha, None))
    return _flatten(Image.fromarray(np.dstack([rgb, alpha])))


def _deep_colours(
    image: ImageFile.ImageFile, data: bytes, name: str
) -> UInt16[np.ndarray, "h w c"]:
    """All sixteen bits of colours, of which Pillow keeps eight: the file is read twice."""
    grey_alpha = image.format == "PNG" and data[25] == 4
    with opened(io.BytesIO(data), name) as other:
        _swap_bytes(other, pairs=grey_alpha)
        other.load()
        low = np.asarray(_upright(other))
    if grey_alpha:  # [h, w, 4]: the grey's high and low byte, the opacity's high and low byte
        return low[:, :, ::2].astype(np.uint16) << 8 | low[:, :, 1::2]
    image.load()
    return np.asarray(_upright(image)).astype(np.uint16) << 8 | low


def _swap_bytes(image: ImageFile.ImageFile, *, pairs: bool) -> None:
    """Makes Pillow, which reads the high byte of 16-bit colours, read the low one.

    Args:
        image: not loaded yet.
        pairs: grey and opacity, whose four bytes are read as four channels.
    """
    native, other = ("16L", "16B") if sys.byteorder == "little" else ("16B", "16L")
    swap = {"16B": "16L", "16L": "16B", "16N": other, native: other}
    tiles = []
    for tile in image.tile:
        args = tile[3]
        assert args is not None  # PNG and TIFF name the mode
        mode, *rest = (args,) if isinstance(args, str) else args
        mode = "RGBA" if pairs else mode[:-3] + swap[mode[-3:]]
        tiles.append((*tile[:3], mode if isinstance(args, str) else (mode, *rest)))
    image.tile = [type(old)(*new) for old, new in zip(image.tile, tiles, strict=True)]


def _declared_bits(image: ImageFile.ImageFile, data: bytes) -> int | None:
    """Bits that the file says are meant; None if it says nothing."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):  # the other deep format is PNG
        return _png_bits(data)
    stored = int(np.max(image.tag_v2[_BITS]))
    if stored < 16:
        return stored
    for tag in (_S_MAXIMUM, _MAXIMUM):
        if tag in image.tag_v2:
            largest = int(np.max(image.tag_v2[tag]))
            return next((bits for bits in BITS if largest < 1 << bits), 16)
    return None


def _png_bits(data: bytes) -> int | None:
    """The largest number of significant bits in a PNG's `sBIT` chunk."""
    start = 8
    while (kind := data[start + 4 : start + 8]) not in (b"IDAT", b""):
        size = int.from_bytes(data[start : start + 4])
        if kind == b"sBIT":
            return max(data[start + 8 : start + 8 + size], default=None)
        start += size + 12
    return None


def _bits(levels: np.ndarray, declared: int | None) -> int:
    largest = int(levels.max())
    if declared is not None:
        # A PNG that keeps to its standard is scaled to 16 bits whatever its sBIT.
        return declared if largest < 1 << declared else 16
    if largest and not (levels % 257).any():
        return 16
    return next(bits for bits in BITS if largest < 1 << bits)


def _eight(levels: np.ndarray, bits: int) -> UInt8[np.ndarray, "..."]:
    return (levels >> (bits - 8) if bits >= 8 else levels << (8 - bits)).astype(np.uint8)


def _grey(
    levels: np.ndarray,
    opaque: np.ndarray | None,
    *,
    bits: int | None,
    name: str,
    inverted: bool = False,
) -> Picture:
    if levels.min() < 0 or levels.max() > 65535:
        raise UserError(f"{name}: grey values {levels.min()} … {levels.max()}, wanted 8 or 16 bits")
    grey = _eight(levels, _bits(levels, bits))
    grey = 255 - grey if inverted else grey
    grey = grey if opaque is None else np.where(opaque, grey, np.uint8(255))
    return np.repeat(grey[:, :, None], 3, axis=2)


# --- refusals ---


def _refuse_raw(image: Any, name: str) -> None:
    """A raw file is a TIFF whose first picture is a thumbnail, or the sensor's own values."""
    tags = image.tag_v2
    preview = tags.get(_SUBFILE, 0) & 1 and _SUB_IFDS in tags
    if _DNG in tags or preview or tags.get(_PHOTOMETRIC) in _RAW_PHOTOMETRIC:
        raise CameraRaw(f"{name}: a camera's raw file: develop it to JPEG or PNG")


def _check_size(size: tuple[int, int], name: str) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise UserError(too_large(name, f"{size[0]}×{size[1]}"))


def check_frame(size: tuple[int, int], name: str) -> None:
    """Raises UserError for a frame of a clip over MAX_FRAME."""
    if size[0] * size[1] > MAX_FRAME:
        found = f"{size[0]}×{size[1]}"
        raise UserError(too_large(name, found, what="frames", most=MAX_FRAME))


def too_large(name: str, found: str, *, what: str = "picture", most: int = MAX_PIXELS) -> str:
    """Message about a picture, or frames, of too many pixels."""
    return f"{name}: {what} of {found} pixels, wanted at most {most:,}; shrink it first"
