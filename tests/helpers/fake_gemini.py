"""A local HTTP server that speaks the Gemini API and OpenAI's chat completions, faults included.

What a question is about is known by its picture alone (the digest of the JPEG, or of the text where
there is none), as the real service would know it. Every request becomes a line of the log before
its answer leaves: {"item", "try", "fault", "paid"}. `paid` is what a service would bill: an answer
was made, even if the line then broke. Faults are a function of item and try, so that a run can be
repeated.
"""

import base64
import collections
import contextlib
import hashlib
import json
import pathlib
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

UNPAID = ("429", "500", "503")
BROKEN = ("timeout", "cut_body")  # an answer was made and got lost
REJECTED = ("cut", "not_json", "wrong_emotion", "other_form", "blocked_answer", "empty_body")
FINAL = ("blocked_prompt",)
FAULTS = (*UNPAID, *BROKEN, *REJECTED, *FINAL)


def good_turns(emotion: str) -> list[dict[str, str]]:
    """A conversation that passes every check."""
    return [
        {
            "question": "What does the face look like, and which emotion is it?",
            "answer": f"The brows are drawn and the lips are tense. The face shows {emotion}.",
        },
        {
            "question": "Why does the person feel this way?",
            "answer": "That cannot be seen, only the face is visible.",
        },
    ]


def random_fault(share: float, seed: int = 0) -> Callable[[str, int], str]:
    """Faults of a share of the requests, of all kinds."""

    def choose(item: str, number: int) -> str:
        rng = random.Random(f"{seed} {item} {number}")
        return rng.choice(FAULTS) if rng.random() < share else ""

    return choose


class Server:
    """The server and what it saw."""

    def __init__(
        self,
        fault: Callable[[str, int], str] = lambda item, number: "",
        *,
        answer: Callable[[dict[str, Any]], str] | None = None,
        log: pathlib.Path | None = None,
        delay: float = 0.0,
        hang: float = 3.0,
        retry_after: str = "0.05",
    ):
        """Starts nothing yet.

        Args:
            fault: (item, number of its request from 0) → one of FAULTS, or "".
            answer: request body → text; a good conversation by default.
            log: file that gets a line for every request.
            delay: seconds of an answer.
            hang: seconds of a fault "timeout"; longer than the client waits.
            retry_after: header of 429.
        """
        self.fault, self.answer, self.log = fault, answer or _conversation, log
        self.delay, self.hang, self.retry_after = delay, hang, retry_after
        self.requests: list[dict[str, Any]] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.at_once = self.most_at_once = 0
        self.url = ""
        self._tries: collections.Counter[str] = collections.Counter()
        self.lock = threading.Lock()

    def note(self, body: dict[str, Any], headers: dict[str, str]) -> str:
        """Writes a request down; its fault."""
        item = item_of(body)
        with self.lock:
            number = self._tries[item]
            self._tries[item] += 1
            fault = self.fault(item, number)
            line = {"item": item, "try": number, "fault": fault, "paid": fault not in UNPAID}
            self.requests.append(line)
            self.bodies.append(body)
            self.headers.append(headers)
            self.times.append(time.monotonic())
            if self.log is not None:
                with self.log.open("a") as file:
                    file.write(json.dumps(line) + "\n")
        return fault

    def paid(self) -> int:
        """Answers that a service would bill."""
        with self.lock:
            return sum(line["paid"] for line in self.requests)

    @contextlib.contextmanager
    def running(self) -> Iterator["Server"]:
        """Serves on a free port of this machine."""
        httpd = _Httpd(("127.0.0.1", 0), _Handler)
        httpd.owner = self
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        self.url = f"http://127.0.0.1:{httpd.server_address[1]}"
        try:
            yield self
        finally:
            httpd.shutdown()
            httpd.server_close()
            thread.join()


