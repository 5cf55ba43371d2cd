"""Hostile and unlucky clients, killed workers, full queues, and the end of a server."""

import asyncio
import base64
import concurrent.futures
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2
import numpy as np
import pytest
from PIL import Image

from emollama_jax.data.media import Sampling
from emollama_jax.serve import media, server
from emollama_jax.serve.decoders import Decoders
from emollama_jax.serve.faults import Fault
from emollama_jax.serve.limits import Budget, Limits
from emollama_jax.tiny.actionfaces.examples import encode_picture, encode_video
from tests.helpers.bad_requests import bad_requests, send_raw
from tests.helpers.fake_engine import FakeEngine, serving, settings
from tests.serve.test_endpoint import NOTHING, asked, picture_uri

SAMPLING = Sampling(4, None)
GOOD = {"messages": NOTHING}


def ask(url, body=GOOD, **options):
    """The answer to a chat request."""
    return httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=60, **options)


def until(true, seconds=60.0):
    """Waits for something to become true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.01)


# ------------------------------------------------------------------ malformed requests


@pytest.fixture(scope="module")
def served():
    limits = Limits(body=300_000, pixels=1_000_000, frames=60, upload=1.0, queue=8, workers=1)
    with serving(FakeEngine(), settings(limits=limits)) as (url, app):
        yield url, app


def test_malformed_requests_get_their_4xx_and_leave_no_traceback(served, caplog, monkeypatch):
    monkeypatch.setattr(server, "HEAD", 1.0)
    url, _ = served
    host, port = url.removeprefix("http://").split(":")
    found = {}
    with caplog.at_level("INFO"):
        for number, (name, raw) in enumerate(bad_requests(seed=0, count=300)):
            status = send_raw(host, int(port), raw, seconds=60, leave=name == "cut")
            # What is no HTTP may be hung up on.
            assert (status is None and name in ("cut", "head")) or 400 <= status < 500, (
                f"request {number}, {name}: {status}"
            )
            found.setdefault(name, set()).add(status)
        assert ask(url).status_code == 200
    assert len(found) >= 12
    assert [name for name, seen in found.items() if seen == {None}] == ["cut"]
    assert not [record for record in caplog.records if record.exc_info]
    assert "Traceback" not in caplog.text


def test_slow_senders_are_hung_up_on(served, monkeypatch):
    url, app = served
    host, port = url.removeprefix("http://").split(":")
    monkeypatch.setattr(server, "HEAD", 0.3)
    began = time.monotonic()
    with socket.create_connection((host, int(port)), timeout=10) as line:
        line.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
        assert line.recv(100) == b""  # the head did not come in time
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as line:
        line.sendall(head + b"Content-Length: 90\r\n\r\n{")
        assert b" 408 " in line.recv(1000)
    assert time.monotonic() - began < 8
    until(lambda: app.gate.inside == 0)
    assert ask(url).status_code == 200


def test_too_large_bodies_are_not_kept(served):
    url, app = served
    answer = ask(url, {"messages": asked("x", "data:image/png;base64," + "A" * 400_000)})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")

    def chunks():
        for _ in range(40):
            yield b" " * 10_000

    headers = {"Content-Type": "application/json"}
    answer = httpx2.post(f"{url}/v1/score", content=chunks(), headers=headers)
    assert answer.status_code == 413
    assert app.gate.inside == 0


@pytest.mark.parametrize(
    ("size", "kind", "words"),
    [((1200, 900), "image_url", "1,080,000, wanted at most 1,000,000"), (None, "video_url", "70")],
)
def test_large_media_are_refused_by_their_header(served, size, kind, words):
    url, _ = served
    if size:
        uri = picture_uri(size)
    else:
        video = encode_video(np.zeros((70, 16, 16, 3), np.uint8), 25.0)
        uri = f"data:video/mp4;base64,{base64.b64encode(video).decode()}"
    error = ask(url, {"messages": asked("x", uri, kind=kind)}).json()["error"]
    assert words in error["message"] and error["code"] == "invalid_media"
    assert error["param"] == f"messages.0.content.1.{kind}"


# ------------------------------------------------------------------ decoding workers


@contextlib.asynccontextmanager
async def pool(**changed):
    """A pool of workers."""
    decoders = Decoders(Limits(**{"workers": 1} | changed), SAMPLING)
    await decoders.start()
    try:
        yield decoders
    finally:
        await decoders.close()


def noise(width, height):
    """A picture that does not compress."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return pixels, encode_picture(pixels)


