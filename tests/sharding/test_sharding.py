"""Meshes, rules, and eight devices against one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from emollama_jax import config
from emollama_jax.base import base_values
from emollama_jax.config import MeshConfig
from emollama_jax.errors import UserError
from emollama_jax.models.emollama import EmoLlama
from emollama_jax.models.parameters import named_parameters
from emollama_jax.models.rngs import abstract
from emollama_jax.sharding.mesh import batch_sharding, batch_shards, make_mesh
from emollama_jax.sharding.rules import param_shardings
from emollama_jax.testing.toy_model import Toy, make_batch, toy_config
from emollama_jax.train.setup import set_up

needs_eight = pytest.mark.skipif(
    jax.device_count() < 8,
    reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=8, set before JAX starts",
)


def mesh_of(data: int, fsdp: int, tensor: int):
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))


def leaf(shape, axes):
    return nnx.Param(jnp.zeros(shape), axes=axes)


@needs_eight
def test_mesh_axes_and_their_types():
    mesh = mesh_of(2, 2, 2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert batch_shards(mesh) == 4
    assert batch_sharding(mesh).spec == PartitionSpec(("data", "fsdp"))


def test_mesh_of_one_device_uses_the_first():
    assert mesh_of(1, 1, 1).devices.tolist() == [[[jax.devices()[0]]]]


def test_mesh_larger_than_the_machine_is_refused():
    with pytest.raises(UserError, match=r"data 64 × fsdp 4 × tensor 1 is 256 devices, found \d+"):
        mesh_of(64, 4, 1)
    with pytest.raises(UserError, match=r"mesh\.fsdp: found 0, wanted -1 or 1"):
        mesh_of(1, 0, 1)


@needs_eight
def test_every_rule():
    params = {
        "q": leaf((3, 8, 16), ("layers", "embed", "heads")),
        "kv": leaf((8, 4), ("embed", "kv_heads")),
        "up": leaf((8, 32), ("embed", "mlp")),
        "words": leaf((48, 8), ("vocab", "embed")),
        "lora_A": leaf((8, 2), ("embed", "rank")),
        "head": leaf((4, 4, 4), ("patches", "queries", "layers")),
        "odd": leaf((4, 4), ("fourier", None)),
        "gate": leaf((), ()),
    }
    found = param_shardings(params, mesh_of(2, 2, 2), preset="fsdp+tensor")
    assert {name: sharding.spec for name, sharding in found.params.items()} == {
        "q": PartitionSpec(None, "fsdp", "tensor"),
        "kv": PartitionSpec("fsdp", "tensor"),
        "up": PartitionSpec("fsdp", "tensor"),
        "words": PartitionSpec("tensor", "fsdp"),
        "lora_A": PartitionSpec("fsdp", None),
        "head": PartitionSpec(None, None, None),
        "odd": PartitionSpec(None, None),
        "gate": PartitionSpec(),
    }
    assert found.replicated == ()


@needs_eight
def test_dimension_that_does_not_divide_is_replicated_and_listed():
    params = {"head": leaf((8, 7), ("embed", "heads")), "twice": leaf((8, 8), ("embed", "embed"))}
    found = param_shardings(params, mesh_of(1, 4, 2), preset="fsdp+tensor")
    assert found.params["head"].spec == PartitionSpec("fsdp", None)
    assert found.params["twice"].spec == PartitionSpec("fsdp", None)
    assert found.replicated == (
        "head: heads of 7 is not divisible by tensor 2",
        "twice: embed of 8, but fsdp splits an earlier dimension",
    )


def test_parameter_without_a_rule_is_refused():
    mesh = mesh_of(1, 1, 1)
    with pytest.raises(ValueError, match="x: no rule for the axis 'width'"):
        param_shardings({"x": leaf((4,), ("width",))}, mesh, preset="fsdp+tensor")
    with pytest.raises(ValueError, match="x: axes None for shape"):
        param_shardings({"x": nnx.Param(jnp.zeros(4))}, mesh, preset="fsdp+tensor")
    with pytest.raises(ValueError, match="one name per dimension"):
        param_shardings({"x": leaf((4, 4), ("embed",))}, mesh, preset="fsdp+tensor")


@needs_eight
def test_every_parameter_of_the_7b_model_has_a_rule():
    cfg = config.load("emollama_7b").model
    params = named_parameters(abstract(lambda rngs: EmoLlama(cfg, rngs=rngs)))
    found = param_shardings(params, mesh_of(1, 4, 2), preset="fsdp+tensor")
    assert set(found.params) == set(params)
    kernel = found.params["llama/layers/q_proj/kernel"]
    assert kernel.spec == PartitionSpec(None, "fsdp", "tensor")
    split = [name for name, sharding in found.params.items() if any(sharding.spec)]
    share = sum(params[name].size for name in split) / sum(leaf.size for leaf in params.values())
    assert share > 0.9999
    assert found.replicated == (
        "qformer/word_embeddings: vocab of 30523 is not divisible by tensor 2",
    )


def trained(mesh_sizes, *, accumulation, tied=False):
    """The toy's state and metrics after one step; a tied embedding trains."""
    cfg = toy_config(accumulation=accumulation)
    trainable = ".*" if tied else "(?!llama/embed_tokens).*"
    changes = [f"model.llama.tied={str(tied).lower()}", f"train.trainable=['{trainable}']"]
    cfg, mesh = config.override(cfg, changes), mesh_of(*mesh_sizes)
    with jax.set_mesh(mesh):
        setup = set_up(cfg, mesh, build=Toy)
        values = base_values(setup.model)
        frozen = {path: values[path] for path in setup.frozen}
        state = setup.start({path: values[path] for path in setup.state.params})
        rng = np.random.Generator(np.random.PCG64(0))
        batch = jax.device_put(make_batch(rng, examples=16, frames=2), batch_sharding(mesh))
        state, metrics = setup.step(frozen, state, batch)
        return state, jax.device_get(vars(metrics))


