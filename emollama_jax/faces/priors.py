"""Computes face priors: box, landmarks and age-gender-race of every example, once per data set.

The dense face features are not stored: the frozen FaceXFormer computes them inside the train step.
Threads decode while the devices search (`mtcnn.Detector.many`) and read (`Reader`), both in batches
of one static size, split over the devices of a mesh. What is done is on disk part by part, and in
the end in the form that `data/priors.py` reads.
"""

import dataclasses
import functools
import json
import logging
import pathlib
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from emollama_jax.ahead import ahead
from emollama_jax.data.face_crop import track
from emollama_jax.data.media import read_image, read_video
from emollama_jax.data.priors import PER_EXAMPLE, PER_FRAME, Prior
from emollama_jax.data.sets import Report
from emollama_jax.disk import sweep, whole_file
from emollama_jax.errors import UserError
from emollama_jax.faces.reader import Detect, Reader, cut_out, read_faces
from emollama_jax.paths import parts_folder, write_whole

CHUNK = {"image": 512, "clip": 32}  # examples of one resumable part
GROUP = 256  # frames that are searched and read together, at least; one clip's stay together
GROUP_BYTES = 2**29  # of decoded frames, at which a group is closed earlier
AHEAD = 8  # examples decoded before they are asked for
SMOOTHING = 5  # frames of a centred mean over a clip's boxes, against the detector's jitter

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a pass over a split found."""

    examples: int
    frames: int
    without_face: int  # examples
    unreadable: int  # examples
    frames_done: int  # frames of this run; the others were there before
    seconds: float  # of this run

    @property
    def rate(self) -> float:
        """Frames a second of this run."""
        return self.frames_done / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        speed = f", {self.rate:,.1f} frames/s" if self.frames_done else ""
        return (
            f"{self.frames:,} frames of {self.examples:,} examples{speed}; "
            f"{self.without_face} without a face, {self.unreadable} unreadable"
        )


def prepare_priors(
    examples: Sequence[Mapping[str, Any]],
    folder: pathlib.Path,
    *,
    reader: Reader,
    detect: Detect,
    progress: Report,
    fingerprint: str = "",
    threads: int = 2,
) -> Summary:
    """Computes and stores the priors of a split once; resumes where it was stopped.

    Args:
        examples: examples of the split, with `media`, `kind` and `boxes` ([F, 4], or empty to
            detect).
        folder: folder of the split's priors.
        reader: FaceXFormer; other weights or another margin make the stored priors void.
        detect: for examples without boxes, e.g. `Detector.many`.
        progress: called with (done, all) examples.
        fingerprint: fingerprint of the examples; another makes stored priors void.
        threads: number of decoding threads.
    """
    mark = {
        "examples": len(examples),
        "reader": reader.fingerprint,
        "data": fingerprint,
        "smoothing": SMOOTHING,
    }
    path = folder / "done.json"
    if path.exists() and (done := json.loads(path.read_text()))["of"] == mark:
        return Summary(**done["summary"], frames_done=0, seconds=0.0)
    shutil.rmtree(folder, ignore_errors=True)
    parts = parts_folder(folder.with_name(folder.name + ".parts"), mark)
    sweep(parts)
    began, frames = time.monotonic(), 0
    chunk = CHUNK[examples[0]["kind"]] if len(examples) else 1
    files = []
    for start in range(0, len(examples), chunk):
        stop = min(start + chunk, len(examples))
        files.append(parts / f"{start:08d}.npz")
        if not files[-1].exists():
            priors = []
            decode = functools.partial(_decode, examples)
            decoded = ahead(decode, range(start, stop), threads=threads, waiting=AHEAD)
            for group in _groups(decoded):
                priors += _read_group(group, reader=reader, detect=detect)
                if len(priors) < stop - start:  # the whole part counts once it is on disk
                    progress(start + len(priors), len(examples))
            _save(files[-1], priors)
            frames += sum(len(prior.found) for prior in priors)
        progress(stop, len(examples))
    summary = _join(files, folder)
    write_whole(epath.Path(path), json.dumps({"of": mark, "summary": summary}))
    shutil.rmtree(parts)
    return Summary(**summary, frames_done=frames, seconds=time.monotonic() - began)


@dataclasses.dataclass(frozen=True)
class _Decoded:
    """The pictures of one example."""

    id: str
    frames: list[np.ndarray]  # uint8 [H, W, 3]; empty if they cannot be read
    boxes: np.ndarray | None  # float32 [F, 4], the set's own

    @property
    def bytes(self) -> int:
        return sum(frame.nbytes for frame in self.frames)


def _decode(examples: Sequence[Mapping[str, Any]], number: int) -> _Decoded:
    example = examples[number]
    name = str(example.get("id", number))
    boxes = np.asarray(example["boxes"], np.float32).reshape(-1, 4)
    try:
        media = example["media"]
        frames = [read_image(media)] if example["kind"] == "image" else list(read_video(media))
    except UserError as error:
        _log.warning("example %s has no face priors: %s", name, error)
        return _Decoded(name, [], None)
    return _Decoded(name, frames, boxes if len(boxes) else None)


def _groups(examples: Iterable[_Decoded]) -> Iterator[list[_Decoded]]:
    """Examples with about `GROUP` frames together."""
    group: list[_Decoded] = []
    for example in examples:
        group.append(example)
        enough = sum(len(one.frames) for one in group) >= GROUP
        if enough or sum(one.bytes for one in group) >= GROUP_BYTES:
            yield group
            group = []
    if group:
        yield group


def _read_group(group: Sequence[_Decoded], *, reader: Reader, detect: Detect) -> list[Prior]:
    """The priors of a group: faces searched together, followed one by one, read together."""
    pictures = [frame for one in group if one.boxes is None for frame in one.frames]
    faces = iter(detect(pictures) if pictures else [])
    seen = []
    for one in group:
        if one.boxes is None:
            followed = track([next(faces) for _ in one.frames], smoothing=SMOOTHING)
            boxes, found = followed.boxes, followed.found
        else:
            boxes, found = one.boxes, np.ones(len(one.frames), bool)
        try:
            seen.append(cut_out(one.frames, boxes, found, reader=reader))
        except (UserError, IndexError) as error:  # the set's own box fits no picture
            _log.warning("example %s counts as without a face: %s", one.id, error)
            nowhere = np.zeros(len(one.frames), bool)
            boxes = np.zeros((len(one.frames), 4), np.float32)
            seen.append(cut_out(one.frames, boxes, nowhere, reader=reader))
    return read_faces(seen, reader)


def _save(path: pathlib.Path, priors: Sequence[Prior]) -> None:
    arrays = {name: np.concatenate([getattr(p, name) for p in priors]) for name in PER_FRAME}
    arrays |= {name: np.stack([getattr(p, name) for p in priors]) for name in PER_EXAMPLE}
    arrays["counts"] = np.array([len(p.found) for p in priors])
    wanted = sum(array.nbytes for array in arrays.values())
    with whole_file(path, wanted=wanted) as half, half.open("wb") as file:
        np.savez(file, **arrays)


def _join(files: Iterable[pathlib.Path], folder: pathlib.Path) -> dict[str, int]:
    """One `.npy` file for each field, and the counts of a `Summary`.

    The largest field of the largest set, the landmarks of a million frames, is 550 MB.
    """
    parts = [dict(np.load(file)) for file in files]
    folder.mkdir(parents=True)
    for name in (*PER_FRAME, *PER_EXAMPLE):
        np.save(folder / f"{name}.npy", np.concatenate([part[name] for part in parts]))
    counts = np.concatenate([part["counts"] for part in parts])
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(counts)]))
    seen = np.concatenate([part["agr_probability"] for part in parts])[:, 0] > 0
    return {
        "examples": len(counts),
        "frames": int(counts.sum()),
        "without_face": int((~seen & (counts > 0)).sum()),
        "unreadable": int((counts == 0).sum()),
    }
