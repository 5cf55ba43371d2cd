"""The report: a page that stands alone, says the numbers it was given, and marks what is wrong."""

import base64
import dataclasses
import html.parser
import io
import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from emollama_jax.data.emotions import LABEL_SPACES
from emollama_jax.data.sets import label_space
from emollama_jax.evaluate import (
    charts,
    latex,
    metrics,
    protocol,
    report,
)
from emollama_jax.evaluate.publish import publish
from emollama_jax.evaluate.published import published
from emollama_jax.evaluate.result import Answers, Result, Settings

SPACE = label_space("actionfaces/images")
VOID = {"meta", "col"}


class Page(html.parser.HTMLParser):
    """The page's elements, texts and links; tags must be balanced."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.links, self.tags, self.rows = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self.links += [attributes[key] for key in ("src", "href") if key in attributes]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data + " "

    def count(self, tag: str, style: str) -> int:
        return sum(t == tag and style in a.get("class", "").split() for t, a in self.tags)


def evaluation() -> protocol.Evaluation:
    answers = [("surprise", "surprise")] * 8 + [("surprise", "fear")] * 2
    answers += [("fear", "fear")] * 3 + [("fear", None)]
    return protocol.evaluate(
        [
            protocol.Prediction(
                id=str(n),
                source="actionfaces/images:test",
                label=label,
                predicted=predicted,
                text="…",
                scores=None,
                parsed="word" if predicted else "none",
            )
            for n, (label, predicted) in enumerate(answers)
        ],
        SPACE,
    )


def item(predicted, *, frames=1, text="It looks like fear.") -> report.Exhibit:
    picture = np.full((96, 96, 3), 200, np.uint8)
    points = np.stack([np.arange(68), 10 + np.arange(68)], -1).astype(np.float32)
    return report.Exhibit(
        id="test-3",
        frames=[picture] * frames,
        landmarks=[points, *[None] * (frames - 1)],
        label="fear",
        predicted=predicted,
        text=text,
    )


@pytest.fixture
def full() -> report.Report:
    steps = np.arange(50)
    return report.Report(
        title="EMO-LLaMA & co",
        lede="One command.",
        numbers=[report.Numbers(title="Images", source="test split", evaluation=evaluation())],
        pictures=[item("fear"), item("surprise"), item(None)],
        clips=[item("fear", frames=8)],
        curves=[
            report.Curve(
                title="Loss",
                label="loss",
                note="of the answers",
                steps=steps,
                values=3 * np.exp(-steps / 9) + 0.25,
                marks=[(20, "interrupted"), (45, "again")],
            )
        ],
        tables=[
            report.Table(title="Ablation", note="", head=("", "WAR"), rows=[("no FIM", "0.81")])
        ],
        seconds={"train": 90.0, "evaluate": 30.0},
        command="emollama demo --out demo_out",
        config="name: tiny\n",
        versions={"jax": "0.10.2"},
    )


def test_the_page_stands_alone(full, tmp_path):
    path = tmp_path / "deep" / "report.html"
    report.write_report(path, full)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.links
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    assert "http" not in text
    assert not re.search(r"@import|url\(|<script", text)
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_the_numbers_are_those_of_the_evaluation(full):
    text, e = report.render(full), evaluation()
    page = Page(text)
    assert f'"number">{100 * 11 / 14:.1f}<' in text
    assert f'"number">{100 * (0.8 + 0.75) / 2:.1f}<' in text
    assert f"{100 * e.war_interval.low:.1f} – {100 * e.war_interval.high:.1f}" in text
    rows = {row[0].strip(): row for row in page.rows if len(row) == 10}
    assert rows["surprise"][1].split() == ["80", "8"]
    assert rows["surprise"][2].split() == ["20", "2"]
    assert rows["fear"][8].split() == ["25", "1"]  # the column of unparsed answers
    assert rows["fear"][9].strip() == "4"
    bars = {row[0].strip(): row for row in page.rows if len(row) == 7}
    low, high = e.recall_interval[0].low, e.recall_interval[0].high
    spread = f"{100 * low:.1f} – {100 * high:.1f}"
    cells = [cell.strip() for cell in bars["surprise"][2:]]
    assert cells == ["80.0", spread, "100.0", "88.9", "10"]
    assert [cell.strip() for cell in bars["anger"][2:]] == ["–", "–", "–", "–", "0"]
    whisker = f'<u style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%">'
    assert text.count("<u ") == 2  # two classes have items
    assert whisker in text


def test_no_column_for_unparsed_answers_where_there_are_none(full):
    predictions = [
        protocol.Prediction(
            id="1", source="s", label="fear", predicted="fear", text="", scores=None, parsed="exact"
        )
    ]
    few = dataclasses.replace(full.numbers[0], evaluation=protocol.evaluate(predictions, SPACE))
    page = Page(report.render(dataclasses.replace(full, numbers=[few])))
    assert not [row for row in page.rows if len(row) == 10]
    assert len([row for row in page.rows if len(row) == 9]) == 8


def test_wrong_answers_are_marked_and_only_those(full):
    text = report.render(full)
    page = Page(text)
    assert page.count("figure", "item") == 4
    assert page.count("figure", "wrong") == 2
    assert text.count("✗ surprise") == 1
    assert text.count("✗ no class named") == 1
    assert text.count("(true: fear)") == 2
    assert text.count("✓ fear") == 2


def test_a_picture_without_a_label_is_not_judged(full):
    photo = dataclasses.replace(item("a photograph"), label=None)
    text = report.render(dataclasses.replace(full, pictures=[photo], clips=[]))
    page = Page(text)
    assert (page.count("figure", "item"), page.count("figure", "wrong")) == (1, 0)
    assert "a photograph</span>" in text
    assert not any(mark in text for mark in ("✓", "✗", "(true: "))


def test_text_from_outside_is_text(full):
    evil = '<script>alert("1")</script>'
    changed = dataclasses.replace(
        full,
        title=evil,
        lede=evil,
        pictures=[dataclasses.replace(item(evil, text=evil), id=evil)],
        command=evil,
        config=evil,
        versions={evil: evil},
        seconds={evil: 1.0},
        tables=[report.Table(title=evil, note=evil, head=(evil,), rows=[(evil, evil)])],
    )
    text = report.render(changed)
    Page(text)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 15


def test_what_is_empty_is_left_out(full):
    bare = dataclasses.replace(full, pictures=(), clips=(), curves=(), tables=(), seconds={})
    text = report.render(bare)
    Page(text)
    for heading in ("Held-out", "Training", "Ablation", "Time"):
        assert heading in report.render(full)
        assert f"<h2>{heading}" not in text


def test_a_failed_write_leaves_the_old_page(full, tmp_path):
    path = tmp_path / "report.html"
    report.write_report(path, full)
    before = path.read_bytes()
    with pytest.raises(AttributeError):
        report.write_report(path, dataclasses.replace(full, title=None))
    assert path.read_bytes() == before


def test_faces_lie_under_their_landmarks():
    svg = charts.faces(item("fear", frames=2).frames, item("fear", frames=2).landmarks, alt="two")
    assert 'viewBox="0 0 196 96"' in svg  # two frames and a gap of 4 pixels
    assert svg.count("<image") == 2
    assert svg.count('class="mesh"') == 1
    mesh = re.search(r'class="mesh"[^>]* d="([^"]*)"', svg)[1]
    assert mesh.startswith("M0.5 10.5L1.5 11.5L")  # pixel centres lie half a pixel inside
    assert (mesh.count("M"), mesh.count("Z")) == (9, 4)  # eyes and lips are closed lines
    uri = re.search(r"base64,([^\"]+)", svg)[1]
    picture = Image.open(io.BytesIO(base64.b64decode(uri)))
    assert picture.size == (96, 96)
    assert abs(int(np.asarray(picture).mean()) - 200) <= 2


def path_of(svg: str, style: str) -> str:
    return re.search(rf'class="{style}" d="([^"]*)"', svg)[1]


def test_a_curve_falls_where_its_values_fall_and_breaks_where_they_are_no_numbers():
    values = [4.0, 2.0, math.nan, 0.0]
    svg = charts.curve(range(4), values, label="loss", marks=[(3, "end")])
    points = re.findall(r"([ML])([\d.]+) ([\d.]+)", path_of(svg, "raw"))
    assert [kind for kind, *_ in points] == ["M", "L", "M"]
    x, y = np.array([point[1:] for point in points], float).T
    np.testing.assert_allclose(np.diff(x) / (x[1] - x[0]), [1, 2])
    assert y[0] < y[1] < y[2]
    assert y[1] == pytest.approx((y[0] + y[2]) / 2)
    assert 'text-anchor="end">end<' in svg  # a mark at the right edge is written to its left
    nothing = charts.curve(range(2), [math.nan] * 2, label="loss", marks=[])
    assert nothing == '<p class="note">loss: no finite value in 2 steps.</p>'


def test_running_mean():
    values = np.array([1.0, 2.0, np.nan, 4.0, 9.0])
    mean = charts.running_mean(values, np.isfinite(values), reach=1)
    np.testing.assert_allclose(mean, [1.5, 1.5, 3, 6.5, 6.5])
    np.testing.assert_array_equal(
        charts.running_mean(np.full(3, np.nan), np.zeros(3, bool), reach=1), [np.nan] * 3
    )


@pytest.mark.parametrize("low, high", [(0, 3.4), (0, 0.07), (0, 299), (100, 1234), (0, 0)])
def test_ticks_are_round_and_cover_the_range(low, high):
    found = charts.ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert len(found) <= 8
    steps = np.diff(found)
    np.testing.assert_allclose(steps, steps[0])
    assert float(f"{steps[0]:.1e}"[:3]) in (1, 2, 2.5, 5)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (7.24, "7.2 s"),
        (59.7, "1 min 00 s"),
        (44, "44 s"),
        (372.4, "6 min 12 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations(seconds, text):
    assert report.duration(seconds) == text


# ---- what an evaluation leaves behind


def scored(number: int, label: str, scores: dict[str, float], **change) -> protocol.Prediction:
    fields = {
        "id": f"item-{number}",
        "source": "raf_db:test",
        "label": label,
        "predicted": max(scores, key=scores.__getitem__),
        "text": None,
        "scores": scores,
        "parsed": "score",
    }
    return protocol.Prediction(**fields | change)


@pytest.fixture
def left(tmp_path):
    """The folder of an evaluation whose model is 95 % sure and right three times in four."""
    space = LABEL_SPACES["raf_db"]
    sure = {name: math.log(0.95 if name == "fear" else 0.05 / 6) for name in space.classes}
    items = [scored(n, "fear" if n % 4 else "anger", sure) for n in range(40)]
    unsure = {name: math.log(0.4 if name == "fear" else 0.1) for name in space.classes}
    items.append(scored(40, "disgust", unsure, text="<b>fear</b>"))
    result = Result(
        title="RAF-DB_test",
        lede="",
        source="raf_db",
        answers=[Answers.of("label scoring", items, space)],
        predictions={"predictions.jsonl": items},
        settings=Settings("emollama eval", "a: 1\n", {}),
        trace={"predictions.jsonl": "0123abcd"},
    )
    publish(result, tmp_path)
    return tmp_path


def test_results_say_the_same_in_html_json_and_latex(left):
    text = (left / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert [link for link in page.links if not link.startswith("data:")] == []
    tree = json.loads((left / "evaluation.json").read_text())
    assert tree["war"] == 30 / 41
    assert tree["trace"] == {"predictions.jsonl": "0123abcd"}
    assert "0123abcd" in text
    gap = abs(40 * (0.95 - 0.75) + 1 * (0.4 - 0)) / 41
    assert tree["calibration"]["error"] == pytest.approx(gap)
    assert tree["calibration"]["count"] == [0, 0, 0, 0, 1, 0, 0, 0, 0, 40]
    assert f"calibration error: {100 * gap:.1f} %" in text
    assert text.count('class="end"') == 2  # dots of two filled bins
    table = (left / "table.tex").read_text()
    assert "RAF-DB\\_test" in table
    assert "73.17" in table and "92.21" in table
    assert (table.count("{"), table.count("\\begin")) == (table.count("}"), 2)
    rows = [row for row in page.rows if row[0].strip() in ("POSTER++", "GPT-4V")]
    assert [row[-1].strip() for row in rows] == ["92.21", "75.81"]


def test_the_surest_mistakes_come_first_and_no_picture_is_shown_unasked(left):
    text = (left / "report.html").read_text(encoding="utf-8")
    assert "<image" not in text and "<img" not in text
    rows = [row[0].strip() for row in Page(text).rows if row and row[0].strip().startswith("item-")]
    assert rows == ["item-0", "item-4", "item-8", "item-40"]  # three of one confusion, no more
    assert "&lt;b&gt;fear&lt;/b&gt;" in text


def test_mistakes_with_pictures(full):
    text = report.render(dataclasses.replace(full, mistakes=[item("surprise", frames=4)]))
    Page(text)
    assert "<h2>Worst mistakes" in text
    assert text.count('class="item wrong"') == 3


def test_reliability_lies_on_the_diagonal_where_a_model_knows_what_it_knows():
    found = metrics.Calibration(
        confidence=np.array([0.25, 0.75]),
        accuracy=np.array([0.25, 0.75]),
        count=np.array([5, 10]),
        error=0.0,
    )
    svg = charts.reliability(found, alt="a & b")
    diagonal = re.findall(r"[\d.]+", path_of(svg, "mark"))
    (x0, y0, x1, y1) = map(float, diagonal)
    for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg):
        share = (float(x) - x0) / (x1 - x0)
        assert float(y) == pytest.approx(y0 + share * (y1 - y0), abs=0.1)
        assert share in (pytest.approx(0.25, abs=1e-3), pytest.approx(0.75, abs=1e-3))
    assert "a &amp; b" in svg


def test_published_numbers_are_of_the_set_that_was_tested():
    assert [row.war for row in published("mafw/fold1")] == [
        57.68,
        57.37,
        54.31,
        52.55,
        48.82,
        45.89,
        26.98,
    ]
    assert {row.model for row in published("ferplus")} == {"GPT-4V", "Exp-CLIP L/14", "SCN"}
    assert all(
        (row.uar is None) == (name in ("raf_db", "ferplus", "affectnet7", "affectnet8"))
        for name in LABEL_SPACES
        for row in published(name)
    )
    assert published("own/faces") == published("actionfaces/images") == []


def test_latex_escapes():
    assert latex.escape("50% of A_b & {c} ~ \\") == (
        r"50\% of A\_b \& \{c\} \textasciitilde{} \textbackslash{}"
    )
