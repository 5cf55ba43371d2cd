"""`emollama eval --predictions`: anyone's files, scored by name, and the traps refused."""

import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from emollama_jax import cli
from emollama_jax.data.emotions import LABEL_SPACES
from emollama_jax.data.sets import label_space
from emollama_jax.errors import UserError
from emollama_jax.evaluate import foreign
from emollama_jax.evaluate.of_file import evaluate_files
from emollama_jax.evaluate.options import PredictionFiles
from emollama_jax.evaluate.parse import parse_answer
from emollama_jax.evaluate.protocol import Prediction, evaluate, write_predictions
from tests.evaluate.test_metrics import GPT4V_FERPLUS, GPT4V_RAFDB, items

RAF_DB = LABEL_SPACES["raf_db"]
COLUMNS = {"truth_column": "gt", "prediction_column": "answer"}


def read(path, text, *, encoding="utf-8", space=None, **change):
    path.write_bytes(text.encode(encoding))
    return foreign.read_foreign(path, PredictionFiles(**COLUMNS | change), space)


def score(path, text, **change):
    found, space = read(path, text, **change)
    return evaluate(found, space).summary()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "answers.csv"


def gpt4v(confusion, classes) -> str:
    """A CSV of ranked lists with a matrix's counts, as GPT-4V's answers were published."""
    lines = ["name,gt,gpt4v"]
    for n, (label, answer) in enumerate(zip(*items(confusion), strict=True)):
        first = "pain" if answer < 0 else classes[answer]
        rest = ",".join(name for name in classes if name != first)
        lines.append(f'{n}.png,{classes[label].title()},"{first.title()},{rest}"')
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("name", "confusion", "war", "uar"),
    [("raf_db", GPT4V_RAFDB, 75.81, 68.98), ("ferplus", GPT4V_FERPLUS, 64.25, 48.72)],
)
def test_the_command_gives_gpt4v_its_published_accuracy(file, capsys, name, confusion, war, uar):
    file.write_text(gpt4v(confusion, LABEL_SPACES[name].classes))
    args = ["--predictions", str(file), "--truth-column", "gt", "--prediction-column", "gpt4v"]
    cli.main(["eval", *args, "--json"])
    out, err = capsys.readouterr()
    tree = json.loads(out)
    assert list(tree) == ["WAR", "UAR", "n", "unparsed", "recall"]
    assert (round(100 * tree["WAR"], 2), round(100 * tree["UAR"], 2)) == (war, uar)
    total = int(np.sum(confusion))
    assert (tree["n"], tree["unparsed"]) == (total, 1 / total)
    assert set(tree["recall"]) == set(LABEL_SPACES[name].classes)
    assert np.mean(list(tree["recall"].values())) == pytest.approx(tree["UAR"])
    assert err == ""
    cli.main(["eval", *args, "--source", name])
    assert f"WAR {war}  UAR {uar}  n {total}" in capsys.readouterr().out


def test_it_starts_without_jax(file):
    file.write_text("gt,answer\nfear,fear\nanger,fear\n")
    args = ["eval", "--predictions", str(file), "--truth-column", "gt"]
    args += ["--prediction-column", "answer", "--json"]
    code = f"import sys; from emollama_jax import cli; cli.main({args!r})\n"
    code += "print(sorted({'jax', 'flax', 'tensorflow_datasets', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    tree, loaded = done.stdout.splitlines()
    assert json.loads(tree)["recall"] == {"fear": 1.0, "anger": 0.0}
    assert loaded == "[]"


# ---- answers


@pytest.mark.parametrize(
    ("answer", "label", "how"),
    [
        ("Sadness,Neutral,Fear", "sadness", "exact"),
        ("happy, sad", "happiness", "synonym"),
        ("Concentration,Neutral,Surprise", None, "none"),  # the first label is no class
        ("contempt, neutral", None, "none"),
        ("['joy', 'surprise']", "happiness", "synonym"),
        ("1. fear, 2. anger", "fear", "exact"),
        ("fear (0.7), anger (0.3)", "fear", "score"),
        ("anger (0.3), fear (0.7)", "fear", "score"),
        ("mild fear, slight surprise", "fear", "word"),
        ("happiness,", "happiness", "exact"),
        ("fear or surprise", None, "ambiguous"),
        ("happy/sad", None, "ambiguous"),
        ("happy, sad, and angry", None, "ambiguous"),
        ("The person, with raised brows, looks surprised.", "surprise", "synonym"),
        ("not happy, sad", "sadness", "synonym"),
        ("Sad, not angry", "sadness", "synonym"),
        ("Neither happy, nor sad, but angry", "anger", "synonym"),
        (" , ", None, "none"),
        ("", None, "none"),
    ],
)
def test_ranked_lists_and_free_text(answer, label, how):
    found = parse_answer(answer, RAF_DB, form="ranked")
    assert (found.label, found.how) == (label, how)


