"""Pictures and clips from files, bytes or frame directories, and which frames of a clip are taken.

`to_model_frame` is the preprocessing of LLaMA-VID up to normalisation (Hugging Face's
`CLIPImageProcessor` on Pillow, and LLaVA's padding), `fps_indices` its sampling, `segment_indices`
that of dynamic FER code. What differs: EXIF and video rotation are applied, transparency is shown
on white, 16-bit pictures are scaled instead of clipped, a clip slower than the wanted rate gives
all its frames instead of an error, and every unreadable file raises one `UserError`.

A directory of frames may be packed into one file (`pack_frames`): an uncompressed zip, whose frames
are read as those of the directory, one by one.

A clip's frames are counted without decoding. Of H.264 and HEVC in MP4 or Matroska, frames that are
neither wanted nor referred to are not decoded at all, which changes no pixel of the others; all
else is decoded frame by frame. Only wanted frames become pictures. FFmpeg may open containers that
hold video and nothing else: a playlist or a text file could make it read other files or the
network.
"""

import dataclasses
import io
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageOps

from emollama_jax.errors import UserError

Source = str | os.PathLike | bytes  # a path, or the file's content
Picture = UInt8[np.ndarray, "h w 3"]
Pick = Callable[[int, float | None], Int[np.ndarray, " m"]]  # (frames, frames per second) → indices

PAD_COLOUR = (122, 116, 104)  # CLIP's mean as LLaVA rounds it
MAX_PIXELS = 89_478_485  # Pillow's own bound against decompression bombs; 9,459 × 9,459
MAX_SIDE = 8192  # of what is resized; longer pictures are shrunk or cut first
MAX_ASPECT = 16
MAX_HELD = 2**26  # bytes of a video file whose packets are held between counting and decoding
PICTURES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".avif", ".jp2", ".heic", ".heif"),
)
VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".mpg", ".mpeg", ".m4v", ".flv", ".wmv")
FRAME_ENDINGS = (".jpg", ".jpeg", ".png")
_ZIP = b"PK\x03\x04"  # how packed frames begin
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,gif,apng,m4v,h264,hevc,mjpeg,ivf,nut,mxf,dv"


@dataclasses.dataclass(frozen=True)
class Clip:
    """Sampled frames of a clip."""

    frames: list[Picture]  # in the order of `indices`; a repeated index repeats the same array
    indices: Int[np.ndarray, " m"]
    count: int  # frames of the whole clip
    fps: float | None  # average rate; None for a directory of frames


