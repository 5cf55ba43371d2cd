"""Frames of video files through FFmpeg: counted without decoding, upright, mirrored as marked.

Of H.264 and HEVC in MP4 or Matroska, frames that are neither wanted nor referred to are not decoded
at all, which changes no pixel of the others; all else is decoded frame by frame. Only wanted frames
become pictures.

FFmpeg may open containers that hold video and nothing else: a playlist or a text file could make it
read other files or the network.
"""

import io
import os
import struct
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from emollama_jax.data.file_kinds import Source, name_of, one_line, open_binary
from emollama_jax.data.stills import Picture, check_frame
from emollama_jax.errors import UserError

MAX_HELD = 2**26  # bytes of a video file whose packets are held between counting and decoding
MAX_CLIP = 2**28  # pixels of the sampled frames, which are held together; 0.8 GB
MAX_WHOLE = 2**30  # pixels of all frames of a clip, where all are wanted; 17 s of 1080p
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,m4v,h264,hevc,ivf,nut,mxf,dv,rm"


ANIMATIONS = "gif,mov"  # whose durations FFmpeg lists; mov is AVIF
SHORTEST = 10  # ms; frames that claim no more are shown for USUAL ms, as browsers do
USUAL = 100


class NotAVideo(UserError):
    """FFmpeg finds no container that it knows, or a broken one."""


@contextmanager
def opened(source: Source, *, formats: str = CONTAINERS) -> Iterator[tuple[Any, Any]]:
    """An open container and its video stream; FFmpeg's errors become one line.

    Args:
        source: a path, or the file's content.
        formats: formats that FFmpeg may open.

    Raises:
        UserError: no video, no decoder for it, frames over MAX_FRAME, broken.
    """
    import av.stream  # imported here: FFmpeg's libraries are large and most commands need none

    name = name_of(source)
    file = (
        io.BytesIO(source)
        if isinstance(source, bytes)
        else os.path.abspath(source)  # "a:b.mp4" would name a protocol
    )
    options = {"format_whitelist": formats, "protocol_whitelist": "file"}
    try:
        with av.open(file, options=options) as container:
            covers = av.stream.Disposition.attached_pic
            streams = [s for s in container.streams.video if not s.disposition & covers]
            if not streams:
                kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
                raise UserError(f"{name}: no video stream (found: {kinds})")
            # A HEIF sequence holds its still picture too.
            stream = next((s for s in streams if s.frames != 1), streams[0])
            if stream.codec_context is None:
                raise UserError(
                    f"{name}: video in a codec that FFmpeg cannot decode; save it as H.264 with "
                    "the program that made it"
                )
            check_frame((stream.codec_context.width, stream.codec_context.height), name)
            yield container, stream
    except (av.error.FFmpegError, UnicodeDecodeError) as error:
        raise NotAVideo(f"{name}: not a readable video ({one_line(error)})") from None


def count(
    source: Source, container: Any, stream: Any, packets: Iterable[Any]
) -> tuple[int, float | None]:
    """Frames of an open container's packets and their average rate, without decoding."""
    discarded = [packet.is_discard for packet in packets if packet.size]
    frames = discarded.count(False)
    # Only MP4's table counts what the file should hold; other headers are often estimates.
    if "mov" in container.format.name and len(discarded) < stream.frames:
        raise UserError(
            f"{name_of(source)}: truncated video ({len(discarded)} of {stream.frames} frames)"
        )
    if frames == 0:
        raise UserError(no_frames(source))
    rate = stream.average_rate or stream.guessed_rate
    return frames, float(rate) if rate else None


