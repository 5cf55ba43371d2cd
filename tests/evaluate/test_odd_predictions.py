"""Predictions that nobody expects: JSON without end, ids of any kind, halves of emoji."""

import json

import pytest

from emollama_jax import cli
from emollama_jax.errors import UserError
from emollama_jax.evaluate import foreign
from emollama_jax.evaluate.options import PredictionFiles
from emollama_jax.evaluate.protocol import Prediction, write_predictions

COLUMNS = {"truth_column": "gt", "prediction_column": "answer", "id_column": "id"}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "answers.jsonl"


def read(path, text):
    path.write_text(text)
    return foreign.read_foreign(path, PredictionFiles(**COLUMNS))[0]


def as_line(**row):
    return json.dumps({"id": "a", "gt": "anger", "answer": "anger"} | row) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"gt": ' + "[" * 100_000, "line 1: no JSON object (nested too"),
        (
            as_line() + '{"gt": "fear", "answer": ' + "9" * 5000 + "}",
            "line 2: no JSON object (a num",
        ),
        (
            as_line() + '{"gt": "fear", "answer": "fear"}',
            "line 2: id is null, wanted the item's id",
        ),
        (as_line(id={"a": 1}), 'line 1: id is {"a": 1}, wanted the item\'s id'),
        (as_line(id=""), 'line 1: id is "", wanted the item\'s id'),
    ],
)
def test_json_that_nobody_expects_is_one_line(file, text, message):
    with pytest.raises(UserError) as caught:
        read(file, text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_lone_surrogates_do_not_keep_a_file_from_being_scored(file, tmp_path, capsys):
    """Half an emoji, as of a log that was cut at a number of characters."""
    file.write_text(as_line(id="x\ud83d", answer="anger \ud83d") + as_line(gt="fear"))
    options = ["--truth-column", "gt", "--prediction-column", "answer", "--id-column", "id"]
    cli.main(["eval", "--predictions", str(file), *options, "--out", str(tmp_path / "out")])
    assert "WAR 50.00" in capsys.readouterr().out
    lines = (tmp_path / "out" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["x\ufffd", "a"]


def test_scores_that_no_float_holds_are_no_scores(file):
    found = read(file, as_line(answer={"anger": 10**290, "fear": 1}) + as_line(gt="fear"))
    assert found[0].predicted == "anger"
    found = read(file, as_line(answer="{'anger': " + "9" * 400 + ", 'fear': 1}"))
    assert found[0].predicted is None


def test_our_own_scores_are_of_the_same_classes(tmp_path):
    rows = [
        Prediction(
            id=str(n),
            source="raf_db:test",
            label="anger",
            predicted="anger",
            text=None,
            scores=scores,
            parsed="score",
        )
        for n, scores in enumerate([{"anger": -1.0, "fear": -2.0}, {"anger": -1.0}])
    ]
    write_predictions(tmp_path / "own.jsonl", rows)
    with pytest.raises(UserError, match=r"line 2: scores of anger, wanted the classes of line 1"):
        foreign.read_foreign(tmp_path / "own.jsonl", PredictionFiles())
