"""Five hundred items, a fifth of the answers faulty, three kills: nothing lost, nothing paid twice.

What was paid is read from the server's own log, not from what the command says.
"""

import collections
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from emollama_jax import cli
from tests.helpers.fake_gemini import BROKEN, FINAL, UNPAID, Server, random_fault
from tests.helpers.prepared_sets import prepare_raf_db

pytest.importorskip("google.genai", reason="the extra `gemini` is not installed")

ITEMS = 500
KILLS = 3
CONCURRENCY = 8
ATTEMPTS = 3


def arguments(data, server):
    """Of the command line."""
    args = f"data instruct raf_db --dir {data} --base-url {server.url} --by gemini --timeout 1"
    args += f" --concurrency {CONCURRENCY} --per-minute 100000 --first-wait 0.02 --tries 12"
    args += f" --attempts {ATTEMPTS}"
    return args.split()


def start(data, server):
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "emollama_jax.cli", *arguments(data, server)],
        env=os.environ | {"GEMINI_API_KEY": "not-a-key"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_three_kills(tmp_path, monkeypatch):
    data = prepare_raf_db(tmp_path, train=ITEMS, test=1)
    log = tmp_path / "server.jsonl"
    server = Server(random_fault(0.2), log=log, delay=0.03, hang=1.5)
    with server.running():
        for kill in range(KILLS):
            before = server.paid()
            process = start(data, server)
            while server.paid() < before + 110:
                assert process.poll() is None, process.communicate()
                time.sleep(0.02)
            assert server.at_once > 0, f"kill {kill} hits nothing on its way"
            process.send_signal(signal.SIGKILL)
            process.communicate()
        process = start(data, server)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        requests = server.paid()
        monkeypatch.setenv("GEMINI_API_KEY", "not-a-key")
        cli.main(arguments(data, server))
        assert server.paid() == requests, "a finished set was asked again"

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    by_item = collections.defaultdict(list)
    for line in lines:
        by_item[line["item"]].append(line)
    assert len(by_item) == ITEMS

    # None is lost: each is accepted or set aside, and the output says so.
    folder = data / "instruct" / "raf_db" / "train"
    done = json.loads((folder / "instruct.json").read_text())
    assert done["conversations"] + done["set_aside"] == ITEMS
    aside = [json.loads(line) for line in (folder / "set_aside.jsonl").read_text().splitlines()]
    assert len({line["id"] for line in aside}) == done["set_aside"] < 0.15 * ITEMS
    assert f"{done['conversations']} accepted, {done['set_aside']} set aside, 0 open" in out
    entries = json.loads((folder / "conversations.json").read_text())
    made = [entry["id"] for entry in entries if entry["made_by"] == "gemini:gemini-2.5-flash"]
    assert len(made) == len(set(made)) == done["conversations"]

    # None is paid more than once beyond what the faults needed: of the paid answers, some broke on
    # the way and some were rejected; of those that remain, one is needed, or none if that was the
    # last attempt.
    extra = 0
    for item, seen in by_item.items():
        paid = [line["fault"] for line in seen if line["paid"]]
        broken = sum(fault in BROKEN for fault in paid)
        good = paid.count("")
        rejected = len(paid) - broken - good
        final = any(fault in FINAL for fault in paid)
        needed = 1 if rejected < ATTEMPTS and not final else 0
        more = max(good - needed, 0) + max(rejected - ATTEMPTS, 0)
        assert more <= 1, (item, seen)
        extra += more
    assert extra <= KILLS * CONCURRENCY

    share = sum(line["fault"] != "" for line in lines) / len(lines)
    assert 0.15 < share < 0.25
    assert {line["fault"] for line in lines} >= {*UNPAID, *BROKEN, "cut", "not_json"}

    # The journal agrees with the server about what was paid for and read.
    (journal,) = folder.glob("journal-*.jsonl")
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    answers = [line for line in entries if "answer" in line]
    read = sum(line["paid"] and line["fault"] not in BROKEN for line in lines)
    assert read - KILLS * CONCURRENCY <= len(answers) <= read
