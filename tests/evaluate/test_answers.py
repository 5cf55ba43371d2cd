"""Answers to labels: what models write is read as its truth, known beforehand, or not at all."""

import json
import random
import re
import time

import pytest

from emollama_jax.data.emotions import LABEL_SPACES
from emollama_jax.data.sets import label_space
from emollama_jax.evaluate.foreign import named_classes
from emollama_jax.evaluate.parse import Parsed, parse_answer
from emollama_jax.evaluate.parse.reasoning import final_answer
from emollama_jax.evaluate.parse.vocabulary import vocabulary

RAF_DB, DFEW, MAFW = (LABEL_SPACES[name] for name in ("raf_db", "dfew", "mafw"))
FORMS = {  # class → a noun and an adjective
    "happiness": ("happiness", "happy"),
    "sadness": ("sadness", "sad"),
    "anger": ("anger", "angry"),
    "fear": ("fear", "afraid"),
    "disgust": ("disgust", "disgusted"),
    "surprise": ("surprise", "surprised"),
    "neutral": ("neutral", "neutral"),
}
UNKNOWN = ("bliss", "beaming")  # an emotion that no synonym table has


@pytest.fixture(scope="module")
def cases(root):
    return root / "tests" / "cases" / "answers"


def fill(phrasing: str, true, other, third) -> str:
    """@t, @o, @p become nouns of the true and two other emotions, capitals adjectives."""
    for name, forms in (("t", true), ("o", other), ("p", third)):
        phrasing = phrasing.replace(f"@{name}", forms[0]).replace(f"@{name.upper()}", forms[1])
    return phrasing.replace("\\n", "\n")


# ---- the documented table


def documented(root) -> list[tuple[str, str | None, str]]:
    text = (root / "docs" / "evaluation.md").read_text(encoding="utf-8")
    section = text.split("### How an answer is read\n")[1].split("\n\nWithout")[0]
    rows = re.findall(r"^\| `(.+)`(?: \(.*\))? \| (\S+) \| (\w+) \|$", section, re.MULTILINE)
    return [
        (answer.replace(r"\|", "|").replace("⏎", "\n"), None if label == "–" else label, how)
        for answer, label, how in rows
    ]


def test_the_documented_table_is_what_happens(root):
    rows = documented(root)
    text = (root / "docs" / "evaluation.md").read_text(encoding="utf-8")
    section = text.split("### How an answer is read\n")[1].split("\n\nWithout")[0]
    assert len(rows) == section.count("\n|") - 2 > 30  # every row but the head was parsed
    for answer, label, how in rows:
        assert parse_answer(answer, RAF_DB) == Parsed(label, how), answer
        assert parse_answer(answer, RAF_DB, form="ranked").label == label, answer
    assert {how for *_, how in rows} == {
        *("exact", "word", "synonym", "score"),
        *("ambiguous", "none", "foreign", "refusal", "unfinished"),
    }


# ---- many answers


def test_written_answers_in_the_style_of_many_models(cases):
    """Hand-written; "read": false marks the few that may stay unparsed."""
    lines = (cases / "prose.jsonl").read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    assert len(items) > 300
    for item in items:
        label = parse_answer(item["answer"], RAF_DB).label
        wanted = [item["label"]] if item.get("read", True) else [item["label"], None]
        assert label in wanted, item


WRAPS = (
    *("{}", "Sure! {}", "<think>It may be @o. Or @p?</think>\n{}", "{}\nI hope this helps!"),
    *("Looking at the picture: {}", "{}\n\nNote that @o would look different.", "Okay, {}"),
    *("{} The eyes and the mouth support this.", "I'd be happy to help. {}", "> {}", "- {}"),
    *("```\n{}\n```", "USER: What is it?\nASSISTANT: {}", "{}</s>", "Wait, is it @o? {}"),
)


@pytest.mark.parametrize("name", ["raf_db", "dfew", "mafw", "ferplus"])
def test_generated_answers_are_never_read_wrong(cases, name):
    """Phrasings × classes × wrappings, the truth known by construction."""
    space, rng = LABEL_SPACES[name], random.Random(name)
    classes = dict(zip(space.canonical, space.classes, strict=True))
    phrasings = (cases / "phrasings.txt").read_text(encoding="utf-8").splitlines()
    right = total = 0
    for phrasing in phrasings:
        for wrap in rng.sample(WRAPS, 3):
            true, other, third = rng.sample(sorted(FORMS), 3)
            answer = fill(wrap.replace("{}", phrasing), FORMS[true], FORMS[other], FORMS[third])
            for form in ("text", "ranked"):
                label = parse_answer(answer, space, form=form).label
                assert label in (classes[true], None), (answer, label)
                right, total = right + (label is not None), total + 1
    assert total > 1800
    assert right > 0.9 * total  # prudence is no excuse for silence


