"""What a conversation may say, and the journal that keeps what was paid."""

import json

import pytest

from emollama_jax.data.emotions import LABEL_SPACES
from emollama_jax.errors import UserError
from emollama_jax.instruct import ask
from emollama_jax.instruct.check import emotions, faults, invented
from emollama_jax.instruct.templates import template
from emollama_jax.remote.journal import Journal
from emollama_jax.remote.request import Reply

FACE = "The brows are raised and the mouth is open."
GOOD = ("What does the face show?", f"{FACE} This is surprise.")
DECLINED = ("Why does she feel so?", "The image does not show a reason.")


def found(*turns, label="surprise"):
    return faults(turns, label=label, kind="image")


@pytest.mark.parametrize(
    "turns",
    [
        [GOOD],
        [GOOD, DECLINED],
        [GOOD, ("What is the person doing?", "She holds a hand in front of the chin.")],
        [("How does he feel?", f"{FACE} He looks astonished, because his brows are high.")],
        [GOOD, ("Why do you think so?", "Because the brows are high and the jaw drops.")],
        [("Describe the face.", "The eyes are calm, the mouth is open: surprise.")],
    ],
)
def test_good_conversations(turns):
    assert found(*turns) == []


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([("Is this surprise?", GOOD[1])], "gives the emotion away"),
        ([(GOOD[0], FACE)], "does not name the emotion surprise"),
        ([(GOOD[0], f"{GOOD[1]} It is not fear.")], "another emotion is named: fear"),
        ([(GOOD[0], f"{GOOD[1]} She is excited.")], "another emotion is named: excited"),
        ([GOOD, ("Is she angry?", "I cannot tell.")], "another emotion is named: anger"),
        ([(GOOD[0], "The person shows surprise.")], "at least two of"),
        ([(GOOD[0], f"{GOOD[1]} She reacted to loud news.")], "a reason is invented"),
        ([(GOOD[0], f"{GOOD[1]} Perhaps someone called.")], "a reason is invented"),
        ([GOOD, (DECLINED[0], "Because she won a prize.")], "a reason is invented"),
        ([GOOD, (DECLINED[0], "She has a good day.")], "must say that the image shows none"),
        ([(GOOD[0], f"<image> {GOOD[1]}")], "place holder"),
    ],
)
def test_faults_are_named(turns, said):
    assert said in "; ".join(found(*turns))


def test_emotions_go_by_the_words_that_all_sets_share():
    assert emotions("She looks happy, he is furious.") == {"happiness", "anger"}
    assert emotions("A calm brow and a blank stare.") == set()


def test_evidence_is_no_invention():
    assert invented("It is sadness because the lip corners are pulled down.") == ""
    assert invented("It is sadness because her friend left.").startswith("because her friend")


@pytest.mark.parametrize("name", [n for n in LABEL_SPACES if n != "ferplus"])
@pytest.mark.parametrize("kind", ["image", "clip"])
def test_templates_name_the_emotion_and_no_other(name, kind):
    space = LABEL_SPACES[name]
    for label, word in enumerate(space.canonical):
        for number in range(8):
            example = {"id": f"{number}", "kind": kind, "label": label, "items": "[[]]"}
            turns = template(example, space)
            assert template(example, space) == turns
            named = set().union(*(emotions(t["value"]) for t in turns if t["from"] == "gpt"))
            assert named == {word}, turns


def test_lengths_and_forms_are_checked():
    def why(text):
        reply = Reply(text=text, finish="stop")
        return ask.judge_conversation(reply, label="surprise", kind="image").why

    turn = {"question": GOOD[0], "answer": GOOD[1]}
    assert why(json.dumps({"turns": [turn]})) == ""
    assert "turns" in why(json.dumps({"turns": []}))
    assert "turns" in why(json.dumps({"turns": [turn] * 3}))
    assert "answer" in why(json.dumps({"turns": [turn | {"answer": "x" * 1300}]}))
    assert "note" in why(json.dumps({"turns": [turn | {"note": "more"}]}))
    assert "not JSON" in why('{"turns": [')


# ---- the journal


def write_one(path, key="a"):
    with Journal(path, {"model": "m"}) as journal:
        journal.sent(key, 0.5)
        journal.answer(key, text="t", value=["v"], why="", aside=False, cost=0.2, tokens=(10, 2))


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path):
    path = tmp_path / "journal.jsonl"
    write_one(path)
    whole = path.read_bytes()
    for cut in range(whole.find(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:cut])
        write_one(path)  # goes on after the last whole line
        with Journal(path, {"model": "m"}) as journal:
            assert journal.entry("a").value == ["v"]
            assert not journal.entry("a").on_its_way
    path.write_bytes(whole[:9])  # not even the first line
    write_one(path)
    assert path.read_bytes() == whole


def test_money_of_what_was_on_its_way_stays_counted(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path, {}) as journal:
        journal.sent("a", 0.5)
    with Journal(path, {}) as journal:
        assert journal.entry("a").on_its_way
        assert journal.spent == 0.5
        journal.sent("a", 0.5)
        journal.failed("a", "503", 0.0)
        journal.sent("a", 0.5)
        journal.answer("a", text="", value=1, why="", aside=False, cost=0.2, tokens=(1, 1))
        assert journal.spent == pytest.approx(0.7)
    with Journal(path, {}) as journal:
        assert journal.spent == pytest.approx(0.7)
        assert journal.entry("a").done


def test_a_journal_of_something_else_or_damaged_is_refused(tmp_path):
    path = tmp_path / "journal.jsonl"
    write_one(path)
    with pytest.raises(UserError, match="a journal of model = 'm', and this is 'n'"):
        Journal(path, {"model": "n"})
    lines = path.read_text().splitlines()
    path.write_text("\n".join(["not json", *lines[1:]]) + "\n")
    with pytest.raises(UserError, match="line 1: damaged"):
        Journal(path, {"model": "m"})
    path.write_text("\n".join(lines) + "\n")
    with Journal(path, {"model": "m"}), pytest.raises(UserError, match="another process"):
        Journal(path, {"model": "m"})
