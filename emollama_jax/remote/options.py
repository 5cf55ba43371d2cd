"""Options for asking another model, on the command line."""

import dataclasses

from emollama_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Limits:
    """Rate, retry and budget limits."""

    concurrency: int = 8
    """requests in flight at once."""
    per_minute: float = 300.0
    """maximum requests per minute; see your tier's limit."""
    timeout: float = 60.0
    """seconds to wait for one answer."""
    tries: int = 8
    """tries per request while the service fails (429, 5xx, time-outs, lost connections)."""
    attempts: int = 3
    """answers requested per item before it is set aside; each retry says why the last failed."""
    first_wait: float = 1.0
    """seconds before the second try; doubles up to a minute, with jitter."""
    budget: float | None = None
    """maximum US dollars for this journal in all; requests in flight count at their maximum."""
    input_price: float | None = None
    """US dollars per million input tokens; the built-in table by default."""
    output_price: float | None = None
    """US dollars per million output tokens; the built-in table by default."""

    def __post_init__(self):
        for name in ("concurrency", "per_minute", "timeout", "tries", "attempts"):
            if getattr(self, name) <= 0:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} is {getattr(self, name)}, wanted more than 0")
        for name in ("first_wait", "budget", "input_price", "output_price"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: below 0")


LIMITS = Limits()