async def decode(decoders, data, want="image"):
    """Decodes one file."""
    async with decoders.decoded(data, want, param="x") as seen:
        return seen


def test_a_worker_gives_what_the_readers_give():
    _, jpeg = noise(40, 30)

    async def run():
        async with pool() as decoders:
            seen = await decode(decoders, jpeg)
            video = encode_video(np.zeros((9, 16, 16, 3), np.uint8), 5.0)
            return seen, await decode(decoders, video, "clip")

    seen, clip = asyncio.run(run())
    np.testing.assert_array_equal(seen.frames[0], np.array(Image.open(io.BytesIO(jpeg))))
    assert seen.count == 1 and len(seen.digest) == 64
    assert clip.count == 9 and clip.indices.tolist() == [1, 3, 5, 7]


def test_a_killed_worker_costs_no_request():
    _, jpeg = noise(1500, 1500)

    async def run():
        async with pool() as decoders:
            (first,) = decoders.processes
            os.kill(first, signal.SIGSTOP)
            asking = asyncio.create_task(decode(decoders, jpeg))
            await asyncio.sleep(0.2)
            os.kill(first, signal.SIGKILL)
            seen = await asking
            assert decoders.restarts == 1 and decoders.processes != [first]
            for pause in (0.0, 0.3):  # known to be dead, or not yet
                (worker,) = decoders.processes
                os.kill(worker, signal.SIGKILL)
                await asyncio.sleep(pause)
                await decode(decoders, jpeg)
            assert decoders.restarts == 3
            return seen

    assert asyncio.run(run()).frames[0].shape == (1500, 1500, 3)


def test_a_file_that_costs_too_much_costs_a_worker():
    _, jpeg = noise(3000, 3000)

    async def run(*, stopped=False, **limits):
        async with pool(**limits) as decoders:
            if stopped:  # as one that never ends
                os.kill(decoders.processes[0], signal.SIGSTOP)
            with pytest.raises(Fault) as raised:
                await decode(decoders, jpeg)
            small = await decode(decoders, noise(8, 8)[1])
            assert small.frames[0].shape == (8, 8, 3)
            return raised.value, decoders.restarts

    slow, restarts = asyncio.run(run(stopped=True, decode=3))
    assert slow.code == "media_too_slow" and restarts == 1
    # What the interpreter and the libraries map, and little more.
    fault, restarts = asyncio.run(run(memory=least_memory() + 15_000_000))
    assert "memory" in fault.message and restarts == 1


