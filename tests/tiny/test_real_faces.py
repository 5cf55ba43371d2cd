"""Faces of a prepared real set as pretraining reads them: votes, boxes, a teacher's labels."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from emollama_jax.data import taught
from emollama_jax.data.sets import label_space
from emollama_jax.data.split import Split
from emollama_jax.errors import UserError
from emollama_jax.tiny.towers import real_faces
from emollama_jax.tiny.towers.pictures import CLASSES
from tests.helpers import official_trees
from tests.helpers.prepared_sets import prepare


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """FERPlus of eight faces a split; the votes of each are 6 for its class and 3 for the next."""
    folder = tmp_path_factory.mktemp("ferplus")
    tree = official_trees.ferplus(folder / "tree", train=8, valid=8, test=8)
    prepare("ferplus", tree, folder / "data")
    return folder / "data"


@pytest.fixture
def read(data, tmp_path):
    def read(*, found=(True,) * 8, split="train", folder="faces"):
        box = np.array([[0, 0, 48, 48]], np.float32)
        opened = Split(data, "ferplus", split)
        opened.priors = [SimpleNamespace(found=np.array([seen]), boxes=box) for seen in found]
        return real_faces.real_pictures(
            tmp_path / folder,
            opened,
            frame_size=96,
            face_size=48,
            margin=0.5,
            units=3,
            progress=lambda done, total: None,
        )

    return read


def test_votes_are_stored_and_become_a_soft_target(data, read):
    example = Split(data, "ferplus", "train").examples[2]
    assert example["votes"].tolist() == [0, 0, 6, 3, 0, 0, 0, 0]
    pictures = read()
    np.testing.assert_allclose(pictures.votes[2], np.array([0, 0, 2, 1, 0, 0, 0, 0]) / 3)
    assert pictures.emotion.tolist() == list(range(8))
    assert pictures.frames.shape == (8, 96, 96, 3) and pictures.faces.shape == (8, 48, 48, 3)


def test_what_a_set_does_not_know_is_unknown(read):
    pictures = read()
    for name in ("landmarks", "pose", "attributes", "action_units"):
        assert np.isnan(getattr(pictures, name)).all(), name
    assert (np.asarray(pictures.agr) == -1).all()


def test_a_picture_without_a_face_is_left_out(read):
    assert read(found=(True, False) * 4).emotion.tolist() == [0, 2, 4, 6]


def test_a_finished_folder_is_only_opened(read, monkeypatch):
    first = read()
    monkeypatch.setattr(real_faces, "read_image", None)
    assert (read().votes == first.votes).all()


def test_a_teachers_labels_are_read_and_unsure_ones_masked(data, read):
    examples = Split(data, "ferplus", "validation").examples
    landmarks = np.full((8, 68, 2), 0.25, np.float32)
    age, male = np.full(8, 34.0, np.float32), np.full(8, 0.9, np.float32)
    male[1], male[2] = 0.6, 0.1
    labels = taught.Labels(
        id=np.array([example["id"] for example in examples]),
        found=np.ones(8, bool),
        landmarks=landmarks,
        spread=np.array([0.02, 0.2, *[0.02] * 6], np.float32),
        pose=np.zeros((8, 3), np.float32),
        age=age,
        male=male,
        agr=taught.classes_of(age, male),
    )
    split = Split(data, "ferplus", "validation")
    path = taught.labels_path(split)
    path.parent.mkdir(parents=True, exist_ok=True)
    of = {"data": split.stored.fingerprint, "teacher": "t"}
    taught.write_labels(path, labels, of)
    try:
        pictures = read(split="validation", folder="labelled")
        np.testing.assert_allclose(pictures.landmarks[0], 0.25, atol=1e-6)
        assert np.isnan(pictures.landmarks[1]).all()  # the two looks disagree
        assert pictures.agr[:3].tolist() == [[3, 0, -1], [3, -1, -1], [3, 1, -1]]
        taught.write_labels(path, labels, of | {"data": "another"})
        with pytest.raises(UserError, match="another preparation"):
            read(split="validation", folder="other")
    finally:
        path.unlink()


@pytest.mark.parametrize("name", ["raf_db", "affectnet8", "mafw"])
def test_classes_are_matched_by_name(name):
    space = label_space(name)
    targets = real_faces.class_targets(space)
    for row, written in zip(targets, space.canonical, strict=True):
        assert row.sum() == (written in CLASSES)
        assert not row.any() or CLASSES[int(row.argmax())] == written


def test_a_set_of_other_classes_is_refused():
    space = dataclasses.replace(label_space("raf_db"), classes=("hungry", "late"), title="Moods")
    with pytest.raises(UserError, match=r"Moods: none of its classes is one of neutral"):
        real_faces.class_targets(space)