def test_casing_synonyms_and_odd_cells(file):
    rows = [
        (" Happy ", "JOY"),
        ("happiness", "She is smiling and looks happy."),
        ("happy", "sadness"),
        ("ANGRY", "anger"),
        ("anger", "angry or disgust"),
        ("fear", ""),
        ("surprise", "surprised, clearly"),
    ]
    text = "gt;answer\n" + "".join(f"{a};{b}\n" for a, b in rows)
    tree = score(file, text)
    # Classes bear the truths' own words, the commoner spelling of each.
    assert tree["recall"] == {
        "angry": 0.5,
        "fear": 0.0,
        "happy": pytest.approx(2 / 3),
        "surprise": 1.0,
    }
    assert tree["WAR"] == 4 / 7
    assert tree["UAR"] == pytest.approx((0.5 + 0 + 2 / 3 + 1) / 4)
    assert tree["unparsed"] == 2 / 7


def test_uar_is_over_the_classes_that_occur(file):
    text = "gt,answer\nfear,fear\nfear,disgust\nanger,anger\nanger,surprise or anger\n"
    tree = score(file, text)
    assert tree == {
        "WAR": 0.5,
        "UAR": 0.5,
        "n": 4,
        "unparsed": 0.25,  # "disgust" is a class, though no truth; two candidates are none
        "recall": {"anger": 0.5, "fear": 0.5},
    }


@pytest.mark.parametrize(
    ("truth", "size"), [("fear", 7), ("contempt", 8), ("worried", 11), ("Disappointment", 11)]
)
def test_the_classes_are_the_smallest_usual_set(file, truth, size):
    _, space = read(file, f"gt,answer\n{truth},fear\n")
    assert len(space.classes) == size
    assert truth.casefold() in space.classes