def least_memory():
    """Bytes of address space of an idle worker."""
    code = (
        "import emollama_jax.serve.decoding as d; d._load_libraries()\n"
        "print(open('/proc/self/statm').read().split()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    return int(done.stdout) * os.sysconf("SC_PAGE_SIZE")


def test_frames_of_all_requests_share_one_budget():
    async def run():
        budget, order = Budget(10), []

        async def hold(name, size):
            async with budget.held(size):
                order.append(name)
                await asyncio.sleep(0.01)

        with pytest.raises(Fault, match="11 bytes decoded"):
            async with budget.held(11):
                pass
        tasks = [asyncio.create_task(hold(*one)) for one in (("a", 6), ("b", 6), ("c", 4))]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return order, budget.left

    assert asyncio.run(run()) == (["a", "c"], 10)


# ------------------------------------------------------------------ other hosts


PRIVATE = """127.0.0.1 10.1.2.3 169.254.169.254 ::1 fe80::1%eth0 ::ffff:10.0.0.1 0.0.0.0
224.0.0.1 100.64.0.1 64:ff9b::a00:1 2002:a00:1:: nonsense"""


@pytest.mark.parametrize("address", PRIVATE.split())
def test_private_addresses_are_not_fetched(address):
    assert not media.is_public(address)


def test_public_addresses_are():
    assert media.is_public("93.184.215.14") and media.is_public("2606:2800:21f::1")
    assert media.is_public("64:ff9b::5db8:d70e")


@pytest.fixture
def other_host():
    """A web server with a picture, a redirect and an endless file."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    picture = encode_picture(np.full((20, 20, 3), 200, np.uint8))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/picture")
                self.end_headers()
                return
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(picture if self.path == "/picture" else bytes(500_000))

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as host:
        thread = threading.Thread(target=host.serve_forever)
        thread.start()
        yield f"http://localhost:{host.server_port}"
        host.shutdown()
        thread.join()


def test_media_of_an_allowed_host(other_host, monkeypatch):
    limits = Limits(body=300_000, queue=8, workers=1)
    how = settings(media_hosts=("LocalHost",), limits=limits)
    with serving(FakeEngine(), how) as (url, _):

        def error(path):
            answer = ask(url, {"messages": asked("x", f"{other_host}{path}")})
            return answer.status_code, answer.json().get("error", {}).get("message", "")

        assert "leads to a private address" in error("/picture")[1]
        monkeypatch.setattr(media, "is_public", lambda _: True)
        assert error("/picture") == (200, "")
        assert "answered 302" in error("/moved")[1]
        assert error("/endless") == (413, "messages.0.content.1.image_url: over 300,000 bytes")


# ------------------------------------------------------------------ load, leaving, the end


def test_a_full_queue_says_so_at_once_and_nothing_is_lost():
    engine = FakeEngine(slots=2, queue=2, pace=0.05)
    with serving(engine, settings(limits=Limits(queue=2, workers=1))) as (url, app):
        with concurrent.futures.ThreadPoolExecutor(12) as clients:
            found = list(clients.map(lambda _: ask(url), range(12)))
        refused = [answer for answer in found if answer.status_code == 429]
        assert {answer.status_code for answer in found} == {200, 429}
        assert len(found) - len(refused) == len(engine.questions) >= 4
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert refused[0].json()["error"]["code"] == "queue_full"
        assert app.gate.inside == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(stream):
    engine = FakeEngine(slots=1, pace=0.05)
    words = {"messages": [{"role": "user", "content": "word " * 400}], "stream": stream}
    body = json.dumps(words).encode()
    with serving(engine, settings()) as (url, app):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as line:
            line.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
            until(lambda: engine.figures().generation_tokens > 1)
        until(lambda: engine.freed == 1)
        until(lambda: app.gate.inside == 0)
        assert engine.figures().running == 0
        assert ask(url).status_code == 200


def test_deadlines():
    engine = FakeEngine(pace=0.1)
    limits = Limits(deadline=0.35, queue=8, workers=1)
    body = {"messages": [{"role": "user", "content": "word " * 50}]}
    with serving(engine, settings(limits=limits)) as (url, app):
        answer = ask(url, body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline")
        answer = ask(url, body | {"stream": True})
        *_, error, last, nothing = answer.text.split("\n\n")
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "deadline"
        assert (last, nothing) == ("data: [DONE]", "")
        until(lambda: engine.freed == 2)
        assert app.gate.inside == 0


def test_a_stopped_engine_is_told():
    engine = FakeEngine()
    with serving(engine, settings()) as (url, _):
        assert httpx2.get(f"{url}/health").json() == {"status": "ok"}
        engine.failure = "out of memory"
        assert httpx2.get(f"{url}/health").status_code == 503
        answer = ask(url)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "stopped")


def test_sigterm_under_load_finishes_what_runs_and_refuses_the_rest(root):
    command = [sys.executable, "-m", "tests.helpers.fake_engine", json.dumps({"pace": 0.1})]
    log = subprocess.PIPE
    with subprocess.Popen(command, cwd=root, stdout=log, stderr=log, text=True) as process:
        url = process.stdout.readline().strip()
        body = {"messages": [{"role": "user", "content": "word " * 15}]}
        with concurrent.futures.ThreadPoolExecutor(6) as clients:
            running = [clients.submit(ask, url, body) for _ in range(6)]
            counts = ('running{model_name="fake"} 4.0', 'waiting{model_name="fake"} 2.0')
            text = ""
            while not all(count in text for count in counts):
                text = httpx2.get(f"{url}/metrics").text
            process.send_signal(signal.SIGTERM)
            until(lambda: httpx2.get(f"{url}/health").status_code == 503)
            late = ask(url)
            assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
            answers = [future.result() for future in running]
        assert [answer.status_code for answer in answers] == [200] * 6
        assert process.wait(timeout=60) == 0
        said = process.stderr.read()
    assert "SIGTERM: 6 requests may finish within 30 s" in said
    assert "Traceback" not in said and "word" not in said


def test_a_grace_time_ends():
    engine = FakeEngine(pace=0.2)
    limits = Limits(grace=0.3, queue=8, workers=1)
    body = {"messages": [{"role": "user", "content": "word " * 200}]}
    with (
        serving(engine, settings(limits=limits)) as (url, app),
        concurrent.futures.ThreadPoolExecutor(1) as clients,
    ):
        asking = clients.submit(ask, url, body)
        until(lambda: app.gate.inside == 1)
        app.server.handle_exit(signal.SIGTERM, None)
        answer = asking.result(timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
    assert engine.freed == 1
