"""What answers cost: Gemini's list prices, to estimate with. The bill is Google's, not this."""

import dataclasses

from emollama_jax.errors import UserError
from emollama_jax.remote.options import Limits

SOURCE = "https://ai.google.dev/gemini-api/docs/pricing"
DATE = "2026-10-07"  # when that page said so
# US dollars per million tokens, (input of text and pictures, output with thoughts): paid tier,
# prompts up to 200,000 tokens, without the batch discount.
GEMINI = {
    "gemini-3.8-flash": (0.75, 3.75),  # until 2026-12-31; (1.50, 7.50) from then on
    "gemini-3.5-flash": (1.50, 9.00),
    "gemini-3.5-flash-lite": (0.30, 2.50),
    "gemini-3.1-pro-preview": (2.00, 12.00),
    "gemini-2.5-pro": (1.25, 10.00),
    "gemini-2.5-flash": (0.30, 2.50),
    "gemini-2.5-flash-lite": (0.10, 0.40),
}


@dataclasses.dataclass(frozen=True)
class Price:
    """US dollars per million tokens; None where nobody said."""

    input: float | None
    output: float | None
    source: str

    @property
    def known(self) -> bool:
        return self.input is not None and self.output is not None

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        """US dollars; 0 where the price is not known."""
        if self.input is None or self.output is None:
            return 0.0
        return (input_tokens * self.input + output_tokens * self.output) / 1e6


def price_of(name: str, limits: Limits) -> Price:
    """The price of a client's answers, e.g. of "gemini:gemini-2.5-flash".

    Raises:
        UserError: there is a budget and no price to hold it with.
    """
    kind, _, model = name.partition(":")
    source = "as given"
    table: tuple[float | None, float | None] = (None, None)
    if kind == "hf":
        table, source = (0.0, 0.0), "on this machine"
    elif kind == "gemini" and model in GEMINI:
        table, source = GEMINI[model], f"{SOURCE}, {DATE}"
    given = (limits.input_price, limits.output_price)
    both = [x if x is not None else y for x, y in zip(given, table, strict=True)]
    price = Price(*both, source="as given" if None not in given else source)
    if limits.budget is not None and not price.known:
        raise UserError(
            f"--budget {limits.budget}: the price of {name} is not in the table; "
            "give --input-price and --output-price, US dollars per million tokens"
        )
    return price
