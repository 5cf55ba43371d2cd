"""Names of data sets, their families, and a set that an installed package adds."""

import sys

import numpy as np
import pytest

from emollama_jax import cli
from emollama_jax.data import sets
from emollama_jax.data.emotions import LABEL_SPACES
from emollama_jax.data.split import Split
from emollama_jax.errors import UserError
from tests.helpers import official_trees
from tests.helpers.prepared_sets import prepare

TOY = '''
"""A folder of pictures with a list "file label"."""

from emollama_jax.data.builders import listing
from emollama_jax.data.builders.official import OfficialSet
from emollama_jax.data.emotions import LabelSpace

SPACE = LabelSpace(
    title="Toy",
    classes=("glad", "sad"),
    written=("glad", "sad"),
    splits={"train": 3},
    support={},
)


def list_tree(source, fold):
    rows = []
    for number, line in listing.read_lines(source / "list.txt"):
        name, label = line.split()
        rows.append(listing.Entry(name, SPACE.index(label)))
    find = {"*": lambda name: source / name}
    return listing.list_splits("toy", SPACE, "image", {"train": rows}, find)


FAMILY = OfficialSet("toy", SPACE, list_tree)
'''


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """What pip leaves of a package that adds a set; gives the function that writes another one."""

    def install(family, place):
        home = tmp_path / "site" / f"{family}-1.0.dist-info"
        home.mkdir(parents=True)
        (home / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {family}\nVersion: 1.0\n")
        (home / "entry_points.txt").write_text(f"[{sets.GROUP}]\n{family} = {place}\n")

    install("toy", "toy_set:FAMILY")
    (tmp_path / "site" / "toy_set.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield install
    sys.modules.pop("toy_set", None)


def test_an_installed_package_adds_a_set(installed, tmp_path, capsys):
    assert sets.label_space("toy").classes == ("glad", "sad")
    source = tmp_path / "src"
    official_trees.write_lines(source / "list.txt", ["a.jpg glad", "b.jpg sad", "c.jpg glad"])
    for number, name in enumerate("abc"):
        picture = official_trees.encode_picture(np.full((32, 32, 3), 60 * number, np.uint8))
        official_trees.write(source / f"{name}.jpg", picture)
    folder, told = prepare("toy", source, tmp_path / "data")
    assert folder == tmp_path / "data" / "toy" / "1.0.0" and told == []
    split = Split(tmp_path / "data", "toy", "train")
    assert split.index.ids == ["a.jpg", "b.jpg", "c.jpg"] and split.index.labels == [0, 1, 0]
    assert split.kind == "image" and split.examples[1]["media"] == (source / "b.jpg").read_bytes()
    sheet = tmp_path / "sheet.png"
    cli.main(["data", "inspect", "toy", "--dir", str(tmp_path / "data"), "--sheet", str(sheet)])
    assert "all counts are the published ones" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"tot: no such data set.*, own/NAME, toy$"):
        sets.family_of("tot")


def test_an_entry_point_that_cannot_be_loaded_is_named(installed):
    installed("broken", "no_such_module:FAMILY")
    with pytest.raises(UserError, match="data set broken: the entry point no_such_module:FAMILY"):
        sets.family_of("broken")


def test_no_package_takes_one_of_our_names(installed):
    installed("raf_db", "toy_set:FAMILY")
    assert sets.label_space("raf_db") is LABEL_SPACES["raf_db"]


@pytest.mark.parametrize("name", LABEL_SPACES)
def test_official_sets_and_their_folds(name):
    family = sets.family_of(name)
    assert family.names == (name,) and not family.drawn
    splits = sets.label_space(name).splits
    assert len({key.partition("/")[0] for key in splits if "/" in key}) == family.folds
    for fold in range(1, family.folds + 1):
        assert sets.family_of(f"{name}/fold{fold}") == family
        assert sets.parse(f"{name}/fold{fold}").fold == fold
    assert sets.parse(name).fold is None


def test_every_family_can_be_asked_for():
    assert {*sets.FAMILIES} == {*LABEL_SPACES, "actionfaces", "own"}
    for name in ("actionfaces/images", "actionfaces/clips", "own/NAME"):
        assert name in sets.family_of(name).names


def test_views_are_stored_once():
    homes = {"affectnet7": "affectnet", "affectnet8": "affectnet", "dfew/fold2": "dfew"}
    homes |= {name: name for name in ("own/a", "actionfaces/clips", "raf_db")}
    assert {name: sets.family_of(name).stored(name) for name in homes} == homes
