"""A decoding worker: files come in on standard input, frames go out on standard output.

A process of its own, because a file from a stranger may hold what crashes a decoder, never ends or
fills the memory. It imports no JAX, holds no secret, writes no file (`RLIMIT_FSIZE` is 0), and has
bounded memory and CPU seconds. What it says is JSON and raw bytes, not pickle: a worker that a file
took over can send wrong pixels, and nothing that runs.

    order: uint32 length, JSON {"size", "want", "pixels", …}, then `size` bytes, the file
    reply: uint32 length, JSON {"shapes", "order", …} or {"error"}, then the frames' bytes

`serve/decoders.py` is the other end.
"""

import dataclasses
import io
import json
import os
import resource
import struct
import sys
from typing import Any, BinaryIO

import numpy as np

from emollama_jax.data import stills, video
from emollama_jax.data.file_kinds import check
from emollama_jax.data.media import Sampling, read_frames, read_image, sample_indices
from emollama_jax.errors import UserError
from emollama_jax.terms import Kind

HEADER = struct.Struct(">I")
MEMORY = 3  # exit status of a worker that ran out of it: a fresh one is better


@dataclasses.dataclass(frozen=True)
class Order:
    """What to decode, and what it may cost."""

    size: int  # bytes of the file
    want: Kind
    pixels: int  # most of a frame
    frames: int  # most of a clip, as stored
    duration: float  # seconds of a clip, at most
    cpu: int  # seconds
    clip_frames: int  # that the model sees
    clip_fps: float | None

    @property
    def sampling(self) -> Sampling:
        """Which frames of a clip are decoded."""
        return Sampling(self.clip_frames, self.clip_fps)


def decode(data: bytes, order: Order) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The frames of a file that the model sees.

    Args:
        data: the file's content.
        order: what is wanted, and the bounds.

    Returns:
        Fields of the reply, and the different frames, uint8 [H, W, 3].

    Raises:
        UserError: unreadable, another kind than wanted, or over a bound.
    """
    kind = check(data)
    if kind == "zip":
        raise UserError("an archive, wanted one picture or clip")
    _check_pixels(data, kind, order)
    if order.want == "image":
        picture = read_image(data)
        return {"count": 1, "indices": [0], "order": [0]}, [picture]

    def pick(count: int, fps: float | None) -> np.ndarray:
        if count > order.frames:
            raise UserError(f"the clip has {count:,} frames, wanted at most {order.frames:,}")
        if fps and count / fps > order.duration:
            raise UserError(
                f"the clip is {count / fps:.0f} s long, wanted at most {order.duration:g} s"
            )
        return sample_indices(count, fps, sampling=order.sampling)

    clip = read_frames(data, pick)
    _, first, back = np.unique(clip.indices, return_index=True, return_inverse=True)
    told = {"count": clip.count, "indices": clip.indices.tolist(), "order": back.tolist()}
    return told, [clip.frames[i] for i in first]


def _check_pixels(data: bytes, kind: str, order: Order) -> None:
    """Reads a file's header."""
    name = f"media of {len(data)} bytes"
    if kind == "picture":
        with stills.opened(io.BytesIO(data), name) as image:
            width, height = image.size
    elif kind == "heif":
        width, height = stills.heif_size(data, name)
    elif order.want == "image":  # `read_image` says what is wrong with it
        return
    else:
        with video.opened(data) as (_, stream):
            width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > order.pixels:
        raise UserError(
            f"{width}×{height} pixels are {width * height:,}, wanted at most {order.pixels:,}: "
            "shrink it"
        )


def main() -> None:
    """Serves orders until standard input ends; the first argument is the memory limit in bytes."""
    _limit(int(sys.argv[1]))
    orders = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    # Libraries that print would break the replies, and what they say may tell of the picture.
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    _load_libraries()
    _reply(replies, {"ready": True}, [])
    while (order := _next(orders)) is not None:
        _allow_seconds(order.cpu)
        try:
            data = orders.read(order.size)
            told, frames = decode(data, order)
            told["shapes"] = [frame.shape[:2] for frame in frames]
        except UserError as error:
            told, frames = {"error": str(error)}, []
        except MemoryError:
            told, frames = {"error": "decoding takes too much memory: shrink it"}, []
            _reply(replies, told, frames)
            sys.exit(MEMORY)
        except Exception as error:  # decoders raise whatever they trip over
            told, frames = {"error": f"broken ({type(error).__name__})"}, []
        _reply(replies, told, frames)


def _limit(memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _allow_seconds(more: int) -> None:
    """Raises the limit of CPU seconds from what was used; beyond it the kernel ends the process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime) + 1 + more
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _load_libraries() -> None:
    """So that the first file pays no import."""
    import av
    from PIL import Image

    Image.init()
    av.logging.set_level(av.logging.PANIC)


def _next(orders: BinaryIO) -> Order | None:
    head = orders.read(HEADER.size)
    if len(head) < HEADER.size:
        return None
    return Order(**json.loads(orders.read(HEADER.unpack(head)[0])))


def _reply(replies: BinaryIO, told: dict[str, Any], frames: list[np.ndarray]) -> None:
    text = json.dumps(told).encode()
    replies.write(HEADER.pack(len(text)) + text)
    for frame in frames:
        replies.write(np.ascontiguousarray(frame).data)
    replies.flush()


if __name__ == "__main__":
    main()
