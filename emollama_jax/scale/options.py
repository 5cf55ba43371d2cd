"""Options of `emollama plan`."""

import dataclasses
from typing import Literal

Kind = Literal["image", "clip"]
Step = Literal["train", "prefill", "decode"]


@dataclasses.dataclass(frozen=True)
class Planned:
    """The step that is planned, and what it works on."""

    step: Step = "train"
    """train, prefill (towers, prompt, first token), or decode (one more token)."""
    kind: Kind | None = None
    """kind of batch, where a row is one example; clip by default if the config has clips."""
    batch: int | None = None
    """examples per step over all chips, or rows where these hold several; the config's training
    batch by default."""
    tokens: float | None = None
    """mean tokens of an example, visual ones included, to tell work from padding; by default that
    of the config's data sets, where they are prepared."""
