"""The official layouts: what is read, what is tolerated, which traps are refused by name."""

import shutil

import numpy as np
import pytest

from emollama_jax.data.builders import affectnet, dfew, ferplus, ferv39k, mafw, own, raf_db
from emollama_jax.data.sets import label_space
from emollama_jax.errors import UserError
from tests.helpers import official_trees


def labels(found, split):
    return [found.classes[item.label] for item in found.splits[split]]


def edit(path, change):
    """Rewrites a text file by a function of its lines."""
    official_trees.write_lines(path, change(path.read_text().splitlines()))


# ---- RAF-DB


def test_raf_db(tmp_path):
    found = raf_db.list_tree(official_trees.raf_db(tmp_path), None)
    assert found.kind == "image" and found.classes == label_space("raf_db").classes
    assert {split: len(items) for split, items in found.splits.items()} == {"train": 14, "test": 7}
    assert labels(found, "test") == list(official_trees.RAF_DB)
    first = found.splits["train"][0]
    assert first.id == "train_00001" and first.media.name == "train_00001_aligned.jpg"
    assert not (found.missing or found.notes or found.dropped)


def test_raf_db_original_pictures(tmp_path):
    root = official_trees.raf_db(tmp_path, train=2, test=1)
    aligned = root / "Image" / "aligned"
    original = root / "Image" / "original"
    original.mkdir()
    for path in aligned.iterdir():
        shutil.copy(path, original / path.name.replace("_aligned", ""))
    assert (
        raf_db.list_tree(root, None).layout == "Image/aligned/*_aligned.jpg"
    )  # the field's pictures
    shutil.rmtree(aligned)
    found = raf_db.list_tree(root, None)
    assert found.layout == "Image/original/*.jpg" and not found.missing


def test_line_ends_marks_spaces_and_endings_are_tolerated(tmp_path):
    root = official_trees.raf_db(tmp_path / "some where" / "basic", train=7, test=7)
    path = root / "EmoLabel" / "list_patition_label.txt"
    lines = [f"  {line.replace(' ', '   ')} " for line in path.read_text().splitlines()]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, "", ""]).encode())
    for picture in (root / "Image" / "aligned").iterdir():
        picture.rename(picture.with_suffix(".JPG"))
    found = raf_db.list_tree(tmp_path / "some where", None)  # the folder above
    assert labels(found, "train") == list(official_trees.RAF_DB) and not found.missing


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train_00001.jpg 0", "label '0' is not one of 1=surprise"),
        ("train_00001.jpg 8", "label '8' is not one of"),
        ("valid_00001.jpg 3", "wanted e.g. 'train_00001.jpg 5'"),
        ("train_00001.jpg", "line 1"),
    ],
)
def test_raf_db_refuses(tmp_path, line, said):
    root = official_trees.raf_db(tmp_path, train=1, test=1)
    edit(root / "EmoLabel" / "list_patition_label.txt", lambda lines: [line, *lines[1:]])
    with pytest.raises(UserError, match=said):
        raf_db.list_tree(root, None)


def test_one_clip_with_two_labels_is_refused(tmp_path):
    root = official_trees.raf_db(tmp_path, train=2, test=1)
    edit(root / "EmoLabel" / "list_patition_label.txt", lambda x: [*x, "train_00001.jpg 4"])
    with pytest.raises(UserError, match="train_00001 is labelled surprise and happiness"):
        raf_db.list_tree(root, None)


def test_another_tree_is_not_taken_for_the_set(tmp_path):
    with pytest.raises(UserError, match=r"no RAF-DB in its official layout \(wanted EmoLabel"):
        raf_db.list_tree(official_trees.ferv39k(tmp_path, train=1, test=1), None)
    with pytest.raises(UserError, match="no such folder"):
        raf_db.list_tree(tmp_path / "nowhere", None)
    official_trees.raf_db(tmp_path / "two" / "a", train=1, test=1)
    official_trees.raf_db(tmp_path / "two" / "b", train=1, test=1)
    with pytest.raises(UserError, match="several trees of RAF-DB"):
        raf_db.list_tree(tmp_path / "two", None)


# ---- FERPlus


def test_ferplus(tmp_path):
    found = ferplus.list_tree(official_trees.ferplus(tmp_path), None)
    assert {s: len(items) for s, items in found.splits.items()} == {
        "train": 16, "validation": 8, "test": 8,
    }  # fmt: skip
    assert labels(found, "test") == list(official_trees.FERPLUS)
    assert found.splits["test"][0].box == (0, 0, 48, 48)


