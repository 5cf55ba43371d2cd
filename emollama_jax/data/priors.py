"""Stored face priors: box, landmarks and age-gender-race of every example of a stored split.

A folder of `.npy` files in the data directory, read through memory maps; the frames of all examples
lie one after the other, and `offsets` says where each example's begin. An example whose media
cannot be read has no frames; one without a face has frames in which it is not found. Both stay, so
that priors and examples keep the same order. `faces/priors.py` computes them.
"""

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Bool, Float32, Int

from emollama_jax.errors import UserError
from emollama_jax.paths import as_path, is_remote

PER_FRAME = ("boxes", "found", "landmarks")
PER_EXAMPLE = ("agr", "agr_probability")


@dataclasses.dataclass(frozen=True)
class Prior:
    """Face priors of one example; F = all stored frames of its media."""

    boxes: Float32[np.ndarray, "f 4"]  # (x1, y1, x2, y2) in pixels; zeros where not found
    found: Bool[np.ndarray, " f"]
    landmarks: Float32[np.ndarray, "f 68 2"]  # in the crop, -1 … 1; zeros where not found
    agr: Int[np.ndarray, "3"]  # age, gender and race class, from the mean over the frames
    agr_probability: Float32[np.ndarray, "3"]  # 0 where no frame has a face


class Priors(Sequence):
    """The priors in a folder, read lazily.

    Raises:
        UserError: there are none.
    """

    def __init__(self, folder: epath.PathLike):
        folder = as_path(folder)
        if not (folder / "done.json").exists():
            raise UserError(
                f"{folder}: no face priors; run `emollama data prepare` for this data set first"
            )
        self._folder = folder
        self._open()

    def _open(self) -> None:
        names = (*PER_FRAME, *PER_EXAMPLE, "offsets")
        self._arrays = {n: _load(self._folder / f"{n}.npy") for n in names}

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


def _load(path: epath.Path) -> np.ndarray:
    """Through a memory map; what lies in a bucket is read whole, 180 MB at most."""
    if is_remote(path):
        return np.load(io.BytesIO(path.read_bytes()))
    return np.load(path, mmap_mode="r")
