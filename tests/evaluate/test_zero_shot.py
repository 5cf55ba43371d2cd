"""Other models under the same protocol: an OpenAI-compatible server, Gemini, Hugging Face."""

import base64
import io
import json
import re

import pytest
from PIL import Image

from emollama_jax import cli
from emollama_jax.data.media import read_image
from emollama_jax.data.split import Split
from emollama_jax.evaluate.protocol import read_predictions
from emollama_jax.remote.request import jpeg
from emollama_jax.testing.toy_sets import prior
from tests.helpers import llava_model
from tests.helpers.fake_gemini import FAULTS, Server, item_of, texts_of
from tests.helpers.prepared_sets import prepare_dfew, prepare_raf_db

TEST = 14
CLASSES = ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A prepared RAF-DB of noise."""
    return prepare_raf_db(tmp_path_factory.mktemp("raf"), train=1, test=TEST)


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    """Keys, which real services would refuse."""
    monkeypatch.setenv("GEMINI_API_KEY", "not-a-key")
    monkeypatch.setenv("OPENAI_API_KEY", "not-a-key-either")


def run(model, data, out, *more, name="raf_db"):
    """The command, quick enough for tests."""
    quick = ["--per-minute", "100000", "--first-wait", "0.01", "--timeout", "0.5"]
    args = ["--model", model, "--data", name, "--dir", str(data), "--out", str(out)]
    cli.main(["zero-shot", *args, *quick, *more])


def refused(capsys, *args, **kwargs):
    """What the one line on stderr says."""
    with pytest.raises(SystemExit) as stop:
        run(*args, **kwargs)
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def openai(server):
    """The model behind a server."""
    return f"openai:{server.url}/v1#llava"


class Oracle:
    """Answers with one sentence after the other, whatever is asked; the same item gets the same."""

    def __init__(self, *answers):
        self.answers, self.seen = answers, {}

    def __call__(self, body):
        number = self.seen.setdefault(item_of(body), len(self.seen))
        return self.answers[number % len(self.answers)]


def test_openai_endpoint(data, tmp_path, capsys):
    # Three of four right, in three manners of speaking; the fourth names no class.
    truth = Oracle(*[f"{word}." for word in CLASSES[:4]], "They look sad.", "ANGER", "A cat.")
    with Server(answer=truth).running() as server:
        run(openai(server), data, tmp_path / "out", "--concurrency", "1")
    predictions = read_predictions(tmp_path / "out" / "predictions.jsonl")
    assert [p.id for p in predictions] == [f"test_{n:05d}" for n in range(TEST)]
    assert [p.label for p in predictions[:7]] == list(CLASSES)
    assert [p.predicted for p in predictions[:7]] == [*CLASSES[:6], None]
    assert [p.parsed for p in predictions[4:7]] == ["synonym", "exact", "none"]
    assert predictions[4].text == "They look sad."
    assert predictions[0].source == "raf_db:test"
    assert predictions[0].subject is None
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert evaluation["war"] == pytest.approx(6 / 7)
    assert evaluation["unparsed"] == pytest.approx(1 / 7)
    assert "WAR 0.8571  UAR 0.8571  n 14" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Choose one from the following options" in page
    assert "emollama zero-shot --model " in page
    body, headers = server.bodies[0], server.headers[0]
    assert headers["authorization"] == "Bearer not-a-key-either"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("llava", 0.0, 64)
    (question,) = texts_of(body)
    assert question == (
        "What is the facial expression of the person in the image? Choose one from the following "
        "options: {surprise, fear, disgust, happiness, sadness, anger, neutral}."
    )
    assert body["messages"][0]["content"][0]["type"] == "image_url"


def test_gemini(data, tmp_path):
    pytest.importorskip("google.genai", reason="the extra `gemini` is not installed")
    with Server(answer=Oracle(*CLASSES)).running() as server:
        out = tmp_path / "out"
        args = ("gemini:gemini-2.5-flash", data, out, "--base-url", server.url)
        run(*args, "--concurrency", "1")
        assert all(p.predicted == p.label for p in read_predictions(out / "predictions.jsonl"))
        assert len(server.requests) == TEST
        run(*args)
        assert len(server.requests) == TEST, "cached answers were asked again"
        assert "responseMimeType" not in server.bodies[0]["generationConfig"]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(data, tmp_path, fault):
    def once(item, number):
        return fault if number == 0 else ""

    with Server(once, answer=lambda body: "anger", hang=1.0).running() as server:
        run(openai(server), data, tmp_path, "--limit", "3")
    found = read_predictions(tmp_path / "predictions.jsonl")
    asked = len(server.requests)
    if fault in ("cut", "not_json", "wrong_emotion", "other_form"):  # an answer like any other
        assert asked == 3
        assert fault != "cut" or [p.text for p in found] == ["an"] * 3
    else:
        assert asked == 6
        assert [p.predicted for p in found] == ["anger"] * 3


def test_what_is_blocked_counts_as_wrong(data, tmp_path):
    with Server(lambda item, n: "blocked_answer", answer=lambda body: "").running() as server:
        run(openai(server), data, tmp_path, "--limit", "2", "--attempts", "2")
    assert len(server.requests) == 4
    assert [p.predicted for p in read_predictions(tmp_path / "predictions.jsonl")] == [None] * 2
    lines = (tmp_path / "set_aside.jsonl").read_text().splitlines()
    aside = [json.loads(line) for line in lines]
    assert [line["id"] for line in aside] == ["test_00000", "test_00001"]
    assert "2 got no answer" in (tmp_path / "report.html").read_text()


def test_a_run_that_failed_goes_on(data, tmp_path, capsys):
    down = [False]
    server = Server(lambda item, n: "500" if down[0] else "", answer=lambda body: "fear")
    with server.running():
        run(openai(server), data, tmp_path, "--limit", "4")
        down[0] = True
        err = refused(capsys, openai(server), data, tmp_path, "--tries", "1", "--concurrency", "1")
        assert "10 of 14 examples have no answer: 5 items in a row got no answer" in err
        assert len(read_predictions(tmp_path / "predictions.jsonl")) == 4
        down[0] = False
        run(openai(server), data, tmp_path)
    assert len(read_predictions(tmp_path / "predictions.jsonl")) == TEST
    assert server.paid() == TEST


def test_options_in_shuffled_order(data, tmp_path):
    with Server(answer=lambda body: "fear").running() as server:
        run(openai(server), data, tmp_path, "--order", "shuffled", "--concurrency", "1")
    orders = [p.options for p in read_predictions(tmp_path / "predictions.jsonl")]
    asked = [re.search(r"\{(.*)\}", texts_of(b)[0])[1] for b in server.bodies]
    assert [", ".join(order) for order in orders] == asked
    assert len(set(orders)) > TEST / 2
    assert all(sorted(order) == sorted(CLASSES) for order in orders)


def test_other_settings_need_another_journal(data, tmp_path, capsys):
    with Server(answer=lambda body: "fear").running() as server:
        run(openai(server), data, tmp_path, "--limit", "2")
        err = refused(capsys, openai(server), data, tmp_path, "--order", "shuffled")
    assert "a journal of order = 'native', and this is 'shuffled'" in err


def test_clips_are_frames_in_order(tmp_path):
    data = prepare_dfew(tmp_path, folds=1)
    with Server(answer=lambda body: "happy").running() as server:
        model = openai(server)
        run(model, data, tmp_path / "out", "--frames", "3", name="dfew/fold1")
    content = server.bodies[0]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url"] * 3 + ["text"]
    assert content[-1]["text"].startswith(
        "These are 3 frames of a video, in order.\nWhat is the facial expression of the person in "
        "the video?"
    )
    found = read_predictions(tmp_path / "out" / "predictions.jsonl")
    assert len(found) == len(Split(data, "dfew/fold1", "test").examples)
    assert {p.predicted for p in found} == {"happy"}


def test_all_folds_are_joined(tmp_path, capsys):
    """Clips 1 … 6, one of each label, are all called happy, the first of the labels."""
    data = prepare_dfew(tmp_path, folds=5)
    with Server(answer=lambda body: "happy").running() as server:
        model = openai(server)
        run(model, data, tmp_path / "out", "--frames", "2", "--fold", "all", name="dfew")
        asked = len(server.bodies)
        err = refused(capsys, model, data, tmp_path / "other", name="dfew")
    assert asked == 6
    assert "dfew has 5 folds: name one with --fold 1, or --fold all" in err
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert told["wars"] == [0.5, 0, 0, 0, 0]  # fold 1 tests clips 1 and 6
    assert told["war"] == pytest.approx(0.1)
    assert (tmp_path / "out" / "table.tex").exists()
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"{model} on DFEW, test, 5 folds" in page and "--fold all" in page


def test_folds_share_a_budget(tmp_path, capsys):
    """Prices are given: each answer costs about as much, and the money is there for three."""
    data = prepare_dfew(tmp_path, folds=5)
    more = ("--frames", "1", "--fold", "all", "--concurrency", "1")
    price = ("--input-price", "1", "--output-price", "0")
    with Server(answer=lambda body: "happy").running() as server:
        model = openai(server)
        run(model, data, tmp_path / "all", *more, *price, name="dfew")
        homes = [tmp_path / "all" / f"fold{n}" for n in range(1, 6)]
        journals = "".join((home / "journal.jsonl").read_text() for home in homes)
        lines = [json.loads(line) for line in journals.splitlines()]
        most, cost = (max(x["cost"] for x in lines if key in x) for key in ("sent", "answer"))
        capsys.readouterr()
        budget = ("--budget", str(2.5 * cost + most))
        before = server.paid()
        err = refused(capsys, model, data, tmp_path / "some", *more, *price, *budget, name="dfew")
    assert "the budget of $" in err
    assert server.paid() - before == 3


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("llava", "wanted one of hf:PATH, openai:URL#MODEL, gemini:MODEL"),
        ("openai:http://localhost:1/v1", "wanted openai:URL#MODEL"),
        ("openai:localhost#m", "wanted a URL"),
        ("hf:./nowhere", "no such folder"),
        ("gemini:", "wanted one of"),
    ],
)
def test_names_of_models(data, tmp_path, capsys, model, said):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    assert said in refused(capsys, model, data, tmp_path)


def test_face_crop(data, tmp_path, monkeypatch):
    """The crop of the prior's box where there is a face, else the whole picture."""
    priors = [prior(1, found=n % 2 == 0) for n in range(TEST)]
    monkeypatch.setattr(Split, "priors", priors)
    with Server(answer=lambda body: "fear").running() as server:
        more = ("--crop", "face", "--side", "64", "--limit", "2", "--concurrency", "1")
        run(openai(server), data, tmp_path, *more)
    sizes = []
    for body in server.bodies:
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        sizes.append(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size)
    assert sizes == [(64, 64), (24, 24)]


