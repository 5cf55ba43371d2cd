"""The golden files of a folder: what is in them, whose weights they need, how they are compared.

Each set gives PyTorch's state dict, made from a manifest's keys or held by the file itself, and the
sizes of the network that it is for.
"""

import dataclasses
import importlib.util
import json
import math
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from emollama_jax import config
from emollama_jax.config import EmoLlamaConfig, EvaVitConfig, LlamaConfig, QFormerConfig
from emollama_jax.data.media import read_image
from emollama_jax.errors import UserError
from emollama_jax.models.facexformer import FaceXFormer
from emollama_jax.models.mtcnn import Detector, Mtcnn, load_mtcnn
from emollama_jax.models.rngs import abstract
from tools.convert_torch import golden
from tools.convert_torch.engine import extract
from tools.convert_torch.facexformer import CHECKPOINT_KEY, unread
from tools.convert_torch.golden_sizes import BERT, FLOAT32, llama_vid_sizes, tiny_sizes
from tools.convert_torch.mtcnn import LAYERS, table

NAMES = ("facexformer", "llama_vid", "llama_vid_tiny", "mtcnn")
WANTED = (
    "wanted any of facexformer.json and .npz, llama_vid.json and .npz, llama_vid_tiny.npz, "
    "mtcnn.json"
)
RELATIVE, PIXELS, PROBABILITY = 5e-5, 0.01, 1e-4  # largest differences
PACKAGES = {"skimage": "data", "matplotlib": "mpl-data/sample_data"}  # that carry pictures
SHAPES = {"boxes": (4,), "probs": (), "landmarks": (5, 2)}  # of a face in mtcnn.json
FACES = ("size", *SHAPES)  # what it says of a picture

State = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Row:
    """One array's comparison.

    Attributes:
        array: its name.
        difference: as it is printed.
        limit: as it is printed.
        ok: whether it is within.
    """

    array: str
    difference: str
    limit: str
    ok: bool


@dataclasses.dataclass(frozen=True)
class GoldenSet:
    """The golden numbers of one network.

    Attributes:
        name: name of its files.
        source: name in `SOURCES`, for its weights.
        model: config with its sizes.
        state: makes the state dict, or several by the stem of their file.
        network: the network without numbers, its leaves under the paths that the source fills.
        compare: runs the network, filled, and compares every array.
        file: name of PyTorch's one file; "" where there are several.
        entry: key of the state dict in the file; "" where the file is the state dict.
    """

    name: str
    source: str
    model: EmoLlamaConfig
    state: Callable[[], Mapping[str, Any]]
    network: Callable[[], nnx.Module]
    compare: Callable[[Any], list[Row]]
    file: str
    entry: str = ""


class Face(nnx.Module):
    """FaceXFormer under the name that `EmoLlama` gives it."""

    def __init__(self, cfg: config.FaceXFormerConfig):
        self.face = FaceXFormer(cfg, rngs=nnx.Rngs(0))


