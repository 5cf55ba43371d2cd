"""Media made for tests: pictures, animations, HEIC, films, archives."""

import io
import struct
import zipfile
import zlib

import av
import numpy as np
import pytest
from PIL import Image

pillow_heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")


def picture(height=48, width=64):
    """Smooth, with no symmetry, so that every rotation shows."""
    y, x = np.mgrid[:height, :width]
    colours = [x * 255 // width, y * 255 // height, (x + y) * 120 // (height + width)]
    return np.stack(colours, -1).astype(np.uint8)


RGB = picture()
GREYS = (10, 60, 110, 160, 210)


def encode(image, kind, **options):
    file = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file, kind, **options)
    return file.getvalue()


def heic(pixels, mode="RGB", **options):
    file = io.BytesIO()
    size = pixels.shape[1::-1]
    made = pillow_heif.from_bytes(mode, size, pixels.tobytes())
    made.save(file, quality=100, **options)
    return file.getvalue()


def animation(kind, greys=GREYS, durations=100, **options):
    frames = [Image.new("RGB", (64, 48), (grey,) * 3) for grey in greys]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    return encode(
        frames[0], kind, save_all=True, append_images=frames[1:], duration=durations,
        **lossless | options,
    )  # fmt: skip


def movie(frames, codec="libx264", container="mp4", pixels="yuv420p", **options):
    file = io.BytesIO()
    with av.open(file, "w", format=container) as opened:
        stream = opened.add_stream(codec, rate=10)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.options = pixels, options
        for frame in frames:
            kind = "rgba" if frame.shape[2] == 4 else "rgb24"
            opened.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format=kind)))
        opened.mux(stream.encode())
    return file.getvalue()


def rebrand(data, major, *others):
    """The same container under other brands."""
    size = int.from_bytes(data[:4])
    names = b"".join(name.encode() for name in (major, *others))[: size - 12]
    rest = data[8 + len(names[4:]) + 8 : size]
    return data[:8] + names[:4] + data[12:16] + names[4:] + rest + data[size:]


def everything(count, fps):
    return np.arange(count)


def means(frames):
    return [round(float(frame.mean())) for frame in frames]


def close(found, wanted, within=6):
    """The same picture but for compression."""
    return found.shape == wanted.shape and np.abs(found.astype(int) - wanted).mean() < within


def png16(levels, *chunks):
    """A 16-bit PNG; Pillow writes none in colour."""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[levels.shape[2]]
    rows = b"".join(b"\0" + row.tobytes() for row in levels.astype(">u2"))
    head = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], 16, kind, 0, 0, 0)

    def chunk(name, data):
        crc = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + crc

    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff16(levels, **options):
    tifffile = pytest.importorskip("tifffile", reason="scikit-image brings tifffile")
    file = io.BytesIO()
    grey = levels.shape[2] == 1
    photometric = {"photometric": "minisblack" if grey else "rgb"} | options
    tifffile.imwrite(file, levels[..., 0] if grey else levels, **photometric)
    return file.getvalue()


def raw(*tags, start=b"II*\0"):
    """A TIFF with a thumbnail, as cameras' raw files begin."""
    file = io.BytesIO()
    extra = {tag: value for tag, value in tags}
    Image.new("RGB", (16, 12)).save(file, "TIFF", tiffinfo=extra)
    return start + file.getvalue()[4:]


def zipped(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, encode(RGB, "PNG"))
    return file.getvalue()
