"""What the small towers are pretrained on: drawn faces, real ones, and the batch of a step."""

import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from emollama_jax.config import Config
from emollama_jax.data.action_units import ACTION_UNITS
from emollama_jax.data.split import Split, prepared
from emollama_jax.tiny.towers.pictures import CLASSES, Crops, Pictures, draw_pictures
from emollama_jax.tiny.towers.real_faces import real_pictures
from emollama_jax.tiny.towers.recipe import Recipe


def drawn_pictures(
    config: Config, recipe: Recipe, out: pathlib.Path, console: Any, split: str
) -> Pictures:
    held = split != "train"
    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > 10:
            last = time.monotonic()
            console.print(f"drawing {split}: {done}/{total} chunks")

    return draw_pictures(
        out / "pictures" / split,
        split=split,
        pictures=recipe.held_out if held else recipe.pictures,
        clips=0 if held else recipe.clips,
        crops=Crops.of(config),
        seed=recipe.seed,
        processes=recipe.processes,
        progress=progress,
    )


def real_sets(config: Config, recipe: Recipe, out: pathlib.Path, console: Any, split: str):
    """The real sets' faces; one without validation examples is not held out."""
    found = []
    for name in recipe.real:
        if split != "train" and split not in prepared(recipe.data, name).get(name, ()):
            continue

        def progress(done: int, total: int, name: str = name) -> None:
            console.print(f"{name}, faces of {split}: {done}/{total}", highlight=False)

        found.append(
            real_pictures(
                out / "pictures" / f"{name.replace('/', '-')}-{split}",
                Split(recipe.data, name, split),
                crops=Crops.of(config),
                units=len(ACTION_UNITS),
                progress=progress,
            )
        )
    return found


def picture_batch(
    drawn: Pictures | None,
    real: Sequence[Pictures],
    which: str,
    recipe: Recipe,
    *,
    size: int,
    seed: int,
) -> Callable[[int], dict[str, np.ndarray]]:
    """The random batch of a step: real faces first, then drawn ones.

    Args:
        drawn: pictures of `actionfaces`; None where all are real.
        real: pictures of prepared sets, each with a share by its size.
        which: the picture, "frames" or "faces".
        recipe: says the shares.
        size: B.
        seed: random seed of the draws.
    """
    landmarks = "frame_landmarks" if which == "frames" else "landmarks"
    n_real = round(size * recipe.real_share) if real else 0
    chances = [_chances(pictures, recipe.balance) for pictures in real]
    shares = np.array([len(pictures.emotion) for pictures in real], float)

    def take(pictures: Pictures, at: np.ndarray, is_real: bool) -> dict[str, np.ndarray]:
        at = np.sort(at)  # read in the file's order
        return {
            "picture": getattr(pictures, which)[at],
            "landmarks": getattr(pictures, landmarks)[at],
            "pose": pictures.pose[at],
            "agr": pictures.agr[at],
            "attributes": pictures.attributes[at],
            "action_units": pictures.action_units[at],
            "votes": pictures.votes[at],
            "real": np.full(len(at), is_real),
        }

    def batch_of(step: int) -> dict[str, np.ndarray]:
        rng = np.random.Generator(np.random.PCG64([seed, step]))
        parts = []
        if n_real:
            counts = rng.multinomial(n_real, shares / shares.sum())
            for pictures, chance, count in zip(real, chances, counts, strict=True):
                at = np.searchsorted(chance, rng.random(count))
                parts.append(take(pictures, at, True))
                # Neighbours are blended: they must not always be neighbours of the file.
                order = rng.permutation(count)
                parts[-1] = {name: rows[order] for name, rows in parts[-1].items()}
        if drawn is not None and size > n_real:
            at = rng.choice(len(drawn.emotion), size - n_real, replace=False)
            parts.append(take(drawn, at, False))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return batch_of


def _chances(pictures: Pictures, balance: float) -> np.ndarray:
    """Cumulated chances of the pictures; rare classes are drawn more often than they stand."""
    emotion = np.asarray(pictures.emotion)
    counts = np.bincount(emotion[emotion >= 0], minlength=len(CLASSES)).astype(float)
    weights = np.where(emotion >= 0, np.maximum(counts, 1)[emotion] ** -balance, 0.0)
    if not weights.any():
        weights = np.ones(len(emotion))
    return np.cumsum(weights) / weights.sum()
