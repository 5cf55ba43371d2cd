"""The drawn faces: labels that hold, action units that show, persons and splits that stay apart."""

import dataclasses

import numpy as np
import pytest

from emollama_jax.data.action_units import ACTION_UNITS, AU, EMOTIONS, MIXES, NEUTRAL
from emollama_jax.errors import UserError
from emollama_jax.tiny.actionfaces.attributes import ATTRIBUTES, attributes
from emollama_jax.tiny.actionfaces.camera import Scene
from emollama_jax.tiny.actionfaces.draw import render
from emollama_jax.tiny.actionfaces.expressions import CLASS_SHARES, DISPLACEMENTS, NOISE, OPTIONAL
from emollama_jax.tiny.actionfaces.geometry import (
    MEAN_FACE,
    View,
    convex_hull,
    curve,
    place,
    resting_face,
)
from emollama_jax.tiny.actionfaces.identity import identities_of, make_identity
from emollama_jax.tiny.actionfaces.sample import SPLITS, sample_clip, sample_image
from emollama_jax.tiny.actionfaces.sheet import contact_sheet, film_strip
from tests.helpers.drawn_labels import (
    STILL,
    draw_intensities,
    softmax_regression,
    stream,
    units_of,
)

SIZE = 96
FRONT = View(0.0, 0.0, 0.0, 30.0, (48.0, 50.0))
PLAIN = Scene(
    seed=1, light=(0.2, -0.2), gaze=(0.0, 0.0), clothes=(90.0, 110.0, 140.0), collar=0.1,
    occlusion="none", side=1, blur=0.0, noise=0.0, brightness=1.0, contrast=1.0,
    cast=(1.0, 1.0, 1.0), jpeg=0,
)  # fmt: skip


def _plain_person():
    """A young person without glasses or beard."""
    for number in identities_of("train"):
        person = make_identity(number)
        if person.age == 2 and person.glasses == "none" and not person.beard and person.race == 0:
            return person
    raise AssertionError("no such person")


# ---------------------------------------------------------------- persons and splits


def test_splits_share_no_person():
    seen = {split: set(identities_of(split)) for split in SPLITS}
    assert len(seen["train"]) >= 3000
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]
    for split in SPLITS:
        assert sample_image(split, 5).identity in seen[split]


def test_a_person_is_a_pure_function_of_the_number():
    again = make_identity.__wrapped__(17)
    assert again == make_identity(17)
    assert again != make_identity(18)


def test_age_lowers_the_resting_face():
    people = [make_identity(number) for number in range(800)]
    corner, brow = [], []
    for person in people:
        face, _ = resting_face(person)
        shift = person.mouth_height + 0.3 * (person.nose_length - 1)
        corner.append(face[[48, 54], 1].mean() / person.face_length - 0.985 - shift)
        brow.append(person.rest_brow)
    old = np.array([person.years > 60 for person in people])
    young = np.array([person.years < 25 for person in people])
    corner, brow = np.array(corner), np.array(brow)
    assert corner[young].mean() < -0.005  # raised
    assert corner[old].mean() > 0.02  # lowered
    # As far as a weak AU15 moves them: without the age the two look alike.
    weak = 0.25 * DISPLACEMENTS[AU[15], 48, 1]
    assert corner[old].mean() - corner[young].mean() > weak
    assert brow[old].mean() > brow[young].mean() + 0.02


def test_every_class_of_age_gender_and_race_occurs():
    people = [make_identity(number) for number in range(600)]
    assert {person.age for person in people} == set(range(8))
    assert {person.gender for person in people} == {0, 1}
    assert {person.race for person in people} == set(range(5))
    # Skin is informative but overlaps: some Indian faces are lighter than some White ones.
    skin = {race: [sum(p.skin) for p in people if p.race == race] for race in (0, 1, 3)}
    assert np.mean(skin[0]) > np.mean(skin[3]) > np.mean(skin[1])
    assert max(skin[3]) > min(skin[0])


