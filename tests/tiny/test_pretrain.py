"""`emollama pretrain`: augmentation, its small training loop, and what the LLaMA is told."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax.batch import IGNORE, IMAGE_TOKEN
from emollama_jax.data.action_units import ACTION_UNITS, EMOTIONS
from emollama_jax.models.layers import Linear
from emollama_jax.models.rngs import abstract
from emollama_jax.tiny.actionfaces.sample import sample_image
from emollama_jax.tiny.towers import fit as fit_module
from emollama_jax.tiny.towers import learners, text
from emollama_jax.tiny.towers.augment import MIRROR, Placement, Strength, augment, mix, sample
from emollama_jax.tiny.towers.fit import Course, fit
from emollama_jax.tiny.towers.learners import FaceLearner, TextLearner, VisionLearner, blur
from emollama_jax.tiny.towers.pictures import Pictures
from emollama_jax.tiny.towers.recipe import Recipe
from emollama_jax.tiny.towers.views import picture_batch


def test_mirror_order_is_an_involution_of_all_landmarks():
    assert sorted(MIRROR) == list(range(68))
    assert (MIRROR[MIRROR] == np.arange(68)).all()


def seen_anew(size=48, rows=16, **strength):
    """A drawn face `rows` times over, and how each is seen anew; pose known in every second."""
    sample = sample_image("train", 3)
    side = sample.picture.shape[0]
    landmarks = ((sample.landmarks + 0.5) * 2 / side - 1).astype(np.float32)
    pose = np.repeat(sample.pose[None].astype(np.float32), rows, axis=0)
    pose[1::2] = np.nan
    batch = {
        "picture": jnp.asarray(np.repeat(sample.picture[None], rows, axis=0)),
        "landmarks": jnp.asarray(np.repeat(landmarks[None], rows, axis=0)),
        "pose": jnp.asarray(pose),
    }
    seen = augment(batch, jax.random.key(3), size=size, strength=Strength(**strength))
    return sample, landmarks, {name: np.asarray(value) for name, value in seen.items()}


def test_augmented_landmarks_mirror_left_and_right_and_pose_goes_along():
    sample, landmarks, seen = seen_anew()
    assert (seen["landmarks"][:, 36:42, 0].mean(1) < seen["landmarks"][:, 42:48, 0].mean(1)).all()
    mirrored = np.isclose(seen["pose"][::2], sample.pose * [1, -1, -1], atol=1e-6).all(1)
    kept = np.isclose(seen["pose"][::2], sample.pose, atol=1e-6).all(1)
    assert (mirrored ^ kept).all() and mirrored.any() and kept.any()
    assert np.isnan(seen["pose"][1::2]).all()
    # Where the pose is a label the head is not turned: the eyes keep their slope.
    eyes = seen["landmarks"][:, 42:48].mean(1) - seen["landmarks"][:, 36:42].mean(1)
    slope = np.arctan2(eyes[:, 1], eyes[:, 0])
    whole = landmarks[42:48].mean(0) - landmarks[36:42].mean(0)
    np.testing.assert_allclose(np.abs(slope[::2]), abs(np.arctan2(*whole[::-1])), atol=1e-4)
    assert np.std(slope[1::2]) > 0.05


def test_small_faces_stand_wholly_within_the_picture_and_sizes_differ():
    _, landmarks, seen = seen_anew(small=1.0, shift=0.0, scale=(1.0, 1.0), turn=0.0, rows=32)
    width = np.ptp(seen["landmarks"][..., 0], axis=1) / np.ptp(landmarks[:, 0])
    assert 0.35 <= width.min() < 0.55 and 0.8 < width.max() <= 1
    assert np.abs(seen["landmarks"]).max() < 1


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("angle", "scale", "shift"), [(0, 1, (0, 0)), (0.3, 0.6, (0.2, -0.1))])
def test_a_pixel_is_drawn_where_its_point_goes(flip, angle, scale, shift):
    picture = np.zeros((1, 32, 32, 3), np.uint8)
    picture[0, 9:12, 19:22] = 255  # centred on pixel (20, 10)
    point = (np.array([[[20, 10]]], np.float32) + 0.5) * 2 / 32 - 1
    placed = Placement(
        flip=jnp.array([flip]),
        angle=jnp.array([float(angle)]),
        scale=jnp.array([float(scale)]),
        shift=jnp.array([shift], jnp.float32),
    )
    (x, y) = np.asarray(placed.forward(jnp.asarray(point)))[0, 0]
    np.testing.assert_allclose(
        placed.backward(placed.forward(jnp.asarray(point))), point, atol=1e-6
    )
    pixels, inside = sample(jnp.asarray(picture), placed, 64)
    weight = np.asarray(pixels)[0, :, :, 0]
    rows, columns = np.indices(weight.shape)
    found = [((index * weight).sum() / weight.sum() * 2 + 1) / 64 - 1 for index in (columns, rows)]
    np.testing.assert_allclose(found, [x, y], atol=0.03)
    assert bool(np.asarray(inside).all()) == (scale == 1)


def test_mix_blends_what_is_named_and_says_where():
    batch = {"picture": jnp.array([[0.0], [8.0]]), "votes": jnp.eye(2), "core": jnp.ones((2, 1))}
    mixed = mix(batch, jax.random.key(0), jnp.array([False, True]), ("picture", "votes"))
    kept = float(mixed["votes"][1, 1])
    assert 0.5 <= kept < 1 and float(mixed["votes"][1, 0]) == pytest.approx(1 - kept)
    np.testing.assert_allclose(mixed["picture"], [[0], [8 * kept]], rtol=1e-6)
    assert mixed["mixed"].tolist() == [False, True] and mixed["core"] is batch["core"]


def pictures_of(votes, **fields):
    """N pictures that know nothing but their votes and what is given."""
    n = len(votes)
    unknown = {
        "frames": np.zeros((n, 96, 96, 3), np.uint8),
        "faces": np.zeros((n, 48, 48, 3), np.uint8),
        "landmarks": np.full((n, 68, 2), np.nan, np.float32),
        "frame_landmarks": np.full((n, 68, 2), np.nan, np.float32),
        "pose": np.full((n, 3), np.nan, np.float32),
        "agr": np.full((n, 3), -1, np.int32),
        "attributes": np.full((n, 40), np.nan, np.float32),
        "action_units": np.full((n, len(ACTION_UNITS)), np.nan, np.float32),
        "emotion": np.where(votes.sum(1) > 0, votes.argmax(1), -1).astype(np.int32),
        "votes": votes.astype(np.float32),
    }
    return Pictures(**unknown | fields)


@pytest.mark.parametrize(
    "make", [FaceLearner, functools.partial(VisionLearner, units=len(ACTION_UNITS))]
)
def test_labels_that_a_set_lacks_bear_no_loss(make, tiny_config):
    """All that is unknown in one picture: its loss is that of the other alone."""
    learner = make(tiny_config, rngs=nnx.Rngs(0))
    which = "faces" if isinstance(learner, FaceLearner) else "frames"
    votes = np.eye(8, dtype=np.float32)[[1, 3]]
    rng = np.random.default_rng(0)
    fields = {
        "landmarks": rng.uniform(-1, 1, (2, 68, 2)),
        "pose": rng.normal(0, 0.1, (2, 3)),
        "attributes": rng.integers(0, 2, (2, 40)).astype(float),
        "action_units": rng.random((2, len(ACTION_UNITS))),
        "agr": rng.integers(0, 2, (2, 3)),
    }
    known = pictures_of(votes, **fields)
    batch = {
        name: np.asarray(getattr(known, name if name != "picture" else which))
        for name in ("picture", "landmarks", "pose", "attributes", "action_units", "agr", "votes")
    }
    batch["picture"] = rng.integers(0, 255, batch["picture"].shape).astype(np.uint8)
    one = jax.tree.map(lambda x: x[:1], batch)
    blind = {name: np.array(value) for name, value in batch.items()}
    for name, value in blind.items():
        if name != "picture":
            value[1] = {"agr": -1, "votes": 0}.get(name, np.nan)
    loss = jax.jit(lambda b: learner.loss(b)[0])
    np.testing.assert_allclose(loss(blind), learner.loss(one)[0], rtol=1e-5)
    assert abs(float(loss(batch)) - float(loss(blind))) > 1e-3


def test_a_real_picture_is_told_by_votes_and_teacher_and_a_drawn_one_by_its_label():
    logits = jnp.zeros((3, 8)).at[:, 2].set(3.0)
    log = np.asarray(jax.nn.log_softmax(logits[0]))
    eye = jnp.eye(8)
    batch = {
        "votes": eye[jnp.array([2, 0, 0])],
        "taught": eye[jnp.array([1, 1, 2])],
        "real": jnp.array([True, False, True]),
        "mixed": jnp.array([False, False, True]),
    }
    share = learners.TAUGHT
    wanted = [-(share * log[1] + (1 - share) * log[2]), -log[0], -log[2]]
    np.testing.assert_allclose(learners._emotion(logits, batch), np.mean(wanted), rtol=1e-5)


def test_rare_classes_are_drawn_more_often_and_real_faces_their_share():
    votes = np.eye(8)[[0] * 900 + [5] * 100]
    real = pictures_of(votes)
    drawn = pictures_of(np.eye(8)[[1] * 200])
    recipe = Recipe(balance=0.5, real_share=0.75)
    batch_of = picture_batch(drawn, [real], "faces", recipe, size=400, seed=0)
    batch, again, other = batch_of(1), batch_of(1), batch_of(2)
    assert (batch["votes"] == again["votes"]).all() and (batch["votes"] != other["votes"]).any()
    assert batch["real"].tolist() == [True] * 300 + [False] * 100
    assert (batch["votes"][300:, 1] == 1).all()
    rare = np.mean([batch_of(step)["votes"][:300, 5].mean() for step in range(20)])
    assert rare == pytest.approx(0.25, abs=0.02)  # 100/√100 beside 900/√900


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
            augment=lambda batch, key, frozen: batch,
            course=Course(steps, learning_rate=0.05, seed=0),
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
    return list(text._tell(tiny_config, Recipe(texts=40), Pictures(**rows)))


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
    seen = blur(batch, jax.random.key(0), None)
    assert np.array_equal(seen["ids"], batch["ids"])
    noise = np.asarray(seen["action_units"]) - 0.5
    assert abs(noise.mean()) < 0.01 and 0.05 < noise.std() < 0.07
    assert set(np.unique(seen["shown"])) == {0, 1}
    assert 0.5 < seen["shown"].mean() < 0.7


@pytest.mark.parametrize("make", [FaceLearner, functools.partial(VisionLearner, units=3)])
def test_only_kernels_decay(make, tiny_config):
    learner = abstract(lambda rngs: make(tiny_config, rngs=rngs))
    decayed = jax.tree_util.tree_map_with_path(fit_module._decays, nnx.split(learner)[1])
    flat = {
        jax.tree_util.keystr(path).removesuffix(".value"): value
        for path, value in jax.tree_util.tree_leaves_with_path(decayed)
    }
    kernels = {name for name in flat if name.endswith(("['kernel']", "['attn']['qkv']"))}
    assert {name for name, value in flat.items() if value} == kernels
    assert 5 < len(kernels) < len(flat) / 2
    assert not flat.get("['tower']['pe']")  # FaceXFormer's constant frequencies
