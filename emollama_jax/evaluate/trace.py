"""Where a number comes from: hashes of the checkpoint, the data and the predictions.

Two evaluations with the same hashes answered with the same weights about the same examples.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import yaml
from etils import epath

from emollama_jax.data.emotions import LabelSpace
from emollama_jax.evaluate.protocol import Prediction, dump_predictions
from emollama_jax.paths import as_path

_PIECE = 2**24  # bytes read at a time


def file_hash(path: epath.PathLike) -> str:
    """SHA-256 of a file, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with as_path(path).open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def predictions_hash(predictions: Iterable[Prediction]) -> str:
    """SHA-256 of the file that these predictions are written to."""
    return hashlib.sha256(dump_predictions(predictions).encode()).hexdigest()


def config_text(cfg: Any) -> str:
    """A config as YAML."""
    return yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(cfg))), sort_keys=False)


def versions(*packages: str) -> dict[str, str]:
    """Versions of packages that took part."""
    return {name: importlib.metadata.version(name) for name in packages}


def folder_hash(folder: epath.PathLike) -> str:
    """SHA-256 over the names and contents of a folder's files, e.g. of a checkpoint."""
    root, digest = as_path(folder), hashlib.sha256()
    for path in sorted(_files(root)):
        digest.update(f"{path.relative_to(root).as_posix()}\0{file_hash(path)}\n".encode())
    return digest.hexdigest()


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    """All files below a folder; a bucket's paths have no recursive glob."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def data_hash(data: Sequence[Mapping[str, Any]], space: LabelSpace) -> str:
    """SHA-256 over every example's name, label word and media, in order."""
    digest = hashlib.sha256()
    for number in range(len(data)):
        example = data[number]
        media = hashlib.sha256(example["media"]).hexdigest()
        label = space.classes[int(example["label"])]
        digest.update(f"{example['id']}\0{label}\0{media}\n".encode())
    return digest.hexdigest()


def priors_hash(priors: Iterable[Any]) -> str:
    """SHA-256 over the face priors of every example, in order."""
    digest = hashlib.sha256()
    for prior in priors:
        for name in ("boxes", "found", "landmarks", "agr", "agr_probability"):
            digest.update(np.ascontiguousarray(getattr(prior, name)).tobytes())
    return digest.hexdigest()