# ---------------------------------------------------------------- action units

# Point, axis (0 x, 1 y) and direction of what each action unit moves; y points down.
MOVES = {
    "AU1": [(21, 1, -1), (22, 1, -1)],
    "AU2": [(17, 1, -1), (26, 1, -1), (18, 1, -1)],
    "AU4": [(21, 1, 1), (22, 1, 1), (21, 0, 1), (22, 0, -1)],
    "AU5": [(37, 1, -1), (44, 1, -1)],
    "AU6": [(41, 1, -1), (46, 1, -1)],
    "AU7": [(37, 1, 1), (41, 1, -1), (43, 1, 1), (47, 1, -1)],
    "AU9": [(31, 1, -1), (35, 1, -1), (51, 1, -1)],
    "AU12": [(48, 1, -1), (54, 1, -1), (48, 0, -1), (54, 0, 1)],
    "AU15": [(48, 1, 1), (54, 1, 1)],
    "AU16": [(57, 1, 1), (66, 1, 1)],
    "AU20": [(48, 0, -1), (54, 0, 1)],
    "AU23": [(48, 0, 1), (54, 0, -1), (51, 1, 1), (57, 1, -1)],
    "AU25": [(66, 1, 1), (57, 1, 1)],
    "AU26": [(8, 1, 1), (57, 1, 1), (66, 1, 1)],
    "AU45": [(37, 1, 1), (38, 1, 1), (43, 1, 1), (44, 1, 1)],
}


@pytest.mark.parametrize("name", ACTION_UNITS)
def test_an_action_unit_moves_its_points_and_shows(name):
    person, none = _plain_person(), np.zeros(len(ACTION_UNITS), np.float32)
    rest, moved = (place(person, units_of(**{name: v}), none, FRONT) for v in (0.0, 1.0))
    half = place(person, units_of(**{name: 0.5}), none, FRONT)
    for point, axis, direction in MOVES[name]:
        way = direction * (moved.landmarks - rest.landmarks)[point, axis]
        assert way > 0.8, (point, way)  # pixels
        assert 0.2 * way < direction * (half.landmarks - rest.landmarks)[point, axis] < 0.8 * way
    still, shown = (
        render(points, person, units, PLAIN, SIZE).astype(float)
        for points, units in ((rest, STILL), (moved, units_of(**{name: 1.0})))
    )
    change = np.abs(shown - still).mean(2)
    assert (change > 25).sum() > 20  # pixels that change clearly


def test_the_table_of_movements_is_mirrored():
    total = DISPLACEMENTS.sum(1)
    assert np.abs(total[:, 0]).max() < 1e-5  # left and right cancel
    assert (np.abs(DISPLACEMENTS).sum((1, 2)) > 0)[:-1].all()
    assert np.abs(MEAN_FACE[:, 0].sum()) < 1e-5


def test_asymmetry_moves_one_side_further():
    person = _plain_person()
    smile = units_of(AU12=0.8)
    rest = place(person, STILL, STILL, FRONT).landmarks
    uneven = place(person, smile, np.full(len(ACTION_UNITS), 0.2, np.float32), FRONT).landmarks
    left, right = (rest - uneven)[48, 1], (rest - uneven)[54, 1]
    assert left > 1.3 * right > 0


def test_lids_and_lips_never_cross():
    rng = stream(3)
    for _ in range(100):
        person = make_identity(int(rng.integers(4000)))
        units = rng.uniform(0, 1, len(ACTION_UNITS)).astype(np.float32)
        y = place(person, units, STILL, FRONT).landmarks[:, 1]
        assert (y[[37, 38, 43, 44]] <= y[[41, 40, 47, 46]] + 1e-3).all()
        assert (y[[61, 62, 63]] <= y[[67, 66, 65]]).all()
        assert (y[[50, 51, 52]] < y[[61, 62, 63]]).all()
        assert (y[[67, 66, 65]] < y[[58, 57, 56]]).all()


