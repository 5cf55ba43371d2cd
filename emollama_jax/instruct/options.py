"""What `emollama data instruct` takes."""

import dataclasses
from typing import Annotated, Literal

import tyro

from emollama_jax.remote.options import LIMITS, Limits


@dataclasses.dataclass(frozen=True)
class InstructOptions:
    """Which split, who makes the conversations, and within which limits."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """a prepared set, e.g. raf_db or actionfaces/images."""
    split: str = "train"
    """split of the set; conversations are for training."""
    dir: str = "data"
    """data folder, on a disk."""
    by: Literal["auto", "gemini", "template"] = "auto"
    """maker of the conversations; auto is gemini where there is a key."""
    model: str = "gemini-2.5-flash"
    """name of the Gemini model."""
    describe: str | None = None
    """for clips, who says what happens in them: openai:URL#MODEL, hf:PATH, gemini:MODEL, or a
    .jsonl file of {"id", "description"}."""
    limit: int | None = None
    """number of examples, the first ones, that get conversations; all by default."""
    media: bool = False
    """also write pictures and clips beside the JSON file, for use in other projects."""
    thinking_tokens: int = 0
    """Gemini's thoughts before an answer, at most; they are paid as output. 0 is none, -1 leaves it
    to the model (some always think)."""
    base_url: str | None = None
    """address of another server that speaks Gemini's API."""
    limits: tyro.conf.OmitArgPrefixes[Limits] = LIMITS
    """limits of speed, tries and cost."""
