"""A set of clips of which some are broken: prepare it, read it all, train through it, be stopped.

    python benchmarks/broken_clips.py --clips 10000 --broken 0.01 --out /tmp/broken

Of each hundred clips one is of a kind in `KINDS`, in turn. Readable kinds must be read rightly;
unreadable ones must be named once in the log, and must stop the run when the limit is below their
share. Faces are not searched for (every frame gets the same box): the time goes to the pipeline.
"""

import argparse
import io
import json
import logging
import pathlib
import struct
import time
from collections.abc import Callable, Sequence
from fractions import Fraction

import av
import numpy as np

SIZE, FRAMES, FPS = 64, 8, 25
CLASSES = ("anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise")


def frames(number: int, *, count: int = FRAMES, height: int = SIZE, width: int = SIZE):
    """Grey pictures whose brightness rises; frame i is grey 16 + 8·i + number % 8."""
    return [np.full((height, width, 3), 16 + 8 * i + number % 8, np.uint8) for i in range(count)]


def encode(
    pictures: Sequence[np.ndarray],
    *,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    container: str = "mp4",
    times: Sequence[int] | None = None,
) -> bytes:
    """Pictures as a video file; `times` are presentation times in frames of 1/25 s."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=FPS)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixels
        stream.codec_context.time_base = Fraction(1, FPS)
        if codec == "libx265":
            stream.options = {"x265-params": "log-level=none"}
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = times[i] if times else i
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return buffer.getvalue()


def rotated(data: bytes) -> bytes:
    """The same MP4 with a display matrix that turns it a quarter, as phones write it."""
    start = data.index(b"tkhd") + 4 + 4 + 20 + 16  # version 0: flags, times, layer and volume
    one = 1 << 16
    matrix = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    return data[:start] + matrix + data[start + 36 :]


def sound_alone() -> bytes:
    """An MP4 with sound and no pictures."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 8000
        file.mux(stream.encode(sound))
        file.mux(stream.encode())
    return buffer.getvalue()


def _truncated(number: int) -> bytes:
    data = encode(frames(number))
    return data[: int(0.8 * len(data))]


# Kind → ending, content, and how many frames it has; 0 for what cannot be read.
KINDS: dict[str, tuple[str, Callable[[int], bytes], int]] = {
    "truncated": (".mp4", _truncated, 0),
    "zero_bytes": (".mp4", lambda number: b"", 0),
    "no_video_stream": (".mp4", lambda number: sound_alone(), 0),
    "wrong_extension": (".avi", lambda number: encode(frames(number)), FRAMES),
    "one_frame": (".mp4", lambda number: encode(frames(number, count=1)), 1),
    "variable_rate": (
        ".mp4",
        lambda number: encode(frames(number), times=[0, 1, 5, 6, 30, 31, 60, 61]),
        FRAMES,
    ),
    "rotated": (".mp4", lambda number: rotated(encode(frames(number, height=48))), FRAMES),
    "odd_size": (
        ".avi",
        lambda number: encode(frames(number, height=47, width=63), codec="mpeg4", container="avi"),
        FRAMES,
    ),
    "ten_bits": (
        ".mkv",
        lambda number: encode(
            frames(number), codec="libx265", pixels="yuv420p10le", container="matroska"
        ),
        FRAMES,
    ),
}


