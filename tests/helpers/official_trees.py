"""Miniature trees in the official layouts of the six sets, of drawn faces; one function a set.

Each function makes its tree under a folder and returns the tree's root. Labels fit the faces where
`actionfaces` draws the emotion. Classes go round, so that every class occurs once there are enough
examples.
"""

import functools
import pathlib

import numpy as np
from PIL import Image

from emollama_jax.data.action_units import EMOTIONS as DRAWN
from emollama_jax.data.emotions import LABEL_SPACES
from emollama_jax.tiny.actionfaces.examples import encode_picture, encode_video
from emollama_jax.tiny.actionfaces.sample import sample_clip, sample_image

RAF_DB = LABEL_SPACES["raf_db"].classes
FERPLUS = LABEL_SPACES["ferplus"].classes
AFFECTNET = LABEL_SPACES["affectnet8"].classes
DFEW = LABEL_SPACES["dfew"].classes
FERV39K = LABEL_SPACES["ferv39k"].written
MAFW = LABEL_SPACES["mafw"].classes
SCENES = ("Action", "Daily Life", "School")
SIZE = 96  # pixels
FPS = 12.0
FRAMES = 6  # of a clip


def raf_db(folder: pathlib.Path, *, train: int = 14, test: int = 7) -> pathlib.Path:
    """`EmoLabel/list_patition_label.txt` and `Image/aligned`."""
    lines = []
    for split, count in (("train", train), ("test", test)):
        for i in range(count):
            label = i % len(RAF_DB)
            name = f"{split}_{i + 1:05d}"
            data = encode_picture(face(RAF_DB[label], i, split))
            write(folder / "Image" / "aligned" / f"{name}_aligned.jpg", data)
            lines.append(f"{name}.jpg {label + 1}")
    write_lines(folder / "EmoLabel" / "list_patition_label.txt", lines)
    return folder


def ferplus(
    folder: pathlib.Path, *, train: int = 16, valid: int = 8, test: int = 8
) -> pathlib.Path:
    """`FER2013Train|Valid|Test/label.csv` with grey 48×48 pictures beside it."""
    number = 0
    for split, count in (("Train", train), ("Valid", valid), ("Test", test)):
        home, lines = folder / f"FER2013{split}", []
        for i in range(count):
            label = i % len(FERPLUS)
            votes = [0] * 10
            votes[label], votes[(label + 1) % 8], votes[8] = 6, 3, 1
            name = f"fer{number:07d}.png"
            picture = Image.fromarray(face(FERPLUS[label], number, "train")).convert("L")
            home.mkdir(parents=True, exist_ok=True)
            picture.resize((48, 48)).save(home / name)
            lines.append(f'{name},"(0, 0, 48, 48)",{",".join(map(str, votes))}')
            number += 1
        write_lines(home / "label.csv", lines)
    return folder


def affectnet_lists(folder: pathlib.Path, *, train: int = 16, test: int = 8) -> pathlib.Path:
    """The older vintage: `Manually_Annotated_file_lists/*.csv`; two more rows are to be dropped."""
    header = "subDirectory_filePath,face_x,face_y,face_width,face_height,facial_landmarks"
    header += ",expression,valence,arousal"
    for split, count in (("training", train), ("validation", test)):
        lines = [header]
        for i in range(count):
            label = i % len(AFFECTNET)
            name = f"{i % 3}/{split}{i}.jpg"
            data = encode_picture(face(AFFECTNET[label], i, split))
            write(folder / "Manually_Annotated_Images" / name, data)
            lines.append(f"{name},20,16,56,64,30.5;40.1,{label},0.1,-0.2")
        lines.append("9/none.jpg,20,16,56,64,1;2,10,-2,-2")  # no face
        lines.append("9/small.jpg,0,0,-1,-1,1;2,3,0,0")
        write_lines(folder / "Manually_Annotated_file_lists" / f"{split}.csv", lines)
    return folder


def affectnet_folders(folder: pathlib.Path, *, train: int = 16, test: int = 8) -> pathlib.Path:
    """The newer vintage: `train_set|val_set/images/<id>.jpg`, `annotations/<id>_exp.npy`."""
    for split, count in (("train_set", train), ("val_set", test)):
        (folder / split / "annotations").mkdir(parents=True, exist_ok=True)
        for i in range(count):
            label = i % len(AFFECTNET)
            data = encode_picture(face(AFFECTNET[label], i, split[:5]))
            write(folder / split / "images" / f"{i}.jpg", data)
            np.save(folder / split / "annotations" / f"{i}_exp.npy", np.array(str(label)))
    return folder


def dfew(
    folder: pathlib.Path, *, clips: int = 15, folds: int = 5, frames: bool = False
) -> pathlib.Path:
    """`EmoLabel_DataSplit/{train,test}(single-labeled)/set_k.csv`; clips as videos or frames."""
    rows = []
    for i in range(clips):
        label = i % len(DFEW)
        if frames:
            write_frames(folder / "Clip" / "clip_224x224" / f"{i + 1:05d}", moving(DFEW[label], i))
        else:
            write(folder / "Clip" / "original" / f"{i + 1}.mp4", video(DFEW[label], i))
        rows.append(f"{i + 1},{label + 1}")
    for fold in range(folds):
        for split, chosen in (
            ("train", [row for i, row in enumerate(rows) if i % 5 != fold]),
            ("test", [row for i, row in enumerate(rows) if i % 5 == fold]),
        ):
            home = folder / "EmoLabel_DataSplit" / f"{split}(single-labeled)"
            write_lines(home / f"set_{fold + 1}.csv", ["video_name,label", *chosen])
    return folder


