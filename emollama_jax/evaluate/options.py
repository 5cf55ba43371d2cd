"""What the verbs that evaluate take: `emollama eval` and `emollama zero-shot`."""

import dataclasses
import pathlib
from typing import Annotated, Literal

import tyro

from emollama_jax.preflight import at_least
from emollama_jax.remote.options import LIMITS, Limits

Answering = Literal["generate", "score"]
Order = Literal["native", "shuffled"]  # of the options in a question
DirectoryArg = tyro.conf.arg(metavar="DIR")


@dataclasses.dataclass(frozen=True)
class Tested:
    """A run, and the prepared split that it is tested on."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = ""
    """folder of `emollama train`, or one checkpoint in it; gs:// too; or package, the one
    that the package carries. With --fold all, {fold} in it is replaced by the number: one
    run for each fold."""
    overrides: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[KEY=VALUE …]")
    ] = ()
    """changes of the sections mesh, distributed and generate."""
    source: str | None = None
    """data set, e.g. raf_db, dfew; actionfaces/images by default. With --predictions: the
    set whose classes count; what the file says by default."""
    split: str = "test"
    """split of the data set."""
    fold: str | None = None
    """fold of dfew and mafw: 1 … 5, or all: the mean over the five."""
    dir: Annotated[str | None, DirectoryArg] = None
    """data folder; the run's by default, data for --predictions. What is prepared there
    tells the age, gender and race that the face network sees: errors by group."""

    @property
    def name(self) -> str:
        """The set that a run is tested on."""
        return self.source or "actionfaces/images"


@dataclasses.dataclass(frozen=True)
class Asking:
    """How a run is asked, and what is shown of it."""

    answering: Literal["both", "generate", "score"] = "both"
    """the written answer, parsed; the likeliest label word; or both."""
    asked: str | None = None
    """set whose label words the question lists, e.g. the one that was trained on."""
    order: Order = "native"
    """order of the options in the question; shuffled measures position bias."""
    seed: int = 0
    """seed of shuffled options."""
    batch: int = 32
    """examples at a time."""
    pictures: bool = False
    """show mistakes of a set under a research licence in the report."""
    without: str | None = None
    """another split, e.g. train: a second number, without the items that also stand in
    it by their name or their content."""

    @property
    def ways(self) -> tuple[Answering, ...]:
        """The ways of answering, the headline first."""
        return ("generate", "score") if self.answering == "both" else (self.answering,)


@dataclasses.dataclass(frozen=True)
class PredictionFiles:
    """Anyone's predictions, and how to read them."""

    predictions: tuple[pathlib.Path, ...] = ()
    """a CSV, JSON or JSON lines file; or five, one for each fold of --source."""
    truth_column: str = "label"
    """column of the true label."""
    prediction_column: str = "predicted"
    """column of the answer: a label, a ranked list (its first counts), or free
    text."""
    id_column: str | None = None
    """column of the item's name, each once, by which the prepared set knows it; items
    are named by their line by default."""
    classes: str | None = None
    """label words with commas, for sets that are not known here."""


@dataclasses.dataclass(frozen=True)
class Output:
    """Where the numbers go."""

    json: bool = False
    """print WAR, UAR, n, unparsed, recall and errors by group as JSON, as shares."""
    out: Annotated[str | None, DirectoryArg] = None
    """folder of predictions.jsonl, evaluation.json, table.tex and report.html; RUN/eval by
    default, runs/package/eval for package, nothing for --predictions."""


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
    order: Order = "native"
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
        at_least(
            1, frames=self.frames, side=self.side, max_tokens=self.max_tokens, limit=self.limit
        )
