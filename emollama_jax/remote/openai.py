"""Any endpoint that speaks OpenAI's chat completions: vLLM, llama.cpp, Ollama, hosted ones."""

import base64
import functools
import os
import re
from typing import Any

import httpx2

from emollama_jax import foreign_json
from emollama_jax.errors import UserError
from emollama_jax.remote.request import Reply, Request, Trouble, one_line, text_of, tokens_of

KEY = "OPENAI_API_KEY"


class OpenAI:
    """One model behind a URL."""

    def __init__(self, url: str, model: str, *, timeout: float):
        """Opens a client; nothing is sent yet.

        Args:
            url: up to and with the version, e.g. "http://localhost:8000/v1".
            model: as the server calls it.
            timeout: seconds of one answer.

        Raises:
            UserError: not a URL.
        """
        if not re.match(r"https?://[^/\s]+", url):
            raise UserError(f"openai:{url}: wanted a URL, e.g. http://localhost:8000/v1")
        if re.match(r"https?://[^/]*@", url) or "?" in url:
            raise UserError(
                f"openai:{redact_url(url)}: a URL stands in journals and reports: give the key in "
                f"{KEY} instead"
            )
        self.name = f"openai:{url}#{model}"
        self._model = model
        key = os.environ.get(KEY)  # a local server needs none
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx2.AsyncClient(headers=headers, timeout=timeout)
        self._url = url.rstrip("/") + "/chat/completions"
        self._limit = "max_tokens"

    async def ask(self, request: Request) -> Reply:
        """One answer. See `Client`."""
        content = [_part(part) for part in request.parts]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if request.system:
            messages.insert(0, {"role": "system", "content": request.system})
        body: dict[str, Any] = {
            "model": self._model,
            "messages": messages,
            "temperature": request.temperature,
            self._limit: request.max_tokens,
        }
        if request.schema:
            form = {"name": "answer", "strict": True, "schema": request.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        try:
            response = await self._http.post(self._url, json=body)
        except httpx2.ConnectError as error:
            raise Trouble(f"no connection ({one_line(error)})", kind="passing") from None
        except httpx2.HTTPError as error:
            what = f"{type(error).__name__} {one_line(error)}".strip()
            raise Trouble(what, kind="passing", maybe_paid=True) from None
        if response.status_code != 200:
            if self._limit == "max_tokens" and "max_completion_tokens" in response.text:
                self._limit = "max_completion_tokens"  # OpenAI's newer models know only this name
                raise Trouble("max_tokens has another name here", kind="passing", after=0.0)
            raise _trouble(response)
        try:
            return _reply(foreign_json.parse(response.content))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            what = f"unreadable response ({one_line(repr(error), 120)})"
            raise Trouble(what, kind="passing", maybe_paid=True) from None

    async def close(self) -> None:
        """Ends the connections. See `Client`."""
        await self._http.aclose()


def redact_url(url: str) -> str:
    """The URL without a user, a password and what is asked."""
    return re.sub(r"(?<=//)[^/]*@", "", url).partition("?")[0]


def _part(part: str | bytes) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    url = f"data:image/jpeg;base64,{base64.b64encode(part).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _reply(tree: dict[str, Any]) -> Reply:
    choice, usage = tree["choices"][0], tree.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    text = text_of(choice["message"].get("content"))
    reply = functools.partial(
        Reply,
        input_tokens=tokens_of(usage.get("prompt_tokens")),
        output_tokens=tokens_of(usage.get("completion_tokens")),
    )
    reason = choice.get("finish_reason")
    if reason == "length":
        return reply(text=text, finish="cut")
    refusal = choice["message"].get("refusal")
    if reason == "content_filter" or refusal:
        why = one_line(refusal or "content_filter")
        return reply(text=text, finish="blocked", why=f"answer, {why}")
    return reply(text=text, finish="stop")


def _trouble(response: httpx2.Response) -> Trouble:
    code = response.status_code
    text = f"{code} {one_line(response.text)}"
    if code in (408, 409, 429) or code >= 500:
        header = response.headers.get("retry-after", "")
        after = float(header) if re.fullmatch(r"\d+(\.\d+)?", header) else None
        return Trouble(text, kind="passing", after=after)
    if code in (401, 403):
        return Trouble(f"{text}: is {KEY} right?", kind="fatal")
    if code == 404:
        return Trouble(f"{text}: are the URL and the model's name right?", kind="fatal")
    return Trouble(text, kind="item")
