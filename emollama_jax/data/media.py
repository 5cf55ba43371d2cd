"""Pictures and clips from files, bytes or frame directories, and which frames of a clip are taken.

`to_model_frame` is the preprocessing of LLaMA-VID up to normalisation (Hugging Face's
`CLIPImageProcessor` on Pillow, and LLaVA's padding), `fps_indices` its sampling, `segment_indices`
that of dynamic FER code. What differs: EXIF and video rotation are applied, transparency is shown
on white, 16-bit pictures are scaled instead of clipped, a clip slower than the wanted rate gives
all its frames instead of an error, and every unreadable file raises one `UserError`.

What a file holds is judged by its content (`file_kinds`): pictures and animations are Pillow's and
pillow-heif's (`stills`), videos FFmpeg's (`video`). A directory of frames is a clip; it may be
packed into one file (`pack_frames`): an uncompressed zip, whose frames are read as those of the
directory, one by one.
"""

import dataclasses
import io
import os
import pathlib
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Container, Iterator
from typing import TypeGuard

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from emollama_jax.data import stills, video
from emollama_jax.data.file_kinds import (
    PICTURES,
    VIDEOS,
    Source,
    beginning,
    check,
    name_of,
    one_line,
    open_binary,
)
from emollama_jax.data.stills import MAX_PIXELS, Picture
from emollama_jax.errors import UserError

__all__ = ["MAX_PIXELS", "PICTURES", "VIDEOS", "Picture", "Source"]  # from the modules below

Pick = Callable[[int, float | None], Int[np.ndarray, " m"]]  # (frames, frames per second) → indices

PAD_COLOUR = (122, 116, 104)  # CLIP's mean as LLaVA rounds it
MAX_SIDE = 8192  # of what is resized; longer pictures are shrunk or cut first
MAX_ASPECT = 16
FRAME_ENDINGS = PICTURES  # of the frames in a directory


