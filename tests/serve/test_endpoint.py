"""The endpoint as OpenAI's own client sees it, on an engine without a model."""

import base64
import enum
import io
import json
import re

import httpx2
import numpy as np
import openai
import pydantic
import pytest
from PIL import Image

from emollama_jax.tiny.actionfaces.examples import encode_video
from tests.helpers.fake_engine import CLASSES, FakeEngine, serving, settings

NOTHING = [{"role": "user", "content": "What is love?"}]


def picture_uri(size=(80, 60), colour="red"):
    """A drawn picture as a data URI."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def asked(text, uri=None, kind="image_url"):
    """Messages that ask about a picture."""
    medium = {"type": kind, kind: {"url": uri or picture_uri()}}
    return [{"role": "user", "content": [{"type": "text", "text": text}, medium]}]


@pytest.fixture(scope="module")
def engine():
    return FakeEngine()


@pytest.fixture(scope="module")
def url(engine):
    with serving(engine, settings()) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


# ------------------------------------------------------------------ chat


def test_an_answer_about_a_picture(client, engine):
    answer = client.chat.completions.create(model="fake", messages=asked("Who is this?"))
    assert answer.choices[0].message.content == "Who is this? "
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 3)
    assert answer.model == "fake" and answer.id.startswith("chatcmpl-")
    said = answer.model_extra["emollama"]
    assert said["face_found"] and said["face"] == 0
    assert said["faces"][0] == {"box": [1.0, 2.0, 30.0, 40.0], "probability": 0.99}
    assert set(said["seconds"]) == {"decode", "look", "first_token", "total"}
    assert "agr" not in said
    question = engine.questions[-1]
    assert question.media.kind == "image" and question.media.frames[0].shape == (60, 80, 3)
    assert not question.agr and question.face is None and question.earlier == ()


def test_a_stream_is_the_same_answer_in_pieces(client):
    stream = client.chat.completions.create(
        model="fake",
        messages=asked("one two three"),
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    parts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert parts == ["", "one ", "two ", "three ", ""]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].model_extra["emollama"]["face_found"]
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-2].model_extra["emollama"]["seconds"]["total"] > 0
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 3


def test_a_stream_ends_with_done(url):
    answer = httpx2.post(f"{url}/v1/chat/completions", json={"messages": NOTHING, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, last, nothing = answer.text.split("\n\n")
    assert (last, nothing) == ("data: [DONE]", "")
    read = [json.loads(event.removeprefix("data: ")) for event in events]
    assert all("usage" not in event for event in read)


def test_log_probabilities(client):
    answer = client.chat.completions.create(
        model="fake", messages=asked("a b"), logprobs=True, top_logprobs=2
    )
    first, second = answer.choices[0].logprobs.content
    assert (first.token, first.logprob, first.bytes) == ("a ", -0.25, [97, 32])
    assert [top.token for top in second.top_logprobs] == ["b ", "ß"]
    assert second.top_logprobs[1].logprob == -9999.0
    assert second.top_logprobs[1].bytes == [195, 159]
    plain = client.chat.completions.create(model="fake", messages=asked("a b"), logprobs=True)
    assert plain.choices[0].logprobs.content[0].top_logprobs == []


def test_log_probabilities_of_a_stream(client):
    chunks = client.chat.completions.create(
        model="fake", messages=asked("a b"), logprobs=True, stream=True
    )
    told = [
        token.token
        for chunk in chunks
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert told == ["a ", "b "]


def test_length_stop_and_seed(client, engine):
    ask = client.chat.completions.create
    short = ask(model="fake", messages=asked("a b c d"), max_tokens=2)
    assert (short.choices[0].message.content, short.choices[0].finish_reason) == ("a b ", "length")
    newer = ask(model="fake", messages=asked("a b c d"), max_completion_tokens=3, max_tokens=2)
    assert newer.usage.completion_tokens == 3
    assert ask(model="fake", messages=asked("a b c"), stop="b").choices[0].message.content == "a "
    ask(model="fake", messages=asked("a"), stop=["x", "y"], temperature=0.5, top_p=0.25, seed=5)
    how = engine.questions[-1].how
    assert engine.questions[-1].stop == ("x", "y")
    assert (how.temperature, how.top_p, how.seed) == (0.5, 0.25, 5)
    ask(model="fake", messages=asked("a"))
    usual = engine.cfg.generate
    assert engine.questions[-1].how.temperature == usual.temperature
    assert engine.questions[-1].how.max_new_tokens == usual.max_new_tokens


def test_several_answers_have_seeds_of_their_own(client):
    answer = client.chat.completions.create(
        model="fake", messages=asked("x"), n=3, temperature=1.0, seed=40
    )
    assert [choice.message.content for choice in answer.choices] == ["40 x ", "41 x ", "42 x "]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 6)
    stream = client.chat.completions.create(
        model="fake", messages=asked("x"), n=2, temperature=1.0, seed=40, stream=True
    )
    texts = ["", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["40 x ", "41 x "]


def test_without_a_seed_answers_differ(client):
    once, again = (
        client.chat.completions.create(model="fake", messages=asked("x"), temperature=1.0)
        for _ in range(2)
    )
    assert once.choices[0].message.content != again.choices[0].message.content


def test_a_conversation_is_turns_about_one_picture(client, engine):
    messages = [
        {"role": "system", "content": "Be brief."},
        *asked("First?"),
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "Second"},
        {"role": "user", "content": "and third?"},
    ]
    answer = client.chat.completions.create(model="fake", messages=messages)
    question = engine.questions[-1]
    assert [(turn.question, turn.answer) for turn in question.earlier] == [
        ("Be brief.\nFirst?", "One.")
    ]
    assert question.text == "Second\nand third?"
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


def test_a_picture_alone_is_described(client, engine):
    content = asked("")[0]["content"][1:]
    client.chat.completions.create(model="fake", messages=[{"role": "user", "content": content}])
    assert engine.questions[-1].text == "Describe the face in the image and name the emotion."


def test_a_clip(client, engine):
    frames = np.random.default_rng(0).integers(0, 255, (30, 32, 32, 3), np.uint8)
    video = encode_video(frames, 25.0)
    uri = f"data:video/mp4;base64,{base64.b64encode(video).decode()}"
    answer = client.chat.completions.create(
        model="fake", messages=asked("What?", uri, kind="video_url")
    )
    media = engine.questions[-1].media
    assert media.kind == "clip" and media.count == 30
    assert len(media.frames) == len(media.indices) == engine.cfg.data.clip_frames
    assert len(set(media.indices.tolist())) == engine.cfg.data.clip_frames
    assert answer.model_extra["emollama"]["face"] is None


def test_which_face_and_age_gender_race(client, engine):
    answer = client.chat.completions.create(
        model="fake", messages=asked("x"), extra_body={"emollama": {"face": 1, "agr": True}}
    )
    assert engine.questions[-1].face == 1 and engine.questions[-1].agr
    said = answer.model_extra["emollama"]
    assert said["face"] == 1 and len(said["faces"]) == 2
    assert said["agr"]["age"] == {"20-29": 0.75, "30-39": 0.25}
    with pytest.raises(openai.BadRequestError, match="face 2: the picture has 2"):
        client.chat.completions.create(
            model="fake", messages=asked("x"), extra_body={"emollama": {"face": 2}}
        )


def test_no_face_is_said(client):
    answer = client.chat.completions.create(
        model="fake", messages=asked("x", picture_uri(colour="black"))
    )
    assert answer.choices[0].message.content == "No face was found in the image."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model_extra["emollama"] | {"seconds": 0} == {
        "face_found": False,
        "faces": [],
        "face": None,
        "seconds": 0,
    }


# ------------------------------------------------------------------ choices and scores


def test_a_structured_choice_is_the_likeliest_label(client):
    answer = client.chat.completions.create(
        model="fake",
        messages=asked("Which?"),
        extra_body={"structured_outputs": {"choice": ["fear", "happiness", "anger"]}},
    )
    assert answer.choices[0].message.content == "happiness"
    scored = answer.model_extra["emollama"]["choices"]
    assert [row["label"] for row in scored] == ["fear", "happiness", "anger"]
    assert [row["log_likelihood"] for row in scored] == [-6.0, -1.0, -5.0]
    assert sum(row["probability"] for row in scored) == pytest.approx(1.0)


def test_a_choice_streams_in_one_piece(client):
    chunks = client.chat.completions.create(
        model="fake",
        messages=asked("Which?"),
        extra_body={"structured_outputs": {"choice": ["fear", "happiness"]}},
        stream=True,
    )
    parts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert parts == ["", "happiness", ""]


class Emotion(enum.StrEnum):
    """Labels as a client's own type."""

    fear = "fear"
    happiness = "happiness"


