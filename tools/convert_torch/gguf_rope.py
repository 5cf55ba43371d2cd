"""Llama 3.1's rope scaling out of the factors that llama.cpp stores instead of its four numbers.

A wavelength w is stretched by 1 where it is short, by `factor` where it is long, and between by
1 / ((1 − s) / factor + s) with s = (original / w − low) / (high − low). The factors know no more of
the three numbers than the two wavelengths original / low and original / high. So `low` is taken as
1, unless Meta's own numbers give the factors.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

META = (1.0, 4.0, 8192)  # low_freq_factor, high_freq_factor, original_max_position_embeddings
CLOSE = 1e-5  # relative: factors are float32, the wavelengths powers of theta in float32


def from_factors(factors: np.ndarray, *, head_dim: int, theta: float) -> dict[str, Any]:
    """The `rope_scaling` of a `config.json`.

    Args:
        factors: float32 [head_dim / 2], of the wavelengths, the shortest first.
        head_dim: width of a head.
        theta: base of the wavelengths.

    Raises:
        ValueError: factors that no such scaling gives.
    """
    half = head_dim // 2
    factors = np.asarray(factors, np.float64)
    if factors.shape != (half,):
        raise ValueError(f"rope_freqs.weight has shape {factors.shape}, wanted ({half},)")
    waves = 2 * np.pi * theta ** (np.arange(half) / half)
    factor = float(factors[-1])
    for low, high, original in (META, *_fitting(waves, factors, factor)):
        share = np.clip((original / waves - low) / (high - low), 0, 1)
        if np.allclose(1 / ((1 - share) / factor + share), factors, rtol=CLOSE, atol=0):
            return {
                "rope_type": "llama3",
                "factor": float(str(np.float32(factor))),
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise ValueError(f"rope_freqs.weight is no scaling of Llama 3.1's ({factors[:4]} …)")


def _fitting(
    waves: np.ndarray, factors: np.ndarray, factor: float
) -> Iterator[tuple[float, float, int]]:
    """Numbers under which the factors may have come about, the roundest first."""
    if factor <= 1:
        return
    share = (1 / factors - 1 / factor) / (1 - 1 / factor)
    between = np.flatnonzero((share > CLOSE) & (share < 1 - CLOSE))
    stays = np.flatnonzero(share >= 1 - CLOSE)
    grows = np.flatnonzero(share <= CLOSE)
    if len(between) > 1:  # s is a line over 1 / w
        i, j = between[0], between[-1]
        slope = (share[i] - share[j]) / (1 / waves[i] - 1 / waves[j])
        zero = 1 / waves[j] - share[j] / slope  # 1 / the longer of the two wavelengths
        yield from _rounded(1 / zero, 1 / (zero + 1 / slope))
    elif len(between) == 1:
        wave, s = waves[between[0]], share[between[0]]
        for ratio in (4.0, 2.0, 8.0):  # high / low
            longest = wave * (1 + s * (ratio - 1))
            yield from _rounded(longest, longest / ratio)
    elif len(stays) and len(grows):
        first, last = waves[stays[-1]], waves[grows[0]]
        step = (last / first) ** (1 / 3)
        yield from _rounded(last / step, first * step)


def _rounded(longest: float, shortest: float) -> Iterator[tuple[float, float, int]]:
    """Low, high and original of two wavelengths, with a `low` of 1 where that fits."""
    original = round(longest)
    if original < 1 or not longest > shortest > 0:
        return
    ratio = longest / shortest
    for low, high in itertools.product((1.0, original / longest), (round(ratio), ratio)):
        if high > 1:
            yield low, low * high, original
