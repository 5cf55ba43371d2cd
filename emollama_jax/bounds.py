"""Bounds of a number in a config, declared beside its field, and the kinds of numbers there are."""

import dataclasses
import re
from typing import Annotated, Any

import pydantic


class OutOfBounds(ValueError):
    """A number outside its bounds."""


class NotANumber(ValueError):
    """A truth value, of which pydantic would make 0 or 1."""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The finite numbers from `low` to `high`, as pydantic checks and messages show them."""

    low: float
    high: float
    above: bool = False  # `low` itself is outside
    below: bool = False  # `high` itself is outside
    also: int | None = None  # one number outside that is allowed

    def __contains__(self, value: float) -> bool:
        if value == self.also:
            return True
        low = self.low < value if self.above else self.low <= value
        return low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low, high = _digits(self.low), _digits(self.high)
        if not self.above and not self.below:
            text = f"{low} … {high}"
        else:
            text = f"{'>' if self.above else '≥'} {low} and {'<' if self.below else '≤'} {high}"
        return text if self.also is None else f"{_digits(self.also)} or {text}"

    def __get_pydantic_core_schema__(
        self, source: Any, handler: pydantic.GetCoreSchemaHandler
    ) -> Any:
        checks = (pydantic.AfterValidator(self._check), pydantic.BeforeValidator(_no_truth_value))
        return handler.generate_schema(Annotated[source, *checks])

    def _check(self, value: float) -> float:
        if value not in self:
            raise OutOfBounds
        return value


def regular_expressions(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """The patterns, each of which compiles; a ValueError names the first that does not."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{pattern!r} is no regular expression ({error})") from None
    return patterns


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise NotANumber
    return value


def _digits(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


INT32 = 2**31 - 1  # what JAX counts in
LARGEST = 1e30  # default bound of a float, well within float32

Size = Annotated[int, Bounds(1, 2**24)]  # rows or columns of an array
Number = Annotated[int, Bounds(1, INT32)]  # steps, examples, files
Few = Annotated[int, Bounds(1, 1024)]
Examples = Annotated[int, Bounds(1, 2**16)]  # per step, with all pictures in memory
Side = Annotated[int, Bounds(1, 8192)]  # pixels
Seed = Annotated[int, Bounds(0, 2**32 - 1)]  # JAX drops higher bits without a word
Axis = Annotated[int, Bounds(1, 2**20, also=-1)]  # devices
Epsilon = Annotated[float, Bounds(0.0, 1.0, above=True)]
Rate = Annotated[float, Bounds(0.0, LARGEST, above=True)]
Amount = Annotated[float, Bounds(0.0, LARGEST)]
Margin = Annotated[float, Bounds(0.0, 100.0)]
Share = Annotated[float, Bounds(0.0, 1.0)]
Decay = Annotated[float, Bounds(0.0, 1.0, below=True)]
Brightness = Annotated[float, Bounds(0.0, 1.0)]
Spread = Annotated[float, Bounds(0.0, 1.0, above=True)]
