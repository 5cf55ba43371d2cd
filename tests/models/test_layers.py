"""Dropout's bits: even, unrelated from row to row and from key to key, the same on any mesh.
Products with few rows, as a TPU takes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from emollama_jax.config import MeshConfig
from emollama_jax.models import layers
from emollama_jax.models.layers import dropout, hashed_bits, split_keys
from emollama_jax.sharding.mesh import make_mesh
from emollama_jax.sharding.target import Target, target

SHAPE = (4, 256, 1024)
SIGMAS = 6.0  # of a million numbers, none strays as far


def signs(key):
    """±1 by the highest bit; [rows, columns]."""
    bits = np.asarray(hashed_bits(key, SHAPE)).reshape(-1, SHAPE[-1])
    return np.where(bits >> 31, 1.0, -1.0)


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_dropout_keeps_its_share_and_the_mean(rate):
    y = np.asarray(dropout(jnp.ones(SHAPE), rate, jax.random.key(1)))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / (1 - rate))}
    spread = (rate * (1 - rate) / y.size) ** 0.5
    assert abs((y > 0).mean() - (1 - rate)) < SIGMAS * spread


def test_evaluation_drops_nothing():
    x = jnp.arange(6.0).reshape(2, 3)
    assert dropout(x, 0.5, None) is x and dropout(x, 0.0, jax.random.key(0)) is x


def test_every_bit_is_even():
    bits = np.asarray(hashed_bits(jax.random.key(2), SHAPE))
    for place in range(32):
        share = ((bits >> place) & 1).mean()
        assert abs(share - 0.5) < SIGMAS * 0.5 / bits.size**0.5, place


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_rows_and_columns_are_unrelated(axis):
    x = signs(jax.random.key(3))
    x = x if axis == "rows" else x.T
    products = x @ x.T / x.shape[1] ** 0.5  # of unrelated signs: variance 1
    apart = products[~np.eye(len(x), dtype=bool)]
    assert np.abs(apart).max() < SIGMAS and abs(apart.std() - 1) < 0.02


def test_keys_are_unrelated():
    """Those of neighbouring seeds, and those that a layer splits from one."""
    keys = [*split_keys(jax.random.key(0), 7), *(jax.random.key(i) for i in range(1, 8))]
    rows = np.stack([signs(key).ravel() for key in keys])
    products = rows @ rows.T / rows.shape[1] ** 0.5
    assert np.abs(products[~np.eye(len(keys), dtype=bool)]).max() < SIGMAS


def test_a_mesh_changes_no_bit():
    key = jax.random.key(5)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    places = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))
    split = jax.jit(lambda: hashed_bits(key, SHAPE), out_shardings=places)()
    assert split.sharding.shard_shape(SHAPE) == (1, 256, 512)
    np.testing.assert_array_equal(split, hashed_bits(key, SHAPE))


# ------------------------------------------------------------------ few rows


def test_a_cpu_is_what_is_traced_for():
    assert target().platform == "cpu"
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        assert target() == Target("cpu", jax.devices()[0].device_kind)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_few_rows_are_padded_for_a_tpu_alone(rows, monkeypatch):
    """To whole registers of each device; the caller sees nothing of it."""
    x, kernel = jnp.arange(float(8 * rows * 4)).reshape(8, rows, 4), jnp.arange(12.0).reshape(4, 3)
    with jax.set_mesh(make_mesh(MeshConfig(data=4, fsdp=2, tensor=1))):
        plain = jax.make_jaxpr(lambda x: layers.dot(x, kernel))(x)
        monkeypatch.setattr(layers, "target", lambda: Target("tpu", "TPU v5 lite"))
        padded = jax.make_jaxpr(lambda x: layers.dot(x, kernel))(x)
        np.testing.assert_array_equal(layers.dot(x, kernel), x @ kernel)
    assert f"f32[{8 * rows},3] = dot_general" in str(plain)
    assert "f32[64,3] = dot_general" in str(padded)
