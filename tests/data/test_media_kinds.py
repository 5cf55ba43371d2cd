"""What files hold, by their content: HEIF, animations, and what is refused by name."""

import os
import pathlib
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from emollama_jax.data import file_kinds, media, stills
from emollama_jax.data.media import PICTURES, VIDEOS, is_video, read_frames, read_image, read_video
from emollama_jax.errors import UserError
from tests.helpers.media_files import (
    GREYS,
    RGB,
    animation,
    close,
    encode,
    everything,
    heic,
    means,
    movie,
    picture,
    pillow_heif,
    raw,
    rebrand,
    zipped,
)

# --- HEIF ---


@pytest.mark.parametrize("tile", [None, 64])
@pytest.mark.parametrize("brands", [None, ("mif1", "miaf"), ("heix",), ("mif1", "heic")])
def test_heic_photographs_are_read_whole(tmp_path, monkeypatch, tile, brands):
    """A grid of tiles is one photograph, whatever the brand and the file's name."""
    size = 150
    if tile:
        monkeypatch.setattr(pillow_heif.options, "GRID_TILE_SIZE", tile)
    whole = picture(size, 200)
    data = heic(whole)
    assert (b"grid" in data) == bool(tile)
    if brands:
        data = rebrand(data, *brands)
    path = tmp_path / "photo.mp4"
    path.write_bytes(data)
    assert not is_video(path) and not is_video(data)
    assert close(read_image(path), whole) and close(read_image(data), whole)
    with pytest.raises(UserError, match=r"photo\.mp4: a picture, wanted a clip"):
        read_frames(path, everything)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_heic_is_turned_once(orientation):
    """The container's turn is applied, its copy in EXIF is not applied again."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pillow_heif.register_heif_opener()
    try:
        data = encode(RGB, "HEIF", exif=exif.tobytes(), quality=100)
    finally:
        Image.OPEN.pop("HEIF", None)
        Image.ID.remove("HEIF")
    assert (b"irot" in data) or (b"imir" in data)
    wanted = np.asarray(Image.fromarray(RGB).transpose(stills._TURNS[orientation]))
    assert close(read_image(data), wanted)


def test_heic_of_other_depths_and_modes():
    grey = RGB[..., 0]
    wanted = np.stack([grey] * 3, -1)
    assert close(read_image(heic(grey, "L")), wanted)
    # pillow-heif gives grey of 10 bits as 16 bits, though asked for 8.
    assert close(read_image(heic(grey.astype(np.uint16) * 257, "I;16")), wanted)
    assert close(read_image(heic(RGB.astype(np.uint16) * 257, "RGB;16")), RGB)
    clear = np.dstack([RGB, np.zeros((48, 64), np.uint8)])
    assert (read_image(heic(clear, "RGBA")) > 250).all()


def test_heic_without_the_extra(monkeypatch, tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(heic(RGB))
    monkeypatch.setattr(stills, "_has_heif", lambda: False)
    for read in (is_video, read_image):
        with pytest.raises(UserError, match=r"photo\.jpg: HEIC is not supported.*emollama-jax\[h"):
            read(path)
    with pytest.raises(UserError, match=r"heif-convert .* sips"):
        is_video(path)


def test_broken_heic():
    data = heic(RGB)
    for share in (0.5, 0.95):
        with pytest.raises(UserError, match="broken HEIC picture") as caught:
            read_image(data[: int(len(data) * share)])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("brand", ["hevc", "msf1", "heic"])
def test_heif_sequences_are_clips(brand):
    data = movie([np.full((48, 64, 3), grey, np.uint8) for grey in GREYS], "libx265",
                 **{"x265-params": "log-level=none"})  # fmt: skip
    data = rebrand(data, brand).replace(b"vide", b"pict", 1)
    assert is_video(data)
    clip = read_frames(data, everything)
    assert np.allclose(means(clip.frames), GREYS, atol=2) and clip.fps == 10
    with pytest.raises(UserError, match="not a picture"):
        read_image(data)


# --- animations ---


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "AVIF"])
def test_animations_are_clips(tmp_path, kind):
    durations = [100, 200, 300, 40, 60]
    path = tmp_path / "still.jpg"  # the name says nothing
    path.write_bytes(animation(kind, durations=durations))
    assert is_video(path)
    for source in (path, path.read_bytes()):
        clip = read_frames(source, lambda count, fps: np.array([4, 0, 2, 2]))
        assert clip.count == 5 and clip.fps == pytest.approx(5 / 0.7)
        assert np.allclose(means(clip.frames), [210, 10, 110, 110], atol=2)
        assert np.allclose(means(read_video(source)), GREYS, atol=2)
    assert np.allclose(read_image(path).mean(), 10, atol=2)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "AVIF"])
def test_one_frame_is_a_picture(kind):
    data = animation(kind, greys=(77,))
    assert not is_video(data) and np.allclose(read_image(data), 77, atol=2)
    with pytest.raises(UserError, match="a picture, wanted a clip"):
        read_frames(data, everything)
    with pytest.raises(UserError, match="a picture, wanted a clip"):
        list(read_video(data))


def test_pages_and_views_are_pictures():
    pages = [Image.new("RGB", (64, 48), (grey,) * 3) for grey in GREYS]
    for kind in ("TIFF", "MPO"):
        data = encode(pages[0], kind, save_all=True, append_images=pages[1:])
        assert not is_video(data) and np.allclose(read_image(data), 10, atol=2)


@pytest.mark.parametrize(("kind", "slow"), [("GIF", 0), ("GIF", 10), ("PNG", 0), ("WEBP", 5)])
def test_frames_without_a_duration_last_as_in_browsers(kind, slow):
    data = animation(kind, durations=[slow] * 5)
    assert read_frames(data, everything).fps == 10


def test_apng_with_a_picture_for_old_readers():
    """That picture is no frame of the animation."""
    frames = [Image.new("L", (64, 48), grey) for grey in GREYS]
    data = encode(frames[0], "PNG", save_all=True, append_images=frames[1:], default_image=True)
    clip = read_frames(data, everything)
    assert means(clip.frames) == [60, 110, 160, 210]
    assert not is_video(
        encode(frames[0], "PNG", save_all=True, append_images=frames[1:2], default_image=True)
    )


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_parts_of_frames_are_shown_as_meant(kind):
    """A dot moves on an opaque ground: each frame shows the ground and its own dot."""
    frames = []
    for i in range(4):
        pixels = np.full((48, 64, 3), 40, np.uint8)
        pixels[10:20, 10 * i : 10 * i + 10] = 200
        frames.append(pixels)
    images = [Image.fromarray(pixels) for pixels in frames]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = encode(images[0], kind, save_all=True, append_images=images[1:], duration=50, **lossless)
    found = read_frames(data, lambda count, fps: np.array([3, 1]))
    np.testing.assert_array_equal(found.frames, [frames[3], frames[1]])


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "AVIF"])
def test_transparent_frames_show_white(kind):
    frames = []
    for i in range(3):
        pixels = np.zeros((48, 64, 4), np.uint8)
        pixels[:, 16 * i : 16 * i + 16] = (0, 0, 200, 255)
        pixels[::47, ::63] = 255  # corners: libwebp would cut off what is transparent around
        frames.append(Image.fromarray(pixels))
    more = {"disposal": 1} if kind == "PNG" else {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **more)
    last = read_frames(data, lambda count, fps: np.array([2])).frames[0]
    assert (last[4:-4, :30] > 240).all() and (last[4:-4, 50:] > 240).all()
    assert np.allclose(last[4:-4, 34:46].mean((0, 1)), [0, 0, 200], atol=6)


def test_videos_with_opacity_show_white():
    pixels = np.zeros((48, 64, 4), np.uint8)
    pixels[:, :32] = (200, 0, 0, 255)
    data = movie([pixels] * 2, "png", "mov", "rgba")
    frame = next(read_video(data))
    assert (frame[:, 32:] == 255).all() and (frame[:, :32] == [200, 0, 0]).all()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "AVIF"])
def test_truncated_animations(kind):
    data = animation(kind, greys=range(0, 250, 2))
    try:
        found = read_frames(data[: len(data) * 2 // 3], everything)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert kind == "GIF" and found.count < 125  # what is there can be told


# --- refusals ---


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("https://host/face.jpg", "https://host/face.jpg: a URL, wanted a file: download"),
        (pathlib.Path("https://host/face.jpg"), "https://host/face.jpg: a URL"),
        ("s3://bucket/clip.mp4", "s3://bucket/clip.mp4: a URL"),
        ("gs://bucket/clip.mp4", "a URL"),
        ("rtsp://camera/1", "a URL"),
        ("HTTP://HOST/x", "a URL"),
        ("file:///tmp/x.jpg", "file:///tmp/x.jpg: a URL, wanted a file: give only its path"),
        ("data:image/png;base64," + "A" * 5000, "…: a data URI, wanted a file"),
        ("C:/face.jpg", "no such file"),
        ("a:b.jpg", "no such file"),
        ("-", "no such file"),
        ("/dev/zero", "a pipe or a device"),
    ],
)
def test_no_files(source, said):
    for read in (is_video, read_image, lambda path: read_frames(path, everything)):
        with pytest.raises(UserError) as caught:
            read(source)
        assert said in str(caught.value) and len(str(caught.value)) < 200


def test_names_like_urls_are_files_where_they_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data:").mkdir()
    (tmp_path / "data:" / "face.png").write_bytes(encode(RGB, "PNG"))
    np.testing.assert_array_equal(read_image("data:/face.png"), RGB)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(UserError, match=r"pipe\.jpg: a pipe or a device, wanted a file"):
        is_video(tmp_path / "pipe.jpg")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"%PDF-1.7\n", "a PDF document: save its page as PNG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
        (b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- x --><svg/>", "an SVG drawing"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"8BPS\0\1", "a Photoshop document"),
        (b"\xff\x0a\x00", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"Rar!\x1a\x07", "an archive"),
        (b"\x1f\x8b\x08", "a gzip archive"),
        (b"\x93NUMPY\1\0", "a NumPy array"),
        (b"II*\0\x10\0\0\0CR\x02\0", "a camera's raw file"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "a camera's raw file"),
        (b"FUJIFILMCCD-RAW 0201", "a camera's raw file"),
        (raw((50706, b"\1\4\0\0")), "a camera's raw file"),  # DNG
        (raw((254, 1), (330, 8)), "a camera's raw file"),  # NEF, ARW: a thumbnail first
        (zipped("IMG_1.HEIC.png", "IMG_1.mov"), "an archive: unpack it"),  # a Live Photo
        (zipped("notes.txt"), "an archive: unpack it"),
        (b"dear friend, " * 9, "neither a picture nor a video (begins with 'dear friend"),
        (b"", "is empty (0 bytes)"),
        (bytes(100), "neither a picture nor a video"),
    ],
)
def test_what_is_neither_is_named(tmp_path, content, said):
    for name in ("face.jpg", "clip.mp4"):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            is_video(path)
        assert f"{name}: " in str(caught.value) and said in str(caught.value)
        for read in (read_image, lambda path: read_frames(path, everything)):
            with pytest.raises(UserError) as caught:
                read(path)
            assert "\n" not in str(caught.value)


def test_a_reduced_tiff_alone_is_a_picture():
    assert read_image(raw((254, 1))).shape == (12, 16, 3)


def test_folders_without_frames(tmp_path):
    with pytest.raises(UserError, match=r"folder without frames \(found: nothing; wanted \.jpg"):
        is_video(tmp_path)
    (tmp_path / "a.mp4").touch()
    (tmp_path / "b.MP4").touch()
    (tmp_path / "readme").touch()
    (tmp_path / ".hidden.jpg").touch()
    (tmp_path / "inner").mkdir()
    said = (
        r"\(found: 2 \.mp4, 1 no ending, 1 folder; wanted|\(found: 2 \.mp4, 1 folder, 1 no ending"
    )
    with pytest.raises(UserError, match=said):
        read_frames(tmp_path, everything)


def test_frames_of_every_ending(tmp_path):
    (tmp_path / "1.webp").write_bytes(encode(RGB, "WEBP", lossless=True))
    (tmp_path / "2.HEIC").write_bytes(heic(RGB))
    (tmp_path / "10.jfif").write_bytes(encode(RGB, "JPEG", quality=100))
    frames = read_frames(tmp_path, everything).frames
    assert len(frames) == 3 and all(close(frame, RGB) for frame in frames)
    packed = media.pack_frames(tmp_path)
    np.testing.assert_array_equal(read_frames(packed, everything).frames, frames)


@pytest.mark.parametrize("tag", [b"zzzz", b"ap4h"])
def test_codecs_without_a_decoder(tag):
    data = movie([RGB] * 2).replace(b"avc1", tag)
    if tag == b"ap4h":
        data = data.replace(b"avcC", b"free")  # ProRes that is none
    reads = (is_video, lambda d: read_frames(d, everything), lambda d: list(read_video(d)))
    for read in reads[tag == b"ap4h" :]:
        with pytest.raises(UserError) as caught:
            read(data)
        assert "\n" not in str(caught.value)
    if tag == b"zzzz":
        assert "a codec that FFmpeg cannot decode" in str(caught.value)


# --- the rest ---


def test_endings():
    for ending in (".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".png", ".apng", ".webp", ".bmp",
                   ".dib", ".tif", ".tiff", ".gif", ".avif", ".jp2", ".heic", ".heif"):  # fmt: skip
        assert ending in PICTURES
    for ending in (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".ts", ".wmv", ".3gp"):
        assert ending in VIDEOS
    for endings in (PICTURES, VIDEOS):
        assert all(e == e.lower() and e.startswith(".") for e in endings)
        assert len(set(endings)) == len(endings)
    assert not set(PICTURES) & set(VIDEOS)


def test_every_known_brand_has_one_kind():
    def kind(major, *others):
        names = b"".join(name.encode() for name in others)
        head = struct.pack(">I4s4sI", 16 + len(names), b"ftyp", major.encode(), 0) + names
        return file_kinds.check(head + struct.pack(">I4s", 8, b"meta"))

    assert {kind(brand) for brand in ("heic", "heix", "mif1", "heim", "heis", "msf1")} == {"heif"}
    assert {kind("avif"), kind("avis"), kind("mif1", "avif"), kind("msf1", "avis")} == {"picture"}
    assert {kind("isom", "mp42"), kind("qt  "), kind("mp42", "mif1"), kind("????")} == {"video"}
    assert file_kinds.brands(b"\0\0\0\x08free\0\0\0\x10ftypheic\0\0\0\0") == ["heic"]


def test_paths_are_checked_without_jax(root):
    code = "import sys; from emollama_jax.data import media; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_libraries_say_nothing(tmp_path, root):
    """What Pillow, libheif, libtiff and FFmpeg would print about odd files stays unsaid."""
    jpeg = encode(RGB, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x09\0" + b"\xff" * 30)
    tiff = encode(RGB, "TIFF", compression="tiff_lzw")
    film = movie([RGB] * 8)
    odd = [
        jpeg, jpeg[:-40], tiff[: len(tiff) // 2], tiff.replace(b"\x03\x01", b"\x07\x91"),
        heic(RGB)[:-200], film[:-300], film[:600] + bytes(200) + film[800:],
        animation("WEBP")[:-30], animation("PNG")[:-60], animation("AVIF")[:-100],
        encode(RGB, "JPEG2000")[:-300], b"II*\0" + b"\xff" * 64, encode(RGB, "PNG")[:-70],
    ]  # fmt: skip
    big = struct.pack(">IIBBBBB", 9500, 9500, 8, 2, 0, 0, 0)
    png = encode(RGB, "PNG")
    head = b"IHDR" + big
    odd.append(png[:12] + head + struct.pack(">I", zlib.crc32(head)) + png[33:])
    for number, content in enumerate(odd):
        (tmp_path / str(number)).write_bytes(content)
    code = """
import pathlib, sys
import numpy as np
from emollama_jax.data.media import is_video, read_frames, read_image
from emollama_jax.errors import UserError
for path in pathlib.Path(sys.argv[1]).iterdir():
    for read in (is_video, read_image, lambda p: read_frames(p, lambda n, fps: np.arange(n))):
        try:
            read(path)
        except UserError as error:
            assert "\\n" not in str(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
