"""The protocol: what an answer names, predictions files, and the numbers made from them."""

import dataclasses
import json

import pytest

from emollama_jax.data import sets
from emollama_jax.data.emotions import LABEL_SPACES, SYNONYMS
from emollama_jax.data.items import category_question
from emollama_jax.data.sets import label_space
from emollama_jax.errors import UserError
from emollama_jax.evaluate import asked, folds, protocol
from emollama_jax.evaluate.parse import Parsed, parse_answer
from emollama_jax.evaluate.result import Answers, Result, Settings
from emollama_jax.evaluate.speaker import best_label

RAF_DB, DFEW, MAFW = (LABEL_SPACES[name] for name in ("raf_db", "dfew", "mafw"))


@pytest.mark.parametrize(
    ("answer", "label", "how"),
    [
        ("happiness", "happiness", "exact"),
        (" Happiness.\n", "happiness", "exact"),
        ("**Surprise**", "surprise", "exact"),
        ("The expression is sadness.", "sadness", "word"),
        ("The brows are raised, the mouth is open. This looks like surprise.", "surprise", "word"),
        ("Anger, clear anger!", "anger", "word"),
        ("A joyful surprise.", None, "ambiguous"),  # a class name and a synonym count alike
        ("She looks happy", "happiness", "synonym"),
        ("He is furious and angry.", "anger", "synonym"),
        ("scared", "fear", "synonym"),
        ("fear or surprise", None, "ambiguous"),
        ("surprise, fear, disgust, happiness, sadness, anger, neutral", None, "ambiguous"),
        ("happy but also scared", None, "ambiguous"),
        ("", None, "none"),
        ("The person wears a hat.", None, "none"),
        ("The fearsome surpriser is unfeared.", None, "none"),  # parts of words
        ("contempt", None, "none"),  # no class of this set
    ],
)
def test_answers(answer, label, how):
    assert parse_answer(answer, RAF_DB) == Parsed(label, how)


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("not happy", None),
        ("not a very happy face", None),
        ("The person does not look happy.", None),
        ("He isn't sad", None),
        ("He isn’t sad", None),
        ("There is no sign of happiness in the eyes.", None),
        ("I don't think it is fear.", None),
        ("not happiness but sadness", "sadness"),
        ("It is not happiness; it is sadness.", "sadness"),
        ("not happiness, sadness", "sadness"),
        ("Sadness, not anger.", "sadness"),
        ("sadness rather than anger", "sadness"),
        ("Instead of fear the face shows surprise", "surprise"),
        ("neither happiness nor sadness: neutral", "neutral"),
        ("no anger, fear or sadness; the face is neutral", "neutral"),
        ("not happy, sad, or angry. Neutral", "neutral"),
        ("no fear and anger, but disgust", "disgust"),
        ("The person is not smiling and looks sad.", "sadness"),
        ("The mouth does not move while the brows show anger", "anger"),
        ("not only sad", "sadness"),
        ("This is no doubt fear.", "fear"),
        ("nothing but disgust", "disgust"),
        ("I am not sure, maybe surprise", "surprise"),
        ("not happy, not sad, not angry", None),
    ],
)
def test_negated_mentions_name_nothing(answer, label):
    assert parse_answer(answer, RAF_DB).label == label


@pytest.mark.parametrize("name", LABEL_SPACES)
def test_every_class_is_read_by_its_name_its_common_name_and_its_synonyms(name):
    space = LABEL_SPACES[name]
    for label, common in zip(space.classes, space.canonical, strict=True):
        assert parse_answer(label.upper(), space).label == label
        assert parse_answer(f"It is {common}.", space).label == label
        for word in (word for word, emotion in SYNONYMS.items() if emotion == common):
            assert parse_answer(f"a {word} face", space).label == label


def test_a_set_reads_its_own_words():
    assert parse_answer("happiness", DFEW) == Parsed("happy", "synonym")
    assert parse_answer("sad", DFEW) == Parsed("sad", "exact")
    assert parse_answer("worried", MAFW) == Parsed("anxiety", "synonym")
    assert parse_answer("worried", RAF_DB).label is None


def test_best_label():
    assert best_label({"fear": -3.0, "anger": -1.5}) == "anger"
    with pytest.raises(UserError, match="wanted finite numbers"):
        best_label({"fear": float("nan"), "anger": -1.5})


# ---- predictions and their evaluation


def prediction(number: int, label: str, predicted: str | None, **change) -> protocol.Prediction:
    fields = {
        "id": f"item-{number}",
        "source": "raf_db:test",
        "label": label,
        "predicted": predicted,
        "text": None if predicted is None else f"It is {predicted} – naïve\n",
        "scores": None,
        "parsed": "none" if predicted is None else "word",
    }
    return protocol.Prediction(**fields | change)


@pytest.fixture
def predictions() -> list[protocol.Prediction]:
    pairs = [
        ("surprise", "surprise"),
        ("surprise", "fear"),
        ("fear", "fear"),
        ("anger", None),
    ]
    return [prediction(n, *pair) for n, pair in enumerate(pairs)]


