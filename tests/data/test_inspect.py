"""`emollama data inspect`: counts beside the published ones, and every fault it must find."""

import dataclasses
import importlib
import shutil

import numpy as np
import pytest

from emollama_jax import cli
from emollama_jax.data import emotions, sets
from emollama_jax.data.inspect import DIFFERS, contact_sheet, inspect
from emollama_jax.data.split import Split
from emollama_jax.errors import UserError
from tests.helpers import official_trees
from tests.helpers.prepared_sets import prepare


def publish(monkeypatch, name, **fields):
    """Other published numbers, so that a small set can be complete."""
    family = sets.family_of(name)
    other = dataclasses.replace(family, space=dataclasses.replace(family.space, **fields))
    monkeypatch.setattr(
        importlib.import_module(f"emollama_jax.data.builders.{name}"), "FAMILY", other
    )


def test_the_published_counts_are_a_table():
    for space in emotions.LABEL_SPACES.values():
        for split, support in space.support.items():
            assert sum(support) == space.splits[split], (space.title, split)
            assert len(support) == len(space.classes)
    dfew, mafw = emotions.LABEL_SPACES["dfew"].splits, emotions.LABEL_SPACES["mafw"].splits
    for splits, clips in ((dfew, 11_697), (mafw, 9_172)):
        for fold in range(1, 6):
            assert splits[f"fold{fold}/train"] + splits[f"fold{fold}/test"] == clips


def test_counts_beside_the_published_ones(tmp_path, monkeypatch):
    prepare("raf_db", official_trees.raf_db(tmp_path / "src"), tmp_path)
    found = inspect(tmp_path, "raf_db")
    assert [(s.split, s.total, s.published_total) for s in found.splits] == [
        ("train", 14, 12_271), ("test", 7, 3_068),
    ]  # fmt: skip
    assert all(s.differs for s in found.splits) and not found.faults
    row = found.lines()[0].split()
    assert row == ["surprise", "2", "14.3%", "published", "1290", DIFFERS]

    support = {"train": (2,) * 7, "test": (1,) * 7}
    publish(monkeypatch, "raf_db", splits={"train": 14, "test": 7}, support=support)
    found = inspect(tmp_path, "raf_db")
    assert not any(s.differs for s in found.splits)
    assert found.lines()[-1] == "all counts are the published ones"
    assert not any(DIFFERS in line for line in found.lines())

    publish(monkeypatch, "raf_db", splits={"train": 14, "test": 7},
            support={**support, "test": (2, 0, 1, 1, 1, 1, 1)})  # fmt: skip
    marked = [line for line in inspect(tmp_path, "raf_db").lines() if line.endswith(DIFFERS)]
    assert [line.split()[0] for line in marked] == ["surprise", "fear"]


def test_a_wrong_fold_is_found(tmp_path, monkeypatch):
    """Fold 2's lists in the place of fold 1's: as many clips, but not of these classes."""
    root = official_trees.dfew(tmp_path / "src")
    prepare("dfew", root, tmp_path / "right", fold=1)
    right = inspect(tmp_path / "right", "dfew/fold1", "test").first.counts
    publish(
        monkeypatch,
        "dfew",
        splits={f"fold{k}/{s}": n for k in range(1, 6) for s, n in (("train", 12), ("test", 3))},
        support={"fold1/test": right},
    )
    assert not inspect(tmp_path / "right", "dfew").first.differs
    for split in ("train", "test"):
        home = root / "EmoLabel_DataSplit" / f"{split}(single-labeled)"
        shutil.copy(home / "set_2.csv", home / "set_1.csv")
    prepare("dfew", root, tmp_path / "wrong")
    found = inspect(tmp_path / "wrong", "dfew")
    wrong = [s.name for s in found.splits if s.differs]
    assert wrong == ["dfew/fold1"]  # by the classes of its test split alone
    assert any(
        fault == "wrong fold: dfew/fold1 and dfew/fold2 share 3 test clips, but folds must "
        "share none: 12, 2, 7"
        for fault in found.faults
    )


def test_what_is_listed_twice_or_in_both_splits_is_found(tmp_path):
    root = official_trees.dfew(tmp_path / "src", folds=1)
    home = root / "EmoLabel_DataSplit"
    for split, line in (("train", "2,2"), ("test", "3,3")):
        path = home / f"{split}(single-labeled)" / "set_1.csv"
        official_trees.write_lines(path, [*path.read_text().splitlines(), line])
    prepare("dfew", root, tmp_path)
    assert inspect(tmp_path, "dfew").faults == (
        "dfew/fold1, train: 1 duplicated, listed twice: 2",
        "dfew/fold1: 1 in both splits, train and test: 3",
    )


def test_the_same_content_under_two_names_is_found(tmp_path):
    root = official_trees.raf_db(tmp_path / "src")
    aligned = root / "Image" / "aligned"
    shutil.copy(aligned / "train_00001_aligned.jpg", aligned / "train_00009_aligned.jpg")
    shutil.copy(aligned / "train_00003_aligned.jpg", aligned / "test_00002_aligned.jpg")
    prepare("raf_db", root, tmp_path)
    faults = inspect(tmp_path, "raf_db").faults
    assert len(faults) == 2
    assert faults[0].endswith("the same content under two names: train_00001 = train_00009")
    assert faults[1].endswith("same content in train and test: train_00003 = test_00002")


def test_the_command_prints_counts_faults_and_what_was_dropped(tmp_path, capsys):
    prepare("affectnet8", official_trees.affectnet_lists(tmp_path / "src"), tmp_path)
    args = ["--dir", str(tmp_path), "--sheet", str(tmp_path / "sheet.png")]
    cli.main(["data", "inspect", "affectnet7", *args])
    out = capsys.readouterr().out
    assert "dropped 2: expression 10 (no face)" in out
    assert "counts differ from the published ones: affectnet7, train; affectnet7, test" in out
    assert "contempt" not in out and "283901" in out
    cli.main(["data", "inspect", "affectnet8", "--split", "test", *args])
    out = capsys.readouterr().out
    assert "contempt" in out and "train" not in out.replace("contempt", "")
    with pytest.raises(SystemExit):
        cli.main(["data", "inspect", "affectnet8", "--split", "dev", *args])
    assert "no split 'dev'; choose one of train, test" in capsys.readouterr().err


def test_the_sheet_shows_every_part_of_a_split(tmp_path):
    """Sets are listed by class: the first examples alone would be of one class."""
    official_trees.write(tmp_path / "src" / "sad" / "0.jpg", b"no picture")
    for i in range(1, 4):
        data = official_trees.encode_picture(np.full((32, 32, 3), 40 * i, np.uint8))
        official_trees.write(tmp_path / "src" / "sad" / f"{i}.jpg", data)
    prepare("own/grey", tmp_path / "src", tmp_path)
    sheet = np.asarray(contact_sheet(Split(tmp_path, "own/grey", "train"), most=2))
    assert (sheet[60, 60] == 255).all()  # the broken one is blank, and stops nothing
    assert abs(int(sheet[60, 180, 0]) - 120) < 4  # then the last
    with pytest.raises(UserError, match="own/none is not prepared"):
        inspect(tmp_path, "own/none")