def test_a_partial_mix_is_no_other_emotions_mix():
    mixes = {name: set(MIXES[name]) for name in EMOTIONS}
    for name in EMOTIONS:
        for missing in OPTIONAL[name]:
            rest = mixes[name] - {missing}
            assert rest
            assert all(rest != mixes[other] for other in EMOTIONS)


def test_emotions_are_readable_from_true_intensities():
    train, test = draw_intensities(2000, "train"), draw_intensities(700, "test")
    assert softmax_regression(*train, *test) >= 0.98
    neutral = train[0][train[1] == NEUTRAL]
    assert neutral.max() <= NOISE
    assert train[0].min() >= 0 and train[0].max() <= 1


def test_classes_are_long_tailed():
    for split in SPLITS:
        assert CLASS_SHARES[split].sum() == pytest.approx(1)
    assert CLASS_SHARES["train"].min() >= 0.04
    assert CLASS_SHARES["test"].min() >= 0.07
    assert EMOTIONS[CLASS_SHARES["train"].argmax()] == "happiness"
    assert EMOTIONS[CLASS_SHARES["train"].argmin()] == "fear"


# ---------------------------------------------------------------- pictures


def test_a_picture_is_a_pure_function_of_seed_split_and_index():
    first, again = sample_image("train", 4), sample_image("train", 4)
    for field in dataclasses.fields(first):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(again, field.name))
    for other in (
        sample_image("train", 5),
        sample_image("test", 4),
        sample_image("train", 4, seed=1),
    ):
        assert (other.picture != first.picture).mean() > 0.5


def test_labels_of_a_picture():
    for index in range(25):
        s = sample_image("test", index)
        assert s.picture.shape == (SIZE, SIZE, 3) and s.picture.dtype == np.uint8
        assert s.picture.std() > 15
        assert s.landmarks.shape == (68, 2) and s.landmarks.dtype == np.float32
        assert s.action_units.shape == (len(ACTION_UNITS),)
        x1, y1, x2, y2 = s.box
        width, height = x2 - x1, y2 - y1
        assert 0.4 * SIZE < width < 0.75 * SIZE
        assert 0.9 < height / width < 1.7
        slack = 0.06 * np.array([width, height])
        assert (s.landmarks > s.box[:2] - slack).all()
        assert (s.landmarks < s.box[2:] + slack).all()
        assert np.abs(s.pose[1]) < 0.6 and np.abs(s.pose[[0, 2]]).max() < 0.3
        known = s.attributes[~np.isnan(s.attributes)]
        assert len(known) >= 20 and set(known) <= {0.0, 1.0}
        assert s.attributes[ATTRIBUTES.index("Male")] == float(s.gender == 0)
        assert EMOTIONS[s.emotion] in s.description


def test_another_size_shows_the_same_face():
    small, large = sample_image("test", 3), sample_image("test", 3, size=192)
    assert large.picture.shape == (192, 192, 3)
    np.testing.assert_allclose(large.landmarks, 2 * small.landmarks, atol=1e-3)
    halved = large.picture.reshape(96, 2, 96, 2, 3).mean((1, 3))
    assert np.corrcoef(halved.ravel(), small.picture.ravel())[0, 1] > 0.9


def test_landmarks_lie_on_what_is_drawn():
    person = _plain_person()
    surprised = units_of(AU26=1.0, AU25=1.0, AU5=0.5)
    view = View(0.05, 0.2, 0.1, 28.0, (46.0, 42.0))
    points = place(person, surprised, STILL, view)
    grey = render(points, person, surprised, PLAIN, SIZE).mean(2)
    face = points.landmarks

    def at(point):
        x, y = np.round(point).astype(int)
        return grey[y, x]

    cheek = at(0.5 * (face[2] + face[31]))
    mouth = at(0.4 * face[62] + 0.6 * face[66])
    assert mouth < 0.6 * cheek
    for first in (36, 42):
        assert at(face[first : first + 6].mean(0)) < 0.6 * cheek  # pupil
    for brow in (19, 24):
        assert at(face[brow]) < 0.8 * cheek
    chin, below = at(0.9 * face[8] + 0.1 * face[57]), at(face[8] + (0, 5))
    assert below < 0.85 * chin  # the neck lies in the shadow of the chin