def read_image(source: Source) -> Picture:
    """Reads a picture as RGB, upright; the first frame of an animation.

    Grey, palette, CMYK and 16-bit pictures are converted (16 bits lose the lower eight), and what
    is transparent is shown on white.

    Raises:
        UserError: missing, a directory, empty, not a picture, broken, or over MAX_PIXELS.
    """
    name = _name(source)
    data = _read(source)
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(_too_large(name, f"{image.width}×{image.height}"))
            return _rgb(ImageOps.exif_transpose(image), name)
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        start = data[:16].decode("ascii", "replace").encode("ascii", "backslashreplace").decode()
        raise UserError(
            f"{name}: not a picture (begins with {start!r}; wanted JPEG, PNG, WebP, BMP, GIF, TIFF)"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(_too_large(name, "more")) from None
    except MemoryError:
        raise
    except Exception as error:  # a broken file makes Pillow's plugins raise whatever they trip over
        raise UserError(f"{name}: broken picture ({_one_line(error)})") from None


def is_video(source: Source) -> bool:
    """Whether a file holds a clip rather than a picture, by its content; directories are clips.

    An animated GIF or PNG is a clip.

    Raises:
        UserError: neither of the two, missing or empty.
    """
    if _is_folder(source):
        return bool(_frame_files(source))
    data = _read(source)
    if data.startswith(_ZIP):
        return bool(_packed(source)[1])
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.format in ("GIF", "PNG") and getattr(image, "n_frames", 1) > 1
    except Image.UnidentifiedImageError:
        pass
    except Exception:  # a picture, if a broken one: `read_image` says what is wrong with it
        return False
    try:
        with _open(source):
            return True
    except UserError:
        raise UserError(f"{_name(source)}: neither a picture nor a video") from None


def read_frames(source: Source, pick: Pick) -> Clip:
    """Reads the wanted frames of a clip.

    Args:
        source: a video file, its bytes, or a directory of .jpg or .png frames (in the order of the
            numbers in their names).
        pick: given the number of frames and the average frames per second (None for a directory),
            returns the indices of the wanted frames, in any order and repeated at will.

    Raises:
        UserError: missing, not a video, truncated, broken, without frames.
        IndexError: `pick` asked for a frame that the clip does not have.
    """

    def choose(count: int, fps: float | None) -> Int[np.ndarray, " m"]:
        indices = np.asarray(pick(count, fps))
        if indices.size and not 0 <= indices.min() <= indices.max() < count:
            raise IndexError(f"{_name(source)}: frames {indices} of a clip of {count}")
        return indices

    if _is_folder(source) or _is_packed(source):
        count, fps = _probe(source)
        indices = choose(count, fps)
    else:
        with _open(source) as (container, stream):
            held = container.size <= MAX_HELD and _skips(container, stream)
            packets = container.demux(stream)
            packets = list(packets) if held else packets
            count, fps = _count(source, container, stream, packets)
            indices = choose(count, fps)
            found = _select(stream, packets, set(indices.tolist())) if held else None
        if found is not None:
            return Clip([found[i] for i in indices.tolist()], indices, count, fps)
    while True:
        wanted = set(indices.tolist())
        kept, decoded = {}, 0
        for index, picture in _stream(source, wanted):
            decoded = index + 1
            if picture is not None:
                kept[index] = picture
            if len(kept) == len(wanted):
                return Clip([kept[i] for i in indices.tolist()], indices, count, fps)
        if decoded == 0:
            raise UserError(_no_frames(source))
        # Fewer frames decode than the container lists, e.g. after a cut before a key frame: what
        # decodes is the clip.
        count = decoded
        indices = choose(count, fps)


def read_video(source: Source) -> Iterator[Picture]:
    """Yields every frame of a clip, one at a time. Raises what `read_frames` raises."""
    count, _ = _probe(source)
    decoded = 0
    for _, picture in _stream(source, range(count)):
        if picture is not None:
            decoded += 1
            yield picture
    if decoded == 0:
        raise UserError(_no_frames(source))


def pack_frames(folder: str | os.PathLike) -> bytes:
    """A directory of frames as one file that `read_frames` reads: its frames, byte for byte.

    Raises:
        UserError: a directory without frames.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for path in _frame_files(folder):
            # A fixed date: the same frames give the same bytes.
            archive.writestr(zipfile.ZipInfo(path.name), path.read_bytes())
    return buffer.getvalue()


def segment_indices(
    count: int, *, segments: int, rng: np.random.Generator | None
) -> Int[np.ndarray, " {segments}"]:
    """One frame from each of equal segments, as dynamic FER code samples.

    Args:
        count: frames of the clip, at least 1. If fewer than segments, each is taken once and the
            last is repeated.
        segments: how many.
        rng: draws a frame of each segment (training); None takes its centre (evaluation).
    """
    if count < segments:
        return np.minimum(np.arange(segments), count - 1)
    edges = np.arange(segments + 1) * count // segments
    if rng is not None:
        return rng.integers(edges[:-1], edges[1:])
    return ((np.arange(segments) + 0.5) * (count / segments)).astype(np.int64)


def fps_indices(count: int, fps: float | None, *, wanted_fps: float) -> Int[np.ndarray, " m"]:
    """Every n-th frame from the first on, n = fps / wanted_fps rounded half to even (LLaMA-VID).

    Raises:
        UserError: the clip has no frame rate, e.g. a directory of frames.
    """
    if fps is None:
        raise UserError(
            "a directory of frames has no frame rate: sample it with data.sampling=segments"
        )
    return np.arange(0, count, max(round(fps / wanted_fps), 1))


def to_model_frame(
    picture: Picture, size: int, *, pad: bool
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The square that the vision tower reads: shortest edge to `size`, centre crop.

    Args:
        picture: any size. Beyond MAX_ASPECT : 1 the far ends, which the crop drops, are cut before
            the resize; beyond MAX_SIDE a picture to be padded is shrunk before.
        size: of the result in pixels.
        pad: first pastes the picture onto a square of PAD_COLOUR, so that nothing is cropped.
            LLaMA-VID pads images, never frames of a video.
    """
    image = Image.fromarray(np.ascontiguousarray(picture))
    if pad:
        image = _square(image)
    short, long = sorted(image.size)
    if long > MAX_ASPECT * short:
        keep = MAX_ASPECT * short
        left, top = (max(side - keep, 0) // 2 for side in image.size)
        image = image.crop(
            (left, top, left + min(image.width, keep), top + min(image.height, keep))
        )
        long = keep
    width, height = (
        (size, int(size * long / short))
        if image.width <= image.height
        else (int(size * long / short), size)
    )
    # Pillow resizes across, then down; what the crop drops is left out in between.
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    image = image.crop((left, 0, left + size, image.height))
    image = image.resize((size, height), Image.Resampling.BICUBIC)
    return np.array(image.crop((0, top, size, top + size)))


def _square(image: Image.Image) -> Image.Image:
    side = max(image.size)
    if side > MAX_SIDE:
        image = image.resize(
            [max(round(x * MAX_SIDE / side), 1) for x in image.size], Image.Resampling.BICUBIC
        )
        side = MAX_SIDE
    square = Image.new("RGB", (side, side), PAD_COLOUR)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _rgb(image: Image.Image, name: str) -> Picture:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise UserError(f"{name}: grey values {grey.min()} … {grey.max()}, wanted 8 or 16 bits")
        return np.repeat((grey >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise UserError(f"{name}: floating-point picture without a range, wanted 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _probe(source: Source) -> tuple[int, float | None]:
    """Frames of a clip and their average rate, without decoding."""
    if _is_folder(source):
        return len(_frame_files(source)), None
    if _is_packed(source):
        return len(_packed(source)[1]), None
    with _open(source) as (container, stream):
        return _count(source, container, stream, container.demux(stream))


def _count(
    source: Source, container: Any, stream: Any, packets: Iterable[Any]
) -> tuple[int, float | None]:
    """`_probe` of an open container's packets."""
    discarded = [packet.is_discard for packet in packets if packet.size]
    count = discarded.count(False)
    # Only MP4's table counts what the file should hold; other headers are often estimates.
    if "mov" in container.format.name and len(discarded) < stream.frames:
        raise UserError(
            f"{_name(source)}: truncated video ({len(discarded)} of {stream.frames} frames)"
        )
    if count == 0:
        raise UserError(_no_frames(source))
    rate = stream.average_rate or stream.guessed_rate
    return count, float(rate) if rate else None


def _skips(container: Any, stream: Any) -> bool:
    """Whether frames can be left out: packets are frames, and the decoder knows references."""
    boxed = any(name in container.format.name for name in ("mov", "matroska"))
    return boxed and stream.codec.name in ("h264", "hevc")


def _select(stream: Any, packets: Sequence[Any], wanted: set[int]) -> dict[int, Picture] | None:
    """The wanted frames by index; of the others only those that later ones refer to are decoded.

    None where packets and frames cannot be matched, or a wanted frame does not decode: then frames
    have to be counted as they come out.
    """
    times = sorted(p.pts for p in packets if p.size and not p.is_discard and p.pts is not None)
    frames = [p for p in packets if p.size]
    if len(set(times)) < sum(not p.is_discard for p in frames) or not frames[0].is_keyframe:
        return None
    from av.video.reformatter import VideoReformatter

    converter = VideoReformatter()
    places = {times[index]: index for index in wanted}
    found: dict[int, Picture] = {}
    stream.codec_context.thread_count = 1  # slices are few, and threads for them cost a tenth
    skip = ""
    for packet in packets:
        needed = "DEFAULT" if packet.pts in places or not packet.size else "NONREF"
        if needed != skip:
            stream.codec_context.skip_frame = skip = needed
        for frame in stream.decode(packet):
            if frame.pts in places:
                found[places[frame.pts]] = _picture(converter, frame)
        if len(found) == len(wanted):
            return found
    return None


def _stream(source: Source, wanted: Container[int]) -> Iterator[tuple[int, Picture | None]]:
    """Decodes frame after frame; those that are not wanted come as None."""
    if _is_folder(source):
        for index, path in enumerate(_frame_files(source)):
            yield index, read_image(path) if index in wanted else None
        return
    if _is_packed(source):
        archive, names = _packed(source)
        for index, name in enumerate(names):
            yield index, _packed_frame(source, archive, name) if index in wanted else None
        return
    from av.video.reformatter import VideoReformatter

    # One converter for all frames, on this thread: setting it up costs more than a small frame.
    converter = VideoReformatter()
    with _open(source) as (container, stream):
        for index, frame in enumerate(container.decode(stream)):
            if index not in wanted:
                yield index, None
                continue
            yield index, _picture(converter, frame)


def _picture(converter: Any, frame: Any) -> Picture:
    picture = converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    # A copy: the array would keep FFmpeg's padded buffer alive.
    return np.array(np.rot90(picture, round(frame.rotation / 90)), order="C")


@contextmanager
def _open(source: Source) -> Iterator[tuple[Any, Any]]:
    """An open container and its video stream; FFmpeg's errors become one line."""
    import av  # imported here: FFmpeg's libraries are large and most commands need none

    name = _name(source)
    _check(source)
    file = (
        io.BytesIO(source)
        if isinstance(source, bytes)
        else os.path.abspath(source)  # "a:b.mp4" would name a protocol
    )
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    try:
        with av.open(file, options=options) as container:
            covers = av.stream.Disposition.attached_pic
            streams = [s for s in container.streams.video if not s.disposition & covers]
            if not streams:
                kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
                raise UserError(f"{name}: no video stream (found: {kinds})")
            yield container, streams[0]
    except (av.error.FFmpegError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: not a readable video ({_one_line(error)})") from None


def _frame_files(folder: str | os.PathLike) -> list[pathlib.Path]:
    """Frames of a directory; 2.jpg comes before 10.jpg."""
    files = [p for p in pathlib.Path(folder).iterdir() if p.suffix.lower() in FRAME_ENDINGS]
    files = [p for p in files if not p.name.startswith(".")]
    if not files:
        raise UserError(f"{folder}: directory without .jpg or .png frames")
    return sorted(files, key=lambda path: _order(path.name))


def _order(name: str) -> list:
    return [int(s) if s.isdigit() else s for s in re.split(r"([0-9]+)", name)]


def _is_packed(source: Source) -> bool:
    if isinstance(source, bytes):
        return source.startswith(_ZIP)
    path = pathlib.Path(source)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_ZIP)) == _ZIP


def _packed(source: Source) -> tuple[zipfile.ZipFile, list[str]]:
    """Packed frames and their names in order."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(_read(source)))
    except zipfile.BadZipFile as error:
        raise UserError(f"{_name(source)}: broken packed frames ({_one_line(error)})") from None
    # Stored as they are, else a small file could unpack to a large one.
    names = [
        info.filename
        for info in archive.infolist()
        if info.filename.lower().endswith(FRAME_ENDINGS)
        and info.compress_type == zipfile.ZIP_STORED
    ]
    if not names:
        raise UserError(f"{_name(source)}: neither a picture nor a video (a zip without frames)")
    return archive, sorted(names, key=_order)


def _packed_frame(source: Source, archive: zipfile.ZipFile, name: str) -> Picture:
    try:
        return read_image(archive.read(name))
    except (UserError, zipfile.BadZipFile, EOFError, RuntimeError) as error:
        raise UserError(f"{_name(source)}, frame {name}: {_one_line(error)}") from None


def _is_folder(source: Source) -> bool:
    return not isinstance(source, bytes) and os.path.isdir(source)


def _read(source: Source) -> bytes:
    _check(source)
    return source if isinstance(source, bytes) else pathlib.Path(source).read_bytes()


def _check(source: Source) -> None:
    """Raises UserError for what cannot be read at all."""
    if isinstance(source, bytes):
        size = len(source)
    else:
        path = pathlib.Path(source)
        if _is_folder(path):
            raise UserError(f"{path}: is a directory, wanted a file")
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({_one_line(error)})") from None
    if size == 0:
        raise UserError(f"{_name(source)}: is empty (0 bytes)")


def _name(source: Source) -> str:
    if isinstance(source, bytes):
        return f"media of {len(source)} bytes"
    return os.fspath(source)


def _no_frames(source: Source) -> str:
    return f"{_name(source)}: video without frames"


def _too_large(name: str, found: str) -> str:
    return f"{name}: picture of {found} pixels, wanted at most {MAX_PIXELS:,}; shrink it first"


def _one_line(error: BaseException) -> str:
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(words.split())
