"""Official lists have exactly their columns; the layouts that DFEW and RAF-DB are also met in."""

import shutil

import pytest

from emollama_jax.data.builders import affectnet, dfew, ferplus, ferv39k, mafw, raf_db
from emollama_jax.errors import UserError
from tests.helpers import official_trees


def edit(path, change):
    official_trees.write_lines(
        path, [change(n, x) for n, x in enumerate(path.read_text().splitlines())]
    )


# ---- exactly their columns


def second(text):
    """Appends to the second line alone."""
    return lambda n, line: line + text if n == 1 else line


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (second(" 1"), r"line 2: 3 columns, wanted 2"),
        (second("\t0.9"), r"line 2: 3 columns, wanted 2"),
        (second(",1"), r"line 2: .*label '2,1' is not one of"),
        (lambda n, line: line.split()[0], r"line 1: 1 columns, wanted 2"),
        (lambda n, line: f"{n} {line}", r"line 1: 3 columns, wanted 2"),
    ],
)
def test_raf_db(tmp_path, change, said):
    root = official_trees.raf_db(tmp_path, train=3, test=1)
    edit(root / "EmoLabel" / "list_patition_label.txt", change)
    with pytest.raises(UserError, match=said):
        raf_db.list_tree(root, None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (second(",1"), "line 2: 13 columns, wanted 12"),
        (lambda n, line: line.replace("(0, 0, 48, 48)", "(0, 0, 48)"), "line 1: box "),
        (lambda n, line: line[:-1] + "x", "line 1: vote count 'x' is not a number"),
        (lambda n, line: line.replace('"', ""), "line 1: 15 columns, wanted 12"),
    ],
)
def test_ferplus(tmp_path, change, said):
    root = official_trees.ferplus(tmp_path, train=3, valid=1, test=1)
    edit(root / "FER2013Train" / "label.csv", change)
    with pytest.raises(UserError, match=said):
        ferplus.list_tree(root, None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (second(",1"), "line 2: 10 columns, wanted 9"),
        (lambda n, line: f"{n},{line}", "column '0' is not among them"),
        (lambda n, line: line + (",expression" if n == 0 else ",3"), "2 columns are called 'expr"),
        (lambda n, line: line.rpartition(",")[0], "no column arousal"),
    ],
)
def test_affectnet(tmp_path, change, said):
    root = official_trees.affectnet_lists(tmp_path, train=3, test=1)
    edit(root / "Manually_Annotated_file_lists" / "training.csv", change)
    with pytest.raises(UserError, match=said):
        affectnet.list_tree(root, None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (second(",3"), "line 2: 3 columns, wanted 2"),
        (lambda n, line: line + (",confidence" if n == 0 else ",3"), "'confidence' is not among"),
        (lambda n, line: line + (",label" if n == 0 else ",3"), "2 columns are called 'label'"),
        (lambda n, line: line.partition(",")[0], "no column label"),
    ],
)
def test_dfew(tmp_path, change, said):
    root = official_trees.dfew(tmp_path, clips=6, folds=1, frames=True)
    edit(root / "EmoLabel_DataSplit" / "train(single-labeled)" / "set_1.csv", change)
    with pytest.raises(UserError, match=said):
        dfew.list_tree(root, 1)


def test_columns_may_change_places_and_separators(tmp_path):
    root = official_trees.dfew(tmp_path, clips=6, folds=1, frames=True)
    before = dfew.list_tree(root, 1)
    path = root / "EmoLabel_DataSplit" / "train(single-labeled)" / "set_1.csv"
    edit(path, lambda n, line: ";".join(reversed(line.split(","))))
    assert dfew.list_tree(root, 1) == before


@pytest.mark.parametrize("more", [" 3", ",3", "\tSad"])
def test_ferv39k(tmp_path, more):
    root = official_trees.ferv39k(tmp_path, train=2, test=1)
    edit(root / "4_setups" / "All_scenes" / "train_All.csv", second(more))
    with pytest.raises(UserError, match=r"line 2: .* wanted e\.g\. 'Action/Sad/0010 Sad', two"):
        ferv39k.list_tree(root, None)