class Face(pydantic.BaseModel):
    """What OpenAI's client makes a JSON schema of."""

    emotion: Emotion


def test_a_json_schema_with_an_enum_is_a_choice(client):
    answer = client.chat.completions.parse(
        model="fake", messages=asked("Which?"), response_format=Face
    )
    assert answer.choices[0].message.parsed == Face(emotion=Emotion.happiness)
    bare = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a", "bc"]}}}
    answer = client.chat.completions.create(
        model="fake", messages=asked("Which?"), response_format=bare
    )
    assert answer.choices[0].message.content == '"bc"'
    answer = client.chat.completions.create(
        model="fake", messages=asked("Which?"), response_format={"type": "text"}
    )
    assert answer.choices[0].message.content == "Which? "


def test_scores_of_labels(url, engine):
    body = {"messages": asked("How is it?"), "labels": ["bad", "good"]}
    answer = httpx2.post(f"{url}/v1/score", json=body).json()
    assert answer["object"] == "score" and answer["question"] == "How is it?"
    assert [row["label"] for row in answer["data"]] == ["bad", "good"]
    assert answer["data"][1]["log_likelihood"] == -6.0
    assert answer["usage"]["prompt_tokens"] == 11
    assert answer["emollama"]["face_found"]


def test_scores_of_the_runs_classes(url, engine):
    body = {"messages": [{"role": "user", "content": asked("")[0]["content"][1:]}]}
    answer = httpx2.post(f"{url}/v1/score", json=body).json()
    assert [row["label"] for row in answer["data"]] == list(CLASSES)
    assert answer["question"].startswith("What is the facial expression of the person in the image")
    body["messages"] = asked("", picture_uri(colour="black"))
    answer = httpx2.post(f"{url}/v1/score", json=body).json()
    assert answer["data"] == [] and answer["emollama"]["face_found"] is False


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("changed", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "hello"}, "messages", "valid array"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'system'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "take turns"),
        ({"messages": [*NOTHING, {"role": "assistant", "content": "x"}]}, "messages", "take turns"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages", "empty"),
        ({"messages": [{"role": "user", "content": "x" * 40_000}]}, "messages", "32,768"),
        ({"messages": asked("x", "data:image/png;base64,!")}, None, "broken base64"),
        ({"messages": asked("x", "data:image/png;base64,")}, None, "empty data URI"),
        ({"messages": asked("x", "data:image/png,abc")}, None, "without ;base64"),
        ({"messages": asked("x", "data:;base64,aGVsbG8=")}, None, "not a picture"),
        ({"messages": asked("x", "https://example.org/a.png")}, None, "fetches nothing from"),
        ({"messages": asked("x", "file:///etc/passwd")}, None, "wanted data:image"),
        ({"messages": asked("x", "http://[::1")}, None, "wanted data:image"),
        ({"messages": asked("x") + asked("y", picture_uri((9, 9)))}, "messages", "more than one"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 9999}, "max_tokens", "wanted at most 200"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": float("nan")}, "temperature", ""),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 99}, "n", "less than or equal to 8"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"seed": 2**70}, "seed", ""),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs", "wanted {choice"),
        ({"structured_outputs": {"choice": ["a", "a"]}}, None, "twice"),
        ({"structured_outputs": {"choice": []}}, None, "at least 1"),
        ({"response_format": {"type": "json_object"}}, "response_format", "free JSON"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, None, "enum"),
        ({"emollama": {"face": -1}}, "emollama.face", "greater than or equal to 0"),
        ({"messages": [{"role": "user", "content": "too long"}]}, None, "999 tokens"),
    ],
)
def test_what_is_refused(url, changed, param, words):
    body = json.dumps({"messages": NOTHING} | changed)
    answer = httpx2.post(
        f"{url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
    )
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    if param is not None:
        assert error["param"] == param


