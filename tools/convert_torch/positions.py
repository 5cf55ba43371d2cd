"""EVA-ViT's position embeddings at another picture size.

LLaMA-VID and LAVIS resize them by PyTorch's bicubic interpolation (`align_corners=False`), the
class token's left alone. JAX's "cubic" has another kernel and other edges, so it is written out.
"""

import math

import numpy as np

A = -0.75  # of the cubic kernel (Keys 1981), as in PyTorch


def interpolate(embedding: np.ndarray, patches: int) -> np.ndarray:
    """Position embeddings for another number of patches.

    Args:
        embedding: [1, 1 + P, D], the class token's first, P a square.
        patches: wanted, a square.

    Returns:
        [1, 1 + patches, D] in the same dtype, computed in float32.

    Raises:
        ValueError: a number of patches that is no square.
    """
    found = embedding.shape[1] - 1
    old, new = math.isqrt(found), math.isqrt(patches)
    if old * old != found or new * new != patches:
        raise ValueError(f"{found} and {patches} patches are not both squares")
    weights = _weights(old, new)  # [new, old]
    grid = embedding[0, 1:].astype(np.float32).reshape(old, old, -1)
    grid = np.einsum("ih,jw,hwd->ijd", weights, weights, grid, optimize=True)
    grid = grid.reshape(1, patches, -1).astype(embedding.dtype)
    return np.concatenate([embedding[:, :1], grid], axis=1)


def _weights(old: int, new: int) -> np.ndarray:
    """float32 [new, old]: what each new position takes of the old ones, edges repeated."""
    weights = np.zeros((new, old), np.float32)
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        left = math.floor(centre)
        for k in range(-1, 3):
            x = abs(centre - (left + k))
            if x <= 1:
                w = (A + 2) * x**3 - (A + 3) * x**2 + 1
            else:
                w = A * x**3 - 5 * A * x**2 + 8 * A * x - 4 * A
            weights[i, min(max(left + k, 0), old - 1)] += w
    return weights