@pytest.mark.parametrize(
    ("style", "more", "said"),
    [
        ("no_caption", " fear", "line 2: 3 columns, wanted 2"),
        ("no_caption", "\tA person.", "line 2: 4 columns, wanted 2"),
        ("with_caption", "\tfear", "line 2: 5 columns, wanted 4"),
    ],
)
def test_mafw(tmp_path, style, more, said):
    root = official_trees.mafw(tmp_path, clips=11, folds=1)
    path = root / "Train & Test Set" / "single" / style / "set_1" / "train.txt"
    lines = path.read_bytes().decode("gbk").splitlines()
    lines[1] += more
    path.write_bytes("\n".join(lines).encode("gbk"))
    with pytest.raises(UserError, match=said):
        mafw.list_tree(root, 1)


# ---- DFEW's layouts


@pytest.fixture
def tree(tmp_path):
    return official_trees.dfew(tmp_path / "DFEW", clips=6, folds=2, frames=True)


def flat(tree):
    """The layout of the authors' training code."""
    for split in ("train", "test"):
        for fold in (1, 2):
            home = tree / "EmoLabel_DataSplit" / f"{split}(single-labeled)"
            lists = tree / "label"
            lists.mkdir(exist_ok=True)
            shutil.copy(home / f"set_{fold}.csv", lists / f"single_{split}set_{fold}.csv")
    for clip in (tree / "Clip" / "clip_224x224").iterdir():
        for frame in list(clip.iterdir()):
            frame.rename(clip / f"{clip.name}_{int(frame.stem):05d}.jpg")
    return tree


def same(first, second):
    """Apart from where the clips lie."""
    ids = [[(item.id, item.label) for item in x.splits["clips"]] for x in (first, second)]
    return ids[0] == ids[1] and (first.views, first.missing) == (second.views, second.missing)


@pytest.mark.parametrize(
    "place",
    ["clip_224x224_16f", "CLIP_224X224_16F", "clip_224x224_avi", "jpg_256"],
)
def test_dfew_clips_in_other_folders(tree, place):
    before = dfew.list_tree(tree, None)
    (tree / "Clip" / "clip_224x224").rename(tree / "Clip" / place)
    found = dfew.list_tree(tree, None)
    assert same(before, found) and place.lower() in found.layout.lower()


def test_dfew_interpolated_frames_come_last(tree):
    shutil.copytree(tree / "Clip" / "clip_224x224", tree / "Clip" / "clip_224x224_16f")
    assert dfew.list_tree(tree, 1).layout.startswith("Clip/clip_224x224/")
    shutil.rmtree(tree / "Clip" / "clip_224x224" / "00003")
    assert dfew.list_tree(tree, 1).layout.startswith("Clip/clip_224x224_16f/")


def test_dfew_parts_of_its_archives(tree):
    before = dfew.list_tree(tree, None)
    home = tree / "Clip" / "clip_224x224"
    for n, clip in enumerate(sorted(home.iterdir())):
        part = home / f"clip_224x224_part_{1 + n // 3}"
        part.mkdir(exist_ok=True)
        clip.rename(part / clip.name)
    assert same(before, dfew.list_tree(tree, None))
    shutil.copytree(part / clip.name, home / "clip_224x224_part_1" / clip.name)
    with pytest.raises(UserError, match=r"part_1/00006 and .*part_2/00006 are both clip 6"):
        dfew.list_tree(tree, 1)


@pytest.mark.parametrize("above", [False, True])
def test_dfew_labels_and_data(tree, tmp_path, above):
    before = dfew.list_tree(tree, None)
    flat(tree)
    shutil.rmtree(tree / "EmoLabel_DataSplit")
    (tree / "Clip" / "clip_224x224").rename(tree / "data")
    shutil.rmtree(tree / "Clip")
    found = dfew.list_tree(tmp_path if above else tree, None)
    assert same(before, found) and found.layout.startswith("data/")
    assert list(dfew.list_tree(tree, 2).views) == ["dfew/fold2"]


def test_dfew_underscored_folders_of_lists(tree):
    before = dfew.list_tree(tree, None)
    for split in ("train", "test"):
        home = tree / "EmoLabel_DataSplit"
        (home / f"{split}(single-labeled)").rename(home / f"{split}(single_labeled)")
    assert same(before, dfew.list_tree(tree, None))


