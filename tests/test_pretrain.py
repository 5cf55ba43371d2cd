"""`emollama pretrain`: augmentation, its small training loop, and what the LLaMA is told."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax.batch import IGNORE, IMAGE_TOKEN
from emollama_jax.data.actionfaces.action_units import ACTION_UNITS, EMOTIONS
from emollama_jax.data.actionfaces.sample import sample_image
from emollama_jax.data.pictures import Pictures
from emollama_jax.models.layers import Linear
from emollama_jax.models.rngs import abstract
from emollama_jax.train import pretrain
from emollama_jax.train.learners import (
    MIRROR,
    FaceLearner,
    TextLearner,
    VisionLearner,
    blur,
    mirror,
    shift,
)
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


# ------------------------------------------------------------------ the LLaMA that is told


@pytest.fixture(scope="module")
def told(tiny_config):
    """40 instruction items of pictures whose only true unit is the emotion's number."""
    emotion = np.arange(-1, 7, dtype=np.int32)
    rows = {field.name: np.zeros(8) for field in dataclasses.fields(Pictures)}
    rows["emotion"] = emotion
    rows["action_units"] = np.repeat(emotion[:, None] / 10, len(ACTION_UNITS), axis=1)
    rows["agr"] = np.ones((8, 3), np.int32)
    return list(pretrain._tell(tiny_config, pretrain.Plan(texts=40), Pictures(**rows)))


def test_items_are_told_with_their_own_units(told):
    images = [item for item in told if len(item.units) == 1]
    assert 10 < len(images) < 30
    assert {item.units.shape for item in told} == {(1, len(ACTION_UNITS)), (16, len(ACTION_UNITS))}
    for item in images:
        emotion = round(float(item.units[0, 0]) * 10)  # frames of clips, -1, are never drawn
        (turn,) = item.turns
        if turn.question.startswith("What is the facial expression"):
            assert turn.answer == EMOTIONS[emotion]
        elif "reason" not in turn.answer:
            assert EMOTIONS[emotion] in turn.answer


def test_learner_reads_what_it_is_shown_and_nothing_else(tiny_config, told):
    per_frame = tiny_config.model.tokens_per_frame
    learner = TextLearner(tiny_config, len(ACTION_UNITS), rngs=nnx.Rngs(0))
    ids = np.array([[1, 5] + [IMAGE_TOKEN] * per_frame + [7, 8]], np.int32)

    def logits(units, shown):
        batch = {"ids": ids, "action_units": units, "shown": np.array([shown], np.float32)}
        return np.asarray(learner(batch))

    low, high = (np.full((1, 1, len(ACTION_UNITS)), value, np.float32) for value in (0, 1))
    nothing, one = [0] * per_frame, [1] + [0] * (per_frame - 1)
    assert np.array_equal(logits(low, nothing), logits(high, nothing))
    difference = np.abs(logits(low, one) - logits(high, one)).max(-1)[0]
    assert (difference[:2] == 0).all() and (difference[2:] > 1e-4).all()


def test_learner_bears_loss_on_answers_alone(tiny_config):
    per_frame = tiny_config.model.tokens_per_frame
    learner = TextLearner(tiny_config, len(ACTION_UNITS), rngs=nnx.Rngs(0))
    batch = {
        "ids": np.array([[1, 5, 7, 8]], np.int32),
        "labels": np.array([[IGNORE, IGNORE, 7, IGNORE]], np.int32),
        "action_units": np.zeros((1, 1, len(ACTION_UNITS)), np.float32),
        "shown": np.ones((1, per_frame), np.float32),
    }
    loss, parts = learner.loss(batch)
    wanted = -jax.nn.log_softmax(learner(batch)[0, 1])[7]
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    assert float(parts["accuracy"]) in (0, 1)


def test_blur_makes_units_unsure_and_hides_tokens():
    batch = {
        "ids": jnp.arange(3),
        "action_units": jnp.full((64, 2, 5), 0.5),
        "shown": jnp.ones((64, 4)),
    }
    seen = blur(batch, jax.random.key(0))
    assert np.array_equal(seen["ids"], batch["ids"])
    noise = np.asarray(seen["action_units"]) - 0.5
    assert abs(noise.mean()) < 0.01 and 0.05 < noise.std() < 0.07
    assert set(np.unique(seen["shown"])) == {0, 1}
    assert 0.5 < seen["shown"].mean() < 0.7


@pytest.mark.parametrize(
    "make", [FaceLearner, functools.partial(VisionLearner, units=3, emotions=2)]
)
def test_only_kernels_decay(make, tiny_config):
    learner = abstract(lambda rngs: make(tiny_config, rngs=rngs))
    decayed = jax.tree_util.tree_map_with_path(pretrain._decays, nnx.split(learner)[1])
    flat = {
        jax.tree_util.keystr(path).removesuffix(".value"): value
        for path, value in jax.tree_util.tree_leaves_with_path(decayed)
    }
    kernels = {name for name in flat if name.endswith(("['kernel']", "['attn']['qkv']"))}
    assert {name for name, value in flat.items() if value} == kernels
    assert 5 < len(kernels) < len(flat) / 2
    assert not flat.get("['tower']['pe']")  # FaceXFormer's constant frequencies
