"""Face priors: box, landmarks and age-gender-race of every example, computed once per data set.

The dense face features are not stored: the frozen FaceXFormer computes them inside the train step.
A split's priors are a folder of `.npy` files in the data directory, read through memory maps; the
frames of all examples lie one after the other, and `offsets` says where each example's begin.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from emollama_jax.data.media import read_image, read_video
from emollama_jax.errors import UserError
from emollama_jax.faces.track import Faces, crop_face, track
from emollama_jax.models.eva_vit import normalise
from emollama_jax.models.facexformer import FaceXFormer
from emollama_jax.models.pretrained import named_parameters

CHUNK = 256  # examples of one resumable part
PER_FRAME = ("boxes", "found", "landmarks")
PER_EXAMPLE = ("agr", "agr_probability")

Detect = Callable[[np.ndarray], Faces]  # uint8 [H, W, 3] → the faces in it


@dataclasses.dataclass(frozen=True)
class Found:
    """The face of one example, followed and cut out; F = stored frames of its media."""

    boxes: np.ndarray  # float32 [F, 4], (x1, y1, x2, y2) in pixels; zeros where not found
    found: np.ndarray  # bool [F]
    crops: np.ndarray  # uint8 [F, S, S, 3]; zeros where not found


@dataclasses.dataclass(frozen=True)
class Prior:
    """What is known of the face of one example."""

    boxes: np.ndarray  # float32 [F, 4]
    found: np.ndarray  # bool [F]
    landmarks: np.ndarray  # float32 [F, 68, 2], in the crop, -1 … 1; zeros where not found
    agr: np.ndarray  # int32 [3], age, gender and race class, from the mean over the frames
    agr_probability: np.ndarray  # float32 [3]; 0 where no frame has a face


class Reader:
    """The frozen FaceXFormer's heads on face crops, in batches of one static size."""

    def __init__(self, face: FaceXFormer, *, margin: float, batch: int = 128):
        graphdef, self._state = nnx.split(face)
        cfg = face.cfg
        self.size, self.margin, self._batch = cfg.swin.image_size, margin, batch
        digest = hashlib.sha256(repr((cfg, margin)).encode())
        for name, leaf in named_parameters(face).items():
            digest.update(name.encode() + np.asarray(leaf[...], np.float32).tobytes())
        self.fingerprint = digest.hexdigest()

        @jax.jit
        def heads(state, crops):
            y = nnx.merge(graphdef, state)(normalise(crops, cfg.image_mean, cfg.image_std))
            return y.landmarks, tuple(jax.nn.softmax(x) for x in (y.age, y.gender, y.race))

        self._heads = heads

    def __call__(self, crops: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """Landmarks [F, 68, 2] and the probabilities of age [F, 8], gender [F, 2], race [F, 5].

        Args:
            crops: uint8 [F, S, S, 3], F > 0.
        """
        parts = []
        for start in range(0, len(crops), self._batch):
            part = crops[start : start + self._batch]
            padded = np.zeros((self._batch, *crops.shape[1:]), np.uint8)
            padded[: len(part)] = part
            heads = jax.device_get(self._heads(self._state, padded))
            parts.append((len(part), heads))
        return jax.tree.map(
            lambda *xs: np.concatenate([x[:n] for (n, _), x in zip(parts, xs, strict=True)]),
            *(heads for _, heads in parts),
        )


def find_face(
    frames: Sequence[np.ndarray], *, boxes: np.ndarray | None, detect: Detect, reader: Reader
) -> Found:
    """Follows one face through an example's frames and cuts it out.

    Args:
        frames: uint8 pictures.
        boxes: the data set's own boxes [F, 4], or None to detect.
        detect: a face detector, e.g. MTCNN.
        reader: whose crop size and margin hold.
    """
    if boxes is None:
        followed = track([detect(frame) for frame in frames])
        boxes, found = followed.boxes, followed.found
    else:
        found = np.ones(len(frames), bool)
    crops = np.zeros((len(frames), reader.size, reader.size, 3), np.uint8)
    for i in np.flatnonzero(found):
        crops[i], _ = crop_face(frames[i], boxes[i], reader.margin, reader.size)
    return Found(boxes=np.asarray(boxes, np.float32), found=found, crops=crops)


def read_faces(faces: Sequence[Found], reader: Reader) -> list[Prior]:
    """The priors of several examples, their crops read together."""
    crops = np.concatenate([face.crops[face.found] for face in faces])
    landmarks, heads = reader(crops) if len(crops) else (None, ())
    priors, start = [], 0
    for face in faces:
        rows = slice(start, start + int(face.found.sum()))
        start = rows.stop
        points = np.zeros((len(face.found), 68, 2), np.float32)
        agr, probability = np.zeros(3, np.int32), np.zeros(3, np.float32)
        if face.found.any():
            points[face.found] = landmarks[rows]
            means = [head[rows].mean(0) for head in heads]
            agr[:] = [mean.argmax() for mean in means]
            probability[:] = [mean.max() for mean in means]
        priors.append(Prior(face.boxes, face.found, points, agr, probability))
    return priors


def prepare_priors(
    examples: Sequence[Mapping[str, Any]],
    folder: pathlib.Path,
    *,
    reader: Reader,
    detect: Detect,
    progress: Callable[[int, int], None],
) -> None:
    """Computes and stores the priors of a split once; continues where it was stopped.

    Args:
        examples: of the split, with `media`, `kind` and `boxes` ([F, 4], or empty to detect).
        folder: of the split's priors.
        reader: FaceXFormer; other weights or another margin make the stored priors void.
        detect: for examples without boxes.
        progress: called with (done, all) examples.
    """
    mark = {"examples": len(examples), "reader": reader.fingerprint}
    parts = folder.with_name(folder.name + ".parts")
    if _read_json(folder / "done.json") == mark:
        return
    shutil.rmtree(folder, ignore_errors=True)
    if _read_json(parts / "of.json") != mark:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        (parts / "of.json").write_text(json.dumps(mark))
    files = []
    for start in range(0, len(examples), CHUNK):
        stop = min(start + CHUNK, len(examples))
        files.append(parts / f"{start:08d}.npz")
        if not files[-1].exists():
            faces = []
            for i in range(start, stop):
                frames, boxes = _frames(examples[i])
                faces.append(find_face(frames, boxes=boxes, detect=detect, reader=reader))
            _save(files[-1], read_faces(faces, reader))
        progress(stop, len(examples))
    _join(files, folder)
    (folder / "done.json").write_text(json.dumps(mark))
    shutil.rmtree(parts)


class Priors(Sequence):
    """The stored priors of a split, read lazily."""

    def __init__(self, folder: pathlib.Path):
        if not (folder / "done.json").exists():
            raise UserError(
                f"{folder}: no face priors; run `emollama data prepare` for this data set first"
            )
        self._folder = folder
        self._open()

    def _open(self) -> None:
        names = (*PER_FRAME, *PER_EXAMPLE, "offsets")
        self._arrays = {n: np.load(self._folder / f"{n}.npy", mmap_mode="r") for n in names}

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder}  # memory maps are opened anew in a worker process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._arrays["offsets"]) - 1

    def __getitem__(self, index: int) -> Prior:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        start, stop = self._arrays["offsets"][index : index + 2]
        frames = {name: np.array(self._arrays[name][start:stop]) for name in PER_FRAME}
        whole = {name: np.array(self._arrays[name][index]) for name in PER_EXAMPLE}
        return Prior(**frames, **whole)


