"""The sharding presets: where every parameter of the 7B lives, and that no preset changes a number.

A change of a rule shows as a diff of tests/golden/partition_specs. Written anew by

    UPDATE_GOLDEN=1 python -m pytest tests/sharding/test_presets.py -k spec
"""

import dataclasses
import math
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from emollama_jax import config
from emollama_jax.base import base_values
from emollama_jax.batch import IGNORE, IMAGE_TOKEN, one_a_row
from emollama_jax.config import MeshConfig
from emollama_jax.errors import UserError
from emollama_jax.models.emollama import EmoLlama
from emollama_jax.models.parameters import named_parameters
from emollama_jax.models.rngs import abstract
from emollama_jax.sharding.mesh import AXES, batch_sharding, make_mesh, mesh_sizes
from emollama_jax.sharding.points import constrain, parts
from emollama_jax.sharding.rules import PRESETS, param_shardings
from emollama_jax.train.setup import set_up

needs_eight = pytest.mark.skipif(
    jax.device_count() < 8,
    reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=8, set before JAX starts",
)


# ------------------------------------------------------------------ rules


@pytest.mark.parametrize("preset", PRESETS)
def test_partition_specs_are_the_reviewed_ones(root, abstract_model, preset):
    sizes = (2, 16, 1) if preset == "fsdp" else (2, 8, 2)
    mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)
    leaves = named_parameters(abstract_model("emollama_7b"))
    found = param_shardings(leaves, mesh, preset=preset)
    layout = " × ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
    lines = [f"emollama_7b, preset {preset}, mesh {layout}", ""]
    lines += [
        f"{path} {list(leaves[path].shape)}: {', '.join(str(axis) for axis in sharding.spec)}"
        for path, sharding in found.params.items()
    ]
    lines += ["", "not followed:", *found.replicated]
    path = root / "tests" / "golden" / "partition_specs" / f"{preset}.txt"
    text = "\n".join(lines) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text


# ------------------------------------------------------------------ meshes


def sizes_of(devices, **fields):
    return mesh_sizes(MeshConfig(**{"data": 1, "fsdp": 1, "tensor": 1} | fields), devices)


def test_one_config_moves_from_one_device_to_a_pod():
    assert sizes_of(1, fsdp=-1) == (1, 1, 1)
    assert sizes_of(8, fsdp=-1) == (1, 8, 1)
    assert sizes_of(256, data=2, fsdp=-1, tensor=4) == (2, 32, 4)
    assert sizes_of(512, data=-1, fsdp=256, slices=2) == (2, 256, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": -1, "fsdp": -1}, "only one size can be −1"),
        ({"data": -2}, r"mesh\.data: found -2, wanted -1 or 1"),
        ({"data": 3, "fsdp": -1}, "8 devices cannot be divided by 3"),
        ({"data": 2, "fsdp": 8}, "data 2 × fsdp 8 × tensor 1 is 16 devices, found 8"),
        ({"data": 3, "slices": 2}, "data 3, slices 2: data crosses the slices"),
        ({"slices": 0}, r"mesh\.slices: found 0, wanted 1"),
        ({"fsdp": 4, "tensor": 2, "preset": "fsdp"}, "preset fsdp splits nothing over tensor 2"),
    ],
)
def test_meshes_that_cannot_be_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        sizes_of(8, **fields)


@needs_eight
def test_slices_are_crossed_by_data_alone():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2, tensor=1, slices=2))
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    assert set(ids[:2].flat) == {0, 1, 2, 3} and set(ids[2:].flat) == {4, 5, 6, 7}


# ------------------------------------------------------------------ points


@needs_eight
def test_points_lay_out_what_they_can():
    def laid(rows, point):
        sharding = jax.jit(lambda x: constrain(x, point))(jnp.zeros((rows, 4))).sharding
        return sharding.shard_shape((rows, 4))

    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        assert laid(16, "frames") == (2, 4) and parts("frames", 16) == 8
        assert laid(12, "frames") == (3, 4) and parts("frames", 12) == 4
        assert laid(3, "frames") == (3, 4) and parts("frames", 3) == 1
        assert laid(16, "batch") == (4, 4)
        assert laid(16, "head") == (16, 2)
    assert parts("frames", 16) == 1  # no mesh
    np.testing.assert_array_equal(constrain(jnp.arange(3), "batch"), [0, 1, 2])


# ------------------------------------------------------------------ eight devices against one

EXAMPLES, FRAMES, ACCUMULATION = 16, 2, 2
# A key's bias moves all logits of a query alike: its gradient is nothing but rounding.
KEY_BIAS = r".*/(key|k_proj|key_projector)/bias"
SHORT = (  # fewer layers of the same kinds, to compile sooner
    # Random weights: the trained ones answer noise so sharply that rounding shows in the gradient.
    "weights=none",
    "model.llama.layers=2",
    "model.vision.depth=2",
    "model.face.decoder_depth=1",
)


