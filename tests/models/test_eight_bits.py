"""Frozen kernels in 8 bits: what they stand for, their products, their way into a model."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax import config
from emollama_jax.base import abstract_model, base_values
from emollama_jax.config import MeshConfig
from emollama_jax.errors import UserError
from emollama_jax.models import eight_bits
from emollama_jax.models.eva_vit import EvaVit
from emollama_jax.models.llama import Llama
from emollama_jax.models.parameters import named_parameters
from emollama_jax.models.rngs import Keys, abstract
from emollama_jax.models.swin import Swin
from emollama_jax.sharding.mesh import make_mesh
from emollama_jax.sharding.target import Target
from emollama_jax.train.setup import set_up
from tests.helpers import llama_vid_golden

LORA = config.LoraConfig(rank=2, alpha=4.0, dropout=0.0, targets=("q_proj", "down_proj"))
LLAMA = dataclasses.replace(
    llama_vid_golden.TINY_LLAMA, heads=4, kv_heads=2, head_dim=8, lora=LORA, remat="full"
)
KERNELS = 7  # of a decoder layer
HALF_A_STEP = 0.5 + 1e-3


class Decoder(nnx.Module):
    """A model that is its decoder alone."""

    def __init__(self, cfg, *, rngs):
        self.llama = Llama(cfg.llama, rngs=rngs)


def run_config(frozen: str, *changes: str) -> config.Config:
    cfg = config.load(
        "tiny",
        ["weights=none", 'train.trainable=["llama/.*lora_[AB]"]', "train.projector=[]", *changes],
    )
    llama = dataclasses.replace(LLAMA, frozen=frozen)
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, llama=llama))


def decoder(frozen: str) -> Llama:
    """The same random numbers for every way to keep them."""
    return Llama(dataclasses.replace(LLAMA, frozen=frozen), rngs=Keys(0))


def embeds(rows: int = 2, tokens: int = 5) -> jax.Array:
    shape = (rows, tokens, LLAMA.width)
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


# ------------------------------------------------------------------ numbers


@pytest.mark.parametrize("axis", [0, 1])
def test_a_kernel_is_within_half_a_step(rng, axis):
    kernel = rng.standard_normal((3, 16, 5)).astype(np.float32)
    kernel[(slice(None),) * axis + (0,)] *= 40
    kernel = np.moveaxis(kernel, axis, 0)
    kernel[..., 2] = 0  # a channel of zeros
    kernel = np.moveaxis(kernel, 0, axis)
    whole, scale = eight_bits.narrow(jnp.asarray(kernel), axis=axis)
    assert whole.dtype == jnp.int8 and scale.dtype == jnp.float32
    assert int(jnp.abs(whole).max()) == 127
    assert scale.shape == tuple(np.delete(kernel.shape, axis))
    steps = np.expand_dims(scale, axis)
    assert (np.abs(eight_bits.wide(whole, scale, axis=axis) - kernel) <= HALF_A_STEP * steps).all()


@pytest.mark.parametrize("shape", [(32, 24), (32, 3, 8)], ids=["one axis", "fused"])
@pytest.mark.parametrize("activations", [False, True], ids=["weights", "both"])
def test_a_product_and_its_gradient(rng, shape, activations):
    """Rounded activations cost a percent of a product of Gaussian numbers; the gradient is exactly
    that of the kernel's values."""
    rows, kernel = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((6, 32), shape))
    rows = rows.at[0].set(0)
    whole, scale = eight_bits.narrow(kernel)
    values = eight_bits.wide(whole, scale)
    wanted, pull = jax.vjp(lambda rows: jnp.tensordot(rows, values, axes=1), rows)
    got, push = jax.vjp(lambda r: eight_bits.product(r, whole, scale, activations), rows)
    assert got.shape == wanted.shape and got.dtype == rows.dtype
    error = float(jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted))
    assert error < (0.02 if activations else 1e-6)
    assert not activations or error > 1e-4
    grad = jnp.asarray(rng.standard_normal(wanted.shape), jnp.float32)
    np.testing.assert_allclose(push(grad)[0], pull(grad)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "narrow"),
    [("TPU v5 lite", True), ("TPU v5", True), ("TPU v6 lite", True)]
    + [(kind, False) for kind in ("TPU v4", "TPU7x", "NVIDIA H100 80GB HBM3", "cpu", "TPU v9")],
)
def test_the_chip_decides_whether_activations_are_narrow_too(kind, narrow, monkeypatch):
    monkeypatch.setattr(eight_bits, "target", lambda: Target("", kind))
    assert eight_bits.narrows_activations("int8") == narrow
    assert eight_bits.narrows_activations("int8_products")
    assert not eight_bits.narrows_activations("int8_weights")


