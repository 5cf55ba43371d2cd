"""Options of `emollama eval` and `emollama zero-shot`."""

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
    """A run and the prepared split to test it on."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = ""
    """run folder of `emollama train`, or one checkpoint in it; gs:// too; or package, the
    run that ships with the package. With --fold all, {fold} in it is replaced by the
    number: one run per fold."""
    overrides: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[KEY=VALUE …]")
    ] = ()
    """changes to the sections mesh, distributed and generate, or to model.llama.frozen,
    model.vision.frozen and model.face.frozen."""
    source: str | None = None
    """data set, e.g. raf_db, dfew; actionfaces/images by default. With --predictions: the
    set whose classes apply; taken from the file by default."""
    split: str = "test"
    """split of the data set."""
    fold: str | None = None
    """fold of dfew and mafw: 1 … 5, or all: the mean over the five."""
    dir: Annotated[str | None, DirectoryArg] = None
    """data folder; the run's by default, data for --predictions. Face priors in it give
    errors by group: age, gender and race as the face network sees them."""

    @property
    def name(self) -> str:
        """The set that a run is tested on."""
        return self.source or "actionfaces/images"


@dataclasses.dataclass(frozen=True)
class Asking:
    """How to ask a run, and what its report shows."""

    answering: Literal["both", "generate", "score"] = "both"
    """answer to use: the generated text, parsed; the likeliest label word; or both."""
    asked: str | None = None
    """set whose label words the question lists, e.g. the training set."""
    order: Order = "native"
    """order of the options in the question; shuffled measures position bias."""
    seed: int = 0
    """random seed of shuffled options."""
    batch: int = 32
    """examples per batch."""
    pictures: bool = False
    """show mistakes in the report even for a set under a research licence."""
    without: str | None = None
    """another split, e.g. train: adds a second number that leaves out items also found
    there, by name or by content."""

    @property
    def ways(self) -> tuple[Answering, ...]:
        """The ways of answering, the headline first."""
        return ("generate", "score") if self.answering == "both" else (self.answering,)


@dataclasses.dataclass(frozen=True)
class PredictionFiles:
    """Files of predictions, and how to read them."""

    predictions: tuple[pathlib.Path, ...] = ()
    """CSV, JSON or JSON Lines file; or five, one for each fold of --source."""
    truth_column: str = "label"
    """column of the true label."""
    prediction_column: str = "predicted"
    """column of the answer: a label, a ranked list (the first counts), or free
    text."""
    id_column: str | None = None
    """column of the item's name, unique and as in the prepared set; the line number by
    default."""
    classes: str | None = None
    """comma-separated label words, for sets that are not built in."""


@dataclasses.dataclass(frozen=True)
class Output:
    """Where the results go."""

    json: bool = False
    """print WAR, UAR, n, unparsed, recall and errors by group as JSON, in shares of 1."""
    out: Annotated[str | None, DirectoryArg] = None
    """folder for predictions.jsonl, evaluation.json, table.tex and report.html; RUN/eval by
    default, runs/package/eval for package, nothing for --predictions."""


@dataclasses.dataclass(frozen=True)
class ZeroShot:
    """The model, the split, and what the model is shown."""

    model: str
    """model to ask: hf:PATH, openai:URL#MODEL or gemini:MODEL."""
    data: str
    """prepared set, e.g. raf_db, dfew or actionfaces/images."""
    fold: str | None = None
    """fold of dfew and mafw: a number, or all, which adds the mean."""
    split: str = "test"
    """split of the set."""
    dir: str = "data"
    """data folder."""
    frames: int = 8
    """frames shown per clip: the centres of that many equal segments."""
    crop: Literal["whole", "face"] = "whole"
    """whole pictures, or the face crop of the set's face priors (emollama data prepare)."""
    side: int = 384
    """longer side of a picture as sent, in pixels; larger pictures are shrunk."""
    order: Order = "native"
    """order of the options in the question; shuffled varies by example."""
    without: str | None = None
    """another split, e.g. train: adds a second number without the items also found there."""
    limit: int | None = None
    """number of examples, from the first, for a trial; all by default."""
    out: pathlib.Path | None = None
    """folder for journal.jsonl (the answers' cache), predictions.jsonl, evaluation.json, table.tex
    and report.html; runs/zero-shot/MODEL/DATA-SPLIT by default."""
    max_tokens: int = 64
    """maximum tokens per answer."""
    thinking_tokens: int = 0
    """maximum tokens of Gemini's thinking per answer; 0 for none, -1 leaves it to the model."""
    base_url: str | None = None
    """base URL of another server with Gemini's API."""
    limits: tyro.conf.OmitArgPrefixes[Limits] = LIMITS
    """rate, retry and budget limits."""

    def __post_init__(self):
        at_least(
            1, frames=self.frames, side=self.side, max_tokens=self.max_tokens, limit=self.limit
        )
