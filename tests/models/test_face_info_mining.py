"""Face Info Mining against plain NumPy, and what it promises: nothing changes before training."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax.config import FaceInfoMiningConfig
from emollama_jax.models.face_info_mining import FaceInfoMining, fourier, sample_at
from emollama_jax.models.facexformer import from_pixels
from emollama_jax.models.parameters import named_parameters
from emollama_jax.terms import LANDMARKS

CONFIG = FaceInfoMiningConfig(
    branches="both", heads=2, head_dim=8, pool=2, fourier_bands=3, norm_eps=1e-6
)
FRAMES, PATCHES, VISUAL, FACE, LLM, SIDE = 3, 9, 24, 16, 20, 8


def build(branches="both", dtype="float32", seed=0):
    return FaceInfoMining(
        dataclasses.replace(CONFIG, branches=branches),
        visual_width=VISUAL,
        face_width=FACE,
        llm_width=LLM,
        dtype=dtype,
        rngs=nnx.Rngs(seed),
    )


def open_gates(fim, a=0.7, b=-0.4):
    """Lets both branches through, and gives every parameter a value that tells it from another."""
    rng = np.random.Generator(np.random.PCG64(5))
    for leaf in named_parameters(fim).values():
        leaf[...] = leaf[...] + jnp.asarray(0.1 * rng.standard_normal(leaf.shape), jnp.float32)
    if hasattr(fim, "global_branch"):
        fim.global_branch.gate[...] = jnp.float32(a)
    if hasattr(fim, "local_branch"):
        fim.local_branch.gate[...] = jnp.float32(b)
    return fim


@pytest.fixture
def inputs(rng):
    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return {
        "visual": normal(FRAMES, PATCHES, VISUAL),
        "face_map": normal(FRAMES, SIDE, SIDE, FACE),
        "task_tokens": normal(FRAMES, 18, FACE),
        "landmarks": jnp.asarray(rng.uniform(-1.2, 1.2, (FRAMES, LANDMARKS, 2)), jnp.float32),
        "found": jnp.array([True, True, True]),
    }


# ------------------------------------------------------------------ sampling


def bilinear(face_map, points):
    """The textbook's four neighbours, one point at a time; the border's value goes on outside."""
    height, width, _ = face_map.shape
    out = []
    for x, y in np.asarray(points, np.float64):
        column = np.clip(((x + 1) * width - 1) / 2, 0, width - 1)
        row = np.clip(((y + 1) * height - 1) / 2, 0, height - 1)
        left, top = int(np.floor(column)), int(np.floor(row))
        right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
        dx, dy = column - left, row - top
        upper = (1 - dx) * face_map[top, left] + dx * face_map[top, right]
        lower = (1 - dx) * face_map[bottom, left] + dx * face_map[bottom, right]
        out.append((1 - dy) * upper + dy * lower)
    return np.stack(out)


@pytest.mark.parametrize(("height", "width"), [(7, 7), (5, 9), (1, 4)])
def test_sample_at_is_bilinear(rng, height, width):
    face_map = rng.standard_normal((2, height, width, 3)).astype(np.float32)
    points = rng.uniform(-1.5, 1.5, (2, 40, 2)).astype(np.float32)
    points[:, :5] = [(-1, -1), (1, 1), (-1, 1), (0, 0), (3, -3)]
    got = np.asarray(sample_at(face_map, points))
    for i in range(2):
        np.testing.assert_allclose(got[i], bilinear(face_map[i], points[i]), atol=2e-6)


def test_sample_at_cell_centres_and_borders(rng):
    face_map = rng.standard_normal((1, 6, 6, 4)).astype(np.float32)
    rows, columns = np.mgrid[:6, :6].reshape(2, 1, -1)
    centres = from_pixels(np.stack([columns, rows], axis=-1).astype(np.float32), 6)
    np.testing.assert_allclose(sample_at(face_map, centres), face_map.reshape(1, 36, 4), atol=2e-6)
    corners = np.array([[(-9.0, -9.0), (9.0, -9.0), (-9.0, 9.0), (9.0, 9.0)]], np.float32)
    want = face_map[:, [0, 0, 5, 5], [0, 5, 0, 5]]
    np.testing.assert_array_equal(sample_at(face_map, corners), want)


def test_fourier_features_tell_x_from_y():
    points = np.array([[[0.25, -0.5]]], np.float32)
    x, y = 0.25 * np.pi * np.array([1, 2, 4]), -0.5 * np.pi * np.array([1, 2, 4])
    want = np.concatenate([np.sin(x), np.sin(y), np.cos(x), np.cos(y)])
    np.testing.assert_allclose(np.asarray(fourier(points, 3))[0, 0], want, atol=1e-6)


# ------------------------------------------------------------------ the equations


def reference(fim, inputs):
    """Both branches as docs/model.md writes them, in float64, frame by frame, head by head."""
    p = {k: np.asarray(v[...], np.float64) for k, v in named_parameters(fim).items()}

    def linear(x, name):
        return x @ p[f"{name}/kernel"] + p.get(f"{name}/bias", 0.0)

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm_eps)
        return x * p[f"{name}/scale"] + p[f"{name}/bias"]

    def attend(x, keys, name):
        q, k, v = (linear(y, f"{name}/{w}_proj") for y, w in ((x, "q"), (keys, "k"), (keys, "v")))
        heads = []
        for n in range(CONFIG.heads):
            cut = slice(n * CONFIG.head_dim, (n + 1) * CONFIG.head_dim)
            logits = q[:, cut] @ k[:, cut].T / np.sqrt(CONFIG.head_dim)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, cut])
        return linear(np.concatenate(heads, -1), f"{name}/o_proj")

    def token(keys, name):
        x = linear(
            attend(p[f"{name}/query"], keys, f"{name}/token_attention"), f"{name}/projector_in"
        )
        erf = np.vectorize(math.erf)
        return linear(x * (1 + erf(x / np.sqrt(2))) / 2, f"{name}/projector_out")

    cell = SIDE // CONFIG.pool
    for i in range(FRAMES):
        x, face_map, task_tokens, points = (
            np.asarray(inputs[name][i], np.float64)
            for name in ("visual", "face_map", "task_tokens", "landmarks")
        )
        pooled = [
            face_map[r * cell : (r + 1) * cell, c * cell : (c + 1) * cell].mean((0, 1))
            for r in range(CONFIG.pool)
            for c in range(CONFIG.pool)
        ]
        keys = norm(linear(np.concatenate([pooled, task_tokens]), "global_in"), "global_norm")
        a, b = np.tanh(p["global_branch/gate"]), np.tanh(p["local_branch/gate"])
        g = attend(norm(x, "global_branch/norm"), keys, "global_branch/attention")
        where = linear(np.asarray(fourier(points[None], CONFIG.fourier_bands))[0], "position")
        marks = norm(bilinear(face_map, points) + p["landmark"] + where, "local_norm")
        lc = attend(norm(x + a * g, "local_branch/norm"), marks, "local_branch/attention")
        tokens = np.concatenate([token(keys, "global_branch"), token(marks, "local_branch")])
        yield x + a * g + b * lc, tokens


def test_equations(inputs):
    fim = open_gates(build())
    mined = fim(**inputs)
    for i, (visual, tokens) in enumerate(reference(fim, inputs)):
        np.testing.assert_allclose(mined.visual[i], visual, atol=1e-5 * np.abs(visual).max())
        np.testing.assert_allclose(mined.tokens[i], tokens, atol=1e-5 * np.abs(tokens).max())


# ------------------------------------------------------------------ what it promises


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("branches", ["both", "global", "local"])
def test_closed_gates_change_no_bit(inputs, branches, dtype):
    fim = build(branches, dtype)
    visual = inputs["visual"].astype(dtype)
    inputs = inputs | {"visual": visual}
    graphdef, state = nnx.split(fim)
    jitted = jax.jit(lambda state, inputs: nnx.merge(graphdef, state)(**inputs))
    for mined in (fim(**inputs), jitted(state, inputs)):
        assert mined.visual.dtype == visual.dtype
        assert np.asarray(mined.visual).tobytes() == np.asarray(visual).tobytes()


def test_open_gates_change_every_patch(inputs):
    mined = open_gates(build())(**inputs)
    assert (jnp.abs(mined.visual - inputs["visual"]).max(-1) > 1e-3).all()


def test_no_face_leaves_the_frame_alone(inputs):
    fim = open_gates(build())
    found = jnp.array([True, False, True])
    mined, all_found = fim(**inputs | {"found": found}), fim(**inputs)
    np.testing.assert_array_equal(mined.visual[1], inputs["visual"][1])
    for token in mined.tokens[1]:
        np.testing.assert_array_equal(token, fim.no_face[...])
    seen = np.array([0, 2])
    np.testing.assert_array_equal(mined.visual[seen], all_found.visual[seen])
    np.testing.assert_array_equal(mined.tokens[seen], all_found.tokens[seen])


def test_without_a_face_nothing_of_the_face_inputs_is_read(inputs):
    fim = open_gates(build())
    none = inputs | {"found": jnp.zeros(FRAMES, bool)}
    zeros = {
        name: jnp.zeros_like(inputs[name]) for name in ("face_map", "task_tokens", "landmarks")
    }
    for a, b in zip(
        jax.tree.leaves(fim(**none)), jax.tree.leaves(fim(**none | zeros)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_frames_do_not_see_each_other(inputs):
    fim = open_gates(build())
    before = fim(**inputs)
    changed = {
        name: x.at[1].add(0.5) for name, x in inputs.items() if name not in ("found", "landmarks")
    }
    after = fim(**inputs | changed)
    for i in (0, 2):
        np.testing.assert_allclose(after.visual[i], before.visual[i], atol=1e-6)
        np.testing.assert_allclose(after.tokens[i], before.tokens[i], atol=1e-6)
    assert jnp.abs(after.tokens[1] - before.tokens[1]).max() > 1e-3


@pytest.mark.parametrize(("branches", "absent"), [("global", "local"), ("local", "global")])
def test_one_branch_is_both_with_the_other_one_shut(inputs, branches, absent):
    both, one = open_gates(build()), build(branches)
    values = named_parameters(both)
    names = named_parameters(one)
    for name, leaf in names.items():
        leaf[...] = values[name][...]
    assert not any(name.startswith(absent) for name in names)
    getattr(both, f"{absent}_branch").gate[...] = jnp.float32(0)
    want, got = both(**inputs), one(**inputs)
    assert got.tokens.shape == (FRAMES, 1, LLM)
    np.testing.assert_array_equal(got.visual, want.visual)
    which = 0 if branches == "global" else 1
    np.testing.assert_array_equal(got.tokens[:, 0], want.tokens[:, which])


def test_landmarks_reach_the_local_branch_only(inputs):
    fim = open_gates(build())
    moved = inputs | {"landmarks": inputs["landmarks"] * 0.5}
    before, after = fim(**inputs), fim(**moved)
    np.testing.assert_array_equal(after.tokens[:, 0], before.tokens[:, 0])
    assert jnp.abs(after.tokens[:, 1] - before.tokens[:, 1]).max() > 1e-3
    assert jnp.abs(after.visual - before.visual).max() > 1e-3
    fim.local_branch.gate[...] = jnp.float32(0)
    np.testing.assert_array_equal(fim(**inputs).visual, fim(**moved).visual)


def test_task_tokens_reach_the_global_branch_only(inputs):
    fim = open_gates(build())
    moved = inputs | {"task_tokens": -inputs["task_tokens"]}
    before, after = fim(**inputs), fim(**moved)
    np.testing.assert_array_equal(after.tokens[:, 1], before.tokens[:, 1])
    assert jnp.abs(after.tokens[:, 0] - before.tokens[:, 0]).max() > 1e-3


def test_landmark_order_matters(inputs):
    fim = open_gates(build())
    before = fim(**inputs)
    after = fim(**inputs | {"landmarks": inputs["landmarks"][:, ::-1]})
    assert jnp.abs(after.tokens[:, 1] - before.tokens[:, 1]).max() > 1e-3


def gradients(fim, inputs):
    graphdef, state = nnx.split(fim)

    def loss(state):
        mined = nnx.merge(graphdef, state)(**inputs)
        return jnp.sum(jnp.sin(mined.visual)) + jnp.sum(jnp.sin(mined.tokens))

    grads = nnx.merge(graphdef, jax.jit(jax.grad(loss))(state))
    return {name: np.abs(leaf[...]).max() for name, leaf in named_parameters(grads).items()}


def test_gradients_reach_every_parameter(inputs):
    inputs = inputs | {"found": jnp.array([True, False, True])}
    reached = gradients(open_gates(build()), inputs)
    # A bias of the keys moves all logits of a query alike, which softmax does not see.
    keys = {name for name in reached if name.endswith("k_proj/bias")}
    assert len(keys) == 4
    assert all(reached[name] < 1e-5 for name in keys)
    assert [name for name in reached if name not in keys and reached[name] < 1e-4] == []


def test_closed_gates_learn_first(inputs):
    inputs = inputs | {"found": jnp.array([True, False, True])}
    reached = gradients(build(), inputs)
    assert reached["global_branch/gate"] > 1e-4
    assert reached["local_branch/gate"] > 1e-4
    assert reached["global_branch/attention/o_proj/kernel"] == 0
    assert reached["global_branch/token_attention/o_proj/kernel"] > 1e-4


def test_a_frame_without_a_face_gives_finite_gradients(inputs):
    inputs = inputs | {"found": jnp.zeros(FRAMES, bool)}
    reached = gradients(open_gates(build()), inputs)
    assert reached.pop("no_face") > 1e-4
    assert set(reached.values()) == {0.0}
