"""Every implementation of attention is softmax(q·kᵀ / √H)·v, forward and backward."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax import config
from emollama_jax.errors import UserError
from emollama_jax.models import attention as attention_module
from emollama_jax.models.attention import attention, attention_after, attention_up_to
from emollama_jax.models.eva_vit import EvaVit
from emollama_jax.models.layers import scan
from emollama_jax.models.llama import Llama
from emollama_jax.sharding.mesh import make_mesh
from emollama_jax.sharding.points import within
from emollama_jax.sharding.target import Target

SAME = 1e-5  # relative to the largest value
SHAPES = {  # B, T, N, K, H
    "one block": (2, 128, 2, 2, 64),
    "grouped, padded": (1, 200, 4, 2, 64),
    "several blocks": (1, 640, 2, 1, 128),
    "EVA-ViT-g": (1, 257, 2, 2, 88),
    "short": (2, 7, 3, 3, 16),
}


def arrays(shape, seed=0):
    """q, k, v and the gradient of the result."""
    examples, tokens, heads, kv_heads, width = shape
    rng = np.random.default_rng(seed)
    sizes = [heads, kv_heads, kv_heads, heads]
    return [
        jnp.asarray(rng.standard_normal((examples, tokens, n, width), np.float32)) for n in sizes
    ]


def with_gradients(function):
    """(q, k, v, gradient) → (result, gradients), compiled."""

    @jax.jit
    def run(q, k, v, gradient):
        result, back = jax.vjp(function, q, k, v)
        return result, *back(gradient)

    return run


def reference(causal):
    """Written out, head by head."""

    def attend(q, k, v):
        group = q.shape[2] // k.shape[2]
        k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
        logits = jnp.einsum("btnh,bsnh->bnts", q, k) / q.shape[-1] ** 0.5
        if causal:
            logits = jnp.where(jnp.tri(q.shape[1], dtype=bool), logits, -jnp.inf)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits), v)

    return with_gradients(attend)


def assert_same(got, wanted, tolerance=SAME):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize("implementation", ["xla", "splash", "auto"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_is_the_reference(shape, causal, implementation):
    given = arrays(shape)
    ours = functools.partial(attention, causal=causal, implementation=implementation)
    assert_same(with_gradients(ours)(*given), reference(causal)(*given))


@pytest.mark.parametrize("implementation", ["xla", "splash"])
def test_bfloat16_rounds_once(implementation):
    """Logits, softmax and sums in float32: as near to the exact result as bfloat16 goes."""
    given = arrays((1, 256, 2, 2, 64))
    halves = [x.astype(jnp.bfloat16) for x in given]
    ours = functools.partial(attention, causal=True, implementation=implementation)
    got = with_gradients(ours)(*halves)
    assert all(x.dtype == jnp.bfloat16 for x in got)
    wanted = reference(True)(*[x.astype(jnp.float32) for x in halves])
    assert_same(got, wanted, tolerance=0.015)


@pytest.mark.parametrize("implementation", ["xla", "splash"])
def test_padding_on_the_right_is_not_seen(implementation):
    """Whatever stands behind a row's tokens changes nothing before it, gradients included."""
    q, k, v, gradient = arrays((1, 160, 2, 1, 32))
    real = (jnp.arange(160) < 100)[None, :, None, None]
    ours = with_gradients(functools.partial(attention, causal=True, implementation=implementation))
    gradient = jnp.where(real, gradient, 0)
    wanted = ours(q, k, v, gradient)
    got = ours(*(jnp.where(real, x, 7.0) for x in (q, k, v)), gradient)
    assert_same([x[:, :100] for x in got], [x[:, :100] for x in wanted])
    assert not any(x[:, 100:].any() for x in got[1:])


