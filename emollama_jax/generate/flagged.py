"""Jitted functions that can be compiled under the XLA flags of a run."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Generic, ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


class Flagged(Generic[P, R]):
    """A function under `jax.jit`, once for each set of flags; called as it is, under none."""

    def __init__(self, function: Callable[P, R], **how: Any):
        """`how` is what `jax.jit` takes."""
        functools.update_wrapper(self, function)
        self._jitted = functools.cache(
            lambda flags: jax.jit(function, compiler_options=dict(flags) or None, **how)
        )

    def under(self, flags: Mapping[str, str]) -> jax.stages.Wrapped:
        """The jitted function; the flags are a TPU's compiler's (`Config.xla_flags`)."""
        return self._jitted(tuple(sorted(flags.items())))

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.under({})(*args, **kwargs)


def flagged(**how: Any) -> Callable[[Callable[P, R]], Flagged[P, R]]:
    """`Flagged` as a decorator."""
    return functools.partial(Flagged, **how)