def write_set(folder: pathlib.Path, *, clips: int, every: int) -> dict[str, str]:
    """Writes a folder per class of the split train; returns the path → kind of the odd ones."""
    sound, kinds, odd = [encode(frames(n)) for n in range(8)], list(KINDS), {}
    for number in range(clips):
        home = f"train/{CLASSES[number % len(CLASSES)]}"
        (folder / home).mkdir(parents=True, exist_ok=True)
        ending, data = ".mp4", sound[number % 8]
        if number % every == every // 2:
            kind = kinds[number // every % len(kinds)]
            ending, make, _ = KINDS[kind]
            odd[f"{home}/{number:05d}{ending}"] = kind
            data = make(number)
        (folder / home / f"{number:05d}{ending}").write_bytes(data)
    return odd


class Names(logging.Handler):
    """Counts the log's lines about each example."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.times: dict[str, int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if "broken so far" in line:
            name = line.partition("example ")[2].partition(":")[0]
            self.times[name] = self.times.get(name, 0) + 1


def prepare(folder: pathlib.Path, data: pathlib.Path) -> None:
    """Examples, and face priors with one box for every frame."""
    from emollama_jax import config
    from emollama_jax.base import load_face
    from emollama_jax.data import sets
    from emollama_jax.data.split import Split
    from emollama_jax.faces.priors import prepare_priors
    from emollama_jax.faces.reader import Reader

    class Middle:
        boxes = np.array([[16, 12, 40, 40]], np.float32)

    sets.prepare("own/broken", data, sets.Preparation(source=folder, missing_share=0))
    split = Split(data, "own/broken", "train")
    cfg = config.load("tiny")
    prepare_priors(
        split.examples,
        pathlib.Path(split.priors_folder),
        reader=Reader(load_face(cfg), margin=cfg.data.face_margin),
        detect=lambda pictures: [Middle] * len(pictures),
        progress=lambda done, total: None,
    )


SOURCES = "data.sources=[{name: own/broken, split: train, kind: clip, weight: 1, items: category}]"


def read_all(data: pathlib.Path, *, share: float, batch: int = 16):
    """One pass over the set by the training pipeline; returns rows and broken rows."""
    from emollama_jax import config
    from emollama_jax.data.pipeline import make_train_iterator
    from emollama_jax.data.split import Split

    overrides = [SOURCES, f"data.dir={json.dumps(str(data))}", f"data.broken_share={share}"]
    cfg = config.load(
        "tiny", [*overrides, f"train.clip_batch={batch}", "data.blank_share=0", "data.packed=null"]
    )
    count = len(Split(data, "own/broken", "train").examples)
    iterator = make_train_iterator(cfg)
    rows = broken = 0
    try:
        while rows < count:
            found = next(iterator)
            rows += len(found.weight)
            broken += int((np.asarray(found.weight) == 0).sum())
    finally:
        iterator.close()
    return rows, broken


def main() -> None:
    """Prepares, reads, trains, and shows that a lower limit stops the run."""
    from emollama_jax import config
    from emollama_jax.errors import UserError
    from emollama_jax.train.loop import fit

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=10_000)
    parser.add_argument("--broken", type=float, default=0.01, help="share of odd clips")
    parser.add_argument("--steps", type=int, help="training steps of 16 clips; one epoch if absent")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()

    names = Names()
    logging.getLogger("emollama_jax").addHandler(names)
    # It names what it cannot read too, but here the training pipeline is counted.
    logging.getLogger("emollama_jax.faces.priors").setLevel(logging.ERROR)
    odd = write_set(args.out / "src", clips=args.clips, every=round(1 / args.broken))
    unreadable = {path for path, kind in odd.items() if KINDS[kind][2] == 0}
    print(f"{args.clips} clips, {len(odd)} odd, {len(unreadable)} of them unreadable")
    began = time.perf_counter()
    prepare(args.out / "src", args.out / "data")
    print(f"prepared in {time.perf_counter() - began:.0f} s")
    began = time.perf_counter()
    rows, broken = read_all(args.out / "data", share=0.01)
    seconds = time.perf_counter() - began
    print(f"read {rows} clips in {seconds:.0f} s ({rows / seconds:.0f} a second), {broken} broken")
    once = set(names.times) == unreadable and set(names.times.values()) == {1}
    print(f"every unreadable clip named once, no other: {once}")
    half = 0.5 * len(unreadable) / args.clips
    try:
        read_all(args.out / "data", share=half)
        print("not stopped")
    except UserError as error:
        print(f"stopped at data.broken_share={half:.4f}: {error}")
    steps = args.steps or -(-args.clips // 16)
    overrides = [
        SOURCES,
        f"data.dir={json.dumps(str(args.out / 'data'))}",
        f"train.steps={steps}",
        f"train.save_every={steps}",
    ]
    began = time.perf_counter()
    result = fit(config.load("tiny", overrides), args.out / "run")
    print(
        f"trained {result.step} steps in {time.perf_counter() - began:.0f} s, "
        f"loss {result.loss:.4f}"
    )


if __name__ == "__main__":
    main()
