"""More requests than a running `emollama serve` can answer, for minutes.

    emollama serve --port 8000 & python benchmarks/serve_load.py --pid $! --minutes 5

First as many clients as slots, one request after the other: that is the capacity. Then four times
that rate, whether or not answers come. Every request is about a drawn picture, one of sixteen.
Prints one line of JSON: counts, percentiles of seconds, memory of the server and its workers minute
by minute, and the server's own count of compilations.
"""

import argparse
import asyncio
import base64
import collections
import json
import os
import pathlib
import re
import statistics
import time

import httpx2

from emollama_jax.tiny.actionfaces.examples import encode_picture
from emollama_jax.tiny.actionfaces.sample import sample_image

TOKENS = 32
QUESTION = "What emotion does the person in the image show?"
PATH = "/v1/chat/completions"


def bodies() -> list[dict]:
    """Requests about sixteen drawn pictures."""
    found = []
    for number in range(16):
        jpeg = base64.b64encode(encode_picture(sample_image("test", number).picture)).decode()
        url = f"data:image/jpeg;base64,{jpeg}"
        content = [
            {"type": "text", "text": QUESTION},
            {"type": "image_url", "image_url": {"url": url}},
        ]
        found.append({"messages": [{"role": "user", "content": content}], "max_tokens": TOKENS})
    return found


def resident(pid: int) -> int:
    """Bytes of memory of a process and its children."""
    total = 0
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for one in (pid, *map(int, children)):
        pages = pathlib.Path(f"/proc/{one}/statm").read_text().split()[1]
        total += int(pages) * os.sysconf("SC_PAGE_SIZE")
    return total


class Load:
    """What was asked, and what came."""

    def __init__(self, client: httpx2.AsyncClient, seed_bodies: list[dict]):
        self.client, self.bodies = client, seed_bodies
        self.status: collections.Counter = collections.Counter()
        self.seconds: dict[int, list[float]] = collections.defaultdict(list)
        self.lost, self.ids = 0, collections.Counter()

    async def ask(self, number: int) -> None:
        """One request."""
        began = time.monotonic()
        try:
            answer = await self.client.post(PATH, json=self.bodies[number % len(self.bodies)])
        except httpx2.HTTPError as error:
            self.lost += 1
            self.status[type(error).__name__] += 1
            return
        self.status[answer.status_code] += 1
        self.seconds[answer.status_code].append(time.monotonic() - began)
        if answer.status_code == 200:
            self.ids[answer.json()["id"]] += 1

    def told(self, code: int) -> dict:
        """Percentiles of the seconds of one status."""
        values = sorted(self.seconds[code])
        if len(values) < 2:
            return {"n": len(values)}
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        picked = {f"p{share}": round(cuts[share - 1], 3) for share in (50, 95, 99)}
        return {"n": len(values), "max": round(values[-1], 3)} | picked


async def capacity(load: Load, clients: int, seconds: float) -> float:
    """Requests a second that so many clients get answered, one after the other."""
    until = time.monotonic() + seconds

    async def client(number: int) -> int:
        done = 0
        while time.monotonic() < until:
            await load.ask(number + done)
            done += 1
        return done

    began = time.monotonic()
    done = sum(await asyncio.gather(*map(client, range(clients))))
    return done / (time.monotonic() - began)


async def run(options: argparse.Namespace) -> dict:
    """Capacity, then the load."""
    wide = httpx2.Limits(max_connections=2000, max_keepalive_connections=50)
    async with httpx2.AsyncClient(base_url=options.url, timeout=300, limits=wide) as client:
        made = bodies()
        rate = await capacity(Load(client, made), options.clients, options.warm)
        load, tasks, memory = Load(client, made), [], []
        began, number = time.monotonic(), 0
        while (now := time.monotonic() - began) < 60 * options.minutes:
            while number < now * rate * options.times:
                tasks.append(asyncio.create_task(load.ask(number)))
                number += 1
            if now > 60 * len(memory):
                memory.append(resident(options.pid))
            await asyncio.sleep(0.005)
        await asyncio.gather(*tasks)
        memory.append(resident(options.pid))
        metrics = (await client.get("/metrics")).text
    compiled = re.search(r"emollama:compilations_total\{.*?\} (\S+)", metrics)
    return {
        "capacity": round(rate, 3),
        "asked": number,
        "status": {str(status): n for status, n in load.status.items()},
        "lost": load.lost,
        "answered_twice": sum(n - 1 for n in load.ids.values()),
        "accepted": load.told(200),
        "refused": load.told(429),
        "resident_mb": [round(value / 2**20) for value in memory],
        "compilations": float(compiled[1]) if compiled else None,
    }


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--pid", type=int, required=True, help="process of the server")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--times", type=float, default=4, help="of the capacity")
    parser.add_argument("--clients", type=int, default=8, help="as many as the server has slots")
    parser.add_argument("--warm", type=float, default=30, help="seconds for the capacity")
    print(json.dumps(asyncio.run(run(parser.parse_args()))))


if __name__ == "__main__":
    main()
