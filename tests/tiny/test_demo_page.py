"""The demo's page: drawn faces in plain words, one question in a card, the photograph's box."""

import io
import json
import re
import types

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from emollama_jax import config, packed
from emollama_jax.data.sets import label_space
from emollama_jax.data.split import InMemory
from emollama_jax.evaluate import groups, protocol, report
from emollama_jax.evaluate.result import Answers
from emollama_jax.tiny import demo, demo_page, demo_photographs
from emollama_jax.tiny.demo_photographs import Photograph

SPACE = label_space("actionfaces/images")
KEYS = (
    "pixel_regression_war",
    "clip_war",
    "clip_middle_frame_war",
    "blank_war",
    "blank_most_named",
    "majority_share",
)


def prediction(n, label, predicted):
    return protocol.Prediction(
        id=f"test-{n}",
        source="actionfaces/images:test",
        label=label,
        predicted=predicted,
        text=predicted,
        scores=None,
        parsed="exact",
        subject=str(n),
    )


@pytest.fixture
def predictions():
    """The category question was answered with fear throughout."""
    return [prediction(n, label, "fear") for n, label in enumerate(SPACE.classes)]


@pytest.fixture
def items(predictions, monkeypatch):
    """Cards of those examples; the answers name what is shown, but for one that names nothing."""
    picture = io.BytesIO()
    Image.new("RGB", (20, 30), "grey").save(picture, "JPEG")
    texts = [f"The lips are pressed: {item.label}." for item in predictions]
    texts[2] = "The lips are pressed."
    prior = types.SimpleNamespace(found=[False])
    monkeypatch.setattr(demo, "describe", lambda *_, batch: texts)
    split = InMemory("actionfaces/images", "test", [{"media": picture.getvalue()}] * 7, [prior] * 7)
    monkeypatch.setattr(demo, "Split", lambda *_: split)
    answers = Answers.of("generate", predictions, SPACE)
    return demo._exhibits(config.load("tiny"), None, demo.QUICK, answers)


def test_a_card_holds_one_question_its_answer_and_what_that_answer_names(items):
    assert len(items) == 7
    for number, item in enumerate(items):
        assert item.question == "Describe the face in the image and name the emotion."
        assert item.predicted == (None if number == 2 else item.label)
        assert item.predicted is None or item.predicted in item.text


@pytest.fixture
def learned_from():
    return ["actionfaces/images:train"]


@pytest.fixture
def page(items, predictions, tmp_path, monkeypatch, learned_from):
    (tmp_path / "run").mkdir()
    rows = [{"step": step, "loss": 1.0 / step} for step in range(1, 9)]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    picture = np.full((40, 30, 3), 90, np.uint8)
    box, other = [3.0, 4.0, 13.5, 24.0], [20.0, 4.0, 28.0, 12.0]
    asked = ("Who is <this>?", "Somebody & nobody.")
    photographs = [
        Photograph("portrait.jpg", picture, [box, other], *asked, "happiness"),
        Photograph("cup.jpg", picture, [], "Who?", "No face was found in the image.", None),
    ]
    monkeypatch.setattr(packed, "read_origin", lambda folder: {"learned_from": learned_from})
    seen = groups.Seen({one.id: ("20-29", "Male", "unknown") for one in predictions})
    answers = Answers.of("generate", predictions, SPACE, seen=seen)
    results = {f"actionfaces/{kind}": answers for kind in ("images", "clips")}
    summary = {
        "difficulty": dict.fromkeys(KEYS, 0.5),
        "resume_bit_identical": True,
        "seconds": {"train": 9.0, "all": 9.0},
    }
    shown = {"actionfaces/images": items, "actionfaces/clips": []}
    cfg = config.load("tiny")
    return report.render(demo_page.make_page(cfg, tmp_path, summary, results, shown, photographs))


def test_the_top_says_that_faces_are_drawn(page):
    header = page.partition("<header>")[2].partition("</header>")[0]
    assert "was drawn by this program" in header and "They show nobody" in header
    assert "say nothing about real faces" in header


def test_every_card_shows_its_question_above_its_answer(page):
    cards = re.findall(r'<figure class="item.*?</figure>', page, re.S)
    assert len(cards) == 9
    for card in cards:
        assert card.count('class="question"') == card.count("<blockquote>") == 1
        assert card.index('class="question"') < card.index("<blockquote>")


def test_photographs_are_on_top_with_their_boxes_and_answers(page):
    section = page.partition("<h2>Real photographs</h2>")[2].partition("</section>")[0]
    assert '<rect class="box" x="3.0" y="4.0" width="10.5" height="20.0"' in section
    assert section.count('class="box"') == page.count('class="box"') == 2
    assert "portrait.jpg" in section and "<span>happiness</span>" in section
    assert "Who is &lt;this&gt;?" in section and "Somebody &amp; nobody." in section
    assert "<span>no face</span>" in section and "No face was found in the image." in section
    assert "the run that ships with this package" in section and "do not trust" in section
    assert page.index("</header>") < page.index("Real photographs") < page.index('class="cards"')


@pytest.mark.parametrize("learned_from", [["ferplus:train", "actionfaces/clips:train"]])
def test_the_note_says_what_was_learned_from(page):
    assert "It learned from ferplus:train, actionfaces/clips:train" in page
    assert "do not believe" not in page


def test_errors_by_group_are_on_the_page(page):
    assert "<h2>Errors by group: images</h2>" in page
    assert re.search(r">gender: Male</th><td>7</td><td>7 of 7</td><td>14.3</td>", page)


def test_photographs_of_installed_packages_are_found_and_missing_ones_said(monkeypatch, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    names = ["astronaut.png", "grace_hopper.jpg", "coffee.png"]
    assert [path.name for path in demo_photographs.find(console)] == names
    assert console.file.getvalue() == ""
    files = [("no-such-package", "no_such_package", "a.png"), ("jax", "jax", "none.png")]
    monkeypatch.setattr(demo_photographs, "FILES", (*files, files[0]))
    assert demo_photographs.find(console) == []
    assert console.file.getvalue().splitlines() == [
        f"no photographs of {name}: pip install {name}, then re-run the command"
        for name in ("no-such-package", "jax")
    ]
