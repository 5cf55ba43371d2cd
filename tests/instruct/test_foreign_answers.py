"""What a service may send, and what a journal may hold: a text, a trouble of that one item, or a
line that is left out; never an end of the run, never a wrong sum.
"""

import asyncio
import json
import math

import httpx2
import pytest

from emollama_jax.errors import UserError
from emollama_jax.remote import run
from emollama_jax.remote.journal import Journal
from emollama_jax.remote.openai import OpenAI
from emollama_jax.remote.options import Limits
from emollama_jax.remote.prices import Price
from emollama_jax.remote.request import Request, Trouble, one_line, text_of, tokens_of

OF = {"of": "a test"}
REQUEST = Request(parts=("q",), max_tokens=5, temperature=0)
PRICE = Price(1.0, 1.0, "given")


def body(content="anger", usage=None):
    message = {"role": "assistant", "content": content}
    usage = {"prompt_tokens": 700, "completion_tokens": 50} if usage is None else usage
    return {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}


def ask(folder, response, *, budget=1.0):
    """One item, asked once; its entry after the journal was read again, and what was spent."""
    client = OpenAI("http://nowhere/v1", "m", timeout=5)
    asyncio.run(client.close())
    data = response if isinstance(response, bytes) else json.dumps(response).encode()
    transport = httpx2.MockTransport(lambda request: httpx2.Response(200, content=data))
    client._http = httpx2.AsyncClient(transport=transport)
    task = run.Task("k", lambda why: REQUEST, lambda reply: run.Verdict(reply.text))
    limits = Limits(tries=1, attempts=1, budget=budget, first_wait=0.0)
    with Journal(folder / "journal", OF) as journal:
        run.ask_all([task], client, journal, limits, PRICE)
        spent = journal.spent
    with Journal(folder / "journal", OF) as journal:
        assert journal.spent == spent
        return journal.entry("k"), spent


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("anger", "anger"),
        (None, ""),
        ([], ""),
        ([{"type": "text", "text": "an"}, {"type": "text", "text": "ger"}], "anger"),
        (["an", {"type": "text", "text": "ger"}, {"type": "image", "url": "x"}], "anger"),
        ("ang\ud83der", "ang\ufffder"),
    ],
)
def test_texts_are_joined_and_can_be_written(tmp_path, content, text):
    entry, spent = ask(tmp_path, body(content))
    assert entry.value == text
    assert spent == pytest.approx(750e-6)


@pytest.mark.parametrize(
    "response",
    [
        body({"text": "anger"}),
        body(3),
        body([{"type": "image", "url": "x"}]),
        {"choices": {"0": 1}},
        [],
        "anger",
        b'{"choices":' + b"[" * 100_000,
        b'{"choices": [], "usage": {"prompt_tokens": ' + b"9" * 5000 + b"}}",
        b"<html>",
        b"\xff\xfe\x00",
    ],
)
def test_anything_else_is_a_trouble_of_that_item(tmp_path, response):
    entry, spent = ask(tmp_path, response)
    assert not entry.done and not entry.on_its_way
    assert 0 < spent < 1e-5  # it may have been paid for


@pytest.mark.parametrize(
    "count", ["7", "x", math.nan, math.inf, -5, 10**200, True, {"a": 1}, [7], None, 7.5]
)
def test_counts_that_count_nothing_are_estimated(tmp_path, count):
    assert tokens_of(count) is None
    usage = {"prompt_tokens": count, "completion_tokens": count}
    entry, spent = ask(tmp_path, body("anger" * 8, usage))
    assert entry.value == "anger" * 8
    assert spent == pytest.approx((REQUEST.input_tokens + 10) / 1e6)


def test_counts_are_whole_numbers():
    assert [tokens_of(n) for n in (0, 7, 7.0, 10**8)] == [0, 7, 7, 10**8]
    for usage in ([1], "x", 3):
        assert isinstance(body(usage=usage)["usage"], type(usage))


def test_usage_of_another_kind(tmp_path):
    entry, _ = ask(tmp_path, body(usage=[1]))
    assert entry.value == "anger"


def test_nobody_waits_for_longer_than_an_hour():
    assert Trouble("x", kind="passing", after=1e9).after == 3600
    assert Trouble("x", kind="passing", after=2.5).after == 2.5


def test_words_of_a_service_can_be_written():
    one_line("a\ud800\nb").encode()
    with pytest.raises(ValueError, match="a content that is a dict"):
        text_of({})


# --- journals


POISON = [
    b"[]",
    b"3",
    b'{"sent": 3, "cost": 1}',
    b'{"sent": "k", "cost": NaN}',
    b'{"sent": "k", "cost": -1}',
    b'{"sent": "k", "cost": ' + b"9" * 5000 + b"}",
    b'{"answer": ["a"], "cost": 1}',
    b'{"answer": "k", "text": "x", "value": [1], "why": "", "aside": false, "cost": 1, '
    b'"tokens": [1, null]}',
    b'{"answer": "k", "text": "x", "value": null, "why": 3, "aside": false, "cost": 1, '
    b'"tokens": [1, 2]}',
    b'{"aside": "k"}',
    b"[" * 50_000,
    b"\xff\xfe",
    b"half a line of an older ki",
]


@pytest.mark.parametrize("line", POISON, ids=[line[:30] for line in POISON])
def test_a_poisoned_line_is_told_of_and_left_out(tmp_path, caplog, line):
    path = tmp_path / "journal"
    with Journal(path, OF) as journal:
        journal.sent("k", 0.5)
    with path.open("ab") as file:
        file.write(line + b"\n")
    with Journal(path, OF) as journal:
        assert journal.spent == 0.5 and journal.entry("k").on_its_way
        journal.answer("k", text="x", value=1, why="", aside=False, cost=0.25, tokens=(1, 2))
    assert f"{path}: left out line 3, which cannot be read" in caplog.text
    with Journal(path, OF) as journal:  # what follows the line counts
        assert journal.spent == 0.25 and journal.entry("k").value == 1
    assert line in path.read_bytes()


@pytest.mark.parametrize("line", [b"[]", b"{}", b'{"of": 3}', b"[" * 50_000, b"\xff"])
def test_a_poisoned_first_line_ends_it(tmp_path, line):
    (tmp_path / "journal").write_bytes(line + b"\n")
    with pytest.raises(UserError, match="line 1: damaged"):
        Journal(tmp_path / "journal", OF)


def test_what_a_judge_makes_of_an_answer_can_be_written(tmp_path):
    with Journal(tmp_path / "journal", OF) as journal:
        journal.answer(
            "k", text="x", value=["a\ud800"], why="", aside=False, cost=0.0, tokens=(1, 2)
        )
    with Journal(tmp_path / "journal", OF) as journal:
        assert journal.entry("k").value == ["a\ufffd"]
