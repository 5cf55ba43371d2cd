"""Malformed requests, by a seed, against a running `emollama serve`.

    emollama serve --body 300000 --port 8000 2> log.txt &
    python benchmarks/serve_faults.py --count 2000 --log log.txt

Each must get a 4xx, or be hung up on; after every hundred, a good request must be answered. Prints
what each kind got. Exit status 1 where something else happened, or the log has a traceback.
"""

import argparse
import collections
import json
import pathlib
import sys
import time

import httpx2

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from tests.helpers.bad_requests import bad_requests, send_raw

GOOD = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=pathlib.Path)
    options = parser.parse_args()
    host, port = options.url.removeprefix("http://").split(":")
    found: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    wrong, began = [], time.monotonic()
    for number, (name, raw) in enumerate(
        bad_requests(seed=options.seed, count=options.count), start=1
    ):
        status = send_raw(host, int(port), raw, seconds=60, leave=name == "cut")
        found[name][status] += 1
        hung_up = status is None and name in ("cut", "head")
        if not hung_up and not (status and 400 <= status < 500):
            wrong.append(f"request {number}, {name}: {status}")
        if number % 100 == 0:
            answer = httpx2.get(f"{options.url}/health", timeout=60)
            answer = httpx2.post(f"{options.url}/v1/score", json={"messages": 1}, timeout=60)
            if answer.status_code != 400:
                wrong.append(f"after request {number}: {answer.status_code}")
            good = httpx2.post(f"{options.url}/v1/chat/completions", json=GOOD, timeout=120)
            if good.status_code != 200:
                wrong.append(f"a good request after {number}: {good.status_code} {good.text[:200]}")
    if options.log and "Traceback" in options.log.read_text():
        wrong.append("a traceback in the log")
    seconds = round(time.monotonic() - began, 1)
    told = {name: {str(status): n for status, n in seen.items()} for name, seen in found.items()}
    print(json.dumps({"requests": options.count, "seconds": seconds, "wrong": wrong, "by": told}))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
