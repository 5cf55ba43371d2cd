"""Prepared sets: TFDS data sets of ArrayRecord shards, views of them, stopping and going on."""

import dataclasses
import json
import pickle
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from emollama_jax.data.builders import own, store
from emollama_jax.data.builders.stored import VERSION, StoredSet
from emollama_jax.data.media import is_video, read_frames, read_image, read_video
from emollama_jax.data.split import Split, prepared, space_of
from emollama_jax.errors import UserError
from tests.helpers import official_trees
from tests.helpers.prepared_sets import prepare


@pytest.fixture(scope="module")
def dfew(tmp_path_factory):
    return official_trees.dfew(tmp_path_factory.mktemp("dfew"), frames=True)


def test_pictures_are_stored_as_they_are(tmp_path):
    root = official_trees.raf_db(tmp_path / "src", train=7, test=3)
    folder, _ = prepare("raf_db", root, tmp_path)
    info = tfds.builder_from_directory(folder).info
    assert {name: split.num_examples for name, split in info.splits.items()} == {
        "train": 7, "test": 3,
    }  # fmt: skip
    source = Split(tmp_path, "raf_db", "train").examples
    example = source[3]
    path = root / "Image" / "aligned" / "train_00004_aligned.jpg"
    assert example["media"] == path.read_bytes()
    assert example["id"] == "train_00004" and example["kind"] == "image" and example["label"] == 3
    assert example["boxes"].shape == (0, 4) and example["subject"] == -1
    question, answer = json.loads(example["items"])[0]
    assert "in the image?" in question["value"] and answer["value"] == "happiness"
    assert [e["id"] for e in pickle.loads(pickle.dumps(source))] == [e["id"] for e in source]
    assert "tensorflow" not in sys.modules


def test_frames_are_packed_byte_for_byte(dfew, tmp_path):
    prepare("dfew", dfew, tmp_path, fold=1)
    example = Split(tmp_path, "dfew/fold1", "test").examples[1]
    home = dfew / "Clip" / "clip_224x224" / f"{int(example['id']):05d}"
    assert is_video(example["media"])
    frames = list(read_video(example["media"]))
    assert len(frames) == official_trees.FRAMES
    for i, frame in enumerate(frames, 1):
        np.testing.assert_array_equal(frame, read_image(home / f"{i}.jpg"))
    clip = read_frames(example["media"], lambda count, fps: np.array([count - 1, 0]))
    np.testing.assert_array_equal(clip.frames[0], frames[-1])
    assert clip.fps is None and clip.count == official_trees.FRAMES
    assert "in the video?" in json.loads(example["items"])[0][0]["value"]


def test_folds_are_views_of_clips_stored_once(dfew, tmp_path):
    folder, _ = prepare("dfew", dfew, tmp_path, fold=1)
    assert list(prepared(tmp_path, "dfew")) == ["dfew/fold1"]
    shards = {p: p.stat().st_mtime_ns for p in folder.glob("*array_record*")}
    prepare("dfew", dfew, tmp_path, fold=4)
    assert {p: p.stat().st_mtime_ns for p in folder.glob("*array_record*")} == shards
    assert list(prepared(tmp_path, "dfew")) == ["dfew/fold1", "dfew/fold4"]
    tests = [{e["id"] for e in Split(tmp_path, f"dfew/fold{k}", "test").examples} for k in (1, 4)]
    assert tests == [{"1", "6", "11"}, {"4", "9", "14"}]
    train = Split(tmp_path, "dfew/fold4", "train").examples
    assert len(train) == 12 and not tests[1] & {e["id"] for e in train}
    assert Split(tmp_path, "dfew/fold1", "test").place == "dfew/clips"


def test_a_further_fold_of_other_clips_keeps_the_first(tmp_path):
    """Lists that do not cover each other: the union is stored."""
    root = official_trees.dfew(tmp_path / "src", folds=2)
    home = root / "EmoLabel_DataSplit"
    for split in ("train", "test"):
        path = home / f"{split}(single-labeled)" / "set_1.csv"
        lines = path.read_text().splitlines()
        official_trees.write_lines(path, [line for line in lines if line not in ("3,3", "6,6")])
    prepare("dfew", root, tmp_path, fold=1)
    before = [e["id"] for e in Split(tmp_path, "dfew/fold1", "train").examples]
    assert "3" not in before
    prepare("dfew", root, tmp_path, fold=2)
    after = Split(tmp_path, "dfew/fold1", "train").examples
    assert [e["id"] for e in after] == before
    assert "3" in [e["id"] for e in Split(tmp_path, "dfew/fold2", "train").examples]


def test_affectnet_is_stored_once_and_asked_for_its_own_classes(tmp_path):
    root = official_trees.affectnet_lists(tmp_path / "src")
    prepare("affectnet8", root, tmp_path)
    eight = Split(tmp_path, "affectnet8", "test").examples
    seven = Split(tmp_path, "affectnet7", "test").examples
    assert (len(eight), len(seven)) == (8, 7)
    first = {n: json.loads(x[0]["items"])[0][0]["value"] for n, x in ((8, eight), (7, seven))}
    assert "contempt" in first[8] and "contempt" not in first[7]
    assert seven[0]["boxes"].tolist() == [[20, 16, 76, 80]]
    with pytest.raises(IndexError):
        seven[7]