@pytest.mark.parametrize("implementation", ["xla", "splash"])
def test_examples_of_a_row_see_themselves_alone(implementation):
    """Each gets what it gets in a row of its own, gradients included."""
    given = arrays((2, 290, 4, 2, 64))
    bounds = [[0, 30, 200, 270], [0, 140, 142, 270]]  # and 20 of padding
    segments = np.zeros((2, 290), np.int32)
    for row, places in enumerate(bounds):
        for number, (first, last) in enumerate(itertools.pairwise(places), start=1):
            segments[row, first:last] = number
    how = {"causal": True, "implementation": implementation}
    got = with_gradients(functools.partial(attention, segments=jnp.asarray(segments), **how))(
        *given[:3], given[3].at[:, 270:].set(0)
    )
    run = reference(True)
    for row, places in enumerate(bounds):
        for first, last in itertools.pairwise(places):
            part = (slice(row, row + 1), slice(first, last))
            assert_same([x[part] for x in got], run(*(x[part] for x in given)))


def test_padding_on_the_left_is_behind_what_is_real():
    """By its positions: real tokens get what they get without it, gradients included."""
    q, k, v, gradient = arrays((2, 640, 4, 2, 16))
    padding = 200  # more than a block
    where = np.broadcast_to(np.arange(640), (2, 640)) - padding
    where = jnp.where(where < 0, where + 2000, where)
    ours = with_gradients(functools.partial(attention, causal=True, positions=where))
    got = ours(q, k, v, gradient.at[:, :padding].set(0))
    wanted = reference(True)(*(x[:, padding:] for x in (q, k, v, gradient)))
    assert_same([x[:, padding:] for x in got], wanted)
    assert not any(x[:, :padding].any() for x in got[1:])


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=["each its own key", "grouped"])
def test_new_tokens_see_what_came_before_and_each_other(heads, platform, monkeypatch):
    """As one pass over earlier and new tokens gives them; what lies beyond a row's count is not.
    On a TPU, the heads of a device are taken side by side."""
    monkeypatch.setattr(attention_module, "target", lambda: Target(platform, ""))
    slots, tokens, counts = 12, 3, (0, 5, 12)
    wanted, new, earlier = [], [], []
    for row, count in enumerate(counts):
        q, k, v, gradient = arrays((1, count + tokens, *heads, 16), seed=row)
        wanted.append(reference(True)(q, k, v, gradient)[0][:, count:])
        beyond = [(0, 0), (0, slots - count), (0, 0), (0, 0)]
        pair = (jnp.pad(x[:, :count], beyond, constant_values=7.0) for x in (k, v))
        earlier.append([x.reshape(1, slots, -1) for x in pair])
        new.append([x[:, count:] for x in (q, k, v)])
    new, earlier = (jax.tree.map(lambda *x: jnp.concatenate(x), *rows) for rows in (new, earlier))
    for tensor in (1, 2):
        with jax.set_mesh(make_mesh(config.MeshConfig(data=1, fsdp=1, tensor=tensor))):
            after = functools.partial(attention_after, *new, count=jnp.array(counts))
            assert_same(jax.jit(after)(earlier=tuple(earlier)), jnp.concatenate(wanted))


@pytest.mark.parametrize("heads", [(3, 3), (4, 2)], ids=["each its own key", "grouped"])
def test_tokens_see_slots_up_to_their_own(heads, monkeypatch):
    """As one pass over all tokens gives the newest ones; later slots are not looked at."""
    monkeypatch.setattr("emollama_jax.models.attention.SLOTS_BLOCK", 5)  # does not divide them
    slots, tokens = 12, 2
    for row, length in enumerate((2, 7, 12)):
        q, k, v, gradient = arrays((1, length, *heads, 16), seed=row)
        wanted = reference(True)(q, k, v, gradient)[0][:, -tokens:]
        later = [(0, 0), (0, slots - length), (0, 0), (0, 0)]
        kept = (jnp.pad(x, later, constant_values=7.0).swapaxes(1, 2) for x in (k, v))
        last = jnp.arange(length - tokens, length)[None]
        kept = tuple(kept)
        exact = attention_up_to(q[:, -tokens:], *kept, last=last, used=jnp.int32(length))
        assert_same(exact, wanted)
        # Blocks that neighbours need change no bit.
        whole = attention_up_to(q[:, -tokens:], *kept, last=last, used=jnp.int32(slots))
        np.testing.assert_array_equal(whole, exact)


