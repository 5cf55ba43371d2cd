"""Prepared sets of noise, made in a second: for tests that do not look at faces."""

import io
import pathlib

import av
import numpy as np
from PIL import Image

from emollama_jax.data import sets


def prepare_raf_db(folder: pathlib.Path, *, train: int, test: int) -> pathlib.Path:
    """RAF-DB's layout with a different noise picture for every example; returns the data folder."""
    rng = np.random.Generator(np.random.PCG64(0))
    tree, lines = folder / "raf", []
    (tree / "EmoLabel").mkdir(parents=True)
    (tree / "Image" / "aligned").mkdir(parents=True)
    for split, count in (("train", train), ("test", test)):
        for n in range(count):
            picture = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
            name = f"{split}_{n:05d}"
            Image.fromarray(picture).save(tree / "Image" / "aligned" / f"{name}_aligned.jpg")
            lines.append(f"{name}.jpg {n % 7 + 1}")
    (tree / "EmoLabel" / "list_patition_label.txt").write_text("\n".join(lines) + "\n")
    prepare("raf_db", tree, folder / "data")
    return folder / "data"


def prepare_dfew(folder: pathlib.Path, *, folds: int = 2) -> pathlib.Path:
    """DFEW's layout, six noise clips; a fold tests every other one, or with five folds every fifth.

    Returns the data folder.
    """
    rng = np.random.Generator(np.random.PCG64(1))
    tree = folder / "dfew"
    clips, lists = tree / "Clip" / "original", tree / "EmoLabel_DataSplit"
    clips.mkdir(parents=True)
    for number in range(1, 7):
        frames = rng.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
        (clips / f"{number}.mp4").write_bytes(_mp4(frames))
    for fold in range(1, folds + 1):
        for split in ("train", "test"):
            home = lists / f"{split}(single-labeled)"
            home.mkdir(parents=True, exist_ok=True)
            if folds == 5:
                tested = {n for n in range(1, 7) if n % 5 == fold % 5}
            else:
                tested = {n for n in range(1, 6) if n % 2 == 1 - fold % 2}
            chosen = tested if split == "test" else set(range(1, 7)) - tested
            rows = [f"{n},{n}" for n in sorted(chosen)]
            (home / f"set_{fold}.csv").write_text("\n".join(["video_name,label", *rows]) + "\n")
    prepare("dfew", tree, folder / "data")
    return folder / "data"


def prepare(
    name: str, source: pathlib.Path, data: pathlib.Path, *, progress=None, **how
) -> tuple[pathlib.Path, list[str]]:
    """Prepares a set without face priors; returns its folder, and what was told."""
    progress = progress or (lambda done, total: None)
    return sets.prepare(name, data, sets.Preparation(source=source, **how), progress)


def _mp4(frames: np.ndarray) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()