# ------------------------------------------------------------------ networks


def products(text: str) -> dict[str, int]:
    """Products in a lowered program with int8 on both sides, and those of a widened kernel."""
    dots = re.findall(r"dot_general .*?: \((tensor<[^>]*>), (tensor<[^>]*>)\)", text)
    both = sum(all("xi8>" in side for side in pair) for pair in dots)
    widened = len(re.findall(r"convert .*: \(tensor<[^>]*xi8>\) -> tensor<[^>]*xf32>", text))
    return {"int8": both, "widened": widened, "all": len(dots)}


def shaped(frozen: str):
    return lambda rngs: Llama(dataclasses.replace(LLAMA, frozen=frozen), rngs=rngs)


def lowered(make, call, *args) -> dict[str, int]:
    graphdef, state = nnx.split(abstract(make))
    return products(
        jax.jit(lambda state, *args: call(nnx.merge(graphdef, state), *args))
        .lower(state, *args)
        .as_text()
    )


@pytest.mark.parametrize(
    ("frozen", "kind", "wanted"),
    [
        ("int8_products", "cpu", {"int8": KERNELS, "widened": 0}),
        ("int8_weights", "cpu", {"int8": 0, "widened": KERNELS}),
        ("int8", "TPU v5 lite", {"int8": KERNELS, "widened": 0}),
        ("int8", "TPU7x", {"int8": 0, "widened": KERNELS}),
        ("float", "TPU v5 lite", {"int8": 0, "widened": 0}),
    ],
)
def test_products_in_scanned_layers(frozen, kind, wanted, monkeypatch):
    """Layers are stacked and scanned: the text holds one layer, all of whose products are told."""
    monkeypatch.setattr(eight_bits, "target", lambda: Target("", kind))
    found = lowered(shaped(frozen), lambda llama, x: llama(x).hidden, embeds())
    assert {key: found[key] for key in wanted} == wanted
    plain = lowered(shaped("float"), lambda llama, x: llama(x).hidden, embeds())
    assert found["all"] == plain["all"]


def test_products_of_a_train_step():
    """Forward; again under `remat=full`, but for the last, whose result no gradient reads; and the
    gradient, with widened kernels."""
    graphdef, adapters, rest = nnx.split(
        abstract(shaped("int8_products")), lambda path, leaf: str(path[-1]).startswith("lora_"), ...
    )

    def loss(adapters, rest):
        return (nnx.merge(graphdef, adapters, rest)(embeds()).hidden ** 2).sum()

    found = products(jax.jit(jax.grad(loss)).lower(adapters, rest).as_text())
    assert found["int8"] == 2 * KERNELS - 1
    assert found["widened"] == KERNELS


def test_products_of_the_towers():
    cfg = config.load("tiny").model
    vit = dataclasses.replace(cfg.vision, frozen="int8_products")
    side = vit.image_size
    pixels = jnp.zeros((1, side, side, 3))
    assert lowered(lambda r: EvaVit(vit, rngs=r), lambda tower, x: tower(x), pixels)["int8"] == 4
    swin = cfg.face.swin
    how = {"dtype": "float32", "remat": "none", "frozen": "int8_products"}
    side = swin.image_size
    found = lowered(
        lambda r: Swin(swin, rngs=r, **how),
        lambda tower, x: tower(x),
        jnp.zeros((1, side, side, 3)),
    )
    stages = len(swin.depths)
    assert found["int8"] == stages * 2 * 4 + stages - 1  # a scanned pair of blocks, and mergings


@pytest.mark.parametrize(("frozen", "most"), [("int8_weights", 0.02), ("int8_products", 0.04)])
def test_a_decoder_stays_near_its_float_self(frozen, most):
    wanted, got = (decoder(how)(embeds()).hidden for how in ("float", frozen))
    error = float(jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted))
    assert 0 < error < most


