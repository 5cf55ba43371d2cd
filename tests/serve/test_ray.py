"""`deploy/ray_serve.py` on two local replicas, one of which is killed under load."""

import concurrent.futures
import contextlib
import importlib.util
import os
import pathlib
import signal
import socket
import sys

import httpx2
import pytest

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed: pip install '.[ray]'", allow_module_level=True)

# Ray's own threads and sockets outlive a test, and its imports warn.
pytestmark = pytest.mark.filterwarnings("ignore")
BODY = {"messages": [{"role": "user", "content": "word " * 30}]}


@pytest.fixture(scope="module")
def url(root):
    """An application of two replicas, with the engine that has no model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "EMOLLAMA_ENGINE": "tests.helpers.fake_engine:slow_engine",
            "EMOLLAMA_MIN_REPLICAS": "2",
            "EMOLLAMA_REPLICAS": "2",
            "PYTHONPATH": str(root),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",
            # A slow machine is no defect.
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "90",
            "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "90",
        }.items():
            patch.setenv(name, value)
        import ray
        from ray import serve

        ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100_000_000)
        try:
            for _ in range(3):  # the first call waits a minute for Ray's proxy, not longer
                with contextlib.suppress(TimeoutError):
                    serve.start(http_options={"port": port})
                    break
            sys.modules.pop("deploy.ray_serve", None)
            serve.run(importlib.import_module("deploy.ray_serve").app)
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()
            ray.shutdown()


def replicas():
    """Process ids of the replicas."""
    found = []
    for folder in pathlib.Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if b"ray::ServeReplica" in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
    return sorted(found)


def ask(url):
    """The status of one request."""
    return httpx2.post(f"{url}/v1/chat/completions", json=BODY, timeout=120).status_code


def test_a_killed_replica_is_replaced_and_costs_only_what_it_had(url):
    assert httpx2.get(f"{url}/health").json() == {"status": "ok"}
    before = replicas()
    assert len(before) == 2
    with concurrent.futures.ThreadPoolExecutor(6) as clients:
        asking = [clients.submit(ask, url) for _ in range(60)]
        next(concurrent.futures.as_completed(asking))
        os.kill(before[0], signal.SIGKILL)
        found = [future.result() for future in asking]
    assert set(found) <= {200, 500, 503}
    assert found.count(200) >= 54  # all but those that the killed one had
    assert ask(url) == 200


def test_streams_come_in_pieces(url):
    with httpx2.stream(
        "POST", f"{url}/v1/chat/completions", json=BODY | {"stream": True}, timeout=120
    ) as answer:
        parts = list(answer.iter_raw())
    assert len(parts) > 5
    assert b"".join(parts).endswith(b"data: [DONE]\n\n")
