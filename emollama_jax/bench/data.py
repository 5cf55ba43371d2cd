"""`emollama bench data`: frames per second of the input pipeline, against PyTorch's `DataLoader`.

Both sides do the same work on the same clips, drawn here (H.264 in MP4, 640 × 360, 4 s): decode,
sample 16 segments, resize and crop the frame and the face, build the prompt's tokens, batch. Each
has two workers, threads here (FFmpeg and Pillow let go of Python's lock), processes there, and they
take turns in one run, so that whatever else the machine does falls on both. PyTorch runs in a
process of its own (`torch_sides/torch_data.py`), because the package never imports it.
"""

import dataclasses
import importlib.util
import io
import json
import math
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from emollama_jax import config
from emollama_jax.bench.torch_side import TorchProcess
from emollama_jax.config import Config
from emollama_jax.data.items import category_item
from emollama_jax.data.pipeline import THREADS, make_train_iterator
from emollama_jax.data.priors import Prior
from emollama_jax.data.sets import label_space
from emollama_jax.data.split import InMemory
from emollama_jax.terms import LANDMARKS
from emollama_jax.tiny.actionfaces.sample import sample_clip

WIDTH, HEIGHT, FPS, SECONDS = 640, 360, 30, 4
FACE, DRAWN = 288, 192  # pixels: side of the face's picture in the clip, and as it is drawn
NAME = "actionfaces/clips"  # whose label words the questions list
WARM = 2  # batches before a timing starts


@dataclasses.dataclass(frozen=True)
class Speed:
    """One round's frames per second."""

    ours: float
    torch: float | None  # None: PyTorch is not installed

    @property
    def ratio(self) -> float:
        return self.ours / self.torch if self.torch else math.nan


def bench_config(name: str, *, batch: int) -> Config:
    """A config whose shapes are measured; the tokenizers are those that the package carries."""
    tokenizer = "{kind: bpe, path: tiny}"
    return config.load(
        name,
        [
            f"data.sources=[{{name: {NAME}, split: train, kind: clip, weight: 1.0}}]",
            f"data.llm_tokenizer={tokenizer}",
            f"data.question_tokenizer={tokenizer}",
            "data.workers=0",
            "data.packed=null",
            f"train.clip_batch={batch}",
        ],
    )


def run(cfg: Config, *, clips: int, batches: int, rounds: int, console: Console) -> list[Speed]:
    """Measures both sides in turns.

    Args:
        cfg: from `bench_config`.
        clips: number of drawn clips.
        batches: batches per timing.
        rounds: timings of each side.
        console: terminal for progress.

    Returns:
        A round each.
    """
    with tempfile.TemporaryDirectory() as folder, Progress(*_COLUMNS, console=console) as bars:
        root = pathlib.Path(folder)
        task = bars.add_task("drawing clips", total=clips)
        examples = []
        for index in range(clips):
            examples.append(make_example(root, index))
            bars.update(task, completed=index + 1)
        task = bars.add_task("measuring", total=rounds)
        found = []
        other = _TorchSide(cfg, root, clips) if importlib.util.find_spec("torch") else None
        try:
            for _ in range(rounds):
                ours = measure(lambda: _ours(cfg, examples), cfg, batches)
                found.append(Speed(ours=ours, torch=other.measure(batches) if other else None))
                bars.update(task, completed=len(found))
        finally:
            if other:
                other.close()
    return found


_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeRemainingColumn(),
)


def table(speeds: Sequence[Speed]) -> str:
    """Output of the command: medians, and the ratio's spread over the rounds."""
    lines = [
        f"{'Grain (this package)':<24}{statistics.median(s.ours for s in speeds):8.0f} frames/s"
    ]
    ratios = sorted(s.ratio for s in speeds if s.torch)
    if not ratios:
        missing = "PyTorch is not installed, so there is no comparison: pip install -e '.[convert]'"
        return f"{lines[0]}\n{missing}"
    torch = statistics.median(s.torch for s in speeds if s.torch)
    lines.append(f"{'PyTorch DataLoader, PyAV':<24}{torch:8.0f} frames/s")
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f} in {len(ratios)} rounds"
    lines.append(f"{'ratio':<24}{statistics.median(ratios):8.2f} ({spread})")
    return "\n".join(lines)