def test_ferplus_votes(tmp_path):
    """The eight classes alone count, the first of equal ones; a row without their votes is left."""
    root = official_trees.ferplus(tmp_path, train=3, valid=1, test=1)
    box = '"(0, 0, 48, 48)"'
    votes = ["0,4,4,0,0,0,0,0,0,2", "1,0,0,2,0,0,0,0,7,0", "0,0,0,0,0,0,0,0,6,4"]
    edit(
        root / "FER2013Train" / "label.csv",
        lambda lines: [f"{line.split(',')[0]},{box},{v}" for line, v in zip(lines, votes)],  # noqa: B905
    )
    found = ferplus.list_tree(root, None)
    assert labels(found, "train") == ["happiness", "sadness"]
    assert found.dropped == {"no vote for any of the eight classes": 1}


def test_the_other_ferplus_file_is_refused(tmp_path):
    header = "Usage,Image name,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt"
    official_trees.write_lines(tmp_path / "a" / "fer2013new.csv", [header, "Training,fer0.png,4,0"])
    for source in (tmp_path / "a", tmp_path / "a" / "fer2013new.csv"):
        with pytest.raises(UserError, match=r"fer2013new\.csv.*1,602 rows"):
            ferplus.list_tree(source, None)
    root = official_trees.ferplus(tmp_path / "b", train=1, valid=1, test=1)
    shutil.copy(tmp_path / "a" / "fer2013new.csv", root / "fer2013new.csv")
    assert (
        len(ferplus.list_tree(root, None).splits["train"]) == 1
    )  # beside label.csv it does no harm
    shutil.copy(tmp_path / "a" / "fer2013new.csv", root / "FER2013Train" / "label.csv")
    with pytest.raises(UserError, match=r"fer2013new\.csv is not FERPlus's label\.csv"):
        ferplus.list_tree(root, None)


def test_ferplus_refuses_other_columns(tmp_path):
    root = official_trees.ferplus(tmp_path, train=1, valid=1, test=1)
    edit(root / "FER2013Test" / "label.csv", lambda lines: [lines[0].rpartition(",")[0]])
    with pytest.raises(UserError, match=r"label\.csv, line 1: 11 columns, wanted 12"):
        ferplus.list_tree(root, None)


# ---- AffectNet


@pytest.mark.parametrize("tree", [official_trees.affectnet_lists, official_trees.affectnet_folders])
def test_affectnet_in_both_vintages(tmp_path, tree):
    found = affectnet.list_tree(tree(tmp_path), None)
    assert labels(found, "test") == list(official_trees.AFFECTNET)
    assert found.views["affectnet8"] == {"train": ("train", None), "test": ("test", None)}
    assert found.views["affectnet7"]["test"] == ("test", [0, 1, 2, 3, 4, 5, 6])
    assert len(found.views["affectnet7"]["train"][1]) == 14


def test_affectnet_drops_and_counts(tmp_path):
    found = affectnet.list_tree(official_trees.affectnet_lists(tmp_path / "a"), None)
    assert found.dropped == {"expression 10 (no face)": 2, "face_width below 0": 2}
    assert found.splits["train"][0].box == (20, 16, 76, 80)
    root = official_trees.affectnet_folders(tmp_path / "b", train=8, test=8)
    np.save(root / "train_set" / "annotations" / "3_exp.npy", np.array(9))
    found = affectnet.list_tree(root, None)
    assert found.dropped == {"expression 9 (uncertain)": 1} and len(found.splits["train"]) == 7


def test_affectnet_refuses(tmp_path):
    root = official_trees.affectnet_lists(tmp_path / "a", train=2, test=2)
    path = root / "Manually_Annotated_file_lists" / "training.csv"
    edit(path, lambda lines: [lines[0], lines[1].replace(",0,0.1", ",12,0.1"), *lines[2:]])
    with pytest.raises(UserError, match=r"line 2: expression 12, wanted 0 … 10"):
        affectnet.list_tree(root, None)
    edit(path, lambda lines: lines[1:])
    with pytest.raises(UserError, match="no column subdirectory_filepath"):
        affectnet.list_tree(root, None)
    root = official_trees.affectnet_folders(tmp_path / "b", train=2, test=2)
    (root / "val_set" / "annotations" / "0_exp.npy").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"0_exp\.npy: not one number"):
        affectnet.list_tree(root, None)


# ---- DFEW