def lmms(responses) -> str:
    """A log of lmms-eval: (target, resps, filtered_resps)."""
    rows = [
        {"doc_id": n, "target": target, "resps": resps, "filtered_resps": filtered}
        for n, (target, resps, filtered) in enumerate(responses)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("column", ["resps", "filtered_resps"])
def test_logs_of_lmms_eval(file, column):
    long = "The person looks sad. <b>Not</b> angry."
    text = lmms(
        [
            ("happiness", [["happiness"]], ["happiness"]),
            ("sadness", [[long]], [long]),
            ("sadness", [long], long),  # since version 0.6 the outer list is left out
            ("fear", [["fear", "It is fear."]], ["fear", "It is fear."]),  # two that agree
            ("fear", [["fear", "anger"]], ["fear", "anger"]),  # two that do not
            ("fear", [[["-1.5", "False"]], [["-0.2", "True"]]], [[-1.5, False], [-0.2, True]]),
        ]
    )
    found, _ = read(file, text, truth_column="target", prediction_column=column)
    labels = [item.predicted for item in found]
    assert labels == ["happiness", "sadness", "sadness", "fear", None, None]
    assert found[1].text == long
    ranked, _ = read(file, '{"gt": "fear", "answer": ["fear", "anger"]}\n')
    assert ranked[0].predicted == "fear"  # under any other name a list is ranked


def test_scores_in_cells_of_either_kind(file):
    scores = {"angry": 0.2, "happy": 97.1, "sad": 2.7}
    pairs = [{"label": name, "score": value} for name, value in scores.items()]
    for cell in (scores, pairs, str(scores), str(pairs), json.dumps(scores), list(scores.items())):
        found, _ = read(file, json.dumps({"gt": "happy", "answer": cell}) + "\n")
        assert (found[0].predicted, found[0].parsed) == ("happy", "score"), cell
    found, _ = read(file, f'gt,answer\nhappy,"{scores}"\nhappy,"{pairs[::-1]}"\n')
    assert [item.predicted for item in found] == ["happy", "happy"]
    found, _ = read(file, '{"gt": "happy", "answer": {"happy": NaN, "sad": 1}}\n')
    assert found[0].predicted is None


@pytest.mark.parametrize(
    ("truths", "pair"),
    [
        (("calm", "neutral", "happy"), "'calm' .line 2. and 'neutral' .line 3."),
        (("joy", "anger", "happiness"), "'joy' .line 2. and 'happiness' .line 4."),
        (("happiness", "amusement"), "'happiness' .line 2. and 'amusement' .line 3."),
        (("anger", "annoyance"), "'anger' .line 2. and 'annoyance' .line 3."),
    ],
)
def test_two_truths_are_not_merged_without_a_word(file, truths, pair):
    text = "gt,answer\n" + "".join(f"{truth},neutral\n" for truth in truths)
    with pytest.raises(UserError, match=f"{pair}: one class or two.*--classes {truths[0]},"):
        read(file, text)
    _, space = read(file, text, space=foreign.named_classes(",".join(truths)))
    assert space.classes == truths
    _, merged = read(file, text, space=RAF_DB)
    assert merged is RAF_DB


def test_two_truths_are_two_classes_with_their_names(file):
    text = "gt,answer\ncalm,neutral\nneutral,neutral\ncalm,neutral\nhappy,joyful\nfearful,fear\n"
    space = foreign.named_classes("calm,neutral,happy,fearful")
    assert score(file, text, space=space)["WAR"] == 0.6
    text = "gt,answer\nhappy,joy\nHappiness,happily\nfear,fear\nanxious,worried\n"
    assert score(file, text)["WAR"] == 1  # forms of a word are one; fear and anxiety are two


# ---- files


def test_one_table_in_every_dress(file):
    rows = [("fear", "It is fear, I think"), ("anger", 'he said "joy"\nand left'), ("joy", "")]
    quoted = [f'"{a}","{b.replace(chr(34), chr(34) * 2)}"' for a, b in rows]
    objects = [{"gt": a, "answer": b or None, "more": [1]} for a, b in rows]
    want, _ = read(file, "gt,answer\n" + "\n".join(quoted))
    assert [item.predicted for item in want] == ["fear", "joy", None]
    assert [item.id for item in want] == ["line 2", "line 3", "line 5"]
    dresses = {
        "bom": "\ufeffgt,answer\r\n" + "\r\n".join(quoted) + "\r\n\r\n",
        "tab": "answer\tname\tgt\n"
        + "\n".join(f"{b}\t\t{a}" for b, a in (q.split(",", 1)[::-1] for q in quoted)),
        "lines": "\n".join(map(json.dumps, objects)) + "\n",
        "list": json.dumps(objects, indent=2),
    }
    for text in dresses.values():
        found, _ = read(file, text)
        key = [(item.label, item.predicted, item.parsed) for item in found]
        assert key == [(item.label, item.predicted, item.parsed) for item in want]


def test_json_answers_may_be_lists(file):
    found, _ = read(file, '{"gt": "fear", "answer": ["fear", "anger"]}\n')
    assert found[0].predicted == "fear"
    found, _ = read(file, '{"gt": "fear", "answer": {"a": 1}}\n')
    assert (found[0].predicted, found[0].parsed) == (None, "none")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gt,answer\n", "no predictions"),
        ("", "no predictions"),
        ("truth,answer\nfear,fear\n", r"no column 'gt' \(found: truth, answer"),
        ("GT,answer\nfear,fear\n", r"did you mean GT\?"),
        ("gt,answer\nfear,fear\n3,fear\n", "line 3: truth 3 is a numeric id, and several number"),
        ("gt,answer\nfear,fear\n2.0,fear\n", "line 3: truth 2.0 is a numeric id"),
        ('{"gt": 3, "answer": "fear"}', "line 1: truth 3 is a numeric id"),
        ("gt,answer\nfear,3\nanger,1\n", "line 2: answer 3 is a numeric id"),
        ('gt,answer\nfear,"4,1,2"\n', "line 2: answer 4,1,2 is a numeric id"),
        (
            "gt,answer\nfear,fear\nconfused,fear\n",
            "line 3: truth 'confused' is not an emotion class",
        ),
        ("gt,answer\nfear,fear\n\n,fear\n", "line 4: no truth"),
        ("gt,answer\nfear,I think, fear\n", "line 2: 3 cells under a header of 2; quote text"),
        ('gt,answer\nfear,"fear\n', "line 2: broken CSV"),
        ('{"gt": "fear", "answer": "fear"}\n[1]\n', r"line 2: no JSON object \(found a list"),
        ('{"gt": "fear", "answer"\n', "line 1: no JSON object"),
        ('[{"gt": "fear"}, 3]', "no list of JSON objects"),
    ],
)
def test_traps_are_named(file, text, message):
    with pytest.raises(UserError, match=message) as caught:
        read(file, text)
    assert "\n" not in str(caught.value)


