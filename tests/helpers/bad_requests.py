"""Requests that a server must refuse, made by a seed, as the bytes that a client would send."""

import base64
import contextlib
import io
import json
import random
import socket
from collections.abc import Iterator

import numpy as np
from PIL import Image

from emollama_jax.tiny.actionfaces.examples import encode_video

PATH = "/v1/chat/completions"


def request(body: bytes, *, path=PATH, length=None, kind="application/json") -> bytes:
    """A POST request."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: {kind}\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n"
    )
    return head.encode() + body


def _messages(parts) -> dict:
    return {"messages": [{"role": "user", "content": parts}]}


def _about(data: bytes, kind="image_url", mime="image/png") -> bytes:
    uri = f"data:{mime};base64,{base64.b64encode(data).decode()}"
    parts = [{"type": "text", "text": "x"}, {"type": kind, kind: {"url": uri}}]
    return request(json.dumps(_messages(parts)).encode())


def _picture(rng, form) -> bytes:
    pixels = np.frombuffer(rng.randbytes(48 * 40 * 3), np.uint8).reshape(48, 40, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


_CLIP = encode_video(np.zeros((8, 16, 16, 3), np.uint8), 25.0)
_ODD = [None, True, -1, 2**80, 1e308, "", "x", [], {}, [[]], {"a": {}}, "\x00", "é" * 50]


def _schema(rng):
    """A valid body with one field of a wrong kind."""
    field = rng.choice(
        [
            "messages",
            "n",
            "temperature",
            "top_p",
            "max_tokens",
            "seed",
            "stop",
            "stream_options",
            "top_logprobs",
            "response_format",
            "structured_outputs",
            "emollama",
            "model",
        ]
    )
    right = {
        "messages": (),
        "model": ("localhost",),
        "stop": (None, "", "x", "é" * 50, "\x00", []),
        "stream_options": (None, {}, {"a": {}}),
        "emollama": ({}, {"a": {}}),
        "structured_outputs": (None,),
        "response_format": (None,),
        "seed": (None, True, -1),
        "n": (None, True),
        "max_tokens": (None, True),
        "temperature": (None, True),
        "top_p": (None, True),
        "top_logprobs": (None,),
    }[field]
    wrong = [value for value in _ODD if not any(value is r or value == r for r in right)]
    if field in ("model", "top_logprobs"):
        wrong = [value for value in wrong if value is not None]
    body = _messages([{"type": "text", "text": "x"}]) | {field: rng.choice(wrong)}
    return request(json.dumps(body).encode())


def _roles(rng):
    """Turns that do not alternate, parts of unknown types."""
    broken = [
        {"role": rng.choice(["tool", "function", "", "USER", 3]), "content": "x"},
        {"role": "user", "content": [{"type": rng.choice(["audio", "file", ""]), "text": "x"}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": rng.choice(_ODD[:9])}]},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": rng.choice([[], "", [1], {"a": 1}])},
    ]
    return request(json.dumps({"messages": [rng.choice(broken)]}).encode())


def _json(rng):
    """A body that is not JSON, or none of ours."""
    good = json.dumps(_messages("x")).encode()
    cut = rng.randrange(1, len(good))
    return request(
        rng.choice(
            [
                good[:cut],
                b"",
                b"\xff" + good,
                b"[" * 60000,
                b'{"a":' * 5000,
                rng.randbytes(200),
                b"null",
                b"[]",
                b'"x"',
                good + b"}",
                good.replace(b"x", b"\\ud800"),
                b"\x00" * 9,
            ]
        )
    )


def _base64(rng):
    """A data URI that is none."""
    text = rng.choice(
        [
            "data:image/png;base64,@@@@",
            "data:image/png;base64,A",
            "data:,x",
            "data:",
            "DATA:;x",
            "data:image/png;base64,ÄÖ",
            "data:image/png;base64",
            "javascript:1",
            "//a/b",
            "\x00",
            "http://127.0.0.1/",
            "http://[",
            "https://a:99999/",
            "file:///etc/passwd",
            "ftp://a/b",
        ]
    )
    parts = [{"type": "image_url", "image_url": {"url": text}}]
    return request(json.dumps(_messages(parts)).encode())


def _truncated(rng):
    """The beginning of a picture."""
    data = _picture(rng, rng.choice(["PNG", "JPEG", "WEBP", "TIFF"]))
    return _about(data[: rng.randrange(1, len(data) // 3)])


def _garbled(rng):
    """A picture's head, and noise."""
    data = _picture(rng, rng.choice(["PNG", "GIF", "BMP"]))
    return _about(data[:12] + rng.randbytes(500))