def make_example(folder: pathlib.Path, index: int) -> dict[str, Any]:
    """Draws a clip into a folder: `INDEX.mp4`, and `INDEX.npz` with its face priors."""
    data, boxes = draw_clip(index)
    path = folder / f"{index}.mp4"
    path.write_bytes(data)
    grid = np.linspace(-0.8, 0.8, LANDMARKS, dtype=np.float32)
    prior = Prior(
        boxes=boxes,
        found=np.ones(len(boxes), bool),
        landmarks=np.tile(np.stack([grid, grid[::-1]], -1), (len(boxes), 1, 1)),
        agr=np.array([2, 1, 2]),
        agr_probability=np.array([0.9, 0.9, 0.9], np.float32),
    )
    np.savez(folder / f"{index}.npz", **vars(prior))
    classes = label_space(NAME).classes
    label = index % len(classes)
    items = json.dumps([category_item(classes, label, "clip")])
    (folder / f"{index}.json").write_text(items)
    return {"id": str(index), "label": label, "media": data, "items": items, "prior": prior}


def draw_clip(index: int) -> tuple[bytes, np.ndarray]:
    """A talking-head clip: a drawn face that moves before a soft background, with camera noise.

    Returns:
        H.264 in MP4 as x264 makes it by default, and the face's box in each frame, float32 [F, 4].
    """
    import av

    rng = np.random.Generator(np.random.PCG64(index))
    sample = sample_clip("train", index, seed=0, size=DRAWN)
    faces = [
        np.asarray(Image.fromarray(f).resize((FACE, FACE), Image.Resampling.BICUBIC), np.float32)
        for f in sample.frames
    ]
    blobs = Image.fromarray(rng.integers(0, 256, (9, 16, 3), np.uint8))
    wall = np.asarray(blobs.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32)
    count, file, boxes = FPS * SECONDS, io.BytesIO(), []
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(count):
            place = i * (len(faces) - 1) / (count - 1)
            before, share = int(place), place % 1
            after = min(before + 1, len(faces) - 1)
            x = round((WIDTH - FACE) / 2 + 24 * math.sin(i / 15))
            y = round((HEIGHT - FACE) / 2 + 16 * math.cos(i / 11))
            frame = wall.copy()
            frame[y : y + FACE, x : x + FACE] = faces[before] * (1 - share) + faces[after] * share
            noisy = np.clip(frame + rng.normal(0, 3, (HEIGHT, WIDTH, 1)), 0, 255)
            picture = av.VideoFrame.from_ndarray(noisy.astype(np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
            offset = np.array([x, y, x, y], np.float32)
            boxes.append(sample.boxes[before] * (FACE / DRAWN) + offset)
        container.mux(stream.encode())
    return file.getvalue(), np.stack(boxes).astype(np.float32)


def measure(start: Callable[[], Iterator[Any]], cfg: Config, batches: int) -> float:
    """Frames per second that an iterator of batches delivers, its first batches left out."""
    iterator = start()
    for _ in range(WARM):
        next(iterator)
    began = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    seconds = time.perf_counter() - began
    iterator.close()
    return batches * cfg.train.clip_batch * cfg.data.clip_frames / seconds


def _ours(cfg: Config, examples: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    priors = [example["prior"] for example in examples]
    return make_train_iterator(cfg, [InMemory(NAME, "train", examples, priors)])


class _TorchSide(TorchProcess):
    """The process that runs PyTorch's loader."""

    def __init__(self, cfg: Config, folder: pathlib.Path, clips: int):
        super().__init__("torch_data.py", command="bench data", needs=("torch",))
        setup = {"folder": str(folder), "clips": clips, "workers": THREADS, "warm": WARM}
        self.ask(do="build", config=config.to_dict(cfg), **setup)

    def measure(self, batches: int) -> float:
        """Frames per second."""
        return self.ask(do="measure", batches=batches)["speed"]