def test_evaluate(predictions):
    result = protocol.evaluate(predictions, RAF_DB)
    assert (result.n, result.war, result.uar) == (4, 0.5, pytest.approx((0.5 + 1 + 0) / 3))
    assert result.unparsed == 0.25
    assert result.parsed == {"word": 3, "none": 1}
    assert result.confusion[5].tolist() == [0, 0, 0, 0, 0, 0, 0, 1]
    assert result.war_interval.low <= result.war <= result.war_interval.high
    tree = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert tree["war_interval"] == {
        "low": result.war_interval.low,
        "high": result.war_interval.high,
    }
    assert tree["per_class"]["recall"]["surprise"] == 0.5
    assert tree["per_class"]["recall"]["neutral"] is None
    assert tree["per_class"]["support"]["surprise"] == 2


def test_intervals_are_by_subject_where_every_item_names_one(predictions):
    many = [
        dataclasses.replace(item, id=f"{item.id}-{n}", subject=item.id)
        for item in predictions
        for n in range(30)
    ]
    clustered = protocol.evaluate(many, RAF_DB)
    assert clustered.clustered
    assert clustered.war_interval.high - clustered.war_interval.low > 0.5
    free = protocol.evaluate([*many[1:], dataclasses.replace(many[0], subject=None)], RAF_DB)
    assert not free.clustered
    assert free.war_interval.high - free.war_interval.low < 0.25


def test_evaluate_refuses_what_would_make_a_wrong_number(predictions):
    with pytest.raises(UserError, match="nothing to evaluate"):
        protocol.evaluate([], RAF_DB)
    with pytest.raises(UserError, match="item item-2 is predicted 2 times"):
        protocol.evaluate([*predictions, predictions[2]], RAF_DB)
    stranger = prediction(9, "surprise", "happy")
    with pytest.raises(UserError, match="predicted 'happy' is not a class of RAF-DB"):
        protocol.evaluate([stranger], RAF_DB)


def test_predictions_file_round_trip(predictions, tmp_path):
    path = tmp_path / "new" / "predictions.jsonl"
    predictions[0] = dataclasses.replace(
        predictions[0], text=None, scores={"fear": -1.25, "anger": -2}, parsed="score", subject="7"
    )
    predictions[1] = dataclasses.replace(predictions[1], options=("fear", "anger"))
    protocol.write_predictions(path, predictions)
    assert len(path.read_text(encoding="utf-8").splitlines()) == 4
    assert protocol.read_predictions(path) == predictions
    assert [entry.name for entry in path.parent.iterdir()] == ["predictions.jsonl"]


def test_a_failed_write_leaves_the_old_file(predictions, tmp_path):
    path = tmp_path / "predictions.jsonl"
    protocol.write_predictions(path, predictions)

    def breaks():
        yield predictions[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        protocol.write_predictions(path, breaks())
    assert protocol.read_predictions(path) == predictions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (b"[1,", r"line 2: not JSON \(.*column 4\)"),
        (b"", "line 2: not JSON"),
        (b"[1]", "line 2: found a list, wanted an object"),
        (b'{"\xff"}', "line 2: .*decode"),
        ({"label": ...}, "line 2: label missing"),
        ({"war": 1}, "line 2: unknown key war"),
        ({"label": 3}, "line 2: label: found 3, wanted a text"),
        ({"predicted": 0}, "line 2: predicted: found 0"),
        ({"parsed": "guess"}, "line 2: parsed: found 'guess'"),
        ({"scores": [1]}, "line 2: scores"),
        ({"options": "fear"}, "line 2: options"),
        ({"scores": {"fear": float("nan")}}, "line 2: scores"),
    ],
)
def test_a_bad_line_is_named(predictions, tmp_path, change, message):
    path = tmp_path / "predictions.jsonl"
    protocol.write_predictions(path, predictions)
    lines = path.read_bytes().splitlines()
    if isinstance(change, dict):
        tree = json.loads(lines[1]) | change
        change = json.dumps({k: v for k, v in tree.items() if v is not ...}).encode()
    lines[1] = change
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=message):
        protocol.read_predictions(path)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="no such predictions file"):
        protocol.read_predictions(tmp_path / "none.jsonl")


# ---- protocols and folds


OFFICIAL = ("raf_db", "ferplus", "affectnet7", "affectnet8", "dfew", "ferv39k", "mafw")


@pytest.mark.parametrize("name", [*OFFICIAL, "actionfaces/images"])
def test_every_set_says_how_it_is_tested(name):
    found = sets.testing_of(name)
    assert found is not None and found.frames and found.crop
    assert found.open == (name == "actionfaces/images")
    listed = [split for split in label_space(name).splits if split.endswith("/test")]
    assert protocol.folds_of(name) == max(len(listed), 1)


@pytest.mark.parametrize("name", ["own/faces", "no_such_set"])
def test_a_set_of_ones_own_is_tested_as_one_likes(name):
    assert sets.testing_of(name) is None
    assert protocol.folds_of(name) == 1


