"""How long the examples of a mixture are, without decoding any: what packing and plans go by."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from emollama_jax.batch import IGNORE
from emollama_jax.config import Config, PackedConfig
from emollama_jax.data.elements import Encoder, Examples, Text
from emollama_jax.data.pipeline import draw_mixture, open_sources
from emollama_jax.data.rows import RowShape, pack
from emollama_jax.data.split import Split
from emollama_jax.errors import UserError
from emollama_jax.terms import Kind

DRAWN = 1000  # examples that a mean is taken of
FITTED = 200  # of these, where rows are fitted to them
FILLED = 0.95  # of a row's tokens, where it is fitted
MULTIPLE = 8  # that a fitted row's tokens are rounded up to


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Means over examples."""

    count: int  # examples drawn
    tokens: float
    squares: float  # of the number of tokens
    labels: float  # tokens that bear loss
    frames: float
    asked: float  # pairs of a frame and a question
    question: float  # tokens of a question, over the pairs


def measure(
    cfg: Config, splits: Sequence[Split] | None = None, *, kind: Kind | None, count: int = DRAWN
) -> Lengths:
    """Draws examples as training does, and encodes their text.

    Args:
        cfg: the run.
        splits: splits of its sources; None: those in `data.dir`.
        kind: the kind of the sources to draw from; None for all.
        count: number of examples.

    Raises:
        UserError: no such source, or not prepared, or no tokenizer.
    """
    splits = open_sources(cfg) if splits is None else splits
    encoder = Encoder(cfg)
    chosen = [
        (source, split)
        for source, split in zip(cfg.data.sources, splits, strict=True)
        if kind in (None, source.kind)
    ]
    if not chosen:
        raise UserError(f"data.sources has no {kind}s: choose another --kind")
    data = dataclasses.replace(cfg.data, sources=tuple(source for source, _ in chosen))
    rows = []
    for of, text in _told(
        dataclasses.replace(cfg, data=data), encoder, [y for _, y in chosen], count
    ):
        frames, tokens, rounds = encoder.frames(of), len(text.ids), len(text.questions)
        words = sum(len(ids) for ids in text.questions)
        labels = int((text.labels != IGNORE).sum())
        rows.append((tokens, tokens**2, labels, frames, frames * rounds, frames * words))
    *means, asked, words = np.mean(rows, axis=0).tolist()
    return Lengths(count, *means, asked=asked, question=words / max(asked, 1e-9))


def fitted(cfg: Config, splits: Sequence[Split] | None = None, *, steps: int = 8) -> PackedConfig:
    """Packed rows that hold the sources' examples: as many a row as fit, `tokens` long or little
    longer, the other sizes as some drawn steps need them.

    Args:
        cfg: the run, with `data.packed`, whose number of rows is kept.
        splits: splits of its sources; None: those in `data.dir`.
        steps: drawn steps.

    Raises:
        UserError: as `measure`.
    """
    packed = cfg.data.packed
    assert packed is not None
    splits = open_sources(cfg) if splits is None else splits
    longest = dataclasses.replace(packed, tokens=cfg.model.llama.reach)
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, packed=longest))
    encoder = Encoder(cfg)
    mean = measure(cfg, splits, kind=None, count=FITTED)
    examples = max(1, int(FILLED * packed.tokens / mean.tokens))
    size = packed.rows * examples
    drawn = _told(cfg, encoder, splits, steps * size)
    row = RowShape(
        tokens=max(packed.tokens, int(mean.tokens)),
        frames=max(1, round(mean.frames * examples)),
        again=round((mean.asked - mean.frames) * examples),
        questions=2 * examples * cfg.data.rounds,
        question_length=cfg.data.question_length,
        examples=2 * examples,
    )
    needed = [
        pack(drawn[i : i + size], encoder=encoder, rows=packed.rows, shape=row).needed
        for i in range(0, len(drawn), size)
    ]
    asked = max((len(ids) for _, text in drawn for ids in text.questions), default=1)
    return PackedConfig(
        rows=packed.rows,
        examples=examples,
        tokens=-(-max(shape.tokens for shape in needed) // MULTIPLE) * MULTIPLE,
        frames=max(shape.frames for shape in needed),
        again=max(shape.again for shape in needed),
        question_length=min(-(-asked // 4) * 4, cfg.data.question_length),
    )


def _told(
    cfg: Config, encoder: Encoder, splits: Sequence[Split], count: int
) -> list[tuple[Kind, Text]]:
    """Kind and text of the first examples that training draws."""
    pairs = zip(cfg.data.sources, splits, strict=True)
    sources = [Examples(encoder, split, kind=x.kind, items=x.items) for x, split in pairs]
    drawn: Any = draw_mixture(sources, cfg)
    return [
        (sources[number].kind, sources[number].told(position, seed=seed).text)
        for number, position, seed in (drawn[i] for i in range(count))
    ]