@pytest.mark.parametrize("frozen", ["int8_weights", "int8_products"])
def test_eight_devices_equal_one(frozen):
    llama, x = decoder(frozen), embeds(rows=8)
    graphdef, state = nnx.split(llama)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x).hidden)
    wanted = run(state, x)
    cfg = run_config(frozen, "mesh.fsdp=4", "mesh.tensor=2")
    whole = abstract_model(cfg, make_mesh(cfg.mesh), build=Decoder)
    leaves = named_parameters(llama)
    for path, place in whole.places.items():
        leaf = leaves[path.removeprefix("llama/")]
        leaf.set_value(jax.device_put(leaf[...], place))
    with jax.set_mesh(whole.mesh):
        got = run(nnx.split(llama)[1], x)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


# ------------------------------------------------------------------ a run's base


def test_only_kernels_are_narrow_and_the_rest_is_as_configured():
    cfg = run_config("int8", "train.frozen_dtype=bfloat16", "mesh.fsdp=4", "mesh.tensor=2")
    whole = abstract_model(cfg, make_mesh(cfg.mesh), build=Decoder)
    assert len(whole.narrow) == KERNELS
    dtypes = {path: str(leaf.dtype) for path, leaf in whole.params.items()}
    assert dtypes["llama/layers/q_proj/kernel"] == "int8"
    assert dtypes["llama/layers/q_proj/kernel_scale"] == "float32"
    assert dtypes["llama/layers/q_proj/lora_A"] == "float32"
    assert dtypes["llama/norm/scale"] == dtypes["llama/embed_tokens"] == "bfloat16"
    specs = {path: tuple(place.spec) for path, place in whole.places.items()}
    assert specs["llama/layers/up_proj/kernel"] == (None, "fsdp", "tensor")
    assert specs["llama/layers/up_proj/kernel_scale"] == (None, "tensor")
    assert specs["llama/layers/down_proj/kernel_scale"] == (None, None)


def test_random_weights_are_those_of_the_float_run():
    """Drawn, then narrowed; wherever they lie, and whatever the caller has already."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    wide, narrow = (
        base_values(abstract_model(run_config(how), mesh, build=Decoder))
        for how in ("float", "int8")
    )
    for path, value in wide.items():
        if path + eight_bits.SCALE in narrow:
            whole, scale = eight_bits.narrow(value, axis=1)
            np.testing.assert_array_equal(narrow[path], whole)
            np.testing.assert_allclose(narrow[path + eight_bits.SCALE], scale, rtol=1e-6)
        else:
            np.testing.assert_array_equal(narrow[path], value)


def test_the_packages_towers_are_narrowed_when_they_are_read():
    changes = ["model.vision.frozen=int8", "weights=[tiny:vision]"]
    cfg = config.load("tiny", [*changes, 'train.trainable=["llama/.*lora_[AB]"]'])
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1))

    class Tower(nnx.Module):
        def __init__(self, cfg, *, rngs):
            self.vision = EvaVit(cfg.vision, rngs=rngs)
            self.llama = Llama(dataclasses.replace(cfg.llama, layers=1), rngs=rngs)

    wide = config.load("tiny", [*changes[1:], 'train.trainable=["llama/.*lora_[AB]"]'])
    given = [
        p for p in named_parameters(abstract(lambda r: Tower(cfg.model, rngs=r))) if "llama" in p
    ]
    narrow, wide = (
        base_values(abstract_model(each, mesh, build=Tower), given=given) for each in (cfg, wide)
    )
    path = "vision/blocks/attn/qkv"
    values = eight_bits.wide(narrow[path], narrow[path + eight_bits.SCALE], axis=1)
    step = np.expand_dims(narrow[path + eight_bits.SCALE], 1)
    assert (np.abs(values - wide[path]) <= HALF_A_STEP * step).all()
    assert len(narrow) == len(wide) + 4


def test_a_train_step_reads_it(monkeypatch):
    """The abstract step takes int8 kernels, and gives nothing but adapters back."""
    cfg = run_config("int8_products", "mesh.fsdp=1")
    setup = set_up(cfg, make_mesh(MeshConfig(data=1, fsdp=1, tensor=1)), build=Decoder)
    assert {path.rpartition("/")[2] for path in setup.state.params} == {"lora_A", "lora_B"}
    assert sum(leaf.dtype == jnp.int8 for leaf in setup.frozen.values()) == KERNELS


def test_what_trains_has_all_its_digits():
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1))
    with pytest.raises(
        UserError, match=r"llama/layers/down_proj/kernel would train, but model\.ll"
    ):
        abstract_model(run_config("int8", "train.trainable=[llama/.*]"), mesh, build=Decoder)
