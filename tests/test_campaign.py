"""`benchmarks/campaign.py`: its short form holds, resumes, and keeps what fails in words."""

import json
import random

import pytest

from benchmarks import campaign
from benchmarks.hazards import fuzz
from benchmarks.hazards.mutations import Recipe, shrink
from benchmarks.hazards.readers import kinds
from benchmarks.hazards.verbs import difference


def test_the_short_form_holds(tmp_path):
    found = campaign.run(tmp_path, campaign.SHORT, seed=0)
    assert found["faults"] == []
    rows = found["rows"]
    assert {f"kills, {verb}" for verb in campaign.SHORT.verbs} <= rows.keys()
    assert all(row["done"] >= 1 for row in rows.values())
    assert rows["inputs"]["done"] == campaign.SHORT.inputs
    assert rows["inputs"]["read"] > 5 and rows["inputs"]["refused"] > 50
    assert "none" in (tmp_path / "report.html").read_text()
    lines = (tmp_path / "journal.jsonl").read_text().splitlines()
    again = campaign.run(tmp_path, campaign.SHORT, seed=0)  # everything is done
    assert again == found
    assert (tmp_path / "journal.jsonl").read_text().splitlines() == lines


def test_a_journal_takes_up_where_it_was_cut(tmp_path):
    path, calls = tmp_path / "journal.jsonl", []

    def work():
        calls.append(1)
        return {"fault": ""}

    campaign.Journal(path).unit("a", work)
    with path.open("a") as file:
        file.write('{"unit": "b", "fau')
    journal = campaign.Journal(path)
    journal.unit("a", work)
    journal.unit("b", work)
    assert len(calls) == 2
    journal.unit("c", lambda: 1 / 0)
    assert "ZeroDivisionError" in journal.done["c"]["fault"]
    assert [json.loads(line)["unit"] for line in path.read_text().splitlines()] == ["a", "b", "c"]


def test_faults_are_counted_and_shown():
    lines = [
        {"unit": "kills-train-0", "kills": 4, "fault": "", "took": 9.0},
        {"unit": "kills-train-1", "kills": 4, "fault": "metrics.jsonl differs", "took": 8.0},
        {"unit": "small-disk-eval-0.3", "fault": "", "took": 3.0},
        {"unit": "inputs-0", "counts": {"read": 3, "fault": 1}, "faults": ["<b>"], "took": 1.0}
        | {"seconds": 0.5, "bytes": 10**8},
    ]
    found = campaign.summary(lines)
    assert found["rows"]["kills, train"]["done"] == 8
    assert found["rows"]["kills, train"]["failed"] == 1
    assert found["rows"]["small disk, eval"]["done"] == 1
    assert found["rows"]["inputs"]["done"] == 4 and found["rows"]["inputs"]["seconds"] == 0.5
    assert found["faults"] == ["kills-train-1: metrics.jsonl differs", "inputs-0: <b>"]
    assert "&lt;b&gt;" in campaign.page(found) and "<b>" not in campaign.page(found)


def test_words_make_the_same_bytes_again():
    every = kinds()
    for number in range(60):
        recipe = fuzz.recipe_of(5, number)
        kind = every[recipe.kind]
        rng = random.Random(f"5 {number}")
        assert kind.draw(rng, recipe.kind) == recipe
        assert kind.make(recipe) == kind.make(recipe)


def test_failing_inputs_are_shrunk():
    recipe = Recipe("table", "csv", (("flip", (0.1, 1)), ("drop", (0.5, 4)), ("cut", (0.9,))))
    small = shrink(recipe, lambda one: ("drop", (0.5, 4)) in one.changes)
    assert small.changes == (("drop", (0.5, 4)),)
    assert small.words() == 'table, csv: [["drop", [0.5, 4]]]'


@pytest.mark.parametrize(
    ("error", "found"),
    [(None, "read"), (FileNotFoundError(2, "", "x"), "refused"), (KeyError(1), "KeyError: 1")],
)
def test_outcomes(tmp_path, monkeypatch, error, found):
    def read(data, folder):
        if error is not None:
            raise error

    kind = kinds()["table"]
    monkeypatch.setattr(fuzz, "kinds", lambda: {"table": _with(kind, read)})
    assert fuzz.outcome(Recipe("table", "csv", ()), tmp_path / "x") == found
    assert not (tmp_path / "x").exists()


def _with(kind, read):
    return type(kind)(kind.bases, kind.dump, read)


def test_results_are_compared_byte_for_byte():
    assert difference({"a": b"1"}, {"a": b"1"}) == ""
    assert difference({"a": b"1\n"}, {"a": b"1\n2\n"}) == "a differs (1 lines, wanted 2)"
    assert "not in both" in difference({}, {"a": b"1"})
    assert difference({}, {}) == "the reference is empty"
