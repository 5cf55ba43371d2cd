"""Every picture upright, mirrored, bright and bounded as it should be."""

import io
import struct
import time

import numpy as np
import pytest
from PIL import Image

from emollama_jax.data import stills, video
from emollama_jax.data.media import is_video, read_frames, read_image, read_video
from emollama_jax.errors import UserError
from tests.helpers.media_files import (
    RGB,
    animation,
    close,
    encode,
    everything,
    movie,
    png16,
    tiff16,
)

# --- orientations ---


ONE = 1 << 16
MATRICES = {  # a, b, c, d: (x, y) → (ax + cy, bx + dy)
    "as it is": ((ONE, 0, 0, ONE), lambda x: x),
    "mirrored": ((-ONE, 0, 0, ONE), np.fliplr),
    "upside down": ((-ONE, 0, 0, -ONE), lambda x: np.rot90(x, 2)),
    "flipped": ((ONE, 0, 0, -ONE), np.flipud),
    "transposed": ((0, ONE, ONE, 0), lambda x: x.swapaxes(0, 1)),
    "clockwise": ((0, ONE, -ONE, 0), lambda x: np.rot90(x, 3)),
    "transversed": ((0, -ONE, -ONE, 0), lambda x: np.rot90(x, 2).swapaxes(0, 1)),
    "counter-clockwise": ((0, -ONE, ONE, 0), np.rot90),
}


@pytest.fixture(scope="module")
def shaded():
    """A film of three equal frames, and the place of its display matrix."""
    data = movie([RGB] * 3, crf="8")
    return data, data.index(b"tkhd") + 4 + 4 + 20 + 16  # version 0: flags, times, layer, volume


@pytest.mark.parametrize("name", MATRICES)
def test_display_matrices(shaded, name):
    data, start = shaded
    (a, b, c, d), turn = MATRICES[name]
    matrix = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    turned = data[:start] + matrix + data[start + 36 :]
    upright = list(read_video(data))
    assert close(upright[0], RGB)
    for frames in (read_frames(turned, everything).frames, list(read_video(turned))):
        for frame, wanted in zip(frames, upright, strict=True):
            np.testing.assert_array_equal(frame, turn(wanted))
            assert frame.flags.c_contiguous


