"""Gemini through Google's own SDK, `google-genai`."""

import functools
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from emollama_jax.errors import UserError
from emollama_jax.remote.request import Reply, Request, Trouble, one_line, text_of, tokens_of

KEYS = ("GEMINI_API_KEY", "GOOGLE_API_KEY")  # the environment's; nothing else is looked at


def api_key() -> str | None:
    """The key from the environment, None if there is none."""
    return next((os.environ[name] for name in KEYS if os.environ.get(name)), None)


class Gemini:
    """One model of the Gemini API."""

    def __init__(
        self, model: str, *, timeout: float, thinking_tokens: int, base_url: str | None = None
    ):
        """Opens a client; nothing is sent yet.

        Args:
            model: e.g. "gemini-2.5-flash".
            timeout: seconds of one answer.
            thinking_tokens: at most, before an answer; 0 turns thought off, -1 is the model's own.
            base_url: base URL of another server with the API.

        Raises:
            UserError: no key, or no SDK.
        """
        key = api_key()
        if key is None:
            raise UserError(f"gemini:{model} needs a key: set {KEYS[0]} in the environment")
        try:
            import httpx2
            from google import genai
            from google.genai import types
        except ImportError:
            raise UserError(
                "Gemini needs Google's SDK: pip install 'emollama-jax[gemini]'"
            ) from None
        self.name = f"gemini:{model}"
        self._model, self._types = model, types
        self._thinking = None
        if thinking_tokens >= 0:
            self._thinking = types.ThinkingConfig(thinking_budget=thinking_tokens)
        # The SDK would take another HTTP library if it finds one, with other exceptions.
        self._http = httpx2.AsyncClient(timeout=timeout)
        options = types.HttpOptions(
            base_url=base_url, timeout=round(timeout * 1000), httpx_async_client=self._http
        )
        self._client = genai.Client(api_key=key, vertexai=False, http_options=options)

    async def ask(self, request: Request) -> Reply:
        """One answer. See `Client`."""
        import httpx2
        from google.genai import errors

        types = self._types
        parts = [
            types.Part.from_text(text=part)
            if isinstance(part, str)
            else types.Part.from_bytes(data=part, mime_type="image/jpeg")
            for part in request.parts
        ]
        config = types.GenerateContentConfig(
            system_instruction=request.system or None,
            temperature=request.temperature,
            max_output_tokens=request.max_tokens,
            response_mime_type="application/json" if request.schema else None,
            response_json_schema=request.schema,
            thinking_config=self._thinking,
        )
        contents = types.Content(role="user", parts=parts)
        try:
            response = await self._client.aio.models.generate_content(
                model=self._model, contents=contents, config=config
            )
        except errors.APIError as error:
            raise _trouble(error) from None
        except httpx2.ConnectError as error:
            raise Trouble(f"no connection ({one_line(error)})", kind="passing") from None
        except (httpx2.HTTPError, TimeoutError) as error:
            what = f"{type(error).__name__} {one_line(error)}".strip()
            raise Trouble(what, kind="passing", maybe_paid=True) from None
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            # A body that is no answer: cut off, or no JSON. The SDK does not check before it reads.
            what = f"unreadable response ({one_line(error, 120)})"
            raise Trouble(what, kind="passing", maybe_paid=True) from None
        return _reply(response)

    async def close(self) -> None:
        """Ends the connections. See `Client`."""
        await self._client.aio.aclose()
        await self._http.aclose()


def _reply(response: Any) -> Reply:
    usage = response.usage_metadata
    reply = functools.partial(Reply)
    if usage is not None:
        output = (usage.candidates_token_count or 0) + (usage.thoughts_token_count or 0)
        reply = functools.partial(
            Reply,
            input_tokens=tokens_of(usage.prompt_token_count),
            output_tokens=tokens_of(output),
        )
    if not response.candidates:
        feedback = response.prompt_feedback
        if feedback is None or feedback.block_reason is None:
            return reply(text="", finish="blocked", why="an empty response")
        why = f"prompt, {feedback.block_reason.value}"
        return reply(text="", finish="blocked", why=why, final=True)
    candidate = response.candidates[0]
    parts = (candidate.content and candidate.content.parts) or []
    text = text_of([part.text for part in parts if part.text and not part.thought])
    reason = getattr(candidate.finish_reason, "value", "STOP")
    if reason == "MAX_TOKENS":
        return reply(text=text, finish="cut")
    if reason != "STOP":
        return reply(text=text, finish="blocked", why=f"answer, {reason}")
    return reply(text=text, finish="stop")


def _trouble(error: Any) -> Trouble:
    code, details = error.code, json.dumps(error.details, default=str)
    text = f"{code} {error.status or ''} {one_line(error.message or '')}".strip()
    if code in (408, 429) or code >= 500:
        after = _retry_after(getattr(error.response, "headers", None) or {}, details)
        return Trouble(text, kind="passing", after=after)
    if code in (401, 403) or "API_KEY_INVALID" in details:
        return Trouble(f"{text}: is {' or '.join(KEYS)} right?", kind="fatal")
    if code == 404:
        return Trouble(f"{text}: is the model's name right?", kind="fatal")
    if error.status == "FAILED_PRECONDITION":  # billing or the country
        return Trouble(text, kind="fatal")
    return Trouble(text, kind="item")


def _retry_after(headers: Mapping[str, str], details: str) -> float | None:
    """Seconds of the header, or of the RetryInfo that Gemini puts into the body."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*", headers.get("retry-after", ""))
    found = found or re.search(r'"retryDelay": "(\d+(?:\.\d+)?)s"', details)
    return float(found[1]) if found else None
