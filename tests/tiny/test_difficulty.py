"""The linear yardstick of a data set's difficulty."""

import numpy as np

from emollama_jax.tiny.difficulty import SIDE, grey, pixel_regression


def test_grey_is_small_and_scaled(rng):
    pictures = [rng.integers(0, 256, (96, 80, 3), dtype=np.uint8) for _ in range(2)]
    pixels = grey([*pictures, np.full((20, 20, 3), 255, np.uint8)])
    assert pixels.shape == (3, SIDE * SIDE)
    assert pixels.min() >= 0
    assert pixels.max() == 1


def test_regression_solves_what_is_linear_and_not_what_is_not(rng):
    def make(n, linear):
        x = rng.normal(0, 1, (n, 20)).astype(np.float32)
        y = (x[:, 0] > 0) if linear else (x[:, 0] * x[:, 1] > 0)
        return x, y.astype(int)

    scores = [
        pixel_regression(make(400, kind), make(200, kind), make(400, kind), classes=2)
        for kind in (True, False)
    ]
    assert scores[0] > 0.9
    assert scores[1] < 0.65
