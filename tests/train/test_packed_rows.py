"""Packed rows train exactly what the same examples train one a row."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from emollama_jax.base import base_values
from emollama_jax.config import MeshConfig
from emollama_jax.data.elements import Encoder, Examples
from emollama_jax.data.rows import lay_out, pack, packed_shape, real, shape_of_kind, stack
from emollama_jax.sharding.mesh import batch_sharding, make_mesh
from emollama_jax.testing.toy_sets import Store, make_config, small_bpe
from emollama_jax.train import step
from emollama_jax.train.setup import set_up
from tests.sharding.test_presets import SHORT, needs_eight

ROWS, PICTURES, CLIPS = 8, 14, 6
OVERRIDES = (
    *SHORT,
    "data.rounds=2",
    "data.text_length=360",
    "data.clip_text_length=400",
    "data.clip_frames=4",
    f"data.packed={{rows: {ROWS}, examples: 2, tokens: 500, frames: 10, again: 8, "
    "question_length: 32}",
)


@pytest.fixture(scope="module")
def quick_compiler():
    """Several programs of all towers: XLA's optimisations would take most of the test's time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "bpe.json"
    path.write_text(small_bpe())
    return make_config(str(path), *OVERRIDES)


@pytest.fixture(scope="module")
def elements(cfg):
    """Pictures and clips, some of two rounds, one broken, of weights from 0 to 2."""
    store, encoder, found = Store(), Encoder(cfg), []
    store.data["actionfaces/images"][3]["media"] = b"no picture"
    for kind, count in (("image", PICTURES), ("clip", CLIPS)):
        split = store.split(f"actionfaces/{kind}s")
        examples = Examples(encoder, split, kind=kind, items="both")
        for seed in range(count):
            element = examples.training(seed % len(split.examples), seed=seed)
            weight = element.weight * (seed % 3)
            found.append((kind, dataclasses.replace(element, weight=weight)))
    assert {len(element.text.questions) for _, element in found} == {0, 1, 2}
    return encoder, found


def packed_batch(cfg, elements):
    encoder, found = elements
    items = [(kind, element.text) for kind, element in found]
    packing = pack(items, encoder=encoder, rows=ROWS, shape=packed_shape(cfg))
    assert packing.shape == packed_shape(cfg)
    assert max(map(len, packing.rows)) > 2
    rows = [[found[i][1] for i in row] for row in packing.rows]
    return lay_out(rows, shape=packing.shape, encoder=encoder)


def alone(cfg, elements, kind):
    """A batch of the examples of a kind, one a row."""
    encoder, found = elements
    shape = shape_of_kind(cfg, kind, rounds=2)
    return stack([e for k, e in found if k == kind], shape=shape, encoder=encoder)


def gradient(cfg, batches, sizes=(1, 1, 1)):
    """Sums of the loss and their gradient, all batches together."""
    where = MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
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

        @functools.partial(jax.grad, has_aux=True)
        def of_sums(params, batch, key):
            model = step.merge(nnx.graphdef(setup.model.module), frozen | params)
            sums = step._loss(model, batch, key, chunk=64)
            return sums.loss, sums

        run, params = jax.jit(of_sums), {path: values[path] for path in setup.state.params}
        total = None
        for batch in batches:
            placed = jax.device_put(batch, batch_sharding(mesh))
            one = jax.device_get(run(params, placed, jax.random.key(0)))
            total = one if total is None else jax.tree.map(np.add, total, one)
        return total


@pytest.fixture(scope="module")
def wanted(cfg, elements, quick_compiler):
    return gradient(cfg, [alone(cfg, elements, kind) for kind in ("image", "clip")])


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), pytest.param((2, 2, 2), marks=needs_eight)], ids=["one", "eight"]
)
def test_packed_is_unpacked(cfg, elements, wanted, sizes):
    """Loss and the whole gradient to 1e-5, each leaf's to 5e-5 of its length."""
    batch = packed_batch(cfg, elements)
    assert real(batch)["examples"] == PICTURES + CLIPS
    grads, sums = gradient(cfg, [batch], sizes)
    of_alone, sums_alone = wanted
    for name, value in vars(sums_alone).items():
        np.testing.assert_allclose(getattr(sums, name), value, rtol=1e-5, err_msg=name)
    length = {name: np.linalg.norm(leaf) for name, leaf in of_alone.items()}
    whole = np.linalg.norm(list(length.values()))
    apart = {name: np.linalg.norm(grads[name] - leaf) for name, leaf in of_alone.items()}
    assert np.linalg.norm(list(apart.values())) < 1e-5 * whole
    for name, norm in length.items():
        if norm > 1e-5 * whole:
            assert apart[name] <= 5e-5 * norm, name