def test_the_rejected_emotion_is_not_taken_where_the_true_one_is_an_unknown_word(cases):
    """The true emotion is in no table, so that only the rejected ones could be found."""
    phrasings = (cases / "phrasings.txt").read_text(encoding="utf-8").splitlines()
    rng, wrong = random.Random(3), []
    for phrasing in phrasings:
        other, third = rng.sample(sorted(set(FORMS) - {"neutral"}), 2)
        answer = fill(phrasing, UNKNOWN, FORMS[other], FORMS[third])
        if parse_answer(answer, RAF_DB).label is not None:
            wrong.append(answer)
    assert len(wrong) <= 0.03 * len(phrasings), wrong


def test_every_form_of_a_word_is_read():
    for answer, label in (
        ("She smiles happily.", "happiness"),
        ("the happiest face", "happiness"),
        ("She is saddened.", "sadness"),
        ("He scowls angrily.", "anger"),
        ("She is frightened.", "fear"),
        ("a look of astonishment", "surprise"),
        ("utterly stunned", "surprise"),
        ("an impassive face", "neutral"),
        ("without any expression", "neutral"),
    ):
        assert parse_answer(answer, RAF_DB).label == label, answer
    assert parse_answer("He sneers contemptuously.", MAFW).label == "contempt"
    assert parse_answer("un-happy, non-neutral", RAF_DB).label is None
    assert parse_answer("\ue000 happy \ue003\ue001", RAF_DB).label == "happiness"  # private signs


@pytest.mark.parametrize(
    "text",
    [
        "the quick brown " * 2000,
        "not a very " * 2000,
        "happy or sad " * 1000,
        "happy, sad, " * 1000,
        "could be mistaken " * 1500,
        "<think>" * 2000,
        "[{'a': " * 1500,
        "Answer: " * 1500,
        "1" * 10_000 + "%%",
        "-" * 10_000 + "a",
        " " * 30_000 + "a",
    ],
    ids=lambda text: text[:12],
)
def test_endless_answers_are_read_in_seconds(text):
    start = time.process_time()
    assert parse_answer(text, RAF_DB, form="ranked").label in (None, "happiness")
    assert time.process_time() - start < 8


# ---- reasoning


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>fear</think>sad", "sad"),
        ("fear</think>\n\nsad", "sad"),
        ("<think>\n\n</think>\n\nsad", "sad"),
        ("<THINK>fear</Think> sad", "sad"),
        ("<think>one <think> two</think> three</think> sad", "sad"),
        ("<think>a</think>b<think>c</think>sad", "b\nsad"),
        ("<thinking>fear <reflection>x</reflection> y</thinking><output>sad</output>", "sad"),
        ("<reasoning>fear</reasoning> <answer> sad </answer>", "sad"),
        ("<think>fear <answer>sad</answer>", "sad"),  # its end was forgotten, the answer was not
        ("<answer>sad", "sad"),
        ("sad</answer>", "sad"),
        ("<answer>sad</answer> It is not fear.", "sad"),
        ("<|START_THINKING|>fear<|END_THINKING|><|START_RESPONSE|>sad<|END_RESPONSE|>", "sad"),
        ("<|channel>thought\nfear<channel|>sad", "sad"),
        ("<|open|>think<|sep|>fear<|close|>think<|sep|>sad", "sad"),
        ("analysisFear comes to mind.assistantfinalsad", "sad"),
        ("Here is my thought process: fear. Here is my response: sad", "sad"),
        ("so $\\boxed{\\text{sad}}$.", "sad"),
        ("<answer>\\boxed{sad}</answer>", "sad"),
        ("sad<|im_end|>\n<|im_start|>user", "sad"),
        ("sad\nQuestion: And this one?\nAnswer: fear", "sad"),
        ("Question: sad or not?\nAnswer: sad", "Question: sad or not?\nAnswer: sad"),
        ("I think he is sad.", "I think he is sad."),
        ("<think>it is fear", None),
        ("<think>it is fear </thin", None),
        ("<think>x</think> a <think>fear", None),
        ("<think>fear <answer>sad</answer> might be", None),
        ("<|channel|>analysis<|message|>fear", None),
        ("analysisFear, since", None),
        ("", ""),
    ],
)
def test_reasoning_is_removed_to_its_end(text, answer):
    assert final_answer(text) == answer


# ---- scores and records


