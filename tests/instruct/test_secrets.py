"""A planted key is in nothing that the remote verbs leave: no file, no output, no report."""

import json
import os
import pathlib
import tempfile

import pytest

from emollama_jax import cli, dispatch
from emollama_jax.errors import UserError
from emollama_jax.redact import redact
from emollama_jax.remote import run as remote_run
from emollama_jax.remote.openai import OpenAI
from tests.helpers import fake_gemini
from tests.helpers.fake_gemini import Server
from tests.helpers.prepared_sets import prepare_raf_db

pytest.importorskip("google.genai", reason="the extra `gemini` is not installed")

PLANTED = "sk-planted-0123456789abcdef"
OTHER = "AIza-planted-fedcba9876543210"


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A prepared set; keys are planted, and reports go below it."""
    monkeypatch.setenv("OPENAI_API_KEY", PLANTED)
    monkeypatch.setenv("GEMINI_API_KEY", OTHER)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return prepare_raf_db(tmp_path, train=3, test=2)


def echo(body):
    """A model that was told the keys, e.g. by a server that puts headers into its prompt."""
    return f"My keys are {PLANTED} and {OTHER}; the face shows anger."


def words_of(verb, data, server):
    if verb == "instruct":
        words = f"data instruct raf_db --dir {data} --by gemini --base-url {server.url} --limit 2"
    else:
        words = f"zero-shot --model openai:{server.url}/v1#m --data raf_db --dir {data}"
        words += f" --split test --out {data}/zero"
    return [*words.split(), "--tries", "1", "--attempts", "1", "--first-wait", "0.01"]


def leftovers(folder):
    """(file, bytes) of everything in a folder."""
    return [(path, path.read_bytes()) for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("verb", ["instruct", "zero-shot"])
@pytest.mark.parametrize("case", ["answers", "401", "500", "fault of ours"])
def test_no_key_is_left_anywhere(data, tmp_path, capfd, monkeypatch, caplog, verb, case):
    send = fake_gemini._Handler._send

    def repeats(self, code, tree, headers, fault=""):
        if "error" in tree:
            tree["error"]["message"] = f"no access with {PLANTED} or {OTHER}"
        send(self, code, tree, headers, fault)

    monkeypatch.setattr(fake_gemini._Handler, "_send", repeats)
    fault = case if case in ("401", "500") else ""
    server = Server(lambda item, number: fault, answer=echo)
    if case == "fault of ours":

        def breaks(task, reply):
            raise KeyError(f"{PLANTED} {OTHER}")

        monkeypatch.setattr(remote_run, "_judge", breaks)
    with server.running():
        try:
            cli.main(words_of(verb, data, server))
            status = 0
        except SystemExit as stop:
            status = stop.code
    used = json.dumps(server.headers)
    assert PLANTED in used or OTHER in used
    wanted = {"answers": {0}, "401": {2}, "500": {0, 2}, "fault of ours": {70}}
    assert status in wanted[case]
    out, err = capfd.readouterr()
    found = [("stdout", out.encode()), ("stderr", err.encode()), ("log", caplog.text.encode())]
    found += leftovers(tmp_path)
    assert len(found) > 8
    holding = [name for name, text in found for key in (PLANTED, OTHER) if key.encode() in text]
    assert holding == []
    if case != "500":
        assert any(b"_API_KEY]" in text for _, text in found)  # it stood there, and was taken out


def test_only_keys_are_taken_out(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", PLANTED)
    monkeypatch.setenv("HF_TOKEN", "short")
    assert redact(f"a {PLANTED} short") == "a [OPENAI_API_KEY] short"
    monkeypatch.delenv("OPENAI_API_KEY")
    assert redact(PLANTED) == PLANTED


@pytest.mark.parametrize(
    "url", ["http://me:secret-word@localhost/v1", "http://localhost/v1?key=secret-word"]
)
def test_a_key_in_a_url_is_refused_and_not_repeated(url):
    with pytest.raises(UserError, match="give the key in OPENAI_API_KEY") as caught:
        OpenAI(url, "m", timeout=1)
    assert "secret-word" not in str(caught.value)


def test_a_report_holds_no_key(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", PLANTED)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(SystemExit), dispatch.boundary(["zero-shot", PLANTED]):
        raise ValueError(f"header Bearer {PLANTED}")
    (saved,) = pathlib.Path(tmp_path).glob("emollama-*.txt")
    assert PLANTED not in capsys.readouterr().err + saved.read_text()
    assert os.environ["OPENAI_API_KEY"] == PLANTED
