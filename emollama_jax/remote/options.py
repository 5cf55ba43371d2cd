"""How a model of somebody else's is asked: what a user may set on the command line."""

import dataclasses

from emollama_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of asking."""

    concurrency: int = 8
    """questions under way at once."""
    per_minute: float = 300.0
    """questions a minute at most; see your tier's limit."""
    timeout: float = 60.0
    """seconds for one answer."""
    tries: int = 8
    """tries of one question while the service fails (429, 5xx, time-outs, broken lines)."""
    attempts: int = 3
    """answers asked for one item before it is set aside; a rejected one is told why."""
    first_wait: float = 1.0
    """seconds before the second try; doubles up to a minute, with jitter."""
    budget: float | None = None
    """US dollars, at most, for this journal in all; questions under way count at their most."""
    input_price: float | None = None
    """US dollars a million input tokens; the built-in table by default."""
    output_price: float | None = None
    """US dollars a million output tokens; the built-in table by default."""

    def __post_init__(self):
        for name in ("concurrency", "per_minute", "timeout", "tries", "attempts"):
            if getattr(self, name) <= 0:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} is {getattr(self, name)}, wanted more than 0")
        for name in ("first_wait", "budget", "input_price", "output_price"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: below 0")


LIMITS = Limits()