def test_errors_as_the_client_raises_them(client, url):
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4' here, only 'fake'") as raised:
        client.chat.completions.create(model="gpt-4", messages=NOTHING)
    assert raised.value.code == "model_not_found"
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").id == "fake"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="fake", messages=asked("x"), stream=True, n=50)
    assert raised.value.param == "n"
    wrong = httpx2.get(f"{url}/v1/chat/completions")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert httpx2.get(f"{url}/nowhere").json()["error"]["code"] == "not_found"
    form = httpx2.post(f"{url}/v1/chat/completions", data={"a": "b"})
    assert (form.status_code, form.json()["error"]["code"]) == (415, "wrong_content_type")


def test_an_error_in_the_middle_of_a_stream(client, caplog):
    stream = client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "say this, then break"}], stream=True
    )
    said = ""
    with pytest.raises(openai.APIError, match="the server failed") as raised:
        for chunk in stream:
            said += chunk.choices[0].delta.content or ""
    assert said == "say this, then break "
    assert raised.value.code == "internal"
    # A defect of ours is the one thing that has a traceback in the log.
    assert "a defect" in caplog.text


def test_unknown_fields_are_accepted_and_named_in_the_log(client, caplog):
    with caplog.at_level("INFO", logger="emollama_jax.serve"):
        client.chat.completions.create(
            model="fake",
            messages=asked("a secret"),
            user="somebody",
            extra_body={"line\nbreak": "a value"},
        )
    assert "fields that do nothing here: 'line\\nbreak', 'user'" in caplog.text
    for word in ("secret", "somebody", "a value", "base64"):
        assert word not in caplog.text


