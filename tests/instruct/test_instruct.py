"""Instruction data: the real SDK against a local server that speaks the API, fault by fault."""

import json
import os
import re
import signal
import threading

import pytest

from emollama_jax import cli
from emollama_jax.data.pipeline import make_train_iterator, open_sources
from emollama_jax.data.split import Split, space_of
from emollama_jax.data.tokenizers import load_tokenizer
from emollama_jax.errors import UserError
from emollama_jax.testing.toy_sets import make_config, prior, small_bpe
from tests.helpers.fake_gemini import FAULTS, Server, texts_of
from tests.helpers.prepared_sets import prepare_dfew, prepare_raf_db

pytest.importorskip("google.genai", reason="the extra `gemini` is not installed")

TRAIN = 9
MADE_BY = "gemini:gemini-2.5-flash"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A prepared RAF-DB of noise; tests copy nothing, each has a folder of links to it."""
    return prepare_raf_db(tmp_path_factory.mktemp("raf"), train=TRAIN, test=1)


@pytest.fixture
def data(prepared, tmp_path):
    """A data folder of one test."""
    (tmp_path / "raf_db").symlink_to(prepared / "raf_db")
    return tmp_path


@pytest.fixture(autouse=True)
def key(monkeypatch):
    """A key, which the real service would refuse."""
    monkeypatch.delenv("GOOGLE_API_KEY", raising=False)
    monkeypatch.setenv("GEMINI_API_KEY", "not-a-key")


def run(data, server, *more, name="raf_db"):
    """The command, quick enough for tests."""
    quick = ["--per-minute", "100000", "--first-wait", "0.01", "--timeout", "0.5"]
    cli.main(
        ["data", "instruct", name, "--dir", str(data), "--base-url", server.url, *quick, *more]
    )


def refused(capsys, data, server, *more, name="raf_db"):
    """What the one line on stderr says, and the exit status."""
    with pytest.raises(SystemExit) as stop:
        run(data, server, *more, name=name)
    return stop.value.code, capsys.readouterr().err


def output(data, name="raf_db", split="train"):
    """instruct.json and conversations.json."""
    folder = Split(data, name, split).instruct_folder
    entries = json.loads((folder / "conversations.json").read_text())
    return json.loads((folder / "instruct.json").read_text()), entries


def only(fault, tries=1):
    """The first tries of every item have the fault."""
    return lambda item, number: fault if number < tries else ""


# ---- what comes out


def test_both_formats_and_what_training_reads(data, capsys):
    with Server().running() as server:
        run(data, server, "--media")
    done, entries = output(data)
    assert done["conversations"] == done["examples"] == TRAIN
    assert [entry["made_by"] for entry in entries] == ["category", MADE_BY] * TRAIN
    assert len({entry["id"] for entry in entries}) == 2 * TRAIN
    first = entries[1]
    assert first["conversations"][0]["value"].startswith("<image>\nWhat does the face look like")
    assert [turn["from"] for turn in first["conversations"]] == ["human", "gpt"] * 2
    media = Split(data, "raf_db", "train").instruct_folder / "media" / first["image"]
    original = Split(data, "raf_db", "train").examples
    assert media.suffix == ".jpg"
    assert media.read_bytes() == original[0]["media"]
    trained = Split(data, "raf_db", "train").instructed().examples
    for index in range(TRAIN):
        category, conversation = json.loads(trained[index]["items"])
        assert [category] == json.loads(original[index]["items"])
        emotion = category[1]["value"]
        assert emotion in conversation[1]["value"]
        assert conversation == entries[2 * index + 1]["conversations"]
        assert trained[index]["media"] == original[index]["media"]
    assert f"{TRAIN} accepted, 0 set aside, 0 open, $0.0" in capsys.readouterr().out


def test_the_request(data):
    with Server().running() as server:
        run(data, server, "--limit", "1")
    (body,), (headers,) = server.bodies, server.headers
    assert headers["x-goog-api-key"] == "not-a-key"
    generation = body["generationConfig"]
    assert generation["responseMimeType"] == "application/json"
    assert list(generation["thinkingConfig"].values()) == [0]
    schema = generation["responseJsonSchema"]["properties"]["turns"]
    assert (schema["minItems"], schema["maxItems"]) == (1, 2)
    picture, label = body["contents"][0]["parts"]
    assert "image/jpeg" in picture["inlineData"].values()
    assert label["text"] == "The emotion: surprise."
    assert "never invents a reason" in body["systemInstruction"]["parts"][0]["text"]


def test_training_draws_conversations_alone_only_where_there_are_some(data):
    def fault(item, number):
        return "blocked_prompt" if item in blocked else ""

    blocked = set()
    with Server(fault).running() as server:
        run(data, server, "--limit", "1")
        blocked.add(server.requests[0]["item"])
        run(data, server, "--limit", "4", "--model", "gemini-2.5-pro")
    done, entries = output(data)
    assert (done["conversations"], done["set_aside"]) == (3, 1)
    assert [e["id"] for e in entries if e["made_by"] != "category"] == [
        f"train_{n:05d}_conversation" for n in (1, 2, 3)
    ]
    assert list(Split(data, "raf_db", "train").drawable("conversation")) == [1, 2, 3]
    assert list(Split(data, "raf_db", "train").drawable("both")) == list(range(TRAIN))
    aside = (Split(data, "raf_db", "train").instruct_folder / "set_aside.jsonl").read_text()
    assert json.loads(aside) == {
        "id": "train_00000",
        "why": "blocked: prompt, PROHIBITED_CONTENT",
    }


def test_another_preparation_is_noticed(data, tmp_path_factory):
    with Server().running() as server:
        run(data, server)
    (data / "raf_db").unlink()
    other = prepare_raf_db(tmp_path_factory.mktemp("other"), train=TRAIN + 1, test=1)
    (data / "raf_db").symlink_to(other / "raf_db")
    with pytest.raises(UserError, match="made for another preparation"):
        Split(data, "raf_db", "train").instructed()


# ---- faults


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_once(data, fault):
    with Server(only(fault), hang=1.0).running() as server:
        run(data, server, "--limit", "2")
    done, _ = output(data)
    if fault == "blocked_prompt":  # asking again would bring the same
        assert (done["conversations"], done["set_aside"]) == (0, 2)
        assert len(server.requests) == 2
    else:
        assert (done["conversations"], done["set_aside"]) == (2, 0)
        assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("cut", "be shorter"),
        ("not_json", "not JSON"),
        ("wrong_emotion", "does not name the emotion"),
        ("other_form", "at most 2 items"),
        ("blocked_answer", "SAFETY"),
        ("empty_body", "an empty response"),
    ],
)
def test_a_rejected_answer_is_told_why_then_set_aside(data, fault, reason):
    with Server(only(fault, tries=9)).running() as server:
        run(data, server, "--limit", "1", "--attempts", "3")
    done, _ = output(data)
    assert (done["conversations"], done["set_aside"]) == (0, 1)
    assert len(server.bodies) == 3
    told = ["An earlier answer was rejected" in texts_of(body)[-1] for body in server.bodies]
    assert told == [False, True, True]
    assert reason in texts_of(server.bodies[-1])[-1]
    aside = (Split(data, "raf_db", "train").instruct_folder / "set_aside.jsonl").read_text()
    assert reason in json.loads(aside)["why"]


def test_retry_after_is_honoured_by_all(data):
    with Server(only("429"), retry_after="0.6").running() as server:
        run(data, server, "--limit", "2", "--concurrency", "1")
    times = server.times
    assert len(times) == 4
    assert times[1] - times[0] >= 0.6
    assert times[3] - times[2] >= 0.6


def test_rate_and_concurrency(data):
    with Server(delay=0.15).running() as server:
        run(data, server, "--concurrency", "3")
    assert server.most_at_once == 3
    with Server().running() as server:
        run(data, server, "--per-minute", "600", "--limit", "5", "--model", "gemini-2.5-pro")
    gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert min(gaps) > 0.05  # a tenth of a second each, give or take the way


@pytest.mark.parametrize(
    ("fault", "said"),
    [("401", "is GEMINI_API_KEY or GOOGLE_API_KEY right?"), ("404", "is the model's name right?")],
)
def test_what_no_retry_mends_stops_at_once(data, capsys, fault, said):
    with Server(only(fault, tries=99)).running() as server:
        status, err = refused(capsys, data, server, "--concurrency", "1")
    assert status == 2
    assert said in " ".join(err.split())
    assert len(server.requests) == 1


def test_a_service_that_is_down_stops_the_run_and_nothing_is_lost(data, capsys):
    with Server(only("503", tries=99)).running() as server:
        status, err = refused(
            capsys, data, server, "--tries", "2", "--concurrency", "1", "--limit", "6"
        )
        assert status == 2
        assert "5 items in a row got no answer, the last: 503" in " ".join(err.split())
        assert len(server.requests) == 10
        server.fault = lambda item, number: ""
        run(data, server, "--limit", "6")
    assert output(data)[0]["conversations"] == 6


def test_a_refused_item_is_set_aside(data):
    blocked = set()
    server = Server(lambda item, number: "400" if item in blocked else "")
    with server.running():
        run(data, server, "--limit", "1")
        blocked.add(server.requests[0]["item"])
        run(data, server, "--limit", "2", "--model", "other", "--concurrency", "1")
    done, _ = output(data)
    assert (done["conversations"], done["set_aside"]) == (1, 1)


# ---- money


def test_dry_run_sends_nothing_and_needs_no_key(data, capsys, monkeypatch):
    monkeypatch.delenv("GEMINI_API_KEY")
    cli.main(["data", "instruct", "raf_db", "--dir", str(data), "--dry-run"])
    out = capsys.readouterr().out
    assert f"conversations  {TRAIN}\n" in out
    tokens = int(re.search(r"tokens +([\d,]+) in", out)[1].replace(",", ""))
    written = int(re.search(r"about ([\d,]+) out", out)[1].replace(",", ""))
    cost = (tokens * 0.30 + written * 2.50) / 1e6
    assert f"cost           about ${cost:.2f} (prices: https://ai.google.dev" in out
    assert not Split(data, "raf_db", "train").instruct_folder.exists()
    prices = ["--input-price", "1000", "--output-price", "0", "--limit", "2"]
    cli.main(["data", "instruct", "raf_db", "--dir", str(data), "--dry-run", *prices])
    assert f"about ${tokens / TRAIN * 2 / 1000:.2f} (prices: as given)" in capsys.readouterr().out


def test_dry_run_counts_what_is_left(data, capsys):
    with Server().running() as server:
        run(data, server, "--limit", "4")
    capsys.readouterr()
    cli.main(["data", "instruct", "raf_db", "--dir", str(data), "--dry-run"])
    assert f"conversations  {TRAIN - 4}\n" in capsys.readouterr().out


def test_budget_is_never_passed(data, capsys):
    # 700 tokens in and 90 out are paid for an answer: at these prices a dollar.
    prices = ["--input-price", "1000", "--output-price", "3333.3333"]
    with Server().running() as server:
        status, err = refused(capsys, data, server, "--budget", "7.5", *prices)
        assert status == 2
        assert (
            "the budget of $7.50 is reached: re-run with a larger --budget to resume"
            in " ".join(err.split())
        )
        # Each needs room for its longest answer, 700 tokens, before it leaves.
        assert 0 < server.paid() <= 5
        assert output(data)[0]["conversations"] == server.paid()
        run(data, server, "--budget", "1000", *prices)
        assert server.paid() == TRAIN
    assert output(data)[0]["conversations"] == TRAIN


def test_budget_needs_a_price(data, capsys):
    with Server().running() as server:
        status, err = refused(capsys, data, server, "--budget", "1", "--model", "gemini-99")
    assert status == 2
    assert "give --input-price and --output-price" in " ".join(err.split())


def test_a_finished_set_costs_nothing(data):
    with Server().running() as server:
        run(data, server)
        run(data, server)
    assert len(server.requests) == TRAIN


# ---- without Gemini


def test_templates_stand_in_and_are_marked(data, capsys, monkeypatch):
    monkeypatch.delenv("GEMINI_API_KEY")
    cli.main(["data", "instruct", "raf_db", "--dir", str(data)])
    assert "templates replace Gemini" in " ".join(capsys.readouterr().err.split())
    done, entries = output(data)
    assert done["made_by"] == "template"
    assert [entry["made_by"] for entry in entries] == ["category", "template"] * TRAIN
    words = space_of(data, "raf_db").canonical
    for number, entry in enumerate(entries[1::2]):
        assert words[number % 7] in entry["conversations"][1]["value"]


def test_templates_never_replace_what_was_paid(data, capsys, monkeypatch):
    with Server().running() as server:
        run(data, server)
        monkeypatch.delenv("GEMINI_API_KEY")
        status, err = refused(capsys, data, server)
    assert status == 2
    assert f"holds conversations of {MADE_BY}" in " ".join(err.split())


def test_gemini_without_a_key(data, capsys, monkeypatch):
    monkeypatch.delenv("GEMINI_API_KEY")
    with Server().running() as server:
        status, err = refused(capsys, data, server, "--by", "gemini")
    assert status == 2
    assert "set GEMINI_API_KEY" in err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--limit", "0"], "--limit is 0"),
        (["--concurrency", "0"], "--concurrency is 0"),
        (["--budget", "-1"], "--budget is -1"),
        (["--split", "nope"], "nope"),
    ],
)
def test_bad_values(data, capsys, args, said):
    with Server().running() as server:
        status, err = refused(capsys, data, server, *args)
    assert status == 2
    assert said in err


# ---- clips


def test_clips_are_described_once_for_all_folds(tmp_path):
    data = prepare_dfew(tmp_path)
    with Server().running() as gemini, Server().running() as other:
        describe = ["--describe", f"openai:{other.url}/v1#llava"]
        run(data, gemini, *describe, name="dfew/fold1")
        first = len(gemini.requests)
        run(data, gemini, *describe, name="dfew/fold2")
    assert first == len(Split(data, "dfew/fold1", "train").examples) == 4
    # Clip 6 is in both folds.
    assert len(gemini.requests) == len(other.requests) == 6
    done, entries = output(data, "dfew/fold2")
    assert done["conversations"] == 3
    assert entries[1]["video"].endswith(".mp4")
    text = texts_of(gemini.bodies[0])[-1]
    assert "The brows rise and the mouth opens." in text
    assert "centre frame of a video" in text
    pictures = [p for p in other.bodies[0]["messages"][0]["content"] if p["type"] == "image_url"]
    assert len(pictures) == 6


def test_clips_with_descriptions_from_a_file(tmp_path, capsys):
    data = prepare_dfew(tmp_path, folds=1)
    clips = Split(data, "dfew/fold1", "train").examples
    lines = [{"id": clips[0]["id"], "description": "She nods and her brows rise."}]
    file = tmp_path / "described.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Server().running() as server:
        run(data, server, "--describe", str(file), name="dfew/fold1")
        assert "She nods and her brows rise." in texts_of(server.bodies[0])[-1]
        assert len(server.requests) == 1
        status, err = refused(capsys, data, server, name="dfew/fold1")
    assert status == 2
    assert "give --describe" in " ".join(err.split())
    done, _ = output(data, "dfew/fold1")
    assert (done["conversations"], done["set_aside"]) == (1, len(clips) - 1)


# ---- stopping


def test_interrupt_lets_answers_come_home(data, capsys):
    server = Server(delay=0.4)
    with server.running():

        def interrupt():
            while server.at_once < 2:
                pass
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        status, err = refused(capsys, data, server, "--concurrency", "2")
        thread.join()
        assert status == 130
        assert "interrupted: re-run the command to resume" in " ".join(err.split())
        paid = server.paid()
        assert 2 <= paid < TRAIN
        run(data, server)
    assert server.paid() == TRAIN
    assert output(data)[0]["conversations"] == TRAIN


def test_two_at_once_are_refused(data, capsys):
    server = Server(delay=0.2)
    with server.running():
        thread = threading.Thread(target=run, args=(data, server))
        thread.start()
        while not server.requests:
            pass
        status, err = refused(capsys, data, server)
        thread.join()
    assert status == 2
    assert f"raf_db/train: in use by process {os.getpid()}" in " ".join(err.split())
    assert output(data)[0]["conversations"] == TRAIN


def test_batches_hold_the_conversations(data, tmp_path):
    with Server().running() as server:
        run(data, server, "--limit", "2")
    (tmp_path / "bpe.json").write_text(small_bpe())
    source = "{name: raf_db, split: train, kind: image, weight: 1.0, items: conversation}"
    cfg = make_config(
        str(tmp_path / "bpe.json"),
        f"data.sources=[{source}]",
        f"data.dir={json.dumps(str(data))}",
        "data.text_length=900",
        "data.rounds=2",
        "train.image_batch=4",
    )
    (split,) = open_sources(cfg)
    split.priors = [prior(1)] * TRAIN
    batches = make_train_iterator(cfg, [split])
    tokenizer = load_tokenizer(cfg.data.llm_tokenizer)
    batch = next(batches)
    assert set(batch.index[:, 0].tolist()) == {0, 1}
    assert batch.weight[:, 0].tolist() == [1.0] * 4
    for labels, index in zip(batch.labels, batch.index[:, 0].tolist(), strict=True):
        learnt = tokenizer.decode([int(i) for i in labels if i >= 0])
        assert f"The face shows {('surprise', 'fear')[index]}." in learnt
        assert "only the face is visible" in learnt
    batches.close()
