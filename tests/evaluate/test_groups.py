"""Errors by group, and the second number without what is also in another split."""

import json
import shutil

import numpy as np
import pytest

from emollama_jax import cli
from emollama_jax.data.sets import label_space
from emollama_jax.data.split import Split
from emollama_jax.errors import UserError
from emollama_jax.evaluate import beside, groups, metrics
from emollama_jax.evaluate.copies import Copies, leave_out
from emollama_jax.evaluate.protocol import Prediction, evaluate
from emollama_jax.evaluate.result import Answers
from tests.helpers import official_trees
from tests.helpers.prepared_sets import prepare

SPACE = label_space("raf_db")
CLASSES = SPACE.classes


def prediction(n, label, predicted):
    return Prediction(
        id=f"item{n}",
        source="raf_db:test",
        label=label,
        predicted=predicted,
        text=None,
        scores=None,
        parsed="exact",
    )


@pytest.fixture
def answers():
    """Each class four times; the first two of each are answered rightly, the last names nothing."""
    return [
        prediction(4 * c + k, name, name if k < 2 else CLASSES[0] if k == 2 and c else None)
        for c, name in enumerate(CLASSES)
        for k in range(4)
    ]


def seen(answers, age=lambda n: "20-29", gender=lambda n: "Male", race=lambda n: "unknown"):
    of = {one.id: (age(n), gender(n), race(n)) for n, one in enumerate(answers)}
    return groups.Seen(of)


def test_groups_are_counted_apart_with_their_intervals(answers):
    gender = {0: "Female", 1: "Female", 2: "Male", 3: "unknown"}
    found = groups.by_group(answers, seen(answers, gender=lambda n: gender[n % 4]), SPACE)
    by = {group.name: group for group in found.groups if group.attribute == "gender"}
    assert list(by) == ["Male", "Female", "unknown"]  # the order of the network's classes
    assert [by[name].n for name in by] == [7, 14, 7] and found.classes == 7
    assert (by["Female"].war, by["Female"].uar) == (1.0, 1.0)
    assert (by["Male"].war, by["unknown"].war) == (0.0, 0.0)
    for group in by.values():
        right = round(group.war * group.n)
        assert group.war_interval == metrics.wilson(right, group.n, level=0.95)
        assert group.war_interval.low < group.war_interval.high
        assert group.uar_interval.low <= group.uar <= group.uar_interval.high


def test_small_groups_are_shown_without_a_uar(answers):
    found = groups.by_group(answers, seen(answers, age=lambda n: "0-9" if n < 3 else "70 and over"),
                            SPACE)  # fmt: skip
    young, old, unknown = (group for group in found.groups if group.attribute == "age")
    assert (young.name, young.n, young.classes) == ("0-9", 3, 1)
    assert np.isnan(young.uar) and np.isnan(young.uar_interval.low) and young.war == 2 / 3
    assert young.war_interval == metrics.wilson(2, 3, level=0.95)
    assert (old.n, old.classes) == (25, 7) and not np.isnan(old.uar)
    assert (unknown.name, unknown.n) == ("unknown", 0) and np.isnan(unknown.war)
    plain = found.to_dict()
    assert plain["age"]["0-9"]["UAR"] is None and plain["age"]["unknown"]["WAR"] is None
    json.dumps(plain, allow_nan=False)
    cells = dict((row[0], row[1:]) for row in found.table("x").rows)
    assert cells["age: 0-9"][:3] == ("3", "1 of 7", "66.7") and cells["age: 0-9"][4:] == ("–", "–")
    assert cells["age: unknown"][0] == "0" and cells["age: unknown"][2] == "–"


def test_race_is_there_only_where_the_network_is_sure_of_some(answers):
    assert {group.attribute for group in groups.by_group(answers, seen(answers), SPACE).groups} == {
        "age",
        "gender",
    }
    assert "sure of anyone's race" in groups.by_group(answers, seen(answers), SPACE).table("").note
    some = groups.by_group(
        answers, seen(answers, race=lambda n: "unknown" if n else "Asian"), SPACE
    )
    races = [(g.name, g.n) for g in some.groups if g.attribute == "race"]
    assert races == [("Asian", 1), ("unknown", 27)]
    assert "sure of anyone's race" not in some.table("").note


