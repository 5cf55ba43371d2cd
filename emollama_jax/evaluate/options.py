"""What `emollama zero-shot` takes."""

import dataclasses
import pathlib
from typing import Literal

import tyro

from emollama_jax.errors import UserError
from emollama_jax.remote.options import LIMITS, Limits


@dataclasses.dataclass(frozen=True)
class ZeroShot:
    """Which model answers about which split, and what it is shown."""

    model: str
    """hf:PATH, openai:URL#MODEL or gemini:MODEL."""
    data: str
    """a prepared set, e.g. raf_db, dfew or actionfaces/images."""
    fold: str | None = None
    """fold of dfew and mafw: its number, or all, which adds their mean."""
    split: str = "test"
    """split of the set."""
    dir: str = "data"
    """data folder."""
    frames: int = 8
    """frames shown of a clip: the centres of so many segments."""
    crop: Literal["whole", "face"] = "whole"
    """whole pictures, or the face crop of the set's face priors (emollama data prepare)."""
    side: int = 384
    """pixels of a picture's longer side as it is sent; larger ones are shrunk."""
    order: Literal["native", "shuffled"] = "native"
    """order of the options in the question; shuffled differs from example to example."""
    without: str | None = None
    """a second number, without the items that also stand in this split, e.g. train."""
    limit: int | None = None
    """number of examples, the first ones: a trial, no result; all by default."""
    out: pathlib.Path | None = None
    """folder of journal.jsonl (the cache of answers), predictions.jsonl, evaluation.json, table.tex
    and report.html; runs/zero-shot/MODEL/DATA-SPLIT by default."""
    max_tokens: int = 64
    """tokens of an answer, at most."""
    thinking_tokens: int = 0
    """Gemini's thoughts before an answer, at most; 0 is none, -1 leaves it to the model."""
    base_url: str | None = None
    """address of another server that speaks Gemini's API."""
    limits: tyro.conf.OmitArgPrefixes[Limits] = LIMITS
    """limits of speed, tries and cost."""

    def __post_init__(self):
        for name in ("frames", "side", "max_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}, wanted at least 1")
