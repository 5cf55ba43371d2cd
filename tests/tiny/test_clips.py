"""Courses of the drawn clips, and the words about drawn faces."""

import re

import numpy as np

from emollama_jax.data.action_units import ACTION_UNITS, AU, EMOTIONS, NEUTRAL
from emollama_jax.data.describe import conversation, describe
from emollama_jax.data.items import category_item
from emollama_jax.tiny.actionfaces import courses
from emollama_jax.tiny.actionfaces.identity import make_identity
from emollama_jax.tiny.actionfaces.sample import sample_clip
from tests.helpers.drawn_labels import (
    draw_courses,
    draw_intensities,
    softmax_regression,
    stream,
    units_of,
)

SIZE = 96


# ---------------------------------------------------------------- clips


def test_a_clip_is_deterministic_and_labelled_per_frame():
    clip, again = sample_clip("validation", 2), sample_clip("validation", 2)
    np.testing.assert_array_equal(clip.frames, again.frames)
    count = len(clip.frames)
    assert courses.SHORTEST <= count <= courses.LONGEST
    assert clip.fps == 12.0
    assert clip.frames.shape == (count, SIZE, SIZE, 3)
    assert clip.landmarks.shape == (count, 68, 2) and clip.boxes.shape == (count, 4)
    assert clip.pose.shape == (count, 3) and clip.action_units.shape == (count, len(ACTION_UNITS))
    step = np.abs(np.diff(clip.landmarks, axis=0)).max((1, 2))
    assert (step > 0).all() and step.max() < 0.12 * SIZE  # it moves, and does not jump
    assert (clip.frames[0] != clip.frames[1]).any()


def _course_features(units: np.ndarray) -> np.ndarray:
    """Peak, mean and last value of each action unit: what came, how long, and what stays."""
    last = units[-max(2, len(units) // 5) :].mean(0)
    return np.concatenate([np.sort(units, axis=0)[-2], units.mean(0), last])


def test_the_course_tells_the_emotion_and_the_middle_frame_does_not():
    (train, y), (test, y_test) = draw_courses(2000, "train"), draw_courses(600, "test")
    whole = [np.stack([_course_features(c.units) for c in clips]) for clips in (train, test)]
    middle = [np.stack([c.units[len(c.units) // 2] for c in clips]) for clips in (train, test)]
    assert softmax_regression(whole[0], y, whole[1], y_test) >= 0.97
    assert softmax_regression(middle[0], y, middle[1], y_test) <= 0.75
    lengths = {len(c.units) for c in train}
    assert min(lengths) == courses.SHORTEST and max(lengths) == courses.LONGEST


def test_apex_lies_off_centre_in_about_half_of_the_expressive_clips():
    clips, _ = draw_courses(800, "train")
    timing = np.array([clip.timing for clip in clips])
    expressive = timing != "none"
    off = np.isin(timing, ("early", "late"))
    assert 0.35 < off[expressive].mean() < 0.6
    for clip in clips:
        calm = np.delete(clip.units, [AU[25], AU[26], AU[45]], axis=1)
        if clip.timing in ("early", "late"):
            assert calm[len(calm) // 2].max() < 0.3 < calm.max()


def test_pairs_share_their_apex_and_differ_in_course():
    person, found = make_identity(3), {}
    rng = stream(8)
    for _ in range(400):
        for name in ("surprise", "fear", "disgust", "anger"):
            course = courses.sample_course(EMOTIONS.index(name), person, rng)
            if course.timing in ("sudden", "slow"):
                found.setdefault(name, []).append(course.units)
    for (sudden, slow), apex in courses.SHARED_APEX.items():
        columns = [AU[unit] for unit in apex if unit not in (25, 26)]  # speech moves these two
        peaks = {
            name: np.mean([units.max(0)[columns] for units in found[name]], axis=0)
            for name in (sudden, slow)
        }
        np.testing.assert_allclose(peaks[sudden], peaks[slow], atol=0.12)
        strong = columns[int(np.argmax(peaks[slow]))]
        for units in found[sudden]:
            over = units[:, strong] > 0.5 * units[:, strong].max()
            first = int(np.argmax(over))
            assert units[max(first - 3, 0), strong] < 0.2  # onset within three frames
            assert units[-1, strong] < 0.2
        for units in found[slow]:
            assert units[-1, strong] > 0.8 * units[:, strong].max()


# ---------------------------------------------------------------- words


def test_descriptions_say_what_the_action_units_say():
    rng = stream(5)
    happy = describe(units_of(AU6=0.7, AU12=0.8), EMOTIONS.index("happiness"), "image", rng)
    assert "cheeks" in happy and re.search(r"pulled up|raised in a smile", happy)
    assert happy.rstrip(".").endswith("happiness")
    angry = describe(units_of(AU4=0.9, AU7=0.6, AU23=0.7), EMOTIONS.index("anger"), "image", rng)
    assert "strongly lowered" in angry and "tight" in angry
    calm = describe(units_of(AU12=0.1), NEUTRAL, "image", rng)
    assert "smile" not in calm and "neutral" in calm
    late = np.zeros((20, len(ACTION_UNITS)), np.float32)
    late[15:, [AU[1], AU[4], AU[15]]] = 0.8
    sad = describe(late, EMOTIONS.index("sadness"), "clip", rng)
    assert re.search(r"late|end", sad) and "down" in sad


def test_conversations_have_the_format_and_a_small_vocabulary():
    words, turns = set(), set()
    rng = stream(6)
    units, labels = draw_intensities(400, "train")
    for one, label in zip(units, labels, strict=True):
        talk = conversation(one, int(label), "image", rng)
        turns.add(len(talk))
        assert [turn["from"] for turn in talk] == ["human", "gpt"] * (len(talk) // 2)
        assert talk[0]["value"].startswith("<image>\n")
        assert sum("<image>" in turn["value"] for turn in talk) == 1
        named = [name for name in EMOTIONS if name in talk[1]["value"]]
        assert named == [EMOTIONS[label]]
        for turn in talk:
            words.update(re.findall(r"[a-z]+", turn["value"].lower()))
    assert turns == {2, 4}
    assert 60 < len(words) < 250
    clip, _ = draw_courses(1, "train")
    asked = {conversation(clip[0].units, 0, "clip", stream(i))[0]["value"] for i in range(20)}
    assert any("video" in question for question in asked)
    assert not any("image" in question.removeprefix("<image>") for question in asked)


def test_category_item_is_worded_as_in_ferid():
    question, answer = category_item(EMOTIONS, 3, "image")
    assert question == {
        "from": "human",
        "value": "<image>\nWhat is the facial expression of the person in the image? Choose one "
        "from the following options: "
        "{surprise, fear, disgust, happiness, sadness, anger, neutral}.",
    }
    assert answer == {"from": "gpt", "value": "happiness"}
    assert "in the video?" in category_item(EMOTIONS, 0, "clip")[0]["value"]