def fold_answers(count: int) -> list[Answers]:
    def right(fold):
        return [prediction(n, "happy", "happy" if n < fold else "sad") for n in range(10)]

    return [Answers.of(f"fold {fold}", right(fold), DFEW) for fold in range(1, count + 1)]


def test_five_folds_have_a_mean_and_fewer_have_none():
    dfew = "dfew"
    found = fold_answers(5)
    mean = folds.mean_of(found, dfew)
    assert mean.war == pytest.approx(0.3)
    assert mean.war_std == pytest.approx(0.158114, abs=1e-6)  # of 0.1 … 0.5, n - 1 below the line
    result = Result(
        title="",
        lede="",
        source=dfew,
        answers=found,
        mean=mean,
        pooled=folds.pool(found, DFEW),
        predictions={},
        settings=Settings("", "", {}),
        trace={},
    )
    tree = json.loads(json.dumps(result.summary(), allow_nan=False))
    assert tree["n"] == 50 and len(tree["folds"]) == 5
    assert tree["recall"] == {"happy": pytest.approx(0.3)}
    with pytest.raises(UserError, match=r"mean over 5 folds, found 4 \(missing fold 5"):
        folds.mean_of(found[:4], dfew)
    with pytest.raises(UserError, match="missing fold 2, 3, 4, 5"):
        folds.mean_of(found[:1], dfew)
    with pytest.raises(UserError, match="unknown fold 6"):
        folds.mean_of(fold_answers(6), dfew)


def test_folds_share_no_item(predictions):
    folds.check_disjoint([predictions[:2], predictions[2:]])
    with pytest.raises(UserError, match="item item-1 is tested in fold 1 and in fold 2"):
        folds.check_disjoint([predictions[:2], predictions[1:]])


# ---- what is asked


def test_classes_map_by_meaning_and_what_does_not_is_said():
    means = asked.map_classes(RAF_DB, DFEW)
    assert means["happiness"] == "happy" and means["anger"] == "angry"
    assert None not in means.values()
    assert asked.unanswerable(RAF_DB, DFEW) == ()
    back = asked.map_classes(MAFW, DFEW)
    assert [name for name, found in back.items() if found is None] == [
        "contempt",
        "anxiety",
        "helplessness",
        "disappointment",
    ]
    assert asked.unanswerable(DFEW, MAFW)[0] == "contempt"
    own = dataclasses.replace(RAF_DB, classes=("joy", "happy"))  # two words of one meaning
    assert asked.map_classes(own, own) == {"joy": "joy", "happy": "happy"}


def test_shuffled_options_are_a_seeded_permutation_of_their_own_for_each_item():
    shuffled = asked.Asked(RAF_DB, "shuffled", seed=1)
    orders = [shuffled.options(f"item-{n}") for n in range(300)]
    assert all(sorted(order) == sorted(RAF_DB.classes) for order in orders)
    assert shuffled.options("item-0") == orders[0]
    assert asked.Asked(RAF_DB, "shuffled", seed=2).options("item-0") != orders[0]
    first = [order[0] for order in orders]
    assert all(25 < first.count(name) < 65 for name in RAF_DB.classes)  # 43 expected
    assert asked.Asked(RAF_DB).options("item-0") == RAF_DB.classes


def test_reworded_items_ask_for_what_was_said():
    item = [[{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "fear"}], []]
    data = [{"id": "a", "kind": "clip", "items": json.dumps(item), "media": b"m"}]
    words = asked.Asked(DFEW, "shuffled")
    (example,) = asked.Reworded(data, words)
    items = json.loads(example["items"])
    question = category_question(words.options("a"), "clip")
    assert items == [[{"from": "human", "value": f"<image>\n{question}"}, item[0][1]], []]
    assert data[0]["items"] == json.dumps(item)


def test_position_bias_is_found_and_only_where_there_is_one():
    shuffled = asked.Asked(RAF_DB, "shuffled")
    names = [f"item-{n}" for n in range(700)]
    labels = [RAF_DB.classes[n % 7] for n in range(700)]

    def bias(choose):
        items = [
            prediction(
                n,
                label,
                choose(shuffled.options(name), label),
                id=name,
                options=shuffled.options(name),
            )
            for n, (name, label) in enumerate(zip(names, labels, strict=True))
        ]
        found = asked.position_bias(items)
        assert found is not None
        return found

    always_first = bias(lambda options, label: options[0])
    assert always_first.answered.tolist() == [1, 0, 0, 0, 0, 0, 0]
    assert always_first.recall.tolist() == [1, 0, 0, 0, 0, 0, 0]
    assert always_first.bias == pytest.approx(6 / 7, abs=0.05)
    assert bias(lambda options, label: label).bias == 0
    assert bias(lambda options, label: "fear").bias < 0.1
    # DFEW's words among RAF-DB's options: places go by meaning.
    dfew = [prediction(0, "happy", "sad", options=("sadness", "happiness"))]
    found = asked.position_bias(dfew)
    assert (found.answered.tolist(), found.true.tolist()) == ([1, 0], [0, 1])
    assert asked.position_bias([prediction(0, "fear", "fear")]) is None
