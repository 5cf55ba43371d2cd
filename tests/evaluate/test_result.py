"""A `Result`: what is traced is what is written, and folds are joined on every host."""

import json

import pytest

from emollama_jax.data.emotions import LABEL_SPACES
from emollama_jax.errors import UserError
from emollama_jax.evaluate import folds
from emollama_jax.evaluate.groups import Seen
from emollama_jax.evaluate.protocol import Prediction, read_predictions
from emollama_jax.evaluate.publish import publish
from emollama_jax.evaluate.result import Answers, Result, Settings
from emollama_jax.evaluate.trace import file_hash, predictions_hash

DFEW = LABEL_SPACES["dfew"]


def result(fold: int, *, seen: bool = True) -> Result:
    """One fold of seven clips; as many are right as its number says."""
    items = [
        Prediction(
            id=f"{fold}-{n}",
            source=f"dfew/fold{fold}:test",
            label=name,
            predicted=name if n < fold else None,
            text="…",
            scores=None,
            parsed="exact" if n < fold else "none",
        )
        for n, name in enumerate(DFEW.classes)
    ]
    faces = {item.id: ("20-29", "Female", "unknown") for item in items}
    known = Seen(faces) if seen else Seen({}, why="no face priors")
    return Result(
        title=f"dfew/fold{fold}, test",
        lede="",
        source=f"dfew/fold{fold}",
        answers=[Answers.of("written answers", items, DFEW, seen=known)],
        predictions={"predictions.jsonl": items},
        settings=Settings("emollama eval", "", {"emollama-jax": "1"}),
        trace={"predictions.jsonl": predictions_hash(items)},
    )


def test_the_traced_hash_is_that_of_the_written_file(tmp_path):
    made = result(2)
    publish(made, tmp_path)
    file = tmp_path / "predictions.jsonl"
    assert file_hash(file) == made.trace["predictions.jsonl"]
    assert read_predictions(file) == made.headline.predictions
    names = {"predictions.jsonl", "evaluation.json", "table.tex", "report.html"}
    assert {path.name for path in tmp_path.iterdir()} == names
    tree = json.loads((tmp_path / "evaluation.json").read_text())
    assert tree["war"] == made.summary()["WAR"] == 2 / 7
    assert tree["groups"] == made.summary()["groups"] is not None


def test_folds_are_joined_with_their_groups(tmp_path):
    """The hashes of predictions are enough, since no host but the first has others."""
    each = [result(fold) for fold in range(1, 6)]
    whole = folds.join(each, "dfew", what="DFEW, test", command="emollama eval --fold all")
    assert whole.title == "DFEW, test, 5 folds"
    assert list(whole.trace) == [f"fold{n}/predictions.jsonl" for n in range(1, 6)]
    told = whole.summary()
    assert told["WAR"] == pytest.approx(3 / 7) and told["n"] == 35
    assert told["groups"]["gender"]["Female"]["n"] == 35
    assert "5 folds: out/report.html" in whole.lines("out")
    publish(whole, tmp_path)
    tree = json.loads((tmp_path / "evaluation.json").read_text())
    assert tree["folds"]["fold 2"]["groups"] == each[1].summary()["groups"]
    assert not (tmp_path / "predictions.jsonl").exists()  # each fold has written its own
    with pytest.raises(UserError, match="missing fold 5"):
        folds.join(each[:4], "dfew", what="", command="")


def test_one_fold_without_priors_leaves_no_groups():
    each = [result(fold, seen=fold != 3) for fold in range(1, 6)]
    told = folds.join(each, "dfew", what="", command="").summary()
    assert "groups" not in told and told["n"] == 35


def test_what_is_printed_first():
    assert result(1).lines("out").startswith("6 of 7 answers are unparsed and count as wrong: 6 ")
    assert result(7).lines("out") == "WAR 1.0000  UAR 1.0000  n 7: out/report.html"
