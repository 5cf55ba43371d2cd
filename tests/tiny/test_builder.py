"""The TFDS builder of the drawn faces: a round trip through ArrayRecord, without TensorFlow."""

import io
import json
import pickle
import shutil
import sys

import av
import numpy as np
import pytest
from PIL import Image

from emollama_jax.data.action_units import ACTION_UNITS, EMOTIONS
from emollama_jax.data.items import category_item
from emollama_jax.data.split import Split
from emollama_jax.errors import UserError
from emollama_jax.tiny import builder
from emollama_jax.tiny.actionfaces.examples import encode_video
from emollama_jax.tiny.actionfaces.sample import sample_clip, sample_image

SIZES = {
    "images": {"train": 7, "validation": 2, "test": 3},
    "clips": {"train": 3, "validation": 1, "test": 2},
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder, steps = tmp_path_factory.mktemp("data"), {name: [] for name in SIZES}
    for name, sizes in SIZES.items():
        builder.prepare(
            folder,
            config_name=name,
            sizes=sizes,
            processes=1,
            progress=lambda done, total, name=name: steps[name].append((done, total)),
        )
    return folder, steps


def test_pictures_survive_the_round_trip(prepared):
    folder, _ = prepared
    source = Split(folder, "actionfaces/images", "test").examples
    assert [example["id"] for example in source] == [f"test-{index:06d}" for index in range(3)]
    with pytest.raises(IndexError, match="example 3 of a split of 3"):
        source[3]
    for index in (2, 0):
        example, drawn = source[index], sample_image("test", index)
        assert example["id"] == f"test-{index:06d}" and example["kind"] == "image"
        picture = np.asarray(Image.open(io.BytesIO(example["media"])))
        assert np.abs(picture.astype(int) - drawn.picture).mean() < 3
        assert example["label"] == drawn.emotion and example["subject"] == drawn.identity
        np.testing.assert_array_equal(example["boxes"], drawn.box[None])
        np.testing.assert_array_equal(example["landmarks"], drawn.landmarks[None])
        np.testing.assert_array_equal(example["pose"], drawn.pose[None])
        np.testing.assert_array_equal(example["action_units"], drawn.action_units[None])
        np.testing.assert_array_equal(example["attributes"], drawn.attributes)
        assert example["agr"].tolist() == [drawn.age, drawn.gender, drawn.race]
        items = json.loads(example["items"])
        assert items[0] == category_item(EMOTIONS, drawn.emotion, "image")
        assert EMOTIONS[drawn.emotion] in items[1][1]["value"]


def test_clips_are_real_videos(prepared):
    folder, _ = prepared
    example, drawn = (
        Split(folder, "actionfaces/clips", "train").examples[1],
        sample_clip("train", 1),
    )
    count = len(drawn.frames)
    with av.open(io.BytesIO(example["media"])) as file:
        stream = file.streams.video[0]
        assert stream.average_rate == 12
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(stream)])
    assert frames.shape == drawn.frames.shape
    assert np.abs(frames.astype(int) - drawn.frames).mean() < 6
    assert len(example["media"]) < 1250 * count + 2000  # bytes
    assert example["kind"] == "clip"
    assert example["boxes"].shape == (count, 4) and example["landmarks"].shape == (count, 68, 2)
    assert example["pose"].shape == (count, 3)
    assert example["action_units"].shape == (count, len(ACTION_UNITS))
    assert "in the video?" in json.loads(example["items"])[0][0]["value"]


def test_the_video_codec_is_deterministic():
    frames = sample_clip("train", 0).frames[:4]
    assert encode_video(frames, 12.0) == encode_video(frames, 12.0)


def test_a_split_is_random_access_and_picklable(prepared):
    folder, _ = prepared
    source = Split(folder, "actionfaces/images", "train").examples
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i]["id"] for i in (6, 0)] == ["train-000006", "train-000000"]


def test_tensorflow_is_not_needed(prepared):
    assert "tensorflow" not in sys.modules


def test_progress_reaches_the_end(prepared):
    _, steps = prepared
    for name, sizes in SIZES.items():
        total = sum(sizes.values())
        assert steps[name][-1] == (total, total)
        assert [done for done, _ in steps[name]] == sorted({done for done, _ in steps[name]})


def test_what_is_prepared_is_reused_and_what_is_half_done_redone(prepared, tmp_path):
    folder, _ = prepared
    calls = []

    def prepare(**settings):
        return builder.prepare(
            tmp_path,
            config_name="images",
            processes=1,
            progress=lambda done, total: calls.append(done),
            **settings,
        )

    shutil.copytree(folder / "actionfaces", tmp_path / "actionfaces")
    leftover = tmp_path / "actionfaces" / "images" / "incomplete.ABC_1.0.0"
    leftover.mkdir()
    place = prepare(sizes=SIZES["images"])
    assert not calls and not leftover.exists()

    (place / "dataset_info.json").unlink()  # as if it had been stopped
    prepare(sizes=SIZES["images"])
    assert calls
    before = Split(tmp_path, "actionfaces/images", "train").examples[0]["media"]
    assert before == Split(folder, "actionfaces/images", "train").examples[0]["media"]

    calls.clear()
    prepare(sizes=SIZES["images"], seed=1)  # other settings are another data set
    assert calls
    assert before != Split(tmp_path, "actionfaces/images", "train").examples[0]["media"]


def test_errors_name_what_is_wrong(tmp_path, prepared):
    with pytest.raises(UserError, match=r"actionfaces/clips is not prepared; run `emollama data"):
        Split(tmp_path, "actionfaces/clips", "train")
    with pytest.raises(UserError, match=r"no split 'dev'; choose one of"):
        Split(prepared[0], "actionfaces/images", "dev")
    for wrong, message in (
        ({"config_name": "films"}, "unknown config 'films'; choose one of images, clips"),
        ({"config_name": "images", "sizes": {"dev": 3}}, "unknown split 'dev'"),
        ({"config_name": "images", "sizes": {"test": 0}}, "test has 0 examples"),
        ({"config_name": "images", "size": 95}, "size is 95 pixels; it must be even"),
    ):
        with pytest.raises(UserError, match=message):
            builder.prepare(tmp_path, **wrong)