# ------------------------------------------------------------------ keys, hosts, metrics


def test_an_api_key():
    with serving(FakeEngine(), settings(key="s3cret")) as (url, _):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError) as raised:
                client.chat.completions.create(model="fake", messages=NOTHING)
            assert raised.value.code == "invalid_api_key"
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
            right = client.with_options(api_key="s3cret")
            assert right.chat.completions.create(model="fake", messages=NOTHING).choices
        assert httpx2.get(f"{url}/health").status_code == 200
        assert httpx2.get(f"{url}/").status_code == 200
        assert httpx2.post(f"{url}/v1/score", json={}).status_code == 401


def test_only_known_hosts_are_answered():
    with serving(FakeEngine(), settings(hosts=("localhost", "127.0.0.1"))) as (url, _):
        assert httpx2.get(f"{url}/health").status_code == 200
        for name in ("evil.example", "[bad"):
            answer = httpx2.get(f"{url}/health", headers={"Host": name})
            assert answer.status_code == 421


def test_metrics_by_vllms_names(client, url):
    client.chat.completions.create(model="fake", messages=asked("one two three"))
    text = httpx2.get(f"{url}/metrics").text
    values = dict(re.findall(r"^emollama:(\S+?)\{[^}]*?\} (\S+)$", text, re.M))
    assert values["num_requests_running"] == values["num_requests_waiting"] == "0.0"
    assert values["compilations_total"] == "0.0"
    assert float(values["generation_tokens_total"]) >= 3
    for name in (
        *("time_to_first_token_seconds_count", "e2e_request_latency_seconds_count"),
        *("inter_token_latency_seconds_count", "request_prompt_tokens_sum"),
    ):
        assert float(values[name]) > 0
    assert 'emollama:request_success_total{finished_reason="stop",model_name="fake"}' in text
    assert 'request_refused_total{model_name="fake",status="400"}' in text


def test_the_page_brings_all_of_it_along(url):
    answer = httpx2.get(f"{url}/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", answer.text)
    about = httpx2.get(f"{url}/about").json()
    assert about["classes"] == list(CLASSES)
