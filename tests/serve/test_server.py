"""`emollama serve` itself: the package's run, asked by OpenAI's client over HTTP."""

import base64
import dataclasses
import re
import signal
import subprocess
import sys

import httpx2
import openai
import pytest

from emollama_jax import cli
from emollama_jax.checkpoint import load_for_inference
from emollama_jax.runs import PACKAGE
from emollama_jax.serve.answer import Answerer
from emollama_jax.tiny.actionfaces.examples import encode_picture
from emollama_jax.tiny.actionfaces.sample import sample_image

QUESTION = "Describe the face in the image and name the emotion."


@pytest.fixture(scope="module")
def jpeg():
    """A drawn face."""
    return encode_picture(sample_image("test", 3, size=160).picture)


@pytest.fixture(scope="module")
def messages(jpeg):
    url = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    medium = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [{"type": "text", "text": QUESTION}, medium]}]


@pytest.fixture(scope="module")
def served():
    """The server's address; SIGTERM ends it with status 0 and no traceback."""
    command = [sys.executable, "-m", "emollama_jax.cli", "serve", "--port", "0", "--slots", "3"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        line = process.stdout.readline()
        assert line.startswith("serving on http://127.0.0.1:"), process.stderr.read()
        yield line.split()[-1]
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
        assert process.wait() == 0, said
    assert "POST /v1/chat/completions 200" in said
    assert "Traceback" not in said and "Warning" not in said and QUESTION not in said


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_it_answers_as_ask_does_and_keeps_what_it_saw(served, client, jpeg, messages):
    answerer = Answerer(*load_for_inference(PACKAGE))
    media = dataclasses.replace(answerer.look(jpeg), agr="")  # off where it is served
    wanted = "".join(answerer.ask(media, QUESTION))
    answer = client.chat.completions.create(model="emollama", messages=messages)
    assert answer.choices[0].message.content == wanted
    again = client.chat.completions.create(model="emollama", messages=messages, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in again) == wanted
    longer = [
        *messages,
        {"role": "assistant", "content": wanted},
        {"role": "user", "content": "What emotion does the person in the image show?"},
    ]
    answer = client.chat.completions.create(model="emollama", messages=longer, logprobs=True)
    assert answer.usage.prompt_tokens_details.cached_tokens > 50
    tokens = answer.choices[0].logprobs.content
    told = "".join(token.token for token in tokens)
    assert told.lstrip() == answer.choices[0].message.content


def test_scores_and_no_compilation(served, messages):
    body = {"messages": messages, "labels": ["happiness", "sadness", "a cup"]}
    data = httpx2.post(f"{served}/v1/score", json=body, timeout=60).json()["data"]
    assert sum(row["probability"] for row in data) == pytest.approx(1.0)
    usual = httpx2.post(f"{served}/v1/score", json={"messages": messages}, timeout=60).json()
    assert "contempt" in [row["label"] for row in usual["data"]]
    wrong = httpx2.post(f"{served}/v1/score", json=body | {"labels": ["a"] * 2}, timeout=60)
    assert wrong.status_code == 400
    text = httpx2.get(f"{served}/metrics").text
    assert re.search(r"^emollama:compilations_total\{.*\} 0.0$", text, re.M)


def test_the_page_knows_the_run(served):
    about = httpx2.get(f"{served}/about").json()
    assert about["model"] == "emollama" and len(about["examples"]) == 7
    assert "FERPlus" in about["trained"] and len(about["known"]) == 3


def test_what_is_refused_before_anything_is_loaded(served, capsys, monkeypatch):
    port = served.rpartition(":")[2]
    for words, said in (
        (["--port", port], "Address already in use: choose another"),
        (["--host", "nowhere.invalid"], "choose another"),
        (["--port", "70000"], "wanted at most 65535"),
        (["--slots", "0"], "wanted at least 1"),
        (["--queue", "-1"], "wanted at least 0"),
        (["runs/none"], "no such folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["serve", *words])
        assert stop.value.code == 2
        assert said in capsys.readouterr().err
    monkeypatch.setenv("EMOLLAMA_API_KEY", " ")
    with pytest.raises(SystemExit):
        cli.main(["serve"])
    assert "EMOLLAMA_API_KEY is empty" in capsys.readouterr().err