@pytest.mark.parametrize("frames", [False, True])
def test_dfew(tmp_path, frames):
    root = official_trees.dfew(tmp_path, frames=frames)
    found = dfew.list_tree(root, None)
    assert found.kind == "clip" and len(found.splits["clips"]) == 15
    assert list(found.views) == [f"dfew/fold{k}" for k in range(1, 6)]
    ids = [item.id for item in found.splits["clips"]]
    stored, positions = found.views["dfew/fold2"]["test"]
    assert stored == "clips" and [ids[n] for n in positions] == ["2", "7", "12"]
    by_id = {item.id: item for item in found.splits["clips"]}
    assert found.classes[by_id["9"].label] == "sad"
    assert by_id["9"].media.name == ("00009" if frames else "9.mp4")
    assert list(dfew.list_tree(root, 3).views) == ["dfew/fold3"]


def test_dfew_takes_the_fuller_layout(tmp_path):
    root = official_trees.dfew(tmp_path, clips=6, frames=True, folds=1)
    official_trees.write(root / "Clip" / "original" / "00001.MP4", official_trees.video("happy", 0))
    assert dfew.list_tree(root, 1).layout.startswith("Clip/clip_224x224")
    for i in range(2, 7):
        official_trees.write(root / "Clip" / "original" / f"{i}.mp4", b"a clip")
    assert dfew.list_tree(root, 1).layout == "Clip/original/*.mp4"
    official_trees.write(root / "Clip" / "original" / "1.mp4", b"a clip")
    with pytest.raises(UserError, match="are both clip 1"):
        dfew.list_tree(root, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda row: f"{row.split(',')[0]},{int(row.split(',')[1]) - 1}", "zero-based labels"),
        (lambda row: f"{int(row.split(',')[0]):05d},{row.split(',')[1]}", "is padded"),
        (lambda row: f"{row.split(',')[0]},8", "label '8' is not one of 1=happy"),
        (lambda row: row.replace(",", ";"), "1 columns, wanted 2 .a clip's number"),
    ],
)
def test_dfew_traps(tmp_path, change, said):
    root = official_trees.dfew(tmp_path, folds=2)
    path = root / "EmoLabel_DataSplit" / "train(single-labeled)" / "set_1.csv"
    edit(path, lambda lines: [lines[0], *map(change, lines[1:])])
    with pytest.raises(UserError, match=said):
        dfew.list_tree(root, 1)
    assert dfew.list_tree(root, 2).views  # the other fold is not touched by it


def test_dfew_without_header_or_fold(tmp_path):
    root = official_trees.dfew(tmp_path, folds=1)
    with pytest.raises(UserError, match="no train and test lists of fold 4"):
        dfew.list_tree(root, 4)
    with pytest.raises(UserError, match="--fold 6: DFEW has the folds 1 … 5"):
        dfew.list_tree(root, 6)
    path = root / "EmoLabel_DataSplit" / "test(single-labeled)" / "set_1.csv"
    edit(path, lambda lines: lines[1:])
    with pytest.raises(UserError, match=r"first line '1,1', wanted 'video_name,label'"):
        dfew.list_tree(root, 1)


def test_dfew_notes_what_stands_twice(tmp_path):
    root = official_trees.dfew(tmp_path, folds=1)
    home = root / "EmoLabel_DataSplit"
    edit(home / "train(single-labeled)" / "set_1.csv", lambda lines: [*lines, lines[1]])
    edit(home / "test(single-labeled)" / "set_1.csv", lambda lines: [*lines, "3,3"])
    notes = dfew.list_tree(root, 1).notes
    assert notes == [
        "dfew/fold1, train: 1 listed twice: 2",
        "dfew/fold1: 1 in both train and test: 3",
    ]


# ---- FERV39k


def test_ferv39k(tmp_path):
    found = ferv39k.list_tree(official_trees.ferv39k(tmp_path), None)
    assert found.kind == "clip" and labels(found, "test") == [
        x.lower() for x in official_trees.FERV39K
    ]
    item = found.splits["train"][1]
    assert item.id == "Daily Life/Disgust/0001" and item.media.is_dir()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("Action/Angry/0000 Sad", "in folder Angry but labelled Sad"),
        ("Action/Angry/0000 0", "is a number, and FERV39k's ids circulate"),
        ("Action/Angry/0000 Bored", "'Bored' is not a class of FERV39k"),
        ("0000 Angry", "wanted e.g. 'Action/Sad/0010 Sad'"),
    ],
)
def test_ferv39k_refuses(tmp_path, line, said):
    root = official_trees.ferv39k(tmp_path, train=1, test=1)
    official_trees.write_lines(root / "4_setups" / "All_scenes" / "train_All.csv", [line])
    with pytest.raises(UserError, match=said):
        ferv39k.list_tree(root, None)