def item_of(body: dict[str, Any]) -> str:
    """The digest of a request's first picture, or of its text where there is none."""
    text = json.dumps(body)
    found = re.search(r'"data": "([^"]+)"|base64,([^"]+)"', text)
    key = (found[1] or found[2]) if found else text
    # The SDK writes base64 with another alphabet than OpenAI's clients.
    data = base64.urlsafe_b64decode(key.replace("+", "-").replace("/", "_")) if found else b""
    return hashlib.sha256(data or text.encode()).hexdigest()[:12]


def texts_of(body: dict[str, Any]) -> list[str]:
    """The text parts of a request."""
    if "contents" in body:
        parts = [part for content in body["contents"] for part in content["parts"]]
        return [part["text"] for part in parts if "text" in part]
    content = body["messages"][-1]["content"]
    return [part["text"] for part in content if part["type"] == "text"]


def _conversation(body: dict[str, Any]) -> str:
    text = "\n".join(texts_of(body))
    found = re.search(r"The emotion: (\w+)\.", text)
    if found is None:  # a description is wanted
        return "The person looks at the camera. The brows rise and the mouth opens."
    return json.dumps({"turns": good_turns(found[1])})


class _Httpd(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    owner: Server

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error of this server."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Httpd

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def do_POST(self) -> None:
        """Answers a question."""
        server = self.server.owner
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            self._answer(server, body)
        finally:
            with server.lock:
                server.at_once -= 1

    def _answer(self, server: Server, body: dict[str, Any]) -> None:
        fault = server.note(body, {k.lower(): v for k, v in self.headers.items()})
        time.sleep(server.hang if fault == "timeout" else server.delay)
        if fault in UNPAID or fault in ("401", "404", "400"):
            headers = {"Retry-After": server.retry_after} if fault == "429" else {}
            status = {"429": "RESOURCE_EXHAUSTED", "400": "INVALID_ARGUMENT"}.get(fault, "FAULT")
            error = {"code": int(fault), "message": f"injected {fault}", "status": status}
            return self._send(int(fault), {"error": error}, headers)
        text = server.answer(body)
        if fault == "not_json":
            text = "Of course! Here is a conversation:"
        elif fault == "wrong_emotion":
            text = json.dumps({"turns": good_turns("contempt")})
        elif fault == "other_form":
            text = json.dumps({"turns": good_turns("anger") * 3})
        elif fault == "cut":
            text = text[: len(text) // 2]
        form = _gemini if "contents" in body else _openai
        return self._send(200, form(text, fault), {}, fault)

    def _send(
        self, code: int, tree: dict[str, Any], headers: dict[str, str], fault: str = ""
    ) -> None:
        data = json.dumps(tree).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        if fault == "empty_body":
            data = b""
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if fault == "cut_body":  # fewer bytes than were promised
            data = data[: len(data) // 2]
            self.close_connection = True
        self.wfile.write(data)


def _gemini(text: str, fault: str) -> dict[str, Any]:
    usage = {"promptTokenCount": 700, "candidatesTokenCount": 90, "totalTokenCount": 790}
    if fault == "blocked_prompt":
        usage["candidatesTokenCount"] = 0
        return {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}, "usageMetadata": usage}
    candidate: dict[str, Any] = {
        "content": {"role": "model", "parts": [{"text": text}]},
        "finishReason": {"cut": "MAX_TOKENS", "blocked_answer": "SAFETY"}.get(fault, "STOP"),
        "index": 0,
    }
    if fault == "blocked_answer":
        del candidate["content"]
    return {"candidates": [candidate], "usageMetadata": usage, "modelVersion": "fake"}


def _openai(text: str, fault: str) -> dict[str, Any]:
    reasons = {"cut": "length", "blocked_answer": "content_filter"}
    reasons["blocked_prompt"] = "content_filter"
    return {
        "id": "1",
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": reasons.get(fault, "stop"),
            }
        ],
        "usage": {"prompt_tokens": 700, "completion_tokens": 5, "total_tokens": 705},
    }