@dataclasses.dataclass(frozen=True)
class Clip:
    """Sampled frames of a clip."""

    frames: list[Picture]  # in the order of `indices`; a repeated index repeats the same array
    indices: Int[np.ndarray, " m"]
    count: int  # frames of the whole clip
    fps: float | None  # average rate; None for a directory of frames


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Which frames of a clip a model sees."""

    frames: int  # M
    fps: float | None  # frames a second that they are taken from; None: equal segments


def read_image(source: Source) -> Picture:
    """Reads a picture as RGB, upright; the first frame of an animation.

    Grey, palette, CMYK, LAB and 16-bit pictures are converted (`stills` says how), and what is
    transparent is shown on white.

    Raises:
        UserError: missing, a directory, empty, not a picture, broken, or over MAX_PIXELS.
    """
    name, kind = name_of(source), check(source)
    if kind == "picture":
        return stills.decode(_read(source), name)
    if kind == "heif":
        return stills.decode_heif(_read(source), name)
    found = "a video" if kind in ("video", "heif sequence") else f"begins with {beginning(source)}"
    raise UserError(
        f"{name}: not a picture ({found}; wanted JPEG, PNG, WebP, AVIF, HEIC, BMP, GIF, TIFF, "
        "JPEG 2000)"
    )


def is_video(source: Source) -> bool:
    """Whether a file holds a clip rather than a picture, by its content; directories are clips.

    Animated pictures (GIF, PNG, WebP, AVIF, HEIF sequences) are clips.

    Raises:
        UserError: neither of the two, missing, empty, a URL, or of a kind that is not supported.
    """
    if _is_folder(source):
        return bool(_frame_files(source))
    name, kind = name_of(source), check(source)
    if kind == "zip":
        return bool(_packed(source)[1])
    if kind == "picture":
        with open_binary(source) as file:
            return stills.is_animation(file, name)
    if kind == "heif":
        stills.need_heif(name)
        return False
    try:
        with video.opened(source):
            return True
    except video.NotAVideo:
        if kind != "unknown":
            raise
        raise UserError(
            f"{name}: neither a picture nor a video (begins with {beginning(source)})"
        ) from None


def read_frames(source: Source, pick: Pick) -> Clip:
    """Reads the wanted frames of a clip.

    Args:
        source: a video or animation, its bytes, or a directory of pictures (in the order of the
            numbers in their names).
        pick: given the number of frames and the average frames per second (None for a directory),
            returns the indices of the wanted frames, in any order and repeated at will.

    Raises:
        UserError: missing, not a video, truncated, broken, without frames, more than
            `video.MAX_CLIP` pixels wanted.
        IndexError: `pick` asked for a frame that the clip does not have.
    """

    def choose(count: int, fps: float | None) -> Int[np.ndarray, " m"]:
        indices = np.asarray(pick(count, fps))
        if indices.size and not 0 <= indices.min() <= indices.max() < count:
            raise IndexError(f"{name_of(source)}: frames {indices} of a clip of {count}")
        return indices

    if _is_video_file(source):
        with video.opened(source) as (container, stream):
            held = video.held_packets(container, stream)
            packets = container.demux(stream) if held is None else held
            count, fps = video.count(source, container, stream, packets)
            indices = choose(count, fps)
            wanted = set(indices.tolist())
            size = stream.codec_context.width * stream.codec_context.height
            _check_total(source, len(wanted), size, video.MAX_CLIP)
            found = video.select(stream, held, wanted, name=name_of(source)) if held else None
        if found is not None:
            return Clip([found[i] for i in indices.tolist()], indices, count, fps)
    else:
        count, fps = _probe(source)
        indices = choose(count, fps)
    while True:
        wanted = set(indices.tolist())
        kept, decoded = {}, 0
        for index, picture in _stream(source, wanted):
            decoded = index + 1
            if picture is not None:
                if not kept:
                    size = picture.shape[0] * picture.shape[1]
                    _check_total(source, len(wanted), size, video.MAX_CLIP)
                kept[index] = picture
            if len(kept) == len(wanted):
                return Clip([kept[i] for i in indices.tolist()], indices, count, fps)
        if decoded == 0:
            raise UserError(video.no_frames(source))
        # Fewer frames decode than the container lists, e.g. after a cut before a key frame: what
        # decodes is the clip.
        count = decoded
        indices = choose(count, fps)


def read_video(source: Source) -> Iterator[Picture]:
    """Yields every frame of a clip, one at a time.

    Raises:
        UserError: as `read_frames`, and for more than `video.MAX_WHOLE` pixels in all.
    """
    count, _ = _probe(source)
    decoded = 0
    for _, picture in _stream(source, range(count)):
        if picture is not None:
            if not decoded:
                size = picture.shape[0] * picture.shape[1]
                _check_total(source, count, size, video.MAX_WHOLE)
            decoded += 1
            yield picture
    if decoded == 0:
        raise UserError(video.no_frames(source))


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
        segments: number of segments.
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


def sample_indices(
    count: int, fps: float | None, *, sampling: Sampling, rng: np.random.Generator | None = None
) -> Int[np.ndarray, " m"]:
    """The frames of a clip that the model sees: random ones in training, where `rng` is given, else
    central ones.

    With a rate, LLaMA-VID's frames; the static shape thins them out, or repeats the last.
    """
    if sampling.fps is None:
        return segment_indices(count, segments=sampling.frames, rng=rng)
    steady = fps_indices(count, fps, wanted_fps=sampling.fps)
    return steady[segment_indices(len(steady), segments=sampling.frames, rng=rng)]


def to_model_frame(
    picture: Picture, size: int, *, pad: bool
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The square that the vision tower reads: shortest edge to `size`, centre crop.

    Args:
        picture: any size. Beyond MAX_ASPECT : 1 the far ends, which the crop drops, are cut before
            the resize; beyond MAX_SIDE a picture to be padded is shrunk before.
        size: side of the result in pixels.
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


def _check_total(source: Source, frames: int, size: int, most: int) -> None:
    if frames * size > most:
        raise UserError(
            f"{name_of(source)}: {frames} frames of {size:,} pixels, wanted at most "
            f"{most:,} together; scale the clip down first"
        )


def _is_video_file(source: Source) -> bool:
    """Whether FFmpeg reads it; Pillow reads animations.

    Raises:
        UserError: missing, empty, or a picture.
    """
    if _is_folder(source):
        return False
    kind = check(source)
    if kind == "heif":
        raise UserError(f"{name_of(source)}: a picture, wanted a clip")
    return kind not in ("zip", "picture")


def _probe(source: Source) -> tuple[int, float | None]:
    """Frames of a clip and their average rate."""
    if _is_folder(source):
        return len(_frame_files(source)), None
    if _is_video_file(source):
        with video.opened(source) as (container, stream):
            return video.count(source, container, stream, container.demux(stream))
    if check(source) == "zip":
        return len(_packed(source)[1]), None
    with open_binary(source) as file, stills.opened(file, name_of(source)) as image:
        count = stills.count_frames(image)
        if count == 1:
            raise UserError(f"{name_of(source)}: a picture, wanted a clip")
        stills.check_animation(image, count, name_of(source))
        return count, video.animation_rate(source, image.format or "")


def _stream(source: Source, wanted: Container[int]) -> Iterator[tuple[int, Picture | None]]:
    """Decodes frame after frame; those that are not wanted come as None."""
    if _is_folder(source):
        for index, path in enumerate(_frame_files(source)):
            yield index, read_image(path) if index in wanted else None
    elif _is_video_file(source):
        yield from video.decoded(source, wanted)
    elif check(source) == "zip":
        archive, names = _packed(source)
        for index, name in enumerate(names):
            yield index, _packed_frame(source, archive, name) if index in wanted else None
    else:
        name = name_of(source)
        with open_binary(source) as file, stills.opened(file, name) as image:
            for index in range(stills.count_frames(image)):
                yield index, stills.animation_frame(image, index, name) if index in wanted else None


def _frame_files(folder: str | os.PathLike) -> list[pathlib.Path]:
    """Frames of a directory; 2.jpg comes before 10.jpg."""
    files = [p for p in pathlib.Path(folder).iterdir() if not p.name.startswith(".")]
    frames = [p for p in files if p.suffix.lower() in FRAME_ENDINGS]
    if not frames:
        kinds = Counter(
            p.suffix.lower() or ("folder" if p.is_dir() else "no ending") for p in files
        )
        found = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common(4)) or "nothing"
        raise UserError(f"{folder}: folder without frames (found: {found}; wanted .jpg, .png, …)")
    return sorted(frames, key=lambda path: _order(path.name))


def _order(name: str) -> list:
    return [int(s) if s.isdigit() else s for s in re.split(r"([0-9]+)", name)]


def _packed(source: Source) -> tuple[zipfile.ZipFile, list[str]]:
    """Packed frames and their names in order."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(_read(source)))
    except (zipfile.BadZipFile, ValueError, RuntimeError) as error:
        raise UserError(f"{name_of(source)}: broken packed frames ({one_line(error)})") from None
    infos = archive.infolist()
    # Stored as they are, else a small file could unpack to a large one.
    names = [
        info.filename
        for info in infos
        if info.filename.lower().endswith(FRAME_ENDINGS)
        and info.compress_type == zipfile.ZIP_STORED
    ]
    if not names or len(names) < len(infos):
        raise UserError(f"{name_of(source)}: an archive: unpack it and name what is in it")
    return archive, sorted(names, key=_order)


def _packed_frame(source: Source, archive: zipfile.ZipFile, name: str) -> Picture:
    try:
        return read_image(archive.read(name))
    except MemoryError:
        raise
    except Exception as error:  # zipfile raises whatever it trips over
        raise UserError(f"{name_of(source)}, frame {name}: {one_line(error)}") from None


def _is_folder(source: Source) -> TypeGuard[str | os.PathLike]:
    return not isinstance(source, bytes) and os.path.isdir(source)


def _read(source: Source) -> bytes:
    return source if isinstance(source, bytes) else pathlib.Path(source).read_bytes()