def test_without_priors_one_line_says_why(answers):
    found = Answers.of("x", answers, SPACE, seen=groups.Seen({}, why="no face priors"))
    assert found.groups.to_dict() is None and "groups" not in found.summary()
    assert found.groups.table("x").rows == [("no face priors",)]


def test_folds_are_joined_and_one_without_priors_leaves_none(answers):
    first, second = seen(answers[:14]), seen(answers[14:])
    assert groups.joined([first, second]).groups.keys() == {one.id for one in answers}
    assert groups.joined([first, groups.Seen({}, why="none here")]).why == "none here"


# ------------------------------------------------------------------ without


def test_the_second_number_is_that_of_the_items_left(answers):
    wrong = [one.id for one in answers if one.predicted is None]
    copies = Copies("train", wrong)
    found = leave_out(answers, copies, SPACE)
    assert found.left_out == len(wrong) == 8
    kept = [one for one in answers if one.predicted is not None]
    assert found.evaluation.war == evaluate(kept, SPACE).war == 14 / 20
    told = Answers.of("x", answers, SPACE, seen=seen(answers), copies=copies).summary()
    assert told["WAR"] == 0.5 and told["without"]["WAR"] == 0.7 and told["without"]["n"] == 20
    assert told["without"]["left_out"] == 8 and len(told["without"]["recall"]) == 7
    rows = {row[0]: row[1:] for row in found.table("x", evaluate(answers, SPACE)).rows}
    assert rows["items"] == ("28", "", "20", "") and rows["WAR"][::2] == ("50.0", "70.0")
    assert rows["recall of surprise"][0] == "50.0" and rows["recall of surprise"][2] == "100.0"
    assert rows["recall of surprise"][1].startswith("15.0 – ")
    with pytest.raises(UserError, match="nothing is left"):
        leave_out(answers, Copies("train", [one.id for one in answers]), SPACE)


# ------------------------------------------------------------------ beside a prepared set


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """FERPlus in small, of which two test pictures, one of them listed twice, are in train too; and
    face priors of its test split."""
    folder = tmp_path_factory.mktemp("ferplus")
    root = official_trees.ferplus(folder / "src", train=8, valid=8, test=8)
    train = sorted((root / "FER2013Train").glob("*.png"))
    test = sorted((root / "FER2013Test").glob("*.png"))
    for here, there in ((0, 3), (1, 3), (2, 5)):
        shutil.copy(train[there], test[here])
    prepare("ferplus", root, folder)
    home = Split(folder, "ferplus", "test").priors_folder
    home.mkdir(parents=True)
    arrays = {
        "boxes": np.zeros((8, 4), np.float32),
        "found": np.arange(8) > 0,
        "landmarks": np.zeros((8, 68, 2), np.float32),
        "agr": np.stack([np.arange(8), np.arange(8) % 2, np.zeros(8)], 1).astype(np.int32),
        "agr_probability": np.full((8, 3), 0.9, np.float32),
        "offsets": np.arange(9),
    }
    arrays["agr_probability"][0] = 0  # no face
    arrays["agr_probability"][1, 1] = 0.49
    arrays["agr_probability"][:, 2] = 0.3
    for name, array in arrays.items():
        np.save(home / f"{name}.npy", array)
    (home / "done.json").write_text("{}")
    return folder


def names_of(data):
    return [path.name for path in sorted((data / "src" / "FER2013Test").glob("*.png"))]


@pytest.fixture
def answered(data, tmp_path):
    """A file of answers: the first four right."""
    words = label_space("ferplus").classes
    lines = ["file,truth,said"]
    for n, name in enumerate(names_of(data)):
        lines.append(f"pictures/{name},{words[n]},{words[n] if n < 4 else words[0]}")
    path = tmp_path / "answers.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


COLUMNS = ("--truth-column", "truth", "--prediction-column", "said")


def score(file, *more, capsys):
    cli.main(["eval", "--predictions", str(file), *COLUMNS, "--source", "ferplus", *map(str, more)])
    return capsys.readouterr()


def test_every_copy_is_left_out_though_inspect_counts_contents(data):
    names = [name.removesuffix(".png") for name in names_of(data)]
    assert Split(data, "ferplus", "test").also_in("train") == names[:3]
    assert Split(data, "ferplus", "test").also_in("validation") == []
    with pytest.raises(UserError, match="--without test: this is the tested split itself"):
        Split(data, "ferplus", "test").also_in("test")
    with pytest.raises(UserError, match="no split 'dev'"):
        Split(data, "ferplus", "test").also_in("dev")