def test_other_encodings_and_missing_files_are_refused(file, tmp_path):
    with pytest.raises(UserError, match="not UTF-8 text"):
        read(file, "gt,answer\nfear,Überraschung\n", encoding="latin-1")
    with pytest.raises(UserError, match="no such predictions file"):
        foreign.read_foreign(tmp_path / "none.csv", PredictionFiles(**COLUMNS))


def test_a_number_among_words_is_an_answer_that_names_nothing(file):
    assert score(file, "gt,answer\nfear,fear\nfear,fear\nfear,7\n")["unparsed"] == 1 / 3


def test_a_named_set_decides_the_classes(file):
    text = "gt,answer\nhappy,contempt\nsad,helpless\n"
    assert score(file, text)["unparsed"] == 1
    tree = score(file, text, space=label_space("mafw"))
    assert (tree["unparsed"], set(tree["recall"])) == (0, {"happiness", "sadness"})
    with pytest.raises(UserError, match="line 2: truth 'contempt' is not a class of RAF-DB"):
        read(file, "gt,answer\ncontempt,fear\n", space=RAF_DB)


def test_items_may_be_named_and_are_then_wanted_once(file):
    found, space = read(file, "name,gt,answer\na,fear,fear\nb,fear,fear\n", id_column="name")
    assert [item.id for item in found] == ["a", "b"]
    found, space = read(file, "name,gt,answer\na,fear,fear\na,fear,fear\n", id_column="name")
    with pytest.raises(UserError, match="item a is predicted 2 times"):
        evaluate(found, space)


# ---- the command


def record(number: int, fold: int, label="happy", predicted="happy") -> Prediction:
    return Prediction(
        id=f"clip-{fold}-{number}",
        source=f"dfew/fold{fold}:test",
        label=label,
        predicted=predicted,
        text=predicted,
        scores=None,
        parsed="exact",
    )


def test_our_own_files_need_no_columns(tmp_path, capsys):
    path = tmp_path / "predictions.jsonl"
    write_predictions(path, [record(0, 1), record(1, 1, "sad", None)])
    cli.main(["eval", "--predictions", str(path), "--json"])
    assert json.loads(capsys.readouterr().out) == {
        "WAR": 0.5,
        "UAR": 0.5,
        "n": 2,
        "unparsed": 0.5,
        "recall": {"happy": 1.0, "sad": 0.0},
    }


def refused(capsys, *args) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["eval", *map(str, args)])
    err = capsys.readouterr().err
    assert (stop.value.code, err.count("\n")) == (2, 1)
    return err


def test_five_folds_are_joined_and_four_are_not(tmp_path, capsys):
    paths = [tmp_path / f"fold{fold}.jsonl" for fold in range(1, 6)]
    for fold, path in enumerate(paths, 1):
        answers = ["happy" if n < fold else "sad" for n in range(10)]
        write_predictions(path, [record(n, fold, predicted=a) for n, a in enumerate(answers)])
    out = tmp_path / "out"
    args = ["--source", "dfew", "--out", out, "--predictions"]
    cli.main(["eval", *map(str, [*args, *paths])])
    assert "WAR 30.00" in capsys.readouterr().out
    tree = json.loads((out / "evaluation.json").read_text())
    assert tree["war"] == pytest.approx(0.3) and tree["wars"] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert "±" in (out / "report.html").read_text(encoding="utf-8")
    assert "mean of 5 folds" in (out / "table.tex").read_text()
    assert list(tree["trace"]) == [path.name for path in paths]
    assert "found 4 (missing fold 5)" in refused(capsys, *args, *paths[:4])
    assert "is given twice" in refused(capsys, *args, *paths[:4], paths[0])
    assert "name the set whose folds" in refused(capsys, "--predictions", *paths[:2])
    swapped = [record(n, 1) for n in range(10)]  # fold 5's file tests fold 1's clips
    write_predictions(paths[4], swapped)
    assert "is tested in fold 1 and in fold 5" in refused(capsys, *args, *paths)


def given(*rows: str) -> str:
    return "gt,answer\n" + "".join(f"{row}\n" for row in rows)


NAMED = ["--truth-column", "gt", "--prediction-column", "answer"]