def test_a_matrix_of_nothing_turns_nothing(shaded):
    data, start = shaded
    empty = data[:start] + bytes(36) + data[start + 36 :]
    np.testing.assert_array_equal(next(read_video(empty)), next(read_video(data)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_of_every_format(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    best = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind in "JPEG AVIF" else {}
    found = read_image(encode(RGB, kind, exif=exif, **best))
    wanted = Image.fromarray(RGB)
    if orientation > 1:
        wanted = wanted.transpose(stills._TURNS[orientation])
    assert close(found, np.asarray(wanted), within=2)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x09\0" + struct.pack("<HHII", 0x0112, 2, 99, 9999),
        b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHH", 0x0112, 3, 1, 77, 0) + bytes(4),
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHI", 0x0112, 12, 1) + bytes(4),
    ],
    ids=["text", "no directory", "cut", "no such turn", "another type"],
)
def test_corrupt_exif_says_nothing(kind, exif):
    best = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    assert close(read_image(encode(RGB, kind, exif=exif, **best)), RGB, within=2)


# --- depths ---


def levels(bits, channels=3):
    """RGB's brightness in `bits` bits, with low bits of their own; the largest value is there."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, channels))
    wide = np.take(RGB, [0, 1, 2, 0][:channels], axis=2).astype(np.uint16) * 256 + noise
    wide[0, 0] = 65535
    return (wide >> (16 - bits)).astype(np.uint16)


def shown(channels):
    found = np.take(RGB, [0, 1, 2][:channels], axis=2).copy()
    found[0, 0] = 255
    return np.repeat(found, 3, axis=2) if channels == 1 else found


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("write", [png16, tiff16])
def test_bits_in_a_file_of_sixteen(write, bits, channels):
    np.testing.assert_array_equal(read_image(write(levels(bits, channels))), shown(channels))


@pytest.mark.parametrize(
    "options", [{"byteorder": ">"}, {"compression": "zlib"}, {"tile": (16, 16)}]
)
def test_twelve_bits_in_tiffs_of_every_layout(options):
    np.testing.assert_array_equal(read_image(tiff16(levels(12), **options)), shown(3))


@pytest.mark.parametrize(
    ("compression", "bits"), [(None, 16), (None, 12), ("zlib", 12), ("zlib", 16)]
)
def test_planes_that_pillow_misreads_are_refused(compression, bits):
    planes = np.moveaxis(levels(bits), 2, 0)
    data = tiff16(planes, planarconfig="separate", compression=compression)
    if (compression, bits) == ("zlib", 16):
        np.testing.assert_array_equal(read_image(data), shown(3))
        return
    with pytest.raises(UserError, match="16-bit TIFF with a plane for each colour"):
        read_image(data)


def test_white_that_is_zero():
    grey = levels(12, 1)
    found = read_image(tiff16(4095 - grey, photometric="miniswhite"))
    np.testing.assert_array_equal(found, shown(1))


DARK = np.full((8, 8, 1), 1500, np.uint16)
DARK[0, 0] = 900


@pytest.mark.parametrize(
    ("data", "brightness"),
    [
        (png16(DARK), 1500 >> 4),
        (png16(DARK, (b"sBIT", b"\x10")), 1500 >> 8),
        (png16(DARK, (b"sBIT", b"\x0c")), 1500 >> 4),
        (png16(DARK, (b"sBIT", b"\x08")), 1500 >> 8),  # scaled to 16 bits, as the standard wants
        (png16(DARK // 257 * 257), 5),  # 8 bits, widened
        (png16(np.repeat(DARK, 3, 2), (b"sBIT", b"\x10\x10\x10")), 1500 >> 8),
        (png16(DARK * 0), 0),
        (png16(DARK // 16), 93),
        (b"P5 8 8 4095\n" + DARK.astype(">u2").tobytes(), 1500 >> 4),
        (b"P5 8 8 65535\n" + DARK.astype(">u2").tobytes(), 1500 >> 8),
    ],
)
def test_declared_depths(data, brightness):
    assert abs(int(read_image(data)[4, 4, 0]) - brightness) <= 1


@pytest.mark.parametrize(("largest", "brightness"), [(65535, 5), (4095, 93), (1500, 93)])
@pytest.mark.parametrize("tag", [281, 341])
def test_largest_value_of_a_tiff(tag, largest, brightness):
    data = tiff16(DARK, extratags=[(tag, 3, 1, largest, False)])
    assert read_image(data)[4, 4, 0] == brightness


def test_opacity_of_twelve_bits():
    """Half opaque red on white, in a range of 4095."""
    pixels = np.zeros((8, 8, 4), np.uint16)
    pixels[..., 0], pixels[..., 3] = 4095, 2048
    pixels[0, 0, 3] = 4095
    assert np.allclose(read_image(png16(pixels))[4, 4], [255, 127, 127], atol=1)
    grey = np.full((8, 8, 2), 4095, np.uint16)
    grey[4, 4] = 1024, 4095
    found = read_image(png16(grey))
    assert found[4, 4].tolist() == [64] * 3 and found[0, 0].tolist() == [255] * 3


def test_transparent_colour_of_sixteen_bits():
    grey, red = levels(16, 1), levels(16)
    grey[3, 3], red[3, 3] = 777, (777, 1, 2)
    found = read_image(png16(grey, (b"tRNS", struct.pack(">H", 777))))
    assert found[3, 3, 0] == 255 and (found[10:] == shown(1)[10:]).all()
    found = read_image(png16(red, (b"tRNS", struct.pack(">3H", 777, 1, 2))))
    assert (found[3, 3] == 255).all() and (found[10:] == shown(3)[10:]).all()


def test_deep_pictures_are_turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    wanted = np.rot90(shown(3), 3)
    data = png16(levels(12), (b"eXIf", exif.tobytes()[6:]))
    np.testing.assert_array_equal(read_image(data), wanted)
    data = tiff16(levels(12), extratags=[(0x0112, 3, 1, 6, False)])
    np.testing.assert_array_equal(read_image(data), wanted)


def test_lab():
    lab = Image.merge("LAB", [Image.new("L", (4, 4), value) for value in (136, 208, 195)])
    assert np.allclose(read_image(encode(lab, "TIFF")).mean((0, 1)), [255, 0, 0], atol=12)


# --- bounds ---


@pytest.mark.parametrize("kind", ["movie", "GIF", "WEBP"])
def test_frames_of_clips_are_bounded_one_by_one(monkeypatch, kind):
    data = movie([RGB] * 4, "ffv1", "matroska") if kind == "movie" else animation(kind)
    assert len(read_frames(data, everything).frames) == len(list(read_video(data)))
    monkeypatch.setattr(stills, "MAX_FRAME", 64 * 48 - 1)
    for read in (lambda d: read_frames(d, everything), lambda d: list(read_video(d))):
        with pytest.raises(UserError, match="frames of 64×48 pixels, wanted at most 3,071"):
            read(data)


def test_all_frames_of_a_clip_are_bounded_together(monkeypatch):
    data = movie([RGB] * 4)
    monkeypatch.setattr(video, "MAX_WHOLE", 64 * 48 * 4 - 1)
    with pytest.raises(UserError, match="4 frames of 3,072 pixels, wanted at most 12,287"):
        next(read_video(data))


def test_a_small_file_of_huge_frames_costs_nothing():
    """By its header alone: three frames of 9000×9000 are 179 KB of GIF and took 10 s and 2 GB."""
    frames = [Image.new("L", (9000, 9000), level) for level in (0, 40, 80)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert len(file.getvalue()) < 200_000
    start = time.process_time()
    with pytest.raises(UserError, match="frames of 9000×9000 pixels, wanted at most 33,554,432"):
        read_frames(file.getvalue(), everything)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("kind", ["mp4", "GIF", "folder"])
def test_frames_held_together_are_bounded(tmp_path, monkeypatch, kind):
    if kind == "folder":
        source = tmp_path
        for i in range(4):
            (tmp_path / f"{i}.png").write_bytes(encode(RGB, "PNG"))
    else:
        source = movie([RGB] * 4) if kind == "mp4" else animation(kind)
    monkeypatch.setattr(video, "MAX_CLIP", 64 * 48 * 2)
    assert len(read_frames(source, lambda count, fps: np.array([0, 3, 3])).frames) == 3
    with pytest.raises(UserError, match="3 frames of 3,072 pixels, wanted at most 6,144 together"):
        read_frames(source, lambda count, fps: np.arange(3))


def test_animations_are_bounded_as_a_whole(monkeypatch):
    monkeypatch.setattr(stills, "MAX_ANIMATION", 64 * 48 * 4)
    for kind in ("GIF", "WEBP"):
        assert is_video(animation(kind))
        with pytest.raises(UserError, match="5 frames of 64×48 are 15,360 pixels, wanted at most"):
            read_frames(animation(kind), everything)