def test_answers_in_a_file_are_counted_by_the_sets_priors(data, answered, tmp_path, capsys):
    more = ("--dir", data, "--id-column", "file", "--without", "train", "--out", tmp_path / "out")
    said = score(answered, *more, "--json", capsys=capsys)
    tree = json.loads(said.out)
    assert said.err == "" and (tree["n"], tree["WAR"]) == (8, 0.5)
    assert tree["without"]["left_out"] == 3 and tree["without"]["n"] == 5
    assert tree["without"]["WAR"] == 1 / 5  # right: 0 … 3, and 0, 1, 2 are left out
    gender = tree["groups"]["gender"]
    assert {name: group["n"] for name, group in gender.items()} == {
        "Male": 3, "Female": 3, "unknown": 2,
    }  # fmt: skip
    assert (gender["Male"]["WAR"], gender["unknown"]["WAR"]) == (1 / 3, 1.0)
    assert list(tree["groups"]) == ["age", "gender"]
    assert len(tree["groups"]["age"]) == 8 and tree["groups"]["age"]["unknown"]["n"] == 1
    kept = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert kept["groups"] == tree["groups"] and kept["without"] == tree["without"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Errors by group" in page and "gender: Female" in page
    assert "Without items that are also in train" in page and "recall of contempt" in page
    # What was written is scored again, beside the same set.
    cli.main(["eval", "--predictions", str(tmp_path / "out" / "predictions.jsonl"),
              "--dir", str(data), "--without", "train", "--json"])  # fmt: skip
    assert json.loads(capsys.readouterr().out) == tree


def test_the_terminal_shows_both_numbers_and_the_groups(data, answered, capsys):
    more = ("--dir", data, "--id-column", "file", "--without", "train")
    lines = score(answered, *more, capsys=capsys).out.splitlines()
    assert "without the 3 that are also in train: WAR 20.00  UAR 20.00  n 5" in lines
    assert any(line.split()[:3] == ["gender,", "Female", "3"] for line in lines)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ((), "items have only line numbers: name their column with --id-column"),
        (("--id-column", "truth"), "8 of 8 items are not in ferplus, test"),
        (("--id-column", "file", "--split", "validation"), "8 of 8 items are not in ferplus, vali"),
        (("--id-column", "file", "--split", "dev"), "ferplus: there is no split 'dev'"),
    ],
)
def test_where_the_set_does_not_tell_one_line_says_why(data, answered, capsys, more, why):
    said = score(answered, "--dir", data, *more, capsys=capsys)
    assert f"no errors by group: {why}" in said.out.splitlines()[-1]
    said = score(answered, "--dir", data, *more, "--json", capsys=capsys)
    assert "groups" not in json.loads(said.out)
    assert said.err.startswith(f"no errors by group: {why}") and said.err.count("\n") == 1
    with pytest.raises(SystemExit) as stop:
        score(answered, "--dir", data, *more, "--without", "train", capsys=capsys)
    assert stop.value.code == 2 and f"--without train: {why}" in capsys.readouterr().err


def test_a_set_without_priors_says_so(data, answered, tmp_path, capsys):
    shutil.copytree(data / "ferplus", tmp_path / "bare" / "ferplus")
    more = ("--dir", tmp_path / "bare", "--id-column", "file", "--without", "train")
    said = score(answered, *more, capsys=capsys).out.splitlines()
    assert "no face priors; run `emollama data prepare`" in said[-1]
    assert any(line.startswith("without the 3") for line in said)


def test_names_match_by_themselves_or_without_folder_and_ending():
    theirs = ["a", "b.c", "test/d"]
    assert beside.match(["a.png", "x\\b.c", "d", "b.c"], theirs, where="set") == {
        "a.png": "a", "x\\b.c": "b.c", "d": "test/d", "b.c": "b.c",
    }  # fmt: skip
    with pytest.raises(
        UserError, match=r"1 of 2 items are not in set, e.g. 'e' \(its first is 'a'"
    ):
        beside.match(["a", "e"], theirs, where="set")
    with pytest.raises(UserError, match="1 of 1 items"):
        beside.match(["n.png"], ["1/n", "2/n"], where="set")