def test_unparsed_answers_are_said_first(file, tmp_path, capsys):
    out = tmp_path / "out"
    file.write_text(
        given("fear,no idea", "anger,fear or anger", "fear,I cannot identify emotions.")
    )
    args = ["eval", "--predictions", str(file), *NAMED]
    cli.main([*args, "--out", str(out)])
    first, second, third, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("All of the 3 answers are unparsed")
    assert "1 name two classes" in first and "1 name no class" in first and "1 are ref" in first
    assert second.startswith("WAR: share of correct answers. UAR:")
    assert third.startswith("WAR 0.00")
    page = (out / "report.html").read_text(encoding="utf-8")
    head = page[page.index("<header>") : page.index("</header>")]
    assert "All of the 3 answers are unparsed" in head and "WAR: share of correct answers" in head
    cli.main([*args, "--json"])
    said = capsys.readouterr()
    assert json.loads(said.out)["unparsed"] == 1 and said.err.startswith("All of the 3")
    file.write_text(given(*["fear,fear"] * 8, "fear,no idea"))
    cli.main(args)
    assert capsys.readouterr().out.startswith("1 of 9 answers are unparsed and count as wrong")
    file.write_text(given(*["fear,fear"] * 10, "fear,no idea"))
    cli.main(args)
    assert capsys.readouterr().out.startswith("WAR: share")


@pytest.mark.parametrize("source", [None, "ferplus", "dfew"])
def test_the_predictions_are_written_and_score_the_same_again(file, tmp_path, capsys, source):
    out = tmp_path / "out"
    file.write_text(given("Happy,joyful", "sad,<think>x</think>sad", "fear,no idea", "sad,happy"))
    named = [] if source is None else ["--source", source]
    cli.main(["eval", "--predictions", str(file), *NAMED, *named, "--out", str(out), "--json"])
    once = json.loads(capsys.readouterr().out)
    cli.main(["eval", "--predictions", str(out / "predictions.jsonl"), "--json"])
    assert json.loads(capsys.readouterr().out) == once
    assert once["WAR"] == 0.5


def test_the_predictions_are_not_overwritten(tmp_path, capsys):
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"gt": "fear", "answer": "fear"}\n')
    assert "overwrite" in refused(capsys, *NAMED, "--predictions", path, "--out", tmp_path)
    assert path.read_text() == '{"gt": "fear", "answer": "fear"}\n'


def test_folds_are_written_fold_by_fold(tmp_path, capsys):
    paths = [tmp_path / f"fold{fold}.csv" for fold in range(1, 6)]
    for path in paths:
        path.write_text(given("happy,joyful", f"sad,{path.stem}"))
    out = tmp_path / "out"
    folds = ["--source", "dfew", "--json", "--predictions"]
    cli.main(["eval", *NAMED, "--out", str(out), *folds, *map(str, paths)])
    once = json.loads(capsys.readouterr().out)
    again = [str(out / f"fold{fold}" / "predictions.jsonl") for fold in range(1, 6)]
    cli.main(["eval", *folds, *again])
    assert json.loads(capsys.readouterr().out) == once


def test_what_can_be_read_once_is_read_once(file, tmp_path):
    text = given("happy,joyful", "sad,sad")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    program = [sys.executable, "-m", "emollama_jax.cli", "eval", *NAMED, "--json", "--out"]
    for number, path in enumerate((pipe, "-", "/dev/stdin")):
        args = [*program, str(tmp_path / f"out{number}"), "--predictions", str(path)]
        if path == pipe:
            writer = threading.Thread(target=pipe.write_text, args=[text])
            writer.start()
        done = subprocess.run(args, input=text, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["WAR"] == 1
        assert len((tmp_path / f"out{number}" / "predictions.jsonl").read_text().splitlines()) == 2
    wrong = text.replace("answer", "guess")
    done = subprocess.run([*args[:-1], "-"], input=wrong, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("emollama: standard input: no column 'answer'")


def test_a_run_or_a_file_is_wanted(capsys):
    assert "--predictions FILE" in refused(capsys)


def test_classes_of_ones_own(file):
    file.write_text('label,predicted\nPain,pain\ncalm,"It is calm, no pain"\n')
    tree = evaluate_files(PredictionFiles((file,), classes="pain, calm")).summary()
    assert (tree["WAR"], tree["recall"]) == (1.0, {"pain": 1.0, "calm": 1.0})
    with pytest.raises(UserError, match=r"not an emotion class .*--classes"):
        evaluate_files(PredictionFiles((file,)))
    with pytest.raises(UserError, match="at least two names"):
        evaluate_files(PredictionFiles((file,), classes="pain,Pain"))
