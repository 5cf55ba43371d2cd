"""The report of a run as one HTML file: numbers, curves, held-out faces, and how it was made.

The page needs nothing beside itself: pictures are embedded, charts are inline SVG (`charts.py`),
the style (`report.css`) follows the reader's light or dark setting and prints on paper.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from etils import epath

from emollama_jax.evaluate import charts
from emollama_jax.evaluate.metrics import Calibration, Interval
from emollama_jax.evaluate.protocol import Evaluation, unparsed_warning
from emollama_jax.paths import as_path, write_whole

_STYLE = pathlib.Path(__file__).with_name("report.css")
_STRONG = 0.7  # tint from which a cell's text is white


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbers:
    """The numbers of one test set."""

    title: str  # "Images"
    source: str  # what was tested, in a sentence
    evaluation: Evaluation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """A value over training steps."""

    title: str
    label: str  # of the values, e.g. "loss, nats a token"
    note: str
    steps: Sequence[int]
    values: Sequence[float]
    marks: Sequence[tuple[int, str]] = ()  # (step, what happened there)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exhibit:
    """A held-out picture (one frame) or clip (its filmstrip) and what the model made of it."""

    id: str
    frames: Sequence[np.ndarray]  # uint8 [h, w, 3]
    landmarks: Sequence[np.ndarray | None]  # float [68, 2] of each frame, pixels; None: no face
    label: str | None  # None: nothing is judged, `predicted` is what stands below it
    predicted: str | None
    text: str  # the model's answer
    question: str = ""  # that it answers; "" where a page asks one question throughout
    boxes: Sequence[Sequence[float]] = ()  # of faces: left, top, right, bottom, pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table with a heading; the first column names the row."""

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    own: Sequence[int] = ()  # numbers of the rows to stand out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that the page says. What is empty is left out."""

    title: str
    lede: str  # what was done, in a sentence or two
    numbers: Sequence[Numbers]
    photographs: Sequence[Exhibit] = ()  # real ones, on top
    photographs_note: str = ""  # who answers about them
    pictures: Sequence[Exhibit] = ()
    clips: Sequence[Exhibit] = ()
    mistakes: Sequence[Exhibit] = ()  # worst first
    calibrations: Sequence[tuple[str, Calibration]] = ()  # title, of label scoring
    curves: Sequence[Curve] = ()
    tables: Sequence[Table] = ()  # difficulty, ablation
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)  # stage → duration
    command: str
    config: str  # the whole config as YAML
    versions: Mapping[str, str]
    trace: Mapping[str, str] = dataclasses.field(default_factory=dict)  # what → hash or file


DEFINITIONS = (
    "WAR: share of correct answers. UAR: mean recall of the classes that occur. "
    "An answer that names no class, or two, is wrong."
)


def write_report(path: epath.PathLike, report: Report) -> None:
    """Writes the page; it appears whole or not at all."""
    write_whole(as_path(path), render(report))


def render(report: Report) -> str:
    """The page as text."""
    sections = [
        _section("Held-out faces", _SEEN, _gallery(report.pictures, "faces")),
        _section("Held-out clips", _SEEN_CLIPS, _gallery(report.clips, "clips")),
        _section("Training", "", "".join(map(_curve, report.curves))),
        *map(_confusion, report.numbers),
        *(_section(table.title, table.note, _table(table)) for table in report.tables),
        _section("Worst mistakes", _WORST, _gallery(report.mistakes, _style(report.mistakes))),
        _section("Calibration", _CALIBRATION, "".join(map(_calibration, report.calibrations))),
        _section("Time", "", _seconds(report.seconds)),
        _section("How it was made", "", _making(report)),
    ]
    photographs = _gallery(report.photographs, "photographs")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.title)}</title>\n"
        f"<style>\n{_STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{escape(report.title)}</h1>\n"
        f'<p class="lede">{escape(report.lede)}</p>\n<p class="note">{DEFINITIONS}</p>\n'
        f"{''.join(map(_warning, report.numbers))}</header>\n"
        f"{_section('Real photographs', report.photographs_note, photographs)}"
        f'<div class="cards">{"".join(map(_card, report.numbers))}</div>\n'
        f"{''.join(sections)}"
        "</body>\n</html>\n"
    )