# ---- MAFW


def test_mafw(tmp_path):
    found = mafw.list_tree(official_trees.mafw(tmp_path), None)
    assert [found.classes[item.label] for item in found.splits["clips"]] == list(
        official_trees.MAFW
    ) * 2
    assert found.splits["clips"][0].id == "00001"
    assert sum(len(found.views[f"mafw/fold{k}"]["test"][1]) for k in range(1, 6)) == 22


def test_mafw_captions_in_gbk_serve_as_lists(tmp_path):
    root = official_trees.mafw(tmp_path, folds=1)
    before = mafw.list_tree(root, 1)
    shutil.rmtree(root / "Train & Test Set" / "single" / "no_caption")
    assert mafw.list_tree(root, 1) == before


def test_mafw_shuffled_ids_are_refused(tmp_path):
    root = official_trees.mafw(tmp_path, folds=1)
    single = root / "Train & Test Set" / "single"
    path = single / "no_caption" / "set_1" / "train.txt"
    lines = path.read_text().splitlines()
    words = [line.split()[1] for line in lines]
    moved = [f"{line.split()[0]} {word}" for line, word in zip(lines, words[1:] + words[:1])]  # noqa: B905
    official_trees.write_lines(path, moved)
    with pytest.raises(UserError, match=r"17 clips are labelled differently in .*shuffled ids"):
        mafw.list_tree(root, 1)
    official_trees.write_lines(path, [f"{line.split()[0]} {i}" for i, line in enumerate(lines)])
    with pytest.raises(UserError, match=r"label '0' is a number, and MAFW's ids .* shuffled"):
        mafw.list_tree(root, 1)


def test_mafw_refuses_compound_labels(tmp_path):
    root = official_trees.mafw(tmp_path, folds=1, captions=False)
    path = root / "Train & Test Set" / "single" / "no_caption" / "set_1" / "test.txt"
    edit(path, lambda lines: ["00001.mp4 anger_disgust", *lines[1:]])
    with pytest.raises(UserError, match="'anger_disgust' is not a class of MAFW"):
        mafw.list_tree(root, 1)


# ---- a user's own data


def test_own_folders_with_and_without_splits(tmp_path):
    root = official_trees.own_folders(tmp_path)
    found = own.list_own(root, "own/mine")
    assert found.classes == ("anger", "happiness", "sadness") and found.kind == "image"
    assert labels(found, "test") == ["anger"] * 3 + ["happiness"] * 3 + ["sadness"] * 3
    whole = own.list_own(root / "train", "own/mine")
    assert sum(map(len, whole.splits.values())) == 9  # divided: tests/data/test_own.py


def test_own_frames_and_videos(tmp_path):
    found = own.list_own(
        official_trees.own_folders(tmp_path / "a", each=1, clips=True), "own/clips"
    )
    assert found.kind == "clip"
    official_trees.write_frames(
        tmp_path / "b" / "Happy" / "first", official_trees.moving("happy", 0)
    )
    found = own.list_own(tmp_path / "b", "own/frames")
    assert found.kind == "clip" and found.classes == ("happy",)


def test_own_tables(tmp_path):
    path = official_trees.own_table(tmp_path)
    found = own.list_own(path, "own/t")
    assert {s: len(items) for s, items in found.splits.items()} == {"train": 4, "test": 2}
    lines = path.read_text().splitlines()
    other = tmp_path / "list.jsonl"
    other.write_text(
        "".join(
            f'{{"file": "{line.split(",")[0]}", "emotion": " {line.split(",")[1].upper()}"}}\n'
            for line in lines[1:]
        )
    )
    assert labels(own.list_own(other, "own/t"), "train") == ["happiness", "sadness", "anger"] * 2


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["path,label", "pictures/0.jpg,3"], "label '3' is a number"),
        (["path,mood", "pictures/0.jpg,sad"], "no column label"),
        (["path,label,split", "pictures/0.jpg,sad,later"], "split 'later', wanted train"),
        (["path,label", "pictures/0.jpg,sad,train"], "line 2: 3 cells under a header of 2"),
        (["path,label", "pictures/0.jpg,"], "the label is empty"),
        (["path,label"], "no pictures and no clips"),
        (["path,label", "pictures/0.jpg,sad", "a.mp4,sad"], "prepare them as two"),
    ],
)
def test_own_tables_refuse(tmp_path, lines, said):
    path = official_trees.own_table(tmp_path, count=1)
    official_trees.write_lines(path, lines)
    with pytest.raises(UserError, match=said):
        own.list_own(path, "own/t")