def real_batch(cfg):
    """Two frames an example, one of them without a face; random pictures and words."""
    rng = np.random.Generator(np.random.PCG64(0))
    size, face = cfg.vision.image_size, cfg.face.swin.image_size
    visual = FRAMES * cfg.tokens_per_frame
    words = rng.integers(3, cfg.llama.vocab_size, (EXAMPLES, 24)).astype(np.int32)
    places = np.full((EXAMPLES, visual), IMAGE_TOKEN, np.int32)
    ids = np.concatenate([words[:, :4], places, words[:, 4:]], axis=1)
    labels = np.where(np.arange(ids.shape[1]) > visual + 10, ids, IGNORE).astype(np.int32)
    found = np.arange(EXAMPLES * FRAMES).reshape(EXAMPLES, FRAMES) % 5 > 0
    return one_a_row(
        frames=rng.integers(0, 256, (EXAMPLES, FRAMES, size, size, 3), np.uint8),
        faces=rng.integers(0, 256, (EXAMPLES, FRAMES, face, face, 3), np.uint8),
        face_found=found,
        landmarks=rng.uniform(-0.8, 0.8, (EXAMPLES, FRAMES, 68, 2)).astype(np.float32),
        ids=ids,
        labels=labels,
        length=np.full(EXAMPLES, ids.shape[1], np.int32),
        questions=rng.integers(3, cfg.qformer.vocab_size, (EXAMPLES, 1, 8), np.int32),
        question_mask=np.arange(8) < rng.integers(3, 9, (EXAMPLES, 1, 1)),
        weight=rng.integers(0, 3, EXAMPLES).astype(np.float32),
        index=np.arange(EXAMPLES, dtype=np.int32),
    )


@needs_eight
@pytest.mark.parametrize(("over", "split"), [("mesh", 8), ("batch", 4)])
def test_frames_of_the_towers_lie_as_asked(over, split):
    """In the program, before the compiler sees it: into how many parts anything is split."""
    cfg = config.load("tiny", [*SHORT, f"model.frames_over={over}"]).model
    graphdef, state = nnx.split(abstract(lambda rngs: EmoLlama(cfg, rngs=rngs)))
    size = {"data": 1, "fsdp": 4, "tensor": 2}
    with jax.set_mesh(make_mesh(MeshConfig(**size))):
        visual = jax.make_jaxpr(lambda state, batch: nnx.merge(graphdef, state).visual(batch))
        program = str(visual(state, real_batch(cfg)))
    leading = re.findall(r"spec=P\(\(([^)]*)\)", program)
    axes = [re.findall(r"\w+", names) for names in leading]
    assert max(math.prod(size[axis] for axis in one) for one in axes) == split


def step_of(sizes, preset, *overrides):
    """Metrics and gradients (Adam's first moment) of one step of the whole tiny model."""
    cfg = config.load("tiny", [*SHORT, f"train.accumulation={ACCUMULATION}", *overrides])
    where = MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2], preset=preset)
    cfg = dataclasses.replace(cfg, mesh=where)
    mesh = make_mesh(cfg.mesh)
    with jax.set_mesh(mesh):
        setup = set_up(cfg, mesh)
        values = base_values(setup.model)
        rng = np.random.Generator(np.random.PCG64(1))
        for path, leaf in values.items():
            if path.endswith("lora_B") or "gate" in path:  # zeros would hide what lies behind
                value = rng.standard_normal(leaf.shape, np.float32) * 0.02 + 0.1 * ("gate" in path)
                values[path] = jax.device_put(value, leaf.sharding)
        frozen = {path: values[path] for path in setup.frozen}
        state = setup.start({path: values[path] for path in setup.state.params})
        batch = jax.device_put(real_batch(cfg.model), batch_sharding(mesh))
        state, metrics = setup.step(frozen, state, batch)
        return jax.device_get(vars(metrics)), jax.device_get(state.opt_state[1].mu)


@pytest.fixture(scope="module")
def quick_compiler():
    """Four programs of all towers: XLA's optimisations would take most of the test's time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def one_device(quick_compiler):
    return step_of((1, 1, 1), "fsdp")


@needs_eight
@pytest.mark.parametrize(
    ("preset", "sizes", "override"),
    [
        ("fsdp", (1, 8, 1), "model.frames_over=mesh"),
        ("fsdp+tensor", (2, 2, 2), "model.frames_over=batch"),
        ("replicated-frozen", (1, 4, 2), "model.frames_at_once=1"),  # two chunks on each device
    ],
)
def test_loss_and_gradients_are_those_of_one_device(one_device, preset, sizes, override):
    """Loss and the whole gradient to 1e-5; each leaf's to 5e-5 of its length.

    Rounding alone moves single leaves by up to 2e-5 (a gate's gradient sums what cancels over all
    patches), and otherwise on another CPU. A row left out, or counted twice, moves each by 1 / 16.
    """
    metrics, grads = step_of(sizes, preset, override)
    wanted, gradient = one_device
    for name, want in wanted.items():
        np.testing.assert_allclose(metrics[name], want, rtol=1e-5, err_msg=name)
    length = {name: np.linalg.norm(leaf) for name, leaf in gradient.items()}
    whole = np.linalg.norm(list(length.values()))
    apart = {name: np.linalg.norm(grads[name] - leaf) for name, leaf in gradient.items()}
    assert np.linalg.norm(list(apart.values())) < 1e-5 * whole
    for name, norm in length.items():
        if re.fullmatch(KEY_BIAS, name):
            assert norm < 1e-5 * whole, name
            continue
        assert norm > 0 or "text_ffn" in name  # of the last layer: no query reads it
        assert apart[name] <= 5e-5 * norm, name