_SEEN = (
    "With the landmarks that were found. Below each: the emotion that the answer names, right or "
    "wrong, then the question and the answer. Wrong ones are framed, with the true emotion beside."
)
_WORST = (
    "Wrong answers with the highest scores where labels were scored; else the "
    "first of the most frequent confusions."
)
_CALIBRATION = (
    "Label scoring: the probability that the model gives its answer (softmax over the labels) "
    "against how often it is right. On the dashed line it is calibrated; below, "
    "overconfident. Larger dots stand for more answers."
)
_SEEN_CLIPS = "From left to right in time. Wrong answers are framed."


def percent(share: float, digits: int = 1) -> str:
    """0.8734 → "87.3"; a share that does not exist (nan) → "–"."""
    return "–" if share != share else f"{100 * share:.{digits}f}"


def spread(interval: Interval) -> str:
    """An interval of a share in per cent, e.g. "71.2 – 80.9"; "–" for one that does not exist."""
    low, high = interval.low, interval.high
    return "–" if low != low else f"{percent(low)} – {percent(high)}"


def duration(seconds: float) -> str:
    """372.4 → "6 min 12 s"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _section(title: str, note: str, body: str) -> str:
    if not body:
        return ""
    note = f'<p class="note">{escape(note)}</p>\n' if note else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{note}{body}\n</section>\n"


def _warning(numbers: Numbers) -> str:
    text = unparsed_warning([numbers.evaluation])
    return f'<p class="alert">{escape(numbers.title)}: {escape(text)}</p>\n' if text else ""


def _card(numbers: Numbers) -> str:
    """Headline numbers of one test set."""
    e = numbers.evaluation
    by = " by person" if e.clustered else ""
    return (
        f'<div class="card"><h3>{escape(numbers.title)}</h3>'
        f'<p class="note source">{escape(numbers.source)}</p><dl>'
        f"{_headline('WAR', e.war, e.war_interval, e.level)}"
        f"{_headline('UAR', e.uar, e.uar_interval, e.level)}</dl>"
        f'<p class="note">{e.n:,} items. {percent(e.unparsed)}\u00a0% of the answers named no '
        f"class. Intervals: {100 * e.level:g}\u00a0%, bootstrap{by}.</p></div>"
    )


def _headline(name: str, value: float, interval: Interval, level: float) -> str:
    low, high = interval.low, interval.high
    return (
        f'<div><dt>{name}</dt><dd><span class="number">{percent(value)}<small> %</small></span>'
        f'<div class="range"><i style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></i>'
        f'<b style="left:{100 * value:.2f}%"></b></div>'
        f'<span class="note" title="{100 * level:g} % interval">{spread(interval)}'
        "</span></dd></div>"
    )


def _gallery(items: Sequence[Exhibit], style: str) -> str:
    if not items:
        return ""
    return f'<div class="items {style}">{"".join(map(_exhibit, items))}</div>'


def _exhibit(item: Exhibit) -> str:
    answer = item.predicted or "no class named"
    wrong, alt = False, f"{item.id}: true {item.label}, answered {answer}"
    if item.label is None:
        verdict, alt = f"<span>{escape(answer)}</span>", f"{item.id}: {answer}"
    elif item.predicted == item.label:
        verdict = f'<span class="good">✓ {escape(answer)}</span>'
    else:
        wrong = True
        verdict = (
            f'<span class="bad">✗ {escape(answer)}</span> '
            f'<span class="true">(true: {escape(item.label)})</span>'
        )
    question = f'<p class="question">{escape(item.question)}</p>' if item.question else ""
    return (
        f'<figure class="item{" wrong" if wrong else ""}" title="{escape(item.id)}">'
        f"{charts.faces(item.frames, item.landmarks, alt=alt, boxes=item.boxes)}"
        f"<figcaption>{verdict}{question}<blockquote>{escape(item.text)}</blockquote></figcaption></figure>"
    )


def _style(items: Sequence[Exhibit]) -> str:
    return "clips" if items and len(items[0].frames) > 1 else "faces"


def _calibration(titled: tuple[str, Calibration]) -> str:
    title, calibration = titled
    error = f"Expected calibration error: {percent(calibration.error)} %."
    drawn = charts.reliability(calibration, alt=f"{title}: reliability diagram")
    return f"<h3>{escape(title)}</h3>\n<p class='note'>{error}</p>\n<figure>{drawn}</figure>\n"


def _curve(curve: Curve) -> str:
    drawn = charts.curve(curve.steps, curve.values, label=curve.label, marks=curve.marks)
    return (
        f"<h3>{escape(curve.title)}</h3>\n<p class='note'>{escape(curve.note)}</p>\n"
        f"<figure>{drawn}</figure>\n"
    )


def _confusion(numbers: Numbers) -> str:
    e = numbers.evaluation
    read = ", ".join(f"{how} {count:,}" for how, count in sorted(e.parsed.items()))
    none = ' "None" counts answers that named no class, or two.' if e.unparsed else ""
    note = (
        "Rows are the true classes, columns the answers; each cell shows the share of its row in "
        f"per cent and the count.{none} How the answers were read: {read}."
    )
    body = f"<figure class='scroll'>{_heat(e)}</figure>\n<h3>Per class</h3>\n{_bars(e)}"
    return _section(f"{numbers.title}: what was taken for what", note, body)


def _heat(e: Evaluation) -> str:
    """The confusion matrix; the column of unparsed answers only where there are any."""
    columns = [*e.classes, "none"] if e.confusion[:, -1].any() else [*e.classes]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    rows = []
    for r, name in enumerate(e.classes):
        total = int(e.confusion[r].sum())
        cells = "".join(
            _cell(int(e.confusion[r, c]), total, right=r == c) for c in range(len(columns))
        )
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}<th>{total:,}</th></tr>')
    return (
        '<table class="heat"><colgroup><col class="names"></colgroup>'
        f'<thead><tr><th class="axis">true ↓ answer →</th>{head}<th class="axis">items</th></tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _cell(count: int, total: int, *, right: bool) -> str:
    share = count / total if total else 0.0
    tint = share if right else share**0.6  # a tenth gone astray shall be seen
    style = " ".join(
        name for name, holds in (("strong", tint >= _STRONG), ("empty", not count)) if holds
    )
    tone = "good" if right else "bad"
    return (
        f'<td class="{style}" style="--tone:var(--{tone}-fill);--tint:{100 * tint:.0f}%">'
        f"{percent(share, 0)}<small>{count:,}</small></td>"
    )


def _bars(e: Evaluation) -> str:
    """Recall of each class as a bar, beside precision, F1 and support; UAR as a line."""
    rows = []
    scores = e.per_class
    for c, name in enumerate(e.classes):
        recall = scores.recall[c]
        width = 0.0 if np.isnan(recall) else 100 * recall
        low, high = e.recall_interval[c].low, e.recall_interval[c].high
        whisker = (
            ""
            if np.isnan(low)
            else f'<u style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></u>'
        )
        rows.append(
            f'<tr><th scope="row">{escape(name)}</th><td class="bar"><div>'
            f'<i style="width:{width:.1f}%"></i>{whisker}'
            f'<b style="left:{100 * e.uar:.1f}%"></b></div></td>'
            f"<td>{percent(recall)}</td><td>{spread(e.recall_interval[c])}</td><td>{percent(scores.precision[c])}</td>"
            f"<td>{percent(scores.f1[c])}</td><td>{scores.support[c]:,}</td></tr>"
        )
    return (
        '<div class="scroll"><table class="bars"><thead><tr><th></th>'
        f"<th>recall (dashed: UAR {percent(e.uar)} %)</th><th>recall</th>"
        f'<th title="Wilson">{100 * e.level:g} % interval</th><th>precision</th>'
        f"<th>F1</th><th>items</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
    rows = "".join(
        f'<tr{" class=own" if number in table.own else ""}><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for number, row in enumerate(table.rows)
    )
    return (
        f'<div class="scroll"><table class="plain"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _seconds(seconds: Mapping[str, float]) -> str:
    if not seconds:
        return ""
    total = sum(seconds.values())
    rows = "".join(
        f'<tr><th scope="row">{escape(stage)}</th><td class="bar"><div>'
        f'<i style="width:{100 * spent / total:.1f}%"></i></div></td>'
        f"<td>{duration(spent)}</td></tr>"
        for stage, spent in seconds.items()
    )
    whole = f'<tr><th scope="row">all</th><td></td><td>{duration(total)}</td></tr>'
    return f'<div class="scroll"><table class="bars"><tbody>{rows}{whole}</tbody></table></div>'


def _making(report: Report) -> str:
    versions = Table(title="", note="", head=("", "version"), rows=list(report.versions.items()))
    rows = list(report.trace.items())
    trace = Table(title="", note="", head=("", "file, or SHA-256 of it"), rows=rows)
    return (
        f'<h3>Command</h3>\n<pre class="command">{escape(report.command)}</pre>\n'
        f"<h3>Versions</h3>\n{_table(versions)}\n"
        + (f"<h3>Where the numbers come from</h3>\n{_table(trace)}\n" if rows else "")
        + f"<h3>Config</h3>\n<pre>{escape(report.config)}</pre>\n"
    )