def _bomb(rng):
    """A picture whose header claims far more pixels than are allowed."""
    side = rng.choice([20_000, 60_000, 2**31 - 1])
    data = bytearray(_picture(rng, "PNG"))
    data[16:24] = side.to_bytes(4, "big") * 2
    return _about(bytes(data))


def _clip(rng):
    """A clip that is cut, or a picture where a clip is wanted."""
    data = rng.choice([_CLIP[: rng.randrange(8, 200)], _picture(rng, "PNG"), rng.randbytes(300)])
    return _about(data, "video_url", "video/mp4")


def _text_files(rng):
    """What FFmpeg or Pillow could be led by to other files."""
    text = rng.choice(
        [
            b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
            b"ffconcat version 1.0\nfile /etc/passwd\n",
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            b"%!PS-Adobe-3.0 EPSF-3.0\n",
            b"PK\x03\x04",
        ]
    )
    return _about(text, rng.choice(["image_url", "video_url"]), "application/x")


def _large(rng):
    """A body over the limit."""
    return request(b" " * rng.choice([400_000, 600_000]))


def _head(rng):
    """What is not HTTP."""
    return rng.choice(
        [
            b"\x16\x03\x01\x02\x00\x01" + rng.randbytes(80),
            b"GET\r\n\r\n",
            b"POST " + b"a" * 40000 + b" HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\nA B: c\r\n\r\n",
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
            rng.randbytes(60) + b"\r\n\r\n",
            b"POST /v1/score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        ]
    )


def _elsewhere(rng):
    """A wrong path, method or type of content."""
    return rng.choice(
        [
            request(b"{}", path="/v1/nothing"),
            request(b"{}", path="/../../etc/passwd"),
            request(b"{}", path="/%00%0d%0aX"),
            request(b"a=b", kind="application/x-www-form-urlencoded"),
            request(b"{}", kind="text/plain"),
            b"DELETE /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
            b"GET /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        ]
    )


def _cut(rng):
    """A connection that ends in the middle of a body: nobody is there to be told."""
    return request(json.dumps(_messages("x")).encode(), length=5_000)


KINDS = {
    name.strip("_"): make
    for name, make in list(globals().items())
    if name.startswith("_")
    and getattr(make, "__code__", None)
    and make.__code__.co_argcount == 1
    and make.__code__.co_varnames[:1] == ("rng",)
}


def bad_requests(*, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Requests of all kinds, with their kind's name."""
    rng = random.Random(seed)
    names = sorted(KINDS)
    for number in range(count):
        name = names[number % len(names)]
        yield name, KINDS[name](rng)


def send_raw(host: str, port: int, raw: bytes, *, seconds: float, leave=False) -> int | None:
    """Sends bytes and reads the answer's status; None if the server hung up.

    Args:
        host: to connect to.
        port: of the host.
        raw: the bytes.
        seconds: longest wait.
        leave: close the connection without waiting for an answer.
    """
    said = b""
    with (
        socket.create_connection((host, port), timeout=seconds) as line,
        contextlib.suppress(ConnectionResetError, BrokenPipeError),
    ):
        line.sendall(raw)
        while not leave and (part := line.recv(65_536)):
            said += part
    head = said.split(b"\r\n", 1)[0].split(b" ")
    return int(head[1]) if len(head) > 1 and head[0].startswith(b"HTTP/") else None
