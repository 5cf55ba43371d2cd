"""The field's numbers, for comparison with a result: UAR and WAR in per cent, as published.

Quoted, not measured here: other frames, crops, prompts and training data are behind each.
Only numbers whose origin is public are listed; None is what was not published.
"""

import dataclasses

from emollama_jax.data.sets import parse


@dataclasses.dataclass(frozen=True)
class Published:
    """One model's result on one set, in per cent."""

    model: str
    how: str  # zero-shot, tuned or supervised
    uar: float | None
    war: float  # accuracy, where a set has one number


def _row(model: str, how: str, numbers: str) -> tuple[tuple[str, Published], ...]:
    """(set, result) of "set uar/war; set war; …"."""
    found = []
    for piece in numbers.split(";"):
        name, value = piece.split()
        uar, _, war = value.rpartition("/")
        found.append((name, Published(model, how, float(uar) if uar else None, float(war))))
    return tuple(found)


_ROWS = (
    *_row(
        "GPT-4V",
        "zero-shot",
        "raf_db 75.81; affectnet8 42.77; ferplus 64.25; dfew 36.96/43.80; ferv39k 24.92/34.29",
    ),
    *_row("GPT-4o (with audio)", "zero-shot", "dfew 50.57/57.19; mafw 38.29/48.82"),
    *_row("Video-LLaVA", "zero-shot", "raf_db 54.5; dfew 22.0/32.6"),
    *_row("Qwen2-VL-7B", "zero-shot", "dfew 43.08/52.83; mafw 31.67/45.89"),
    *_row(
        "Exp-CLIP L/14",
        "zero-shot",
        "raf_db 65.37; affectnet7 44.27; affectnet8 38.43; ferplus 55.42; dfew 40.16/47.09; "
        "ferv39k 27.45/31.07; mafw 23.95/26.98",
    ),
    *_row("Face-LLaVA", "zero-shot", "raf_db 78.0; dfew 46.9/56.4"),
    *_row("Face-LLaVA", "tuned", "raf_db 92.1; dfew 62.5/74.5"),
    *_row("Emotion-LLaMA (with audio)", "zero-shot", "dfew 45.59/59.37"),
    *_row("Emotion-LLaMA (with audio)", "tuned", "dfew 64.21/77.06"),
    *_row("EmoLA", "zero-shot", "raf_db 74.1"),
    *_row("EmoLA (middle frame)", "zero-shot", "dfew 34.6/44.9"),
    *_row("EmoLA", "tuned", "raf_db 92.1"),
    *_row("ExpLLM", "tuned", "raf_db 91.03; affectnet7 65.93; affectnet8 62.86"),
    *_row("EMO-LLaMA (as quoted by Face-LLaVA)", "tuned", "dfew 60.2/65.9"),
    *_row("R1-Omni", "tuned", "dfew 56.27/65.83; mafw 40.04/57.68"),
    *_row("POSTER++", "supervised", "raf_db 92.21; affectnet7 67.49; affectnet8 63.77"),
    *_row("SCN", "supervised", "raf_db 87.03; affectnet8 60.23; ferplus 89.35"),
    *_row("DFER-CLIP", "supervised", "dfew 59.61/71.25; ferv39k 41.27/51.65; mafw 39.89/52.55"),
    *_row("MAE-DFER", "supervised", "dfew 63.41/74.43; ferv39k 43.12/52.07; mafw 41.62/54.31"),
    *_row("S2D", "supervised", "dfew 61.82/76.03; ferv39k 41.28/52.56; mafw 41.86/57.37"),
)


def published(source: str) -> list[Published]:
    """The field's numbers on a set, best WAR first; none for a user's own data."""
    name = parse(source).family
    return sorted((row for of, row in _ROWS if of == name), key=lambda row: -row.war)
