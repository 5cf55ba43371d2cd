"""Modules without numbers, and modules whose numbers are those of `nnx.Rngs`, traced sooner."""

import jax
import numpy as np
import pytest
from flax import nnx

from emollama_jax.models.layers import LayerNorm, Linear, stack
from emollama_jax.models.parameters import named_parameters
from emollama_jax.models.rngs import Keys, abstract


class Net(nnx.Module):
    """Plain and stacked parameters, also a stack in a stack."""

    def __init__(self, *, rngs):
        def linear(rngs):
            return Linear(3, 5, axes=("embed", "mlp"), bias=True, dtype="float32", rngs=rngs)

        self.first = linear(rngs)
        self.many = stack(linear, 4, rngs=rngs)
        self.norm = LayerNorm(5, eps=1e-6, rngs=rngs)
        self.deep = stack(lambda rngs: Pair(linear, rngs=rngs), 2, rngs=rngs)
        self.last = linear(rngs)


class Pair(nnx.Module):
    def __init__(self, linear, *, rngs):
        self.inner = stack(linear, 3, rngs=rngs)


def test_keys_give_the_numbers_of_flax():
    wanted = {name: leaf[...] for name, leaf in named_parameters(Net(rngs=nnx.Rngs(7))).items()}

    @jax.jit
    def make():
        return {name: x[...] for name, x in named_parameters(Net(rngs=Keys(7))).items()}

    found = make()
    assert list(found) == list(wanted) and len(wanted) == 10
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-6, err_msg=name)
    assert not np.array_equal(found["many/kernel"][0], found["many/kernel"][1])


def test_an_abstract_module_has_shapes_and_axes_and_no_numbers():
    wanted, found = (
        named_parameters(Net(rngs=nnx.Rngs(0))),
        named_parameters(abstract(lambda rngs: Net(rngs=rngs))),
    )
    assert list(found) == list(wanted)
    for name, leaf in found.items():
        assert isinstance(leaf.get_value(), jax.ShapeDtypeStruct), name
        assert (leaf.shape, leaf.dtype) == (wanted[name].shape, wanted[name].dtype), name
        assert leaf.axes == wanted[name].axes, name
    assert found["deep/inner/kernel"].axes == ("layers", "layers", "embed", "mlp")


@pytest.mark.parametrize("make", [nnx.Rngs, Keys])
def test_seeds_differ(make):
    one, two = (Net(rngs=make(seed)).first.kernel[...] for seed in (0, 1))
    assert not np.array_equal(one, two)