def test_dfew_lists_that_differ_are_refused(tree):
    flat(tree)
    assert dfew.list_tree(tree, None)
    path = tree / "label" / "single_testset_1.csv"
    edit(path, lambda n, line: "1,5" if n == 1 else line)
    with pytest.raises(UserError, match="differ: one of the two is wrong"):
        dfew.list_tree(tree, 1)
    path.write_text("video_name,label\n1,0\n")
    with pytest.raises(UserError, match="zero-based labels"):
        dfew.list_tree(tree, 1)


def test_dfew_without_either_says_what_is_wanted(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="wanted EmoLabel_DataSplit, or label/single_trainset_1"):
        dfew.list_tree(tmp_path, None)


# ---- RAF-DB from Kaggle


def kaggle(folder, *, words=False, home="DATASET", lists=("train", "test")):
    for split, count in (("train", 14), ("test", 7)):
        lines = ["image,label"]
        for i in range(count):
            label = i % 7
            name = f"{split}_{i + 1:05d}_aligned.jpg"
            kind = official_trees.RAF_DB[label] if words else str(label + 1)
            data = official_trees.encode_picture(
                official_trees.face(official_trees.RAF_DB[label], i, split)
            )
            official_trees.write(folder / home / split / kind / name, data)
            lines.append(f"{name},{label + 1}")
        if split in lists:
            official_trees.write_lines(folder / f"{split}_labels.csv", lines)
    return folder


def labels(found):
    return {item.id: found.classes[item.label] for items in found.splits.values() for item in items}


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    return labels(raf_db.list_tree(official_trees.raf_db(tmp_path_factory.mktemp("raf")), None))


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({}, ["labels of train agree with train_labels.csv", "labels of test agree"]),
        ({"lists": ("train",)}, ["labels of train agree", "test_labels.csv is missing"]),
        ({"lists": ()}, ["train_labels.csv is missing", "test_labels.csv is missing"]),
        ({"words": True}, ["labels of train agree", "labels of test agree"]),
        ({"home": "."}, ["labels of train agree", "labels of test agree"]),
    ],
)
def test_kaggle_folders(tmp_path, official, how, told):
    found = raf_db.list_tree(kaggle(tmp_path / "a", **how), None)
    assert labels(found) == official and not found.missing
    assert all(line.startswith(start) for line, start in zip(found.told, told, strict=True))
    if how.get("home") != ".":  # the folder itself may be named, or one above
        assert labels(raf_db.list_tree(tmp_path, None)) == official
        assert raf_db.list_tree(tmp_path / "a" / "DATASET", None).told == found.told


def test_kaggle_folders_and_lists_must_agree(tmp_path):
    root = kaggle(tmp_path)
    home = root / "DATASET" / "train"
    (home / "1" / "train_00001_aligned.jpg").rename(home / "2" / "train_00001_aligned.jpg")
    with pytest.raises(UserError, match=r"in the folder of fear, but train_labels.csv says surpri"):
        raf_db.list_tree(root, None)
    (home / "2" / "train_00001_aligned.jpg").unlink()
    assert raf_db.list_tree(root, None).missing == ["DATASET/train/*/train_00001_aligned.jpg"]
    edit(root / "test_labels.csv", second(",1"))
    with pytest.raises(UserError, match=r"test_labels.csv, line 2: 3 columns, wanted 2"):
        raf_db.list_tree(root, None)


@pytest.mark.parametrize(
    ("move", "said"),
    [
        (("train/7", "train/0"), "folders are 1 … 7 or class words"),
        (("train/7", "train/bored"), "folders are 1 … 7 or class words"),
        (("test/1/test_00001_aligned.jpg", "test/1/cat.jpg"), "prepare other pictures as own/NAME"),
        (
            ("test/1/test_00001_aligned.jpg", "train/1/test_00001_aligned.jpg"),
            "no picture of RAF-DB's train",
        ),
        (("test", "val"), "test is missing"),
    ],
)
def test_kaggle_folders_are_refused(tmp_path, move, said):
    root = kaggle(tmp_path, lists=())
    (root / "DATASET" / move[0]).rename(root / "DATASET" / move[1])
    with pytest.raises(UserError, match=said):
        raf_db.list_tree(root, None)


def test_a_picture_in_two_folders_is_refused(tmp_path):
    home = kaggle(tmp_path) / "DATASET" / "train"
    shutil.copy(home / "1" / "train_00001_aligned.jpg", home / "2")
    with pytest.raises(UserError, match="are one picture with two labels"):
        raf_db.list_tree(tmp_path, None)