def ferv39k(folder: pathlib.Path, *, train: int = 14, test: int = 7) -> pathlib.Path:
    """`2_ClipsforFaceCrop/<Scene>/<Emotion>/<id>` and `4_setups/All_scenes/*_All.csv`."""
    number = 0
    for split, count in (("train", train), ("test", test)):
        lines = []
        for i in range(count):
            emotion, scene = FERV39K[i % len(FERV39K)], SCENES[i % len(SCENES)]
            name = f"{scene}/{emotion}/{number:04d}"
            write_frames(folder / "2_ClipsforFaceCrop" / name, moving(emotion.lower(), number))
            lines.append(f"{name} {emotion}")
            number += 1
        write_lines(folder / "4_setups" / "All_scenes" / f"{split}_All.csv", lines)
    return folder


def mafw(
    folder: pathlib.Path, *, clips: int = 22, folds: int = 5, captions: bool = True
) -> pathlib.Path:
    """`data/clips/*.mp4`, `…/single/no_caption/set_k`, and GBK-encoded `with_caption` lists."""
    rows = []
    for i in range(clips):
        emotion = MAFW[i % len(MAFW)]
        name = f"{i + 1:05d}.mp4"
        write(folder / "data" / "clips" / name, video(emotion, i))
        rows.append((name, emotion))
    for fold in range(folds):
        for split, chosen in (
            ("train", [row for i, row in enumerate(rows) if i % 5 != fold]),
            ("test", [row for i, row in enumerate(rows) if i % 5 == fold]),
        ):
            home = folder / "Train & Test Set" / "single"
            plain = home / "no_caption" / f"set_{fold + 1}" / f"{split}.txt"
            write_lines(plain, [f"{name} {emotion}" for name, emotion in chosen])
            if captions:
                told = [
                    f"{name}\t{emotion}\t一个人皱着眉头\tA person frowns."
                    for name, emotion in chosen
                ]
                path = home / "with_caption" / f"set_{fold + 1}" / f"{split}.txt"
                write(path, ("\n".join(told) + "\n").encode("gbk"))
    return folder


def own_folders(folder: pathlib.Path, *, each: int = 3, clips: bool = False) -> pathlib.Path:
    """`train|test/<class>/…`: a user's own data."""
    for split in ("train", "test"):
        for n, emotion in enumerate(("happiness", "sadness", "anger")):
            for i in range(each):
                number = 10 * n + i + 100 * (split == "test")
                home = folder / split / emotion
                if clips:
                    write(home / f"{i}.mp4", video(emotion, number))
                else:
                    write(home / f"{i}.jpg", encode_picture(face(emotion, number, split)))
    return folder


def own_table(folder: pathlib.Path, *, count: int = 6) -> pathlib.Path:
    """`list.csv` with the columns path, label, split; returns the file."""
    lines = ["path,label,split"]
    for i in range(count):
        emotion = ("happiness", "sadness", "anger")[i % 3]
        write(folder / "pictures" / f"{i}.jpg", encode_picture(face(emotion, i, "train")))
        lines.append(f"pictures/{i}.jpg,{emotion},{'test' if i % 3 == 2 else 'train'}")
    write_lines(folder / "list.csv", lines)
    return folder / "list.csv"


# ---- drawing and writing

_ALIKE = {
    "happy": "happiness",
    "sad": "sadness",
    "angry": "anger",
    "anxiety": "fear",
    "helplessness": "sadness",
    "disappointment": "sadness",
    "contempt": "disgust",
}


def face(emotion: str, number: int, split: str) -> np.ndarray:
    """A drawn face, uint8 [96, 96, 3]; no two numbers or splits give the same pixels."""
    indices = _indices()[_ALIKE.get(emotion, emotion)]
    picture = _drawn(indices[number % len(indices)]).copy()
    salt = sum(split.encode())
    picture[0, :8] = np.unpackbits(np.array([salt % 256, number % 256], np.uint8))[:8, None] * 255
    picture[1, :8] = np.unpackbits(np.array([number % 256], np.uint8))[:, None] * 255
    return picture


def moving(emotion: str, number: int, *, frames: int = FRAMES) -> np.ndarray:
    """The frames of a drawn clip, uint8 [F, 96, 96, 3]."""
    clip = _clips()[DRAWN.index(_ALIKE.get(emotion, emotion)) % len(_clips())]
    chosen = clip[np.arange(frames) % len(clip)].copy()
    chosen[:, :2, :8] = np.unpackbits(np.array([number % 256], np.uint8))[None, :, None] * 255
    return np.roll(chosen, number % 3, axis=2)


def video(emotion: str, number: int, *, frames: int = FRAMES) -> bytes:
    """A drawn clip as MP4."""
    return encode_video(moving(emotion, number, frames=frames), FPS)


def write(path: pathlib.Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_lines(path: pathlib.Path, lines: list[str]) -> None:
    write(path, ("\n".join(lines) + "\n").encode())


def write_frames(folder: pathlib.Path, frames: np.ndarray) -> None:
    for i, frame in enumerate(frames, 1):
        write(folder / f"{i}.jpg", encode_picture(frame))


@functools.cache
def _indices() -> dict[str, list[int]]:
    """Emotion → drawn pictures that show it."""
    found: dict[str, list[int]] = {name: [] for name in DRAWN}
    for index in range(60):
        sample = sample_image("train", index, size=SIZE)
        found[DRAWN[sample.emotion]].append(index)
    return found


@functools.cache
def _drawn(index: int) -> np.ndarray:
    return sample_image("train", index, size=SIZE).picture


@functools.cache
def _clips() -> list[np.ndarray]:
    return [sample_clip("train", index, size=SIZE).frames for index in range(4)]