def priors_folder(data_dir: str | os.PathLike, name: str, split: str) -> pathlib.Path:
    """Where the priors of e.g. ("data", "actionfaces/images", "train") lie."""
    return pathlib.Path(data_dir) / "priors" / name / split


def open_priors(data_dir: str | os.PathLike, name: str, split: str) -> Priors:
    """The priors of a prepared split.

    Raises:
        UserError: they are not prepared.
    """
    return Priors(priors_folder(data_dir, name, split))


def _frames(example: Mapping[str, Any]) -> tuple[list[np.ndarray], np.ndarray | None]:
    media, boxes = example["media"], np.asarray(example["boxes"], np.float32).reshape(-1, 4)
    frames = [read_image(media)] if example["kind"] == "image" else list(read_video(media))
    return frames, boxes if len(boxes) else None


def _save(path: pathlib.Path, priors: Sequence[Prior]) -> None:
    arrays = {name: np.concatenate([getattr(p, name) for p in priors]) for name in PER_FRAME}
    arrays |= {name: np.stack([getattr(p, name) for p in priors]) for name in PER_EXAMPLE}
    arrays["counts"] = np.array([len(p.found) for p in priors])
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **arrays)
    partial.replace(path)


def _join(files: Iterable[pathlib.Path], folder: pathlib.Path) -> None:
    """One `.npy` file for each field; the largest field of the largest set is 180 MB."""
    parts = [dict(np.load(file)) for file in files]
    folder.mkdir(parents=True)
    for name in (*PER_FRAME, *PER_EXAMPLE):
        np.save(folder / f"{name}.npy", np.concatenate([part[name] for part in parts]))
    counts = np.concatenate([part["counts"] for part in parts])
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(counts)]))


def _read_json(path: pathlib.Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None