@pytest.mark.parametrize(
    ("text", "label", "how"),
    [
        ("{'angry': np.float32(0.1), 'happy': np.float32(0.7)}", "happiness", "score"),
        ("{'angry': 0.1, 'happy': tensor(0.7, device='cuda:0')}", "happiness", "score"),
        ("OrderedDict([('angry', 0.1), ('happy', 0.7)])", "happiness", "score"),
        ("Counter({'happy': 5, 'sad': 3})", "happiness", "score"),
        ('{"angry": "10%", "happy": "70 %"}', "happiness", "score"),
        ('{"ANGRY": -3.2, "Happy": -0.1}', "happiness", "score"),  # log-likelihoods
        ('{"angry": false, "happy": true}', "happiness", "score"),
        ('{"prob_angry": 0.1, "prob_happy": 0.7}', "happiness", "score"),
        ('{"angry": 0.1, "happy": 0.7, "confidence": 0.9, "age": 31}', "happiness", "score"),
        ("{angry: 0.1, happy: 0.7}", "happiness", "score"),
        (
            "[{'label': 'angry', 'score': 0.1}, {'label': 'joy', 'score': 0.7}]",
            "happiness",
            "score",
        ),
        (
            "[[{'label': 'angry', 'score': .1}, {'label': 'joy', 'score': .7}]]",
            "happiness",
            "score",
        ),
        (
            "[{'Type': 'ANGRY', 'Confidence': 1}, {'Type': 'HAPPY', 'Confidence': 7}]",
            "happiness",
            0,
        ),
        ("{'labels': ['angry', 'happy'], 'scores': [0.1, 0.7]}", "happiness", "score"),
        ("{'emotion': {'angry': 9, 'sad': 1}, 'dominant_emotion': 'angry'}", "anger", "synonym"),
        ("[{'box': [0, 1], 'emotions': {'angry': 0.1, 'happy': 0.7}}]", "happiness", "score"),
        ("('happy', 0.98)", "happiness", "synonym"),
        ('```json\n{"emotion": "sad"}\n```', "sadness", "synonym"),
        ('Here you are: {"emotion": "sad", "why": "no smile, not happy"}', "sadness", "synonym"),
        ('{"reasoning": "could be fear", "answer": "sadness"}', "sadness", "exact"),
        ('{"emotion": "sad", "reason": "he loo', "sadness", "synonym"),  # cut off
        ("| emotion | share |\n|---|---|\n| anger | 10% |\n| sadness | 90% |", "sadness", "score"),
        ("anger 2/10, sadness 9/10", "sadness", "score"),
        ("P(anger)=0.1, P(sadness)=0.9", "sadness", "score"),
        ("I give anger 10 percent and sadness 90 percent.", "sadness", "score"),
        ("anger ❌ sadness ✅", "sadness", "score"),
        ("anger: no; sadness: no", None, "ambiguous"),
        ("anger: yes; sadness: yes", None, "ambiguous"),
        ("{'angry': nan, 'sad': 0.2}", None, "none"),
        ("{'angry': 0.1, 'confusion': 0.9}", None, "foreign"),
        ("anger 10%, confusion 90%", None, "none"),
        ("{'angry': 0.1, 'sad': 0.2", "sadness", "score"),
        ("{'mouth': 'open'}", None, "none"),
        ('{"emotions": ["sad", "angry"]}', None, "ambiguous"),
        ("sadness (10%)", None, "none"),
    ],
)
def test_scores_and_records(text, label, how):
    found = parse_answer(text, RAF_DB)
    assert found.label == label
    assert not how or found.how == how


def test_trees_of_json_are_read_as_their_text_is():
    for tree, label in (
        ({"angry": 0.1, "sad": 0.9}, "sadness"),
        ([{"label": "angry", "score": 0.1}, {"label": "sad", "score": 0.9}], "sadness"),
        ([["angry", 0.1], ["sad", 0.9]], "sadness"),
        ({"emotion": "not angry but sad"}, "sadness"),
        ([["sad"]], "sadness"),
        ([["sad", "sad"]], "sadness"),
        ([["sad", "angry"]], None),
        ([[-1.5, False], [-0.2, True]], None),
        ({}, None),
    ):
        assert parse_answer(tree, RAF_DB).label == label, tree
        assert parse_answer(json.dumps(tree), RAF_DB).label == label, tree
    ranked = ["sad", "angry"]
    assert parse_answer(ranked, RAF_DB).label == "sadness"
    assert parse_answer(ranked, RAF_DB, form="samples") == Parsed(None, "ambiguous")


# ---- words that are one class or two


def test_a_word_goes_to_the_class_that_it_is_a_form_of():
    space = named_classes("calm,neutral,joy,happiness")
    words = vocabulary(space)
    assert words["calmly"] == "calm" and words["expressionless"] == "neutral"
    assert words["joyful"] == "joy" and words["happy"] == words["glad"] == "happiness"
    two = vocabulary(named_classes("joy,amusement"))
    assert two["joyful"] == "joy" and "happy" not in two  # which of the two, nobody knows
    assert parse_answer("calm, not neutral", space) == Parsed("calm", "word")


@pytest.mark.parametrize("text", ["Emotion: happy -> sad", "happiness → sadness", "fear => anger."])
def test_an_arrow_between_two_classes_is_ambiguous(text):
    assert parse_answer(text, label_space("raf_db")) == Parsed(None, "ambiguous")
    assert parse_answer("smile -> happiness", label_space("raf_db")).label == "happiness"


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("The brows are raised, the eyes are calm. The expression is sadness.", "sadness"),
        ("The eyes look calm, and the lips are pressed. The face shows anger.", "anger"),
        ("The gaze is calm and the mouth is open: she is surprised.", "surprise"),
        ("The eyes are calm and the brows are relaxed. The expression is neutral.", "neutral"),
        ("The expression is not anger. The eyes are calm.", "neutral"),
        ("The eyes are calm.", "neutral"),
    ],
)
def test_a_part_of_the_face_is_not_the_answer(text, label):
    assert parse_answer(text, label_space("actionfaces/images")).label == label
