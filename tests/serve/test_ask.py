"""`emollama ask`: what is a question, what is refused before JAX, text and JSON, conversations."""

import dataclasses
import io
import json
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from emollama_jax import config
from emollama_jax.errors import UserError
from emollama_jax.serve import answer, terminal


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "face.png"
    Image.fromarray(np.full((30, 40, 3), 90, np.uint8)).save(path)
    return path


def wish(*media, question=None, **changes):
    plain = {"chat": question is None, "run": "run", "face": None, "temperature": None}
    plain |= {"max_new_tokens": None, "as_json": False, "without_face": False}
    return terminal.Wish(media=media, question=question, **plain | changes)


@pytest.mark.parametrize(
    ("behind", "question"),
    [
        (["What is it?"], "What is it?"),
        (["Why?"], "Why?"),
        (["Describe"], "Describe"),
        ([" "], " "),
        ([""], ""),
        (["Is this Fig. 3 of a/b"], "Is this Fig. 3 of a/b"),
        (["other.jpg"], None),
        (["clips/other"], None),
        ([], None),
        (["missing.jpg", "What is it?"], "What is it?"),
    ],
)
def test_media_and_question(photo, behind, question):
    media, found = terminal.split_arguments([str(photo), *behind])
    assert found == question
    assert media == (photo, *map(pathlib.Path, behind if question is None else behind[:-1]))


def test_an_existing_file_is_no_question(photo, monkeypatch):
    monkeypatch.chdir(photo.parent)
    pathlib.Path("is it").write_bytes(photo.read_bytes())
    assert terminal.split_arguments([str(photo), "is it"])[1] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, "--temperature is -1, wanted at least 0"),
        ({"temperature": float("nan")}, "--temperature is nan"),
        ({"max_new_tokens": 0}, "--max-new-tokens is 0, wanted at least 1"),
        ({"face": -1}, "--face is -1, wanted at least 0"),
        ({"question": "  ", "chat": False}, "the question is empty"),
        ({"run": "nowhere"}, "nowhere: no such folder.*make demo"),
    ],
)
def test_bad_wishes_are_refused(photo, changes, message):
    with pytest.raises(UserError, match=message):
        terminal.check(wish(photo, **changes))


def test_a_face_of_a_clip_is_refused(photo, tmp_path):
    frames = tmp_path / "frames"
    frames.mkdir()
    for number in range(2):
        (frames / f"{number}.png").write_bytes(photo.read_bytes())
    with pytest.raises(UserError, match="is a clip; faces are chosen in pictures only"):
        terminal.check(wish(frames, face=0))


CALLS = """
import sys
from emollama_jax import cli
for args in {calls}:
    try:
        cli.main(["ask", *args])
    except SystemExit as end:
        assert end.code == 2, (args, end.code)
    else:
        raise AssertionError(args)
assert "jax" not in sys.modules and "flax" not in sys.modules
"""


