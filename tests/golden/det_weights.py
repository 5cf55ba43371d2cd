"""Deterministic weights from a state-dict key: the same numbers on any machine, nothing to ship."""

import zlib

import numpy as np


def tensor(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Weights for one floating-point state-dict entry.

    Args:
        key: the state-dict key, e.g. "backbone.0.0.0.weight".
        shape: the entry's shape, as PyTorch stores it.
        seed: the golden set's seed.

    Returns:
        float32 array: matrices and larger scaled by 1/sqrt(fan-in), vectors named "weight" around
        1, other vectors around 0.
    """
    rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(key.encode())]))
    x = rng.standard_normal(shape, dtype=np.float32)
    if len(shape) >= 2:
        return x / np.float32(np.sqrt(np.prod(shape[1:])))
    if key.rsplit(".", 1)[-1] == "weight":
        return 1 + np.float32(0.1) * x
    return np.float32(0.1) * x