def read_sets(folder: pathlib.Path, *, seed: int, images: pathlib.Path | None) -> list[GoldenSet]:
    """The sets of a folder; their weights are not made yet.

    Args:
        folder: folder of golden files.
        seed: random seed of facexformer's weights and pictures.
        images: a folder of pictures, searched before the packages that carry some.

    Raises:
        UserError: no folder, none of the sets in it, half of one, a file that cannot be read, or a
            picture that is nowhere.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; {WANTED}")
    if images is not None and not images.is_dir():
        raise UserError(f"--images {images}: no such folder")
    found = []
    if _both(folder, "facexformer"):
        found.append(_facexformer(folder, seed))
    if _both(folder, "llama_vid"):
        found.append(_llama_vid(folder))
    if (folder / "llama_vid_tiny.npz").is_file():
        found.append(_tiny(folder / "llama_vid_tiny.npz"))
    if (folder / "mtcnn.json").is_file():
        found.append(_mtcnn(folder / "mtcnn.json", images))
    if not found:
        raise UserError(f"{folder}: no golden files in it; {WANTED}")
    return found


def compare_arrays(ours: golden.Arrays, held: golden.Arrays) -> list[Row]:
    """Every array of ours and of a golden file, each known to both or a failure.

    Integers and booleans must be equal, the rest within `RELATIVE` of the largest value.
    """
    rows = []
    for name, wanted in held.items():
        if name not in ours:
            rows.append(Row(name, "unknown array: nothing of ours to compare with", "", False))
        elif wanted.dtype.kind in "biu":
            rows.append(_equal(name, ours[name], wanted))
        else:
            rows.append(_within(name, ours[name], wanted, limit=RELATIVE, relative=True))
    return rows + [
        Row(name, "absent from the golden file", "", False) for name in ours if name not in held
    ]


def _equal(name: str, ours: Any, wanted: Any) -> Row:
    ours, wanted = np.asarray(ours), np.asarray(wanted)
    if ours.shape != wanted.shape:
        return Row(name, f"{ours.shape}, wanted {wanted.shape}", "equal", False)
    number = int((ours != wanted).sum())
    return Row(name, f"{number} differ" if number else "0", "equal", number == 0)


def _within(name: str, ours: Any, wanted: Any, *, limit: float, relative: bool) -> Row:
    try:
        difference = golden.off(ours, wanted)
    except ValueError as error:  # another shape
        return Row(name, str(error), f"{limit:g}", False)
    if not relative:
        difference = float(np.abs(np.asarray(ours) - wanted).max(initial=0))
    return Row(name, f"{difference:.1e}", f"{limit:g}", difference <= limit)


# --- reading --------------------------------------------------------------------------------------


def _both(folder: pathlib.Path, name: str) -> bool:
    """Whether a set of a manifest and arrays is there."""
    there = {end: (folder / f"{name}{end}").is_file() for end in (".json", ".npz")}
    if len(set(there.values())) > 1:
        has, lacks = sorted(there, key=there.__getitem__, reverse=True)
        raise UserError(
            f"{folder / name}{lacks}: missing beside {name}{has}: copy it there, or delete {has}"
        )
    return there[".npz"]


def _json(path: pathlib.Path, wanted: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); wanted {wanted}") from None
    if not isinstance(value, dict) or not all(isinstance(entry, dict) for entry in value.values()):
        raise UserError(f"{path}: wanted {wanted}")
    return value


def _npz(path: pathlib.Path) -> State:
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise UserError(f"{path}: not an .npz of plain arrays ({error})") from None


def _shapes(path: pathlib.Path, entries: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    try:
        return {
            key: tuple(int(n) for n in entry["shape"])
            for key, entry in entries.items()
            if entry["dtype"]
        }
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: wanted a shape and a dtype for every key") from None


def _state(
    path: pathlib.Path, entries: Mapping[str, Any], seed: int, buffers: Mapping[str, np.ndarray]
) -> State:
    """The state dict of a manifest: floats by their keys, integers from the architecture."""
    state = {}
    for key, shape in _shapes(path, entries).items():
        if entries[key]["dtype"].startswith("float"):
            state[key] = golden.tensor(key, shape, seed)
        elif key in buffers and buffers[key].size == math.prod(shape):
            state[key] = buffers[key].reshape(shape)
        else:
            raise UserError(
                f"{path}: {key} is {entries[key]['dtype']} {shape}, and no integer buffer of ours"
            )
    return state


# --- the sets -------------------------------------------------------------------------------------


def _model(llama: LlamaConfig, vision: EvaVitConfig, qformer: QFormerConfig) -> EmoLlamaConfig:
    """A whole model's config around a LLaMA-VID's; what else is in it plays no part."""
    model = config.load("tiny").model
    return dataclasses.replace(model, llama=llama, vision=vision, qformer=qformer)


def _facexformer(folder: pathlib.Path, seed: int) -> GoldenSet:
    path = folder / "facexformer.json"
    entries = _json(path, 'an object, key → {"shape": […], "dtype": "…"}')
    _shapes(path, entries)
    held = _npz(path.with_suffix(".npz"))
    model = config.load("emollama_7b").model
    model = dataclasses.replace(model, face=dataclasses.replace(model.face, **FLOAT32))
    return GoldenSet(
        name="facexformer",
        source="facexformer",
        model=model,
        state=lambda: _state(path, entries, seed, unread(model.face)),
        network=lambda: nnx.eval_shape(lambda: Face(model.face)),
        compare=lambda network: compare_arrays(
            golden.facexformer_arrays(network.face, seed=seed), held
        ),
        file="model.pt",
        entry=CHECKPOINT_KEY,
    )


def _llama_vid(folder: pathlib.Path) -> GoldenSet:
    path = folder / "llama_vid.json"
    manifest = _json(path, 'an object of "meta" and "state_dict"')
    held = _npz(path.with_suffix(".npz"))
    try:
        meta, entries = manifest["meta"], manifest["state_dict"]
        seed = int(meta["seed"])
        llama, vision, qformer = llama_vid_sizes(_shapes(path, entries))
        golden.llama_vid_inputs(meta, image_size=vision.image_size)
        cases = golden.llama_vid_cases(meta).values()
        missing = {"ids_image", "ids_video"} - set(meta)
        missing |= {field for about in cases for field in golden.CASE if field not in about}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {error!r}; wanted what tests/golden/README.md says") from None
    if missing:
        raise UserError(f"{path}: meta: {', '.join(sorted(missing))} missing")
    positions = f"{BERT}.embeddings.position_ids"
    buffers = {positions: np.arange(qformer.max_positions, dtype=np.int64)}
    return GoldenSet(
        name="llama_vid",
        source="llama-vid",
        model=_model(llama, vision, qformer),
        state=lambda: _state(path, entries, seed, buffers),
        network=lambda: nnx.eval_shape(lambda: golden.LlamaVid(llama, vision, qformer)),
        compare=lambda network: compare_arrays(golden.llama_vid_arrays(network, meta), held),
        file="pytorch_model.bin",
    )


def _tiny(path: pathlib.Path) -> GoldenSet:
    arrays = _npz(path)
    missing = [name for name in sorted(golden.TINY_INPUTS | {"greedy_mean"}) if name not in arrays]
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} missing: it holds its inputs, too")
    try:
        llama, vision, qformer = tiny_sizes(json.loads(str(arrays["meta_json"])))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: meta_json: {error}; wanted the networks' sizes") from None
    held = {
        name: array
        for name, array in arrays.items()
        if name not in golden.TINY_INPUTS and not name.startswith("sd/")
    }
    return GoldenSet(
        name="llama_vid_tiny",
        source="llama-vid",
        model=_model(llama, vision, qformer),
        state=lambda: {key[3:]: arrays[key] for key in arrays if key.startswith("sd/")},
        network=lambda: nnx.eval_shape(lambda: golden.LlamaVid(llama, vision, qformer)),
        compare=lambda network: compare_arrays(golden.tiny_arrays(network, arrays), held),
        file="pytorch_model.bin",
    )


def _mtcnn(path: pathlib.Path, images: pathlib.Path | None) -> GoldenSet:
    wanted = _json(path, "an object, picture → its size, boxes, probs and landmarks")
    for name, faces in wanted.items():
        if missing := [field for field in FACES if field not in faces]:
            raise UserError(f"{path}: {name}: {', '.join(missing)} missing")
        try:
            {field: _numbers(faces, field) for field in SHAPES}
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: {name}: {error}") from None
    pictures = _pictures(path, list(wanted), images)

    def state() -> dict[str, State]:
        networks = load_mtcnn()
        return {name: extract(getattr(networks, name), table(name)) for name in LAYERS}

    def compare(network: Mtcnn) -> list[Row]:
        detect = Detector(network)
        return [
            row
            for name, faces in wanted.items()
            for row in _faces(name, faces, read_image(pictures[name]), detect)
        ]

    return GoldenSet(
        name="mtcnn",
        source="mtcnn",
        model=config.load("tiny").model,
        state=state,
        network=lambda: abstract(lambda rngs: Mtcnn(rngs=rngs)),
        compare=compare,
        file="",
    )


def _pictures(
    path: pathlib.Path, names: list[str], images: pathlib.Path | None
) -> dict[str, pathlib.Path]:
    """Where the pictures are that a `mtcnn.json` names."""
    places = [images] if images is not None else []
    for package, folder in PACKAGES.items():
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            places.append(pathlib.Path(spec.submodule_search_locations[0]) / folder)
    found = {
        name: next((place / name for place in places if (place / name).is_file()), None)
        for name in names
    }
    if absent := [name for name, place in found.items() if place is None]:
        searched = ", ".join(map(str, places)) or "no folder: scikit-image is not installed"
        raise UserError(
            f"{path}: no picture {', '.join(absent)} (searched {searched}): name their folder with "
            "--images"
        )
    return {name: place for name, place in found.items() if place is not None}


def _numbers(faces: Mapping[str, Any], field: str) -> np.ndarray:
    """A field as an array, one row per face; null stands for no face, as an empty list does."""
    return np.asarray(faces[field] or [], np.float64).reshape(-1, *SHAPES[field])


def _faces(name: str, faces: Mapping[str, Any], picture: np.ndarray, detect: Detector) -> list[Row]:
    """A picture's rows."""
    found = detect(picture)
    rows = [_equal(f"{name} size", [picture.shape[1], picture.shape[0]], faces["size"])]
    for field, ours, limit in (
        ("boxes", found.boxes, PIXELS),
        ("probs", found.probabilities, PROBABILITY),
        ("landmarks", found.landmarks, PIXELS),
    ):
        wanted = _numbers(faces, field)
        rows.append(_within(f"{name} {field}", ours, wanted, limit=limit, relative=False))
    return rows + [
        Row(f"{name} {field}", "unknown field: nothing of ours to compare with", "", False)
        for field in faces
        if field not in FACES
    ]
