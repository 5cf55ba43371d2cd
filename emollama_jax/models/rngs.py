"""Random numbers of a new module: `nnx.Rngs`, or one of two faster substitutes.

`Shapes` gives none: the module is abstract, to be filled from files. `Keys` gives the numbers of
`nnx.Rngs` inside of `jax.jit`. There flax (seen in 0.12.8) asks its counter, a tracer, for a
sharding at each draw, and JAX writes an error message that walks through all equations so far: a
model of 450 parameters took 5 s to trace.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

Module = TypeVar("Module", bound=nnx.Module)


class Shapes:
    """Stands for `nnx.Rngs` in a module that has shapes alone; see `abstract`."""


class Keys:
    """The keys that `nnx.Rngs` of the same seed gives, counted in Python."""

    def __init__(self, key: int | jax.Array):
        """`key` is a seed, or a key of `jax.random`."""
        self._key = jax.random.key(key) if isinstance(key, int) else key
        self._count = 0

    def params(self) -> jax.Array:
        """The next key."""
        key = jax.random.fold_in(self._key, jnp.uint32(self._count))
        self._count += 1
        return key


Rngs = nnx.Rngs | Shapes | Keys


def abstract(make: Callable[[Rngs], Module]) -> Module:
    """A module whose parameters are `jax.ShapeDtypeStruct`s; nothing is traced.

    Args:
        make: rngs → the module.
    """
    return make(Shapes())


def stacked(make: Callable[[Rngs], Module], depth: int, *, rngs: Rngs) -> Module:
    """`depth` modules as one, whose parameters have a leading axis."""
    if isinstance(rngs, nnx.Rngs):
        build = nnx.split_rngs(splits=depth)(nnx.vmap(make, in_axes=(0,), out_axes=0))
        return build(rngs)
    module = abstract(make)
    graphdef, state = nnx.split(module)
    if isinstance(rngs, Shapes):

        def deepen(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((depth, *leaf.shape), leaf.dtype)

        return nnx.merge(graphdef, jax.tree.map(deepen, state))
    keys = jax.random.split(rngs.params(), depth)
    return nnx.merge(graphdef, jax.vmap(lambda key: nnx.split(make(Keys(key)))[1])(keys))