def test_face_crop_needs_priors(data, tmp_path, capsys):
    err = refused(capsys, "openai:http://127.0.0.1:9/v1#m", data, tmp_path, "--crop", "face")
    assert "no face priors" in err


def test_hugging_face_model(data, tmp_path):
    """The command's answers are those of `generate` on a prompt that is written by hand."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    from transformers import AutoModelForImageTextToText, AutoProcessor

    llava_model.save(tmp_path / "llava")
    model = f"hf:{tmp_path / 'llava'}"
    run(model, data, tmp_path / "out", "--max-tokens", "6", "--limit", "4")
    found = read_predictions(tmp_path / "out" / "predictions.jsonl")
    network = AutoModelForImageTextToText.from_pretrained(tmp_path / "llava").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "llava")
    examples = Split(data, "raf_db", "test").examples
    for prediction, example in zip(found, examples, strict=False):
        question = json.loads(example["items"])[0][0]["value"].removeprefix("<image>\n")
        picture = Image.open(io.BytesIO(jpeg(read_image(example["media"]))))
        prompt = f"user: <image>\n{question}\nassistant:"
        inputs = processor(images=picture, text=prompt, return_tensors="pt")
        ids = network.generate(**inputs, max_new_tokens=6, do_sample=False)
        fresh = ids[0, inputs["input_ids"].shape[1] :]
        assert prediction.text == processor.decode(fresh, skip_special_tokens=True).strip()
    assert len({prediction.text for prediction in found}) > 1
    before = (tmp_path / "out" / "journal.jsonl").read_text()
    run(model, data, tmp_path / "out", "--max-tokens", "6", "--limit", "4")
    assert (tmp_path / "out" / "journal.jsonl").read_text() == before
