"""From what a user writes, "gemini:MODEL", to a client."""

from emollama_jax.errors import UserError
from emollama_jax.remote.options import Limits
from emollama_jax.remote.request import Client

FORMS = "hf:PATH, openai:URL#MODEL, gemini:MODEL"


def check_spec(spec: str) -> tuple[str, str]:
    """Splits a model's name.

    Returns:
        Its kind, and the text after the colon.

    Raises:
        UserError: neither of the three kinds.
    """
    kind, colon, rest = spec.partition(":")
    if kind not in ("hf", "openai", "gemini") or not colon or not rest:
        raise UserError(f"model {spec!r}: wanted one of {FORMS}")
    if kind == "openai" and not all(rest.partition("#")):
        raise UserError(f"model {spec!r}: wanted openai:URL#MODEL, e.g. {EXAMPLE}")
    return kind, rest


EXAMPLE = "openai:http://localhost:8000/v1#llava"


def open_client(
    spec: str, limits: Limits, *, thinking_tokens: int, base_url: str | None = None
) -> Client:
    """A client of a model.

    Args:
        spec: "hf:PATH", "openai:URL#MODEL" or "gemini:MODEL".
        limits: limits, for the time-out.
        thinking_tokens: maximum thinking tokens of Gemini.
        base_url: base URL of another server with Gemini's API.

    Raises:
        UserError: no such kind, no key, or a library that is not installed.
    """
    kind, rest = check_spec(spec)
    if kind == "hf":
        from emollama_jax.remote.local import Local

        return Local(rest)
    if kind == "openai":
        from emollama_jax.remote.openai import OpenAI

        url, _, model = rest.partition("#")
        return OpenAI(url, model, timeout=limits.timeout)
    from emollama_jax.remote.gemini import Gemini

    return Gemini(rest, timeout=limits.timeout, thinking_tokens=thinking_tokens, base_url=base_url)