def test_refused_before_jax_is_imported(photo, tmp_path):
    calls = [
        [str(tmp_path / "none.jpg"), "who?"],
        [str(photo), "who?", "--run", str(tmp_path)],
        [str(photo), "who?", "--temperature", "-1"],
        [str(photo), "who?", "--max-new-tokens", "0"],
        ["https://host.invalid/face.jpg", "who?"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", CALLS.format(calls=calls)],
        capture_output=True,
        text=True,
        env=os.environ,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(calls) and all(line.startswith("emollama: ") for line in lines)


class Stub:
    """An answerer of fixed words: the face is found where the picture is not black."""

    def __init__(self):
        self.cfg = config.load("tiny")
        self.encoder = types.SimpleNamespace(room=300)
        self.looked = 0

    def look(self, path, *, face):
        self.looked += 1
        if path.name == "broken.png":
            raise UserError("cannot be read")
        found = path.name != "dark.png"
        boxes = np.array([[1, 2, 3, 4], [5, 5, 6, 6]], np.float32)[: 2 if found else 0]
        return types.SimpleNamespace(
            source=path,
            kind="image",
            boxes=boxes,
            probabilities=np.ones(len(boxes), np.float32),
            face=0 if found else None,
            found=found,
        )

    def scores(self, media, classes):
        return {name: float(-number) for number, name in enumerate(classes)}


class Talk:
    """A conversation that repeats the question and counts."""

    def __init__(self, answerer, media, *, without_face):
        self.media, self.turns, self.forgotten = media, [], 0
        self.without_face = without_face

    def ask(self, question, *, how):
        if not (self.media.found or self.without_face):
            yield answer.NO_FACE.format(medium="image")
            return
        self.turns.append(question)
        yield f"{len(self.turns)}: "
        yield question


@pytest.fixture
def stub(monkeypatch, tmp_path):
    made = Stub()
    monkeypatch.setattr(terminal, "_load", lambda run: made)
    monkeypatch.setattr(answer, "Conversation", Talk)
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    return made


def run(asked, tmp_path, capsys, lines=""):

    asked = dataclasses.replace(asked, run=str(tmp_path / "run"))
    progress = io.StringIO()
    terminal.ask(asked, Console(file=progress))
    return capsys.readouterr().out.splitlines(), progress.getvalue()


def test_text_and_what_is_being_done(stub, photo, tmp_path, capsys):
    out, told = run(wish(photo, question="Who?"), tmp_path, capsys)
    assert out == ["1: Who?"]
    assert told.startswith("loading the run") and "…" in told


def test_several_pictures_are_named_and_a_missing_face_is_the_answer(stub, photo, tmp_path, capsys):
    dark = tmp_path / "dark.png"
    dark.write_bytes(photo.read_bytes())
    out, _ = run(wish(photo, dark, question="Who?"), tmp_path, capsys)
    assert out == [f"{photo}: 1: Who?", f"{dark}: No face was found in the image."]
    out, _ = run(wish(dark, question="Who?", without_face=True), tmp_path, capsys)
    assert out == ["(no face found; answering about the whole picture) 1: Who?"]


def test_json_has_a_line_for_each_answer(stub, photo, tmp_path, capsys):
    dark = tmp_path / "dark.png"
    dark.write_bytes(photo.read_bytes())
    out, _ = run(wish(photo, dark, question="Who?", as_json=True), tmp_path, capsys)
    first, second = map(json.loads, out)
    assert first["media"] == str(photo) and first["question"] == "Who?"
    assert first["answer"] == "1: Who?" and first["face_found"] and first["face"] == 0
    assert first["faces"][0] == {"box": [1.0, 2.0, 3.0, 4.0], "probability": 1.0}
    assert len(first["scores"]) == 7 and sum(first["scores"].values()) == pytest.approx(1, abs=1e-3)
    assert set(first["seconds"]) == {"load", "answer"}
    assert not second["face_found"] and second["faces"] == [] and second["scores"] is None
    assert second["answer"] == "No face was found in the image."


def test_a_conversation_looks_once(stub, photo, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("How?\n\nWhy?"))
    out, _ = run(wish(photo, question="Who?", chat=True), tmp_path, capsys)
    assert out == ["1: Who?", "2: How?", "3: Why?"]
    assert stub.looked == 1


def test_every_picture_gets_every_question(stub, photo, tmp_path, capsys, monkeypatch):
    other = tmp_path / "other.png"
    other.write_bytes(photo.read_bytes())
    monkeypatch.setattr(sys, "stdin", io.StringIO("How?\nWhy?\n"))
    out, _ = run(wish(photo, other), tmp_path, capsys)
    assert out == [f"{path}: {n}" for n in ("1: How?", "2: Why?") for path in (photo, other)]


def test_no_question_at_all_is_said(stub, photo, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    with pytest.raises(UserError, match="no question"):
        run(wish(photo), tmp_path, capsys)


def test_without_a_question_the_standard_one_is_answered(
    stub, photo, tmp_path, capsys, monkeypatch
):
    standard = "Describe the face in the image and name the emotion."
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))  # a pipe that holds nothing
    out, _ = run(wish(photo), tmp_path, capsys)
    assert out == [f"1: {standard}"]
    out, _ = run(wish(photo, question="Who?", chat=True), tmp_path, capsys)
    assert out == ["1: Who?"]

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("Why?\n\nHow?\n"))
    out, _ = run(wish(photo), tmp_path, capsys)
    assert out == [f"1: {standard}", "2: Why?"]


def test_one_broken_picture_costs_no_answer_about_the_others(stub, photo, tmp_path, capsys):
    broken, last = tmp_path / "broken.png", tmp_path / "last.png"
    for path in (broken, last):
        path.write_bytes(photo.read_bytes())
    with pytest.raises(UserError, match=r"broken\.png: cannot be read"):
        run(wish(photo, broken, last, question="Who?"), tmp_path, capsys)
    assert capsys.readouterr().out.splitlines() == [f"{photo}: 1: Who?", f"{last}: 1: Who?"]


def test_more_tokens_than_positions_are_refused(stub, photo, tmp_path, capsys):
    with pytest.raises(UserError, match="--max-new-tokens 301: wanted at most 300"):
        run(wish(photo, question="Who?", max_new_tokens=301), tmp_path, capsys)
