"""Swin: each layer and the whole against `transformers`, padding, shifts, stage shapes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax.config import SwinConfig
from emollama_jax.errors import UserError
from emollama_jax.models.rngs import abstract
from emollama_jax.models.swin import APART, Swin, WindowAttention, relative_index, shift_mask
from tests.helpers.llama_vid_golden import LAYER, WHOLE, fill
from tools.convert_torch import engine
from tools.convert_torch.facexformer import swin as table
from tools.convert_torch.golden import off

# Maps of 20, 10 and 5 in windows of 4: shifted, shifted and padded, padded to two windows.
SMALL = SwinConfig(
    image_size=80,
    patch_size=4,
    width=16,
    depths=(2, 4, 2),
    heads=(1, 2, 4),
    window=4,
    mlp_ratio=4,
    norm_eps=1e-5,
)


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def build(cfg: SwinConfig, *, dtype="float32", remat="none") -> Swin:
    model = abstract(lambda rngs: Swin(cfg, dtype=dtype, remat=remat, rngs=rngs))
    return fill(model, seed=3)


def pixels(rng, size, batch=2):
    return rng.standard_normal((batch, size, size, 3), dtype=np.float32)


def block(model: Swin, stage: int, index: int):
    """One block out of the stacked pairs."""
    graphdef, state = nnx.split(model.stages[stage].pairs)
    pair = nnx.merge(graphdef, jax.tree.map(lambda x: x[index // 2], state))
    return pair.shifted if index % 2 else pair.unshifted


RENAMED = {  # `transformers` names → torchvision's; stage numbers are filled in below
    "embeddings.patch_embeddings.projection": "0.0",
    "embeddings.norm": "0.2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.o_proj": "attn.proj",
    "attention.relative_position_bias.relative_position_bias_table": (
        "attn.relative_position_bias_table"
    ),
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.3",
}


def torchvision_keys(state):
    """A `transformers` Swin's state dict under torchvision's keys, q, k and v joined."""
    tensors = {}
    for key, tensor in state.items():
        if key.startswith("layernorm."):
            continue
        value = tensor.numpy()
        if ".q_proj." in key:
            parts = [state[key.replace("q_proj", name)] for name in ("q_proj", "k_proj", "v_proj")]
            key = key.replace("attention.q_proj", "attn.qkv")
            value = np.concatenate([part.numpy() for part in parts])
        elif ".k_proj." in key or ".v_proj." in key:
            continue
        for theirs, ours in RENAMED.items():
            key = key.replace(theirs, ours)
        if key.startswith("encoder.layers."):
            _, _, stage, kind, *rest = key.split(".")
            number = 2 * int(stage) + (1 if kind == "blocks" else 2)
            key = ".".join([str(number), *rest])
        tensors[f"features.{key}"] = value
    return tensors


class Holder(nnx.Module):
    def __init__(self, swin):
        self.face = nnx.Dict(swin=swin)


@pytest.fixture(scope="module")
def reference():
    """`transformers`' Swin with random weights, ours with the same, and what each layer saw."""
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.SwinModel(
        transformers.SwinConfig(
            image_size=SMALL.image_size,
            patch_size=SMALL.patch_size,
            embed_dim=SMALL.width,
            depths=list(SMALL.depths),
            num_heads=list(SMALL.heads),
            window_size=SMALL.window,
            mlp_ratio=SMALL.mlp_ratio,
            layer_norm_eps=SMALL.norm_eps,
        ),
        add_pooling_layer=False,
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # its own start is too small to tell biases apart
            parameter.normal_(0, 0.1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    seen = {}

    def record(name):
        def hook(module, args, output):
            first = output[0] if isinstance(output, tuple) else output
            seen[name] = args[0].numpy(), first.numpy()

        return hook

    for s, stage in enumerate(theirs.encoder.layers):
        for b, layer in enumerate(stage.blocks):
            layer.register_forward_hook(record(("block", s, b)))
        if stage.downsample is not None:
            stage.downsample.register_forward_hook(record(("merge", s + 1)))
    image = np.random.default_rng(5).standard_normal((2, 3, 80, 80), dtype=np.float32)
    with torch.no_grad():
        theirs(torch.from_numpy(image))
    ours = build(SMALL)
    tensors = torchvision_keys(theirs.state_dict())
    engine.assign(Holder(ours), tensors, table(SMALL, torch="features"), ignore={})
    return theirs, ours, seen, jnp.asarray(image.transpose(0, 2, 3, 1))


def as_map(tokens):
    side = int(tokens.shape[1] ** 0.5)
    return tokens.reshape(tokens.shape[0], side, side, -1)


def test_all_stages_are_transformers(reference):
    _, ours, seen, image = reference
    for stage, (depth, output) in enumerate(zip(SMALL.depths, ours(image), strict=True)):
        assert off(output, as_map(seen["block", stage, depth - 1][1])) < WHOLE


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("index", [0, 1])
def test_a_block_is_transformers(reference, stage, index):
    _, ours, seen, _ = reference
    x, wanted = seen["block", stage, index]
    actual = block(ours, stage, index)(jnp.asarray(as_map(x)), shift=2 * index)
    assert off(actual, as_map(wanted)) < LAYER


@pytest.mark.parametrize("stage", [1, 2])
def test_merging_is_transformers(reference, stage):
    _, ours, seen, _ = reference
    x, wanted = seen["merge", stage]
    assert off(ours.stages[stage].downsample(jnp.asarray(as_map(x))), as_map(wanted)) < LAYER


def test_merging_an_odd_map_pads_with_zeros(rng):
    merge = build(SMALL).stages[1].downsample
    x = rng.standard_normal((1, 5, 3, 16), dtype=np.float32)
    padded = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    assert merge(x).shape == (1, 3, 2, 32)
    np.testing.assert_array_equal(merge(x), merge(padded))


def test_attention_of_one_window_is_transformers(reference, rng):
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    theirs, ours, _, _ = reference
    x = rng.standard_normal((3, 16, 32), dtype=np.float32)
    with torch.no_grad():
        wanted = theirs.encoder.layers[1].blocks[0].attention(torch.from_numpy(x))[0].numpy()
    actual = block(ours, 1, 0).attn(jnp.asarray(x.reshape(3, 4, 4, 32)), shift=0)
    assert off(actual, wanted.reshape(3, 4, 4, 32)) < LAYER


@pytest.fixture
def attention():
    """Attention in windows of 4 with two heads."""
    module = nnx.eval_shape(
        lambda: WindowAttention(
            8, heads=2, window=4, dtype="float32", frozen="float", rngs=nnx.Rngs(0)
        )
    )
    return fill(module, seed=7)


def test_padding_is_zeros_before_qkv(attention, rng):
    """torchvision's rule: padded tokens take part, with the bias of `qkv` as their q, k and v."""
    x = rng.standard_normal((2, 6, 2, 8), dtype=np.float32)
    padded = np.pad(x, ((0, 0), (0, 2), (0, 2), (0, 0)))
    assert off(attention(x, shift=0), attention(padded, shift=0)[:, :6, :2]) < LAYER
    # A window of its own shows that they do take part.
    alone = attention(np.ascontiguousarray(x[:, :2]), shift=0)
    assert off(alone, attention(x, shift=0)[:, :2]) > 0.01


def test_a_single_window_is_not_shifted(attention, rng):
    x = rng.standard_normal((1, 3, 4, 8), dtype=np.float32)
    np.testing.assert_array_equal(attention(x, shift=2), attention(x, shift=0))
    tall = rng.standard_normal((1, 8, 4, 8), dtype=np.float32)  # shifted by rows alone
    assert off(attention(tall, shift=2), attention(tall, shift=0)) > 0.01


def test_shift_mask_parts_what_the_roll_joined():
    """A token may attend where its unrolled distance is what it seems in the window."""
    mask = shift_mask(8, 12, window=4, shift=(2, 2))
    rows, columns = np.meshgrid(np.arange(8), np.arange(12), indexing="ij")
    rows, columns = (np.roll(axis, (-2, -2), (0, 1)) for axis in (rows, columns))
    for window in range(6):
        i, j = divmod(window, 3)
        here = np.s_[4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
        r, c = rows[here].reshape(-1), columns[here].reshape(-1)
        near = (abs(r[:, None] - r) < 4) & (abs(c[:, None] - c) < 4)
        np.testing.assert_array_equal(mask[window] == 0, near)
    assert set(np.unique(mask)) == {0, APART}


def test_relative_index_is_row_major_query_minus_key():
    index = relative_index(7)
    assert index.shape == (49, 49)
    for query, key in [(0, 0), (0, 48), (48, 0), (10, 22)]:
        rows = query // 7 - key // 7 + 6
        columns = query % 7 - key % 7 + 6
        assert index[query, key] == rows * 13 + columns


def test_other_picture_sizes_work(rng):
    """Maps of 16, 8 and 4 with a model of another `image_size`; 4 is one window."""
    shapes = [x.shape for x in build(SMALL)(pixels(rng, 64))]
    assert shapes == [(2, 16, 16, 16), (2, 8, 8, 32), (2, 4, 4, 64)]


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(rng, remat):
    cfg = dataclasses.replace(SMALL, depths=(4,), heads=(1,))
    image = pixels(rng, 32, batch=1)

    def gradients(remat):
        graphdef, state = nnx.split(build(cfg, remat=remat))
        return jax.jit(jax.grad(lambda s: jnp.mean(nnx.merge(graphdef, s)(image)[-1] ** 2)))(state)

    for actual, wanted in zip(
        jax.tree.leaves(gradients(remat)), jax.tree.leaves(gradients("none")), strict=True
    ):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("depths", "heads"), [((2, 3), (1, 2)), ((2, 2), (1,))], ids=["odd depth", "heads missing"]
)
def test_impossible_stages_are_refused(depths, heads):
    with pytest.raises(UserError, match="swin: depths"):
        build(dataclasses.replace(SMALL, depths=depths, heads=heads))
