"""Options of `emollama data instruct`."""

import dataclasses
from typing import Annotated, Literal

import tyro

from emollama_jax.remote.options import LIMITS, Limits


@dataclasses.dataclass(frozen=True)
class InstructOptions:
    """The split, the generator of conversations, and the limits."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """prepared set, e.g. raf_db or actionfaces/images."""
    split: str = "train"
    """split of the set; conversations are for training."""
    dir: str = "data"
    """data folder, on a disk."""
    by: Literal["auto", "gemini", "template"] = "auto"
    """generator of the conversations; auto: gemini if a key is set, else template."""
    model: str = "gemini-2.5-flash"
    """name of the Gemini model."""
    describe: str | None = None
    """source of clip descriptions: openai:URL#MODEL, hf:PATH, gemini:MODEL, or a .jsonl file of
    {"id", "description"}."""
    limit: int | None = None
    """number of examples to make conversations for, from the first; all by default."""
    media: bool = False
    """also write pictures and clips beside the JSON file, for other projects."""
    thinking_tokens: int = 0
    """maximum tokens of Gemini's thinking per answer, billed as output; 0 for none, -1 leaves it
    to the model (some always think)."""
    base_url: str | None = None
    """base URL of another server with Gemini's API."""
    limits: tyro.conf.OmitArgPrefixes[Limits] = LIMITS
    """rate, retry and budget limits."""
