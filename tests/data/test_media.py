"""Pictures and clips from every kind of file, and what is said of broken ones."""

import io
import struct
import tracemalloc
import zlib

import av
import numpy as np
import pytest
from PIL import Image

from emollama_jax.data import media
from emollama_jax.data.media import (
    fps_indices,
    is_video,
    read_frames,
    read_image,
    read_video,
    segment_indices,
    to_model_frame,
)
from emollama_jax.errors import UserError


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(height=40, width=60):
    """Smooth, with no symmetry, so that every rotation shows."""
    y, x = np.mgrid[:height, :width]
    colours = [x * 255 // width, y * 255 // height, (x + y) * 120 // (height + width)]
    return np.stack(colours, -1).astype(np.uint8)


def write_clip(path, frames, *, codec="libx264", fps=25, options=None, container=None, keep=None):
    """Frames as a video file; `keep` chooses packets by (index, packet)."""
    with av.open(str(path), "w", format=container, options=options or {}) as file:
        stream = file.add_stream(codec, rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        if codec == "libx264":
            stream.options = {"crf": "8", "g": "6", "bf": "0"}
        file.start_encoding()
        packets = [p for f in frames for p in stream.encode(av.VideoFrame.from_ndarray(f))]
        for index, packet in enumerate([*packets, *stream.encode()]):
            if keep is None or keep(index, packet):
                file.mux(packet)
    return path


def grey_frames(count, height=48, width=64):
    """Frame i is grey 8·i."""
    return [np.full((height, width, 3), 8 * i, np.uint8) for i in range(count)]


def numbers(frames):
    return [round(float(f.mean()) / 8) for f in frames]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """24 frames as MP4, its index in front so that it can be truncated."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    return write_clip(path, grey_frames(24), options={"movflags": "faststart"})


def everything(count, fps):
    return np.arange(count)


# --- pictures ---


RGB = picture()
GREY = RGB[..., 0]
LEVELS16 = GREY.astype(np.uint16) * 256 + 77


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encode(Image.fromarray(RGB)), RGB),
        (encode(Image.fromarray(GREY)), np.stack([GREY] * 3, -1)),
        (encode(Image.fromarray(GREY > 99)), np.stack([(GREY > 99) * 255] * 3, -1)),
        (encode(Image.fromarray(LEVELS16)), np.stack([GREY] * 3, -1)),
        (encode(Image.fromarray(LEVELS16), "TIFF"), np.stack([GREY] * 3, -1)),
        (encode(Image.fromarray(RGB), "BMP"), RGB),
        (encode(Image.fromarray(RGB), "WEBP", lossless=True), RGB),
    ],
    ids=["rgb", "grey", "bits", "grey16", "tiff16", "bmp", "webp"],
)  # fmt: skip
def test_kinds_of_pictures(data, expected):
    found = read_image(data)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


def test_cmyk_colours():
    inks = np.zeros((8, 8, 4), np.uint8)
    inks[..., 1:3] = 255  # magenta and yellow: red
    found = read_image(encode(Image.fromarray(inks, "CMYK"), "JPEG", quality=95))
    assert found[4, 4, 0] > 240 and found[4, 4, 1:].max() < 15


def test_palette():
    image = Image.fromarray(RGB).quantize(8)
    np.testing.assert_array_equal(read_image(encode(image)), np.asarray(image.convert("RGB")))


def test_transparency_is_white():
    alpha = np.zeros((40, 60), np.uint8)
    alpha[:, :20], alpha[:, 20:40] = 255, 128
    image = Image.fromarray(np.dstack([RGB, alpha]))
    found = read_image(encode(image)).astype(int)
    np.testing.assert_array_equal(found[:, :20], RGB[:, :20])
    np.testing.assert_allclose(found[:, 20:40], (RGB[:, 20:40] * 128.0 + 255 * 127) / 255, atol=1)
    assert (found[:, 40:] == 255).all()
    palette = Image.fromarray(GREY // 64)
    palette.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    found = read_image(encode(palette, transparency=0))
    assert (found[GREY // 64 == 0] == 255).all() and (found[GREY // 64 == 1] == [200, 0, 0]).all()
    grey = Image.fromarray(np.dstack([GREY, alpha]), "LA")
    assert (read_image(encode(grey))[:, 40:] == 255).all()


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [(1, lambda x: x), (2, np.fliplr), (3, lambda x: np.rot90(x, 2)), (4, np.flipud),
     (5, lambda x: x.swapaxes(0, 1)), (6, lambda x: np.rot90(x, 3)), (8, np.rot90)],
)  # fmt: skip
def test_exif_orientation(orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(read_image(encode(Image.fromarray(RGB), exif=exif)), upright(RGB))


def test_first_frame_of_an_animation():
    frames = [Image.fromarray(np.full((10, 12, 3), c, np.uint8)) for c in (200, 50)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (read_image(data) == 200).all()
    assert is_video(data)
    assert numbers(read_video(data)) == [25, 6]


def test_path_and_bytes_agree(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(encode(Image.fromarray(RGB), "JPEG"))
    np.testing.assert_array_equal(read_image(path), read_image(path.read_bytes()))
    np.testing.assert_array_equal(read_image(str(path)), read_image(path))


@pytest.mark.parametrize("size", [(1, 1), (8000, 8000)])
def test_extreme_sizes(size):
    found = read_image(encode(Image.new("L", size, 90), compress_level=1))
    assert found.shape == (*size, 3) and found[0, 0, 0] == 90
    for pad in (False, True):
        assert (to_model_frame(found, 32, pad=pad) == 90).all()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.jpg", b"not a picture at all", r"text.jpg: not a picture \(begins with 'not a pic"),
        ("empty.png", b"", "empty.png: is empty"),
        ("cut.jpg", encode(Image.fromarray(RGB), "JPEG")[:400], "cut.jpg: broken picture"),
        ("cut.png", encode(Image.fromarray(RGB))[:120], "cut.png: broken picture"),
        ("zeros.jpg", bytes(100), "zeros.jpg: not a picture"),
        ("float.tif", encode(Image.fromarray(np.eye(4, dtype=np.float32)), "TIFF"), "floating"),
        ("wide.tif", encode(Image.fromarray(np.full((4, 4), -5, np.int32)), "TIFF"), "-5 … -5"),
    ],
)
def test_unreadable_pictures(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_image(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_picture_and_directory(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jpg: no such file"):
        read_image(tmp_path / "nowhere.jpg")
    with pytest.raises(UserError, match="is a directory"):
        read_image(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read_image(tmp_path / ("n" * 400))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_500, 60_000])
def test_decompression_bomb(side):
    """A header that claims an enormous picture is refused before anything is unpacked."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = encode(Image.fromarray(RGB))
    data = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    with pytest.raises(UserError, match="wanted at most 89,478,485"):
        read_image(data)
    assert not is_video(data)


# --- clips ---


@pytest.mark.parametrize(
    ("codec", "container"),
    [("libx264", "mp4"), ("mpeg4", "avi"), ("ffv1", "matroska"), ("libvpx", "webm"),
     ("libx264", "mpegts"), ("mpeg4", "mov")],
)  # fmt: skip
def test_containers(tmp_path, codec, container):
    path = write_clip(tmp_path / "clip.bin", grey_frames(9), codec=codec, container=container)
    clip = read_frames(path, everything)
    assert clip.count == 9 and numbers(clip.frames) == list(range(9))
    assert clip.fps == pytest.approx(25)
    assert is_video(path)
    assert clip.frames[0].shape == (48, 64, 3) and clip.frames[0].dtype == np.uint8


def test_wanted_frames(clip):
    asked = []

    def pick(count, fps):
        asked.append((count, fps))
        return np.array([20, 3, 3, 0])

    found = read_frames(clip, pick)
    assert asked == [(24, 25.0)]
    assert numbers(found.frames) == [20, 3, 3, 0]
    np.testing.assert_array_equal(found.indices, [20, 3, 3, 0])
    same = read_frames(clip.read_bytes(), pick)
    np.testing.assert_array_equal(same.frames, found.frames)
    with pytest.raises(IndexError, match="clip of 24"):
        read_frames(clip, lambda count, fps: np.array([24]))


def test_all_frames_streamed(clip):
    frames = read_video(clip)
    assert numbers([next(frames), next(frames)]) == [0, 1]
    assert numbers(frames) == list(range(2, 24))


def test_only_wanted_frames_are_held(tmp_path):
    path = write_clip(tmp_path / "long.mp4", grey_frames(30, 240, 320) * 5)
    frame = 240 * 320 * 3
    tracemalloc.start()
    kept = read_frames(path, lambda count, fps: np.array([10, 149]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kept.count == 150
    assert 2 * frame < peak < 8 * frame


def test_rotation(tmp_path):
    """Phones store the frames as the sensor lies and a matrix that turns them."""
    shaded = write_clip(tmp_path / "shaded.mp4", [picture(48, 64)] * 2)
    data = bytearray(shaded.read_bytes())
    upright = next(read_video(bytes(data)))
    start = data.index(b"tkhd") + 4 + 4 + 20 + 16  # version 0: flags, times, layer and volume
    one = 1 << 16
    for matrix, turns in (
        ((0, one, 0, -one, 0, 0, 0, 0, 1 << 30), 3),  # a quarter clockwise
        ((-one, 0, 0, 0, -one, 0, 0, 0, 1 << 30), 2),
        ((0, -one, 0, one, 0, 0, 0, 0, 1 << 30), 1),
    ):
        data[start : start + 36] = struct.pack(">9i", *matrix)
        np.testing.assert_array_equal(next(read_video(bytes(data))), np.rot90(upright, turns))


def test_frames_before_the_first_key_frame(tmp_path):
    """Frames that the container lists but that cannot be decoded do not count."""
    path = write_clip(
        tmp_path / "cut.mkv", grey_frames(12), container="matroska", keep=lambda i, p: i > 0
    )
    asked = []
    found = read_frames(path, lambda n, fps: asked.append(n) or np.array([0, n - 1]))
    assert asked == [11, found.count] and found.count < 11
    assert numbers(found.frames)[-1] == 11


def test_frame_directory(tmp_path):
    for i in range(12):  # 10.png sorts before 2.png by letters
        Image.fromarray(grey_frames(12)[i]).save(tmp_path / f"{i}.{'png' if i % 2 else 'jpg'}")
    (tmp_path / "notes.txt").write_text("not a frame")
    found = read_frames(tmp_path, lambda count, fps: segment_indices(count, segments=4, rng=None))
    assert found.count == 12 and found.fps is None
    assert numbers(found.frames) == [1, 4, 7, 10]
    assert numbers(read_video(tmp_path)) == list(range(12))
    assert is_video(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"folder without frames \(found: nothing; wanted \.jpg"):
        read_frames(tmp_path / "empty", everything)


@pytest.mark.parametrize("share", [0.4, 0.95])
def test_truncated_clip(tmp_path, clip, share):
    data = clip.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match=r"cut\.mp4: truncated video \(\d+ of 24 frames\)"):
        read_frames(tmp_path / "cut.mp4", everything)


def test_clip_without_its_index(tmp_path):
    path = write_clip(tmp_path / "late.mp4", grey_frames(24))  # MP4's index comes last
    with pytest.raises(UserError, match="not a readable video"):
        read_frames(path.read_bytes()[:-400], everything)


@pytest.mark.parametrize(
    ("container", "message"),
    [
        ("avi", "video without frames"),  # FFmpeg names the stream of an empty AVI only
        ("mp4", r"no video stream \(found: nothing\)"),
        ("matroska", r"not a readable video \(End of file\)"),
    ],
)
def test_video_without_frames(tmp_path, container, message):
    path = tmp_path / "none.bin"
    write_clip(path, grey_frames(2), container=container, keep=lambda i, p: False)
    for read in (lambda: read_frames(path, everything), lambda: list(read_video(path))):
        with pytest.raises(UserError, match=rf"none\.bin: {message}"):
            read()


def test_sound_without_pictures(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 8000
        file.mux(stream.encode(sound))
        file.mux(stream.encode())
    with pytest.raises(UserError, match=r"sound\.mp4: no video stream \(found: audio\)"):
        read_frames(path, everything)


@pytest.mark.parametrize(
    "content",
    [b"just text, of some length", b"#EXTM3U\n#EXTINF:1,\nframe.ts\n", b"ffconcat version 1.0\n"],
    ids=["text", "playlist", "concat"],
)
def test_not_media(tmp_path, content):
    """Text must not make FFmpeg draw it, nor playlists make it open other files."""
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"clip\.mp4: not a readable video"):
        read_frames(path, everything)
    with pytest.raises(UserError, match=r"clip\.mp4: neither a picture nor a video"):
        is_video(path)


def test_is_video_goes_by_content(tmp_path, clip):
    (tmp_path / "named.jpg").write_bytes(clip.read_bytes())
    (tmp_path / "named.mp4").write_bytes(encode(Image.fromarray(RGB), "JPEG"))
    assert is_video(tmp_path / "named.jpg")
    assert not is_video(tmp_path / "named.mp4")
    assert not is_video(encode(Image.fromarray(RGB), "GIF"))
    with pytest.raises(UserError, match="no such file"):
        is_video(tmp_path / "nowhere.mp4")


# --- sampling ---


def test_segment_centres():
    np.testing.assert_array_equal(segment_indices(48, segments=16, rng=None), np.arange(1, 48, 3))
    np.testing.assert_array_equal(segment_indices(16, segments=16, rng=None), np.arange(16))
    np.testing.assert_array_equal(segment_indices(10, segments=4, rng=None), [1, 3, 6, 8])


def test_segments_at_random():
    rng = np.random.default_rng(0)
    drawn = np.stack([segment_indices(37, segments=16, rng=rng) for _ in range(400)])
    edges = np.arange(17) * 37 // 16
    assert (drawn >= edges[:-1]).all() and (drawn < edges[1:]).all()
    assert set(drawn.ravel()) == set(range(37))  # no frame is out of reach, the last included
    again = segment_indices(37, segments=16, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(again, drawn[0])


@pytest.mark.parametrize("rng", [None, np.random.default_rng(0)])
def test_short_clips_repeat_the_last_frame(rng):
    np.testing.assert_array_equal(segment_indices(3, segments=6, rng=rng), [0, 1, 2, 2, 2, 2])
    np.testing.assert_array_equal(segment_indices(1, segments=2, rng=rng), [0, 0])


@pytest.mark.parametrize(
    ("fps", "stride"), [(25, 25), (29.97, 30), (12.5, 12), (13.5, 14), (2.5, 2), (0.5, 1)]
)
def test_fps_strides(fps, stride):
    np.testing.assert_array_equal(fps_indices(100, fps, wanted_fps=1.0), np.arange(0, 100, stride))


def test_fps_of_a_directory():
    with pytest.raises(UserError, match=r"data\.sampling=segments"):
        fps_indices(10, None, wanted_fps=1.0)


# --- the vision tower's frame ---


@pytest.mark.parametrize("shape", [(40, 60), (61, 40), (300, 451), (224, 224), (7, 5)])
def test_model_frame_is_clips(shape):
    """Against Hugging Face's processor, the Pillow one that LLaMA-VID ran."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 224}, crop_size=224, do_rescale=False, do_normalize=False
    )
    x = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    expected = np.asarray(processor(Image.fromarray(x))["pixel_values"][0]).transpose(1, 2, 0)
    found = to_model_frame(x, 224, pad=False)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


def test_padding():
    x = np.random.default_rng(0).integers(0, 256, (21, 30, 3), np.uint8)
    square = np.empty((30, 30, 3), np.uint8)
    square[:] = (122, 116, 104)
    square[4:25] = x  # nine rows are missing: four above, five below
    np.testing.assert_array_equal(
        to_model_frame(x, 64, pad=True), to_model_frame(square, 64, pad=False)
    )
    tall = to_model_frame(x.swapaxes(0, 1), 64, pad=True)
    np.testing.assert_array_equal(tall, to_model_frame(square.swapaxes(0, 1), 64, pad=False))


@pytest.mark.parametrize("shape", [(2, 70_000), (70_000, 2)])
def test_strips(shape):
    """The middle of a strip stays the middle, and its padded square is not built in full."""
    x = np.full((*shape, 3), 10, np.uint8)
    middle = max(shape) // 2
    np.moveaxis(x, int(np.argmax(shape)), 0)[middle - 8 : middle + 8] = 200
    tracemalloc.start()
    assert (to_model_frame(x, 32, pad=False) == 200).all()
    padded = to_model_frame(x, 32, pad=True)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert padded.shape == (32, 32, 3)
    assert (padded[0, 0] == media.PAD_COLOUR).all()