def animation_rate(source: Source, kind: str) -> float:
    """Average frames per second of an animated picture by its frames' durations, without decoding.

    Args:
        source: a path, or the file's content.
        kind: Pillow's name of its format.
    """
    if kind == "WEBP":
        durations = list(_webp_durations(source))
    elif kind == "PNG":
        durations = list(_png_durations(source))
    else:
        with opened(source, formats=ANIMATIONS) as (container, stream):
            packets = [packet for packet in container.demux(stream) if packet.size]
            durations = [1000 * float(p.duration * p.time_base) for p in packets]
    total = sum(duration if duration > SHORTEST else USUAL for duration in durations)
    if not durations:
        raise UserError(no_frames(source))
    return 1000 * len(durations) / total


def _webp_durations(source: Source) -> Iterator[int]:
    """Milliseconds of each frame: the chunks `ANMF` of the RIFF file."""
    with open_binary(source) as file:
        file.seek(12)
        while len(head := file.read(8)) == 8:
            size = int.from_bytes(head[4:], "little")
            if head[:4] == b"ANMF":
                yield int.from_bytes(file.read(16)[12:15], "little")
                size -= 16
            file.seek(size + size % 2, io.SEEK_CUR)


def _png_durations(source: Source) -> Iterator[float]:
    """Milliseconds of each frame: the chunks `fcTL`, a fraction of a second."""
    with open_binary(source) as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            size = int.from_bytes(head[:4])
            if head[4:] == b"fcTL":
                part, whole = struct.unpack(">2H", file.read(26)[20:24])
                yield 1000 * part / (whole or 100)
                size -= 26
            file.seek(size + 4, io.SEEK_CUR)


def held_packets(container: Any, stream: Any) -> list[Any] | None:
    """All packets, where frames can be left out: packets are frames, and references are known."""
    boxed = any(name in container.format.name for name in ("mov", "matroska"))
    if container.size > MAX_HELD or not boxed or stream.codec.name not in ("h264", "hevc"):
        return None
    return list(container.demux(stream))


def select(
    stream: Any, packets: Sequence[Any], wanted: set[int], *, name: str
) -> dict[int, Picture] | None:
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
                found[places[frame.pts]] = _picture(converter, frame, name)
        if len(found) == len(wanted):
            return found
    return None


def decoded(source: Source, wanted: Container[int]) -> Iterator[tuple[int, Picture | None]]:
    """Frame after frame; those that are not wanted come as None."""
    from av.video.reformatter import VideoReformatter

    # One converter for all frames, on this thread: setting it up costs more than a small frame.
    converter, name = VideoReformatter(), name_of(source)
    with opened(source) as (container, stream):
        for index, frame in enumerate(container.decode(stream)):
            yield index, _picture(converter, frame, name) if index in wanted else None


def no_frames(source: Source) -> str:
    """Message about a video without frames."""
    return f"{name_of(source)}: video without frames"


def _picture(converter: Any, frame: Any, name: str) -> Picture:
    check_frame((frame.width, frame.height), name)
    clear = any(component.is_alpha for component in frame.format.components)
    try:
        found = converter.reformat(frame, format="rgba" if clear else "rgb24", threads=1)
    except ValueError as error:
        raise UserError(f"{name}: frames of a kind that FFmpeg cannot convert ({error})") from None
    pixels = found.to_ndarray()
    if clear:  # shown on white, as pictures are
        image = Image.fromarray(pixels)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = np.asarray(image.convert("RGB"))
    # A copy: the array would keep FFmpeg's padded buffer alive.
    return np.array(_upright(pixels, _matrix(frame)), order="C")


def _matrix(frame: Any) -> tuple[int, int, int, int] | None:
    """a, b, c, d of the display matrix: a pixel (x, y) is shown at (ax + cy, bx + dy)."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    a, b, _, c, d = struct.unpack_from("=5i", bytes(data))
    return a, b, c, d


def _upright(
    pixels: UInt8[np.ndarray, "h w 3"], matrix: tuple[int, int, int, int] | None
) -> UInt8[np.ndarray, "..."]:
    """Turned and mirrored to the nearest of the eight orientations."""
    if matrix is None:
        return pixels
    a, b, c, d = matrix
    if abs(a) + abs(d) < abs(b) + abs(c):  # rows become columns
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
