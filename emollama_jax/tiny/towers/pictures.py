"""Many pictures of faces as arrays in memory-mapped files: what the towers are pretrained on.

Those drawn here know everything of themselves; those of a real set (`real_faces.py`) what
its labels and a teacher say. Unknown numbers are nan, unknown classes -1, unknown votes 0.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from emollama_jax.config import Config
from emollama_jax.data.action_units import EMOTIONS
from emollama_jax.data.emotions import LABEL_SPACES
from emollama_jax.data.face_crop import crop_face, to_crop
from emollama_jax.data.media import to_model_frame
from emollama_jax.tiny.actionfaces.sample import sample_clip, sample_image
from emollama_jax.workers import pool as worker_pool

CLASSES = LABEL_SPACES["ferplus"].classes  # every set's votes are told in these
CHUNK = 250  # pictures, or clips divided by 10, that one task draws


@dataclasses.dataclass(frozen=True)
class Pictures:
    """N pictures, each as the vision tower's frame and as FaceXFormer's crop."""

    frames: np.ndarray  # uint8 [N, S, S, 3]
    faces: np.ndarray  # uint8 [N, Sf, Sf, 3]
    landmarks: np.ndarray  # float32 [N, 68, 2], in the crop, -1 … 1
    frame_landmarks: np.ndarray  # float32 [N, 68, 2], in the frame, -1 … 1
    pose: np.ndarray  # float32 [N, 3], radians
    agr: np.ndarray  # int32 [N, 3]
    attributes: np.ndarray  # float32 [N, 40], nan where not determined
    action_units: np.ndarray  # float32 [N, K], 0 … 1
    emotion: np.ndarray  # int32 [N], of `EMOTIONS` or `CLASSES`, -1 for a frame of a clip
    votes: np.ndarray  # float32 [N, CLASSES], shares that sum to 1


@dataclasses.dataclass(frozen=True)
class Crops:
    """How a face is cut out."""

    frame_size: int  # S of the vision tower
    face_size: int  # Sf of FaceXFormer
    margin: float  # of the face crop

    @classmethod
    def of(cls, cfg: Config) -> "Crops":
        """Those of a config."""
        model = cfg.model
        return cls(model.vision.image_size, model.face.swin.image_size, cfg.data.face_margin)


@dataclasses.dataclass(frozen=True)
class _Task:
    split: str
    start: int
    count: int
    clips: bool
    seed: int
    crops: Crops


def _draw(task: _Task) -> Pictures:
    """One chunk, in a worker process."""
    rng = np.random.Generator(np.random.PCG64([task.seed, task.start, task.clips, 77]))
    rows: list[tuple] = []
    for index in range(task.start, task.start + task.count):
        if task.clips:
            clip = sample_clip(task.split, index, seed=task.seed)
            agr = (clip.age, clip.gender, clip.race)
            one = zip(
                clip.frames, clip.landmarks, clip.boxes, clip.pose, clip.action_units, strict=True
            )
            rows += [(*frame, agr, np.full(40, np.nan, np.float32), -1) for frame in one]
        else:
            s = sample_image(task.split, index, seed=task.seed)
            agr = (s.age, s.gender, s.race)
            rows.append(
                (
                    s.picture,
                    s.landmarks,
                    s.box,
                    s.pose,
                    s.action_units,
                    agr,
                    s.attributes,
                    s.emotion,
                )
            )
    drawn: dict[str, list] = {field.name: [] for field in dataclasses.fields(Pictures)}
    for picture, landmarks, box, pose, units, agr, attributes, emotion in rows:
        # A detector's boxes are never the same twice: the crops must not be either.
        side = np.tile(box[2:] - box[:2], 2)
        loose = (box + rng.normal(0, 0.03, 4) * side).astype(np.float32)
        face, crop = crop_face(picture, loose, task.crops.margin, task.crops.face_size)
        scale = 2 / np.array([picture.shape[1], picture.shape[0]], np.float32)
        drawn["frames"].append(to_model_frame(picture, task.crops.frame_size, pad=False))
        drawn["faces"].append(face)
        drawn["landmarks"].append(to_crop(landmarks, crop))
        drawn["frame_landmarks"].append((landmarks + 0.5) * scale - 1)
        drawn["pose"].append(pose)
        drawn["agr"].append(agr)
        drawn["attributes"].append(attributes)
        drawn["action_units"].append(units)
        drawn["emotion"].append(emotion)
        name = EMOTIONS[emotion] if emotion >= 0 else ""
        drawn["votes"].append([float(name == other) for other in CLASSES])
    kinds = {"frames": np.uint8, "faces": np.uint8, "agr": np.int32, "emotion": np.int32}
    return Pictures(
        **{name: np.asarray(rows, kinds.get(name, np.float32)) for name, rows in drawn.items()}
    )


def draw_pictures(
    folder: pathlib.Path,
    *,
    split: str,
    pictures: int,
    clips: int,
    crops: Crops,
    seed: int,
    processes: int,
    progress: Callable[[int, int], None],
) -> Pictures:
    """Draws pictures and the frames of clips once; a folder that is complete is only opened.

    Args:
        folder: folder for the arrays, one `.npy` file a field.
        split: split of `actionfaces`.
        pictures: number of pictures.
        clips: number of clips, whose frames are all added.
        crops: sizes of both pictures of a face.
        seed: random seed of the drawing.
        processes: number of worker processes.
        progress: called with (done, all) tasks.
    """
    if not (folder / "done").exists():
        tasks = [
            _Task(split, start, min(step, total - start), is_clip, seed, crops)
            for total, step, is_clip in ((pictures, CHUNK, False), (clips, CHUNK // 10, True))
            for start in range(0, total, step)
        ]
        chunks = []
        with worker_pool(processes) as pool:
            for chunk in pool.map(_draw, tasks):
                chunks.append(chunk)
                progress(len(chunks), len(tasks))
        save_pictures(folder, chunks)
    return open_pictures(folder)


def save_pictures(folder: pathlib.Path, chunks: Sequence[Pictures]) -> None:
    """Writes chunks one after the other, one `.npy` file a field, through memory maps.

    Args:
        folder: folder for the files, with `done` written last.
        chunks: chunks of any length.
    """
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(len(chunk.emotion) for chunk in chunks)
    for field in dataclasses.fields(Pictures):
        first = getattr(chunks[0], field.name)
        path, shape = folder / f"{field.name}.npy", (total, *first.shape[1:])
        out = np.lib.format.open_memmap(path, "w+", dtype=first.dtype, shape=shape)
        at = 0
        for chunk in chunks:
            out[at : at + len(chunk.emotion)] = getattr(chunk, field.name)
            at += len(chunk.emotion)
        out.flush()
    (folder / "done").touch()


def open_pictures(folder: pathlib.Path) -> Pictures:
    """What `save_pictures` wrote, through memory maps."""
    names = [field.name for field in dataclasses.fields(Pictures)]
    return Pictures(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names})