def test_processes_write_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(store.SHARD, "image", 3)
    root = official_trees.ferplus(tmp_path / "src", train=7, valid=2, test=2)
    steps = []

    def progress(done, total):
        steps.append((done, total))

    folders = [
        prepare("ferplus", root, tmp_path / f"{n}", processes=n, progress=progress)[0]
        for n in (1, 2)
    ]
    names = [sorted(p.name for p in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]
    assert "ferplus-train.array_record-00002-of-00003" in names[0]
    for split in ("train", "validation", "test"):
        one, two = (list(Split(f.parents[1], "ferplus", split).examples) for f in folders)
        assert [e["id"] for e in one] == [e["id"] for e in two]
        assert [e["media"] for e in one] == [e["media"] for e in two]
    assert steps[-1] == (11, 11)


def test_a_stopped_preparation_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(store.SHARD, "image", 2)
    root = official_trees.raf_db(tmp_path / "src", train=5, test=2)
    made, stop = [], [True]
    make_example = store.make_example

    def counting(entry, kind, classes):
        made.append(entry.id)
        if len(made) == 5 and stop:
            stop.clear()
            raise KeyboardInterrupt
        return make_example(entry, kind, classes)

    monkeypatch.setattr(store, "make_example", counting)
    with pytest.raises(KeyboardInterrupt):
        prepare("raf_db", root, tmp_path)
    with pytest.raises(UserError, match="raf_db is not prepared; run `emollama data prepare"):
        Split(tmp_path, "raf_db", "train")
    prepare("raf_db", root, tmp_path)
    assert len(made) == 5 + 3  # two shards of two were whole; the rest is written
    assert len(Split(tmp_path, "raf_db", "train").examples) == 5
    made.clear()
    folder, _ = prepare("raf_db", root, tmp_path)
    assert made == [] and sorted(p.name for p in folder.parent.iterdir()) == [VERSION]
    path = root / "EmoLabel" / "list_patition_label.txt"
    official_trees.write_lines(path, path.read_text().splitlines()[1:])
    prepare("raf_db", root, tmp_path)  # another list is another set
    assert len(Split(tmp_path, "raf_db", "train").examples) == 4


def test_missing_files_are_listed_and_too_many_stop(tmp_path):
    root = official_trees.raf_db(tmp_path / "src", train=20, test=5)
    for i in (3, 9):
        (root / "Image" / "aligned" / f"train_{i:05d}_aligned.jpg").unlink()
    with pytest.raises(UserError, match=r"2 of 25 files are missing \(8.0%, at most 1.0% may be"):
        prepare("raf_db", root, tmp_path)
    listed = (tmp_path / "raf_db" / "missing.txt").read_text().split()
    assert listed == [f"Image/aligned/train_{i:05d}_aligned.jpg" for i in (3, 9)]
    _, told = prepare("raf_db", root, tmp_path, missing_share=0.1)
    assert told[-1] == f"2 files are missing and left out: {', '.join(listed)}"
    assert len(Split(tmp_path, "raf_db", "train").examples) == 18
    assert StoredSet(tmp_path, "raf_db").metadata["missing"] == 2


def test_a_clip_folder_without_frames_is_missing(tmp_path):
    root = official_trees.ferv39k(tmp_path / "src", train=2, test=1)
    for path in (root / "2_ClipsforFaceCrop" / "Action" / "Angry" / "0000").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"1 of 3 files are missing.*Action/Angry/0000"):
        prepare("ferv39k", root, tmp_path)


def test_own_data_has_its_own_classes(tmp_path):
    prepare("own/mine", official_trees.own_table(tmp_path / "src"), tmp_path)
    assert space_of(tmp_path, "own/mine").classes == ("anger", "happiness", "sadness")
    example = Split(tmp_path, "own/mine", "test").examples[0]
    assert json.loads(example["items"])[0][1]["value"] == "anger"
    assert example["id"] == "pictures/2.jpg"
    assert space_of(tmp_path, "raf_db").classes == official_trees.RAF_DB


@pytest.mark.parametrize(
    ("name", "fold", "said"),
    [
        (
            "rafdb",
            None,
            r"rafdb: no such data set \(did you mean raf_db\?\); known: actionfaces/images",
        ),
        ("raf_db/x", None, "no such data set"),
        ("dfew/fold6", None, "no such data set"),
        ("own", None, "no such data set"),
        ("own/../x", None, "no such data set"),
        ("raf_db", 1, "--fold 1: raf_db has no folds"),
        ("own/x", 1, "--fold 1: own/x has no folds"),
    ],
)
def test_names_and_folds_that_do_not_exist(tmp_path, name, fold, said):
    (tmp_path / "src").mkdir()
    with pytest.raises(UserError, match=said):
        prepare(name, tmp_path / "src", tmp_path, fold=fold)


def test_opening_says_what_is_there(dfew, tmp_path):
    prepare("dfew", dfew, tmp_path, fold=2)
    for name, split, said in (
        ("dfew", "train", "dfew has folds: name one, e.g. dfew/fold1"),
        ("dfew/fold3", "train", r"dfew/fold3 is not prepared \(prepared are dfew/fold2\)"),
        ("dfew/fold2", "dev", "no split 'dev'; choose one of train, test"),
        ("own/x", "train", "own/x is not prepared"),
    ):
        with pytest.raises(UserError, match=said):
            Split(tmp_path, name, split)


def test_the_fingerprint_knows_labels_and_sizes(tmp_path):
    found = own.list_own(official_trees.own_table(tmp_path / "src"), "own/t")
    before = store.fingerprint(found)
    items = found.splits["train"]
    other = dataclasses.replace(items[0], label=2)
    changed = dataclasses.replace(found, splits={**found.splits, "train": [other, *items[1:]]})
    assert store.fingerprint(changed) != before
    with items[0].media.open("ab") as file:
        file.write(b"x")
    assert store.fingerprint(found) != before
