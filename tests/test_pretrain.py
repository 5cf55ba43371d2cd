"""Augmentation and the small training loop of `emollama pretrain`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax.data.actionfaces.sample import sample_image
from emollama_jax.models.layers import Linear
from emollama_jax.train.learners import MIRROR, mirror, shift
from emollama_jax.train.pretrain import fit


def test_mirror_order_is_an_involution_of_all_landmarks():
    assert sorted(MIRROR) == list(range(68))
    assert (MIRROR[MIRROR] == np.arange(68)).all()


def test_mirror_matches_a_drawn_face():
    """A frontal face and its mirror image: landmark k lies where its partner lay."""
    sample = sample_image("train", 3)
    size = sample.picture.shape[0]
    landmarks = (sample.landmarks + 0.5) * 2 / size - 1
    batch = {
        "picture": jnp.asarray(sample.picture)[None],
        "landmarks": jnp.asarray(landmarks)[None],
        "pose": jnp.asarray(sample.pose)[None],
    }
    both = mirror(jax.tree.map(lambda x: jnp.concatenate([x, x]), batch), jnp.array([True, False]))
    np.testing.assert_array_equal(both["picture"][1], sample.picture)
    np.testing.assert_array_equal(both["picture"][0], sample.picture[:, ::-1])
    left, right = both["landmarks"][0, 36:42].mean(0), both["landmarks"][0, 42:48].mean(0)
    assert left[0] < right[0]  # "eye image-left" is still on the left
    np.testing.assert_allclose(both["landmarks"][0, 8], landmarks[8] * [-1, 1], atol=1e-6)  # chin
    np.testing.assert_allclose(both["pose"][0], sample.pose * [1, -1, -1], atol=1e-7)


def test_shift_moves_landmarks_with_the_picture():
    size = 16
    picture = np.zeros((8, size, size, 3), np.uint8)
    picture[:, 7, 9] = 255
    point = (np.array([9, 7]) + 0.5) * 2 / size - 1
    batch = {
        "picture": jnp.asarray(picture),
        "landmarks": jnp.broadcast_to(jnp.asarray(point, jnp.float32), (8, 1, 2)),
    }
    moved = shift(batch, jax.random.key(0), most=3)
    for one, (x, y) in zip(moved["picture"], np.asarray(moved["landmarks"][:, 0]), strict=True):
        column, row = ((x + 1) * size - 1) / 2, ((y + 1) * size - 1) / 2
        assert one[round(float(row)), round(float(column)), 0] == 255
    assert len({tuple(p) for p in np.asarray(moved["landmarks"][:, 0]).tolist()}) > 1


class _Line(nnx.Module):
    """Learns y = 2 x."""

    def __init__(self):
        self.linear = Linear(
            1, 1, axes=("embed", "mlp"), bias=False, dtype="float32", rngs=nnx.Rngs(0)
        )

    def loss(self, batch):
        loss = jnp.mean((self.linear(batch["x"]) - 2 * batch["x"]) ** 2)
        return loss, {"loss": loss}


@pytest.fixture
def run(tmp_path):
    def one(steps, name="saved.npz"):
        learner, seen = _Line(), []
        fit(
            learner,
            lambda step: {"x": np.full((4, 1), 1 + step % 3, np.float32)},
            augment=lambda batch, key: batch,
            steps=steps,
            learning_rate=0.05,
            seed=0,
            saved=tmp_path / name,
            report=lambda step, parts: seen.append((step, parts["loss"])),
        )
        return float(learner.linear.kernel[0, 0]), seen

    return one


def test_fit_learns(run):
    kernel, seen = run(400)
    assert kernel == pytest.approx(2, abs=0.05)
    assert seen[-1][0] == 400
    assert seen[-1][1] < seen[0][1]


def test_fit_continues_from_what_it_saved(run):
    whole, _ = run(400)
    again, seen = run(400)  # the file of step 250 is there: only the rest runs
    assert again == whole
    assert seen[0][0] == 300