@needs_eight
def test_a_tied_embedding_trains_as_table_and_as_head():
    """Alike on one device and on eight, its gradient the sum of both."""
    one, eight = (trained(sizes, accumulation=2, tied=True) for sizes in ((1, 1, 1), (2, 2, 2)))
    assert "llama/lm_head/kernel" not in one[0].params
    name = "llama/embed_tokens"
    found = [np.asarray(state.opt_state[1].mu[name]) for state, _ in (one, eight)]
    scale = np.abs(found[0]).max()
    np.testing.assert_allclose(found[1], found[0], atol=1e-5 * scale, rtol=0)
    assert (found[0] != 0).any(-1).all()  # every word is a possible answer: the head's gradient
    assert eight[0].params[name].sharding.spec == PartitionSpec("tensor", "fsdp")


@pytest.fixture(scope="module")
def one_device():
    return trained((1, 1, 1), accumulation=2)


@needs_eight
@pytest.mark.parametrize("sizes", [(2, 2, 2), (8, 1, 1), (1, 4, 2)])
def test_eight_devices_equal_one(one_device, sizes):
    state, metrics = trained(sizes, accumulation=2)
    for name, want in one_device[1].items():
        np.testing.assert_allclose(metrics[name], want, rtol=1e-5, err_msg=name)
    # Adam's first moment after one step is the gradient times 1 - b1.
    moments = state.opt_state[1].mu
    for name, want in jax.device_get(one_device[0].opt_state[1].mu).items():
        scale = np.abs(want).max()
        np.testing.assert_allclose(moments[name], want, atol=1e-5 * scale, rtol=0, err_msg=name)
        assert scale > 0 or name == "llama/layers/lora_A"  # lora_B is still zero
    kernel = state.params["llama/layers/kernel"]
    assert kernel.addressable_shards[0].data.size * sizes[1] * sizes[2] == kernel.size
    assert moments["llama/layers/kernel"].sharding == kernel.sharding
