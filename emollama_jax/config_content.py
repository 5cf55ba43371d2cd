"""What `model.content` of a config names: how a frame's patches become content tokens.

"all" keeps every patch, "mean" makes one token of them, "grid:n" pools windows of side ÷ n. What
does not fill a window is left out, so there are n × n tokens only where n divides the side: 16 × 16
patches give 3 × 3 for "grid:3", but 8 × 8 for "grid:6", as in LLaMA-VID.
"""

import math

from emollama_jax.errors import UserError


def checked(value: str) -> str:
    """The setting as it is.

    Raises:
        ValueError: none of the three.
    """
    if value not in ("all", "mean"):
        kind, _, n = value.partition(":")
        if kind != "grid" or not n.isdigit() or int(n) < 2:
            raise ValueError(f"{value!r} is neither 'all' nor 'mean' nor 'grid:n' with n > 1")
    return value


def window(content: str, patches: int) -> int:
    """Patches along a side of the square that becomes one token.

    Raises:
        UserError: a grid finer than the patches.
    """
    side = math.isqrt(patches)
    if content in ("all", "mean"):
        return {"all": 1, "mean": side}[content]
    n = int(content.removeprefix("grid:"))
    if n > side:
        raise UserError(
            f"model.content: {content}, but a frame has {side} × {side} patches: choose "
            f"grid:{side} or smaller, or all"
        )
    return side // n


def tokens(content: str, patches: int) -> int:
    """Content tokens of a frame."""
    return (math.isqrt(patches) // window(content, patches)) ** 2