@pytest.mark.parametrize("implementation", ["xla", "splash"])
@pytest.mark.parametrize("region", ["batch", "frames"])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1), (1, 1, 8)], ids=str)
def test_eight_devices_equal_one(sizes, region, implementation):
    given = arrays((8, 128, 4, 2, 32))
    causal = region == "batch"
    wanted = reference(causal)(*given)
    mesh = make_mesh(config.MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
    with jax.set_mesh(mesh), within(region):
        ours = functools.partial(attention, causal=causal, implementation=implementation)
        assert_same(with_gradients(ours)(*given), wanted)


@pytest.mark.parametrize(("platform", "lowered"), [("tpu", "tpu"), ("cpu", "cpu"), ("gpu", "cuda")])
def test_auto_is_splash_for_a_tpu_and_xla_elsewhere(platform, lowered, monkeypatch):
    monkeypatch.setattr(attention_module, "target", lambda: Target(platform, ""))
    q, k, v, _ = arrays((1, 128, 2, 2, 32))
    ours = functools.partial(attention, causal=True, implementation="auto")
    text = jax.jit(ours).trace(q, k, v).lower(lowering_platforms=(lowered,)).as_text()
    assert ("tpu_custom_call" in text) == (platform == "tpu")
    assert platform == "tpu" or "custom_call" not in text


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_splash_in_scanned_layers(remat):
    """Under `scan` with every policy, gradients are those of xla."""

    class Layers(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.asarray([0.5, 1.5]))

    x = arrays((2, 128, 2, 2, 32))[0]
    graphdef, state = nnx.split(Layers())

    def gradient(implementation):
        def step(layer, x, _):
            y = x * layer.scale[...]
            return x + attention(y, y, y, causal=True, implementation=implementation), None

        def loss(state):
            layers = nnx.merge(graphdef, state)
            return (scan(layers, step, x, remat=remat)[0] ** 2).sum()

        return jax.jit(jax.grad(loss))(state)

    assert_same(gradient("splash"), gradient("xla"))


def test_config_reaches_the_networks(tiny_config):
    """Both networks compute the same with splash, and by another way."""
    llama, vision = tiny_config.model.llama, tiny_config.model.vision
    cases = [
        (Llama, dataclasses.replace(llama, layers=1), (1, 40, llama.width), True),
        (EvaVit, dataclasses.replace(vision, depth=1), (1, 96, 96, 3), False),
    ]
    for network, cfg, shape, causal in cases:
        x = np.random.default_rng(0).standard_normal(shape, np.float32)
        results, programs = [], []
        for implementation in ("xla", "splash"):
            model = network(dataclasses.replace(cfg, attention=implementation), rngs=nnx.Rngs(0))
            graphdef, state = nnx.split(model)

            def run(state, x, graphdef=graphdef, causal=causal):
                model = nnx.merge(graphdef, state)
                if not causal:
                    return model(x)
                return model(x, positions=jnp.arange(x.shape[1])[None]).hidden

            results.append(jax.jit(run)(state, x))
            programs.append(str(jax.make_jaxpr(run)(state, x)))
        assert_same(results[1], results[0])
        assert "pallas_call" in programs[1] and "pallas_call" not in programs[0]


def test_where_it_cannot_run(monkeypatch):
    q, k, v, _ = arrays((1, 8, 2, 2, 16))
    with pytest.raises(UserError, match="cudnn needs an NVIDIA GPU, found cpu"):
        attention(q, k, v, implementation="cudnn")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(UserError, match="cudnn computes in bfloat16, found float32"):
        attention(q, k, v, implementation="cudnn")
    monkeypatch.setattr(attention_module, "target", lambda: Target("gpu", ""))
    with pytest.raises(UserError, match="splash is for TPUs"):
        attention(q, k, v, implementation="splash")