def test_pose_turns_the_nose():
    person = _plain_person()

    def nose(**turn: float) -> np.ndarray:
        view = dataclasses.replace(FRONT, **turn)
        return place(person, STILL, STILL, view).landmarks[30]

    assert nose(yaw=0.3)[0] > nose()[0] + 3
    assert nose(pitch=0.2)[1] > nose()[1] + 2
    level = place(person, STILL, STILL, dataclasses.replace(FRONT, roll=0.2)).landmarks
    assert level[45, 1] > level[36, 1] + 3


def test_attributes_follow_action_units():
    person = _plain_person()

    def value(name: str, units: np.ndarray) -> float:
        return attributes(person, units, PLAIN)[ATTRIBUTES.index(name)]

    assert value("Smiling", STILL) == 0 and value("Smiling", units_of(AU12=0.8)) == 1
    assert np.isnan(value("Smiling", units_of(AU12=0.2)))
    assert value("Mouth_Slightly_Open", STILL) == 0
    assert value("Mouth_Slightly_Open", units_of(AU26=0.8)) == 1
    assert value("Narrow_Eyes", units_of(AU45=1.0)) == 1
    assert value("Narrow_Eyes", units_of(AU5=1.0)) == 0
    assert value("Arched_Eyebrows", units_of(AU1=1.0, AU2=1.0)) == 1
    assert value("Young", STILL) == 1
    sun = dataclasses.replace(PLAIN, occlusion="sunglasses")
    assert attributes(person, STILL, sun)[ATTRIBUTES.index("Eyeglasses")] == 1
    assert value("Eyeglasses", STILL) == 0


@pytest.mark.parametrize("occlusion", ["hand", "microphone", "scarf", "sunglasses"])
def test_occlusion_covers_part_of_the_face(occlusion):
    person = _plain_person()
    points = place(person, STILL, STILL, FRONT)
    free = render(points, person, STILL, PLAIN, SIZE).astype(int)
    scene = dataclasses.replace(PLAIN, occlusion=occlusion)
    hidden = render(points, person, STILL, scene, SIZE).astype(int)
    share = (np.abs(hidden - free).max(2) > 20).mean()
    assert 0.02 < share < 0.4


def test_an_unknown_split_is_named():
    with pytest.raises(UserError, match="unknown split 'dev'; choose one of train"):
        sample_image("dev", 0)


# ---------------------------------------------------------------- curves and sheets


def test_curves_pass_through_their_points():
    points = stream(1).uniform(0, 90, (6, 2)).astype(np.float32)
    np.testing.assert_allclose(curve(points, steps=4)[::4], points, atol=1e-4)


def test_convex_hull():
    square = np.array([[0, 0], [4, 0], [4, 4], [0, 4]], np.float32)
    inside = np.array([[2, 2], [1, 3], [2, 0]], np.float32)
    hull = convex_hull(np.concatenate([inside, square]))
    assert {tuple(point) for point in hull} == {tuple(point) for point in square}


def test_sheets_hold_every_picture():
    samples = [sample_image("test", index) for index in range(5)]
    sheet = contact_sheet(samples, 3)
    assert sheet.width == 3 * SIZE and sheet.height > 2 * SIZE
    np.testing.assert_array_equal(np.asarray(sheet)[:SIZE, SIZE : 2 * SIZE], samples[1].picture)
    clip = sample_clip("test", 0)
    assert film_strip(clip, columns=8).width == 8 * SIZE
