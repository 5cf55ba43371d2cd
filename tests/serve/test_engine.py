"""The engine: what it answers is what `ask` answers, whoever asks beside, and nothing compiles."""

import asyncio
import dataclasses
import hashlib
import types

import jax
import numpy as np
import pytest

from emollama_jax.checkpoint import load_for_inference
from emollama_jax.config import MeshConfig
from emollama_jax.data.media import Clip
from emollama_jax.data.prompts import Turn
from emollama_jax.errors import UserError
from emollama_jax.models.llama import KVCache
from emollama_jax.runs import PACKAGE
from emollama_jax.serve import slots
from emollama_jax.serve.answer import Answerer, Conversation, probabilities
from emollama_jax.serve.engine import BatchingEngine
from emollama_jax.serve.kept import Kept
from emollama_jax.serve.requests import Busy, Decoded, End, EngineSizes, Piece, Question, Stopped
from emollama_jax.serve.slots import lengths_of
from emollama_jax.serve.writing import StopTexts
from emollama_jax.sharding.mesh import make_mesh
from emollama_jax.tiny.actionfaces.sample import sample_image

SIZES = EngineSizes(slots=4, waiting=40)  # a group of prompts at once
ASKED = "How does the person feel?"


@pytest.fixture(scope="module")
def loaded():
    """The shipped run, whose answers are about what it sees; with short clips."""
    cfg, model = load_for_inference(PACKAGE)
    return short(cfg), model


def short(cfg):
    data = dataclasses.replace(cfg.data, clip_frames=2, clip_text_length=cfg.data.text_length)
    return dataclasses.replace(
        cfg, data=data, generate=dataclasses.replace(cfg.generate, max_new_tokens=12)
    )


@pytest.fixture(scope="module")
def cfg(loaded):
    return loaded[0]


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[1]


def detect(pictures):
    """Two faces in each picture, none in dark ones."""

    def found(picture):
        boxes = [[20, 20, 70, 80], [0, 0, 9, 9]] if picture.max() > 9 else []
        boxes = np.array(boxes, np.float32).reshape(-1, 4)
        return types.SimpleNamespace(boxes=boxes, probabilities=np.ones(len(boxes), np.float32))

    return list(map(found, pictures))


@pytest.fixture(scope="module")
def answerer(cfg, model):
    return Answerer(cfg, model, detect=detect)


@pytest.fixture(scope="module")
def make(cfg, model):
    """Opens engines with few lengths of prompts, and closes them at the end."""
    opened, patch = [], pytest.MonkeyPatch()
    patch.setattr(slots, "SMALLEST", 224)

    def make(sizes=SIZES, *, model=model, mesh=None):
        engine = BatchingEngine(cfg, model, sizes, mesh=mesh, detect=detect)
        opened.append(engine)
        engine.open(lambda what, done, total: None)
        return engine

    yield make
    patch.undo()
    for engine in opened:
        engine.close()


@pytest.fixture(scope="module")
def engine(make):
    return make()


def picture(number):
    pixels = sample_image("test", number).picture
    return decoded("image", [pixels])


def decoded(kind, frames):
    digest = hashlib.sha256(b"".join(frame.tobytes() for frame in frames)).hexdigest()
    return Decoded(kind, frames, np.arange(len(frames)), len(frames), digest)


def question(cfg, number=0, text=ASKED, *, media=None, how=None, **fields):
    how = dataclasses.replace(cfg.generate, **(how or {}))
    media = picture(number) if media is None else media
    return Question(media=media, text=text, how=how, **{"agr": True, **fields})


async def read(answer):
    """The whole text, all tokens, and the end."""
    events = [event async for event in answer]
    assert [isinstance(event, End) for event in events] == [False] * (len(events) - 1) + [True]
    text = "".join(piece.text for piece in events[:-1])
    return text, [token for piece in events[:-1] for token in piece.tokens], events[-1]


def together(engine, *questions):
    """All asked at once."""

    async def ask():
        return await asyncio.gather(*(read(engine.ask(question)) for question in questions))

    return asyncio.run(ask())


def looked(answerer, one):
    clip = Clip(one.frames, one.indices, one.count, None)
    return answerer.see(one.kind, clip, answerer.search([clip])[0])


def alone(answerer, question):
    """As `emollama ask` answers."""
    media = looked(answerer, question.media)
    return "".join(Conversation(answerer, media).ask(question.text, how=question.how))


def test_answers_are_those_of_ask_whoever_asks_beside(cfg, engine, answerer):
    asked = [question(cfg, n, f"{ASKED} {'Why? ' * (n % 3)}") for n in range(8)]
    asked[3] = dataclasses.replace(asked[3], how=dataclasses.replace(cfg.generate, temperature=1.5))
    frames = [sample_image("test", n).picture for n in (1, 2)]
    asked.append(question(cfg, media=decoded("clip", frames)))
    wanted = [alone(answerer, one) for one in asked]
    assert len(set(wanted)) > 3  # else equality would prove little
    before = engine.figures()
    found = together(engine, *asked)
    assert [text for text, _, _ in found] == wanted
    one_by_one = [together(engine, one)[0] for one in asked]
    assert [text for text, _, _ in one_by_one] == wanted
    after = engine.figures()
    assert after.compilations == before.compilations
    assert (after.running, after.waiting, after.failure) == (0, 0, None)
    assert after.requests - before.requests == 2 * len(asked)
    assert after.tower_misses - before.tower_misses == len(asked)
    assert after.tower_hits - before.tower_hits == len(asked)
    ends = [end for _, _, end in found]
    assert sum(end.completion_tokens for end in ends) * 2 == (
        after.generation_tokens - before.generation_tokens
    )


def test_numbers_do_not_depend_on_the_neighbours(cfg, engine):
    """Down to the last bit."""
    asked = question(cfg, 5, top_logprobs=3)
    (_, tokens, end), *_ = together(engine, asked)
    others = [question(cfg, n, how={"temperature": 1.0}) for n in range(4)]
    *_, (_, beside, _) = together(engine, *others, asked)
    assert beside == tokens and len(tokens) == end.completion_tokens > 2
    for token in tokens:
        assert token.id == token.top[0][0] and token.logprob == token.top[0][2]
        assert len(token.top) == 3 and token.top[0][2] >= token.top[1][2] >= token.top[2][2]


def test_a_talk_goes_on_from_what_is_kept(cfg, engine, answerer):
    media = picture(6)
    talk, texts = Conversation(answerer, looked(answerer, media)), [ASKED, "Why?", "And the eyes?"]
    wanted = ["".join(talk.ask(text, how=cfg.generate)) for text in texts]
    before, turns = engine.figures(), ()
    for number, text in enumerate(texts):
        ((answer, _, end),) = together(engine, question(cfg, text=text, media=media, earlier=turns))
        assert answer == wanted[number]
        assert end.cached_tokens == 0 if number == 0 else end.cached_tokens > 20
        turns = (*turns, Turn(text, answer))
    assert engine.figures().compilations == before.compilations


def test_a_long_talk_forgets_its_beginning(cfg, engine):
    turns = tuple(Turn(f"And {n}: " + "eyes and mouth, " * 6, "Yes.") for n in range(12))
    ((_, _, end),) = together(engine, question(cfg, earlier=turns))
    assert 112 < end.prompt_tokens <= 224 - cfg.generate.max_new_tokens


def test_labels_are_rated_as_by_ask(cfg, engine, answerer):
    from emollama_jax.data.items import category_question

    classes = ["happy", "sad", "angry", "a much longer answer than these", *map(str, range(10))]
    media = picture(2)
    wanted = answerer.scores(looked(answerer, media), classes)
    asked = question(cfg, text=category_question(classes, "image"), media=media)
    before = engine.figures()
    found = asyncio.run(engine.score(asked, classes))
    assert list(found.log_likelihoods) == classes
    np.testing.assert_allclose(
        list(found.log_likelihoods.values()), list(wanted.values()), rtol=1e-5
    )
    assert found.probabilities == probabilities(found.log_likelihoods)
    assert engine.figures().compilations == before.compilations


def test_text_alone_is_answered(cfg, engine):
    plain = dataclasses.replace(question(cfg), media=None)
    ((text, _, end),) = together(engine, plain)
    assert text and end.prompt_tokens > 10


def test_stop_texts_end_an_answer(cfg, engine):
    ((whole, tokens, _),) = together(engine, question(cfg, 1, top_logprobs=0))
    stop = whole[3:5]
    ((cut, _, end),) = together(engine, question(cfg, 1, stop=("never", stop)))
    assert cut == whole[: whole.index(stop)] and end.reason == "stop"
    assert end.completion_tokens <= len(tokens)


def test_stop_texts_hold_back_what_may_become_one():
    stops = StopTexts(["END", "\n\n"])
    assert [stops.add(piece) for piece in ("a E", "N", "x\n", "y E", "ND z")] == [
        ("a ", False),
        ("", False),
        ("ENx", False),
        ("\ny ", False),
        ("", True),
    ]
    assert stops.rest() == ""


def test_what_the_asker_can_mend_is_told_and_the_engine_goes_on(cfg, engine):
    dark = decoded("image", [np.zeros((30, 30, 3), np.uint8)])
    ((text, _, end),) = together(engine, question(cfg, media=dark))
    assert (text, end.reason) == ("No face was found in the image.", "no_face")

    async def refused(wanted, work):
        with pytest.raises(UserError, match=wanted):
            await work

    async def all_refused():
        await refused("2 faces", read(engine.ask(question(cfg, face=2))))
        await refused("no room", read(engine.ask(question(cfg, text="eyes " * 600))))
        await refused("no room", read(engine.ask(question(cfg, how={"max_new_tokens": 220}))))
        await refused("No face", engine.score(question(cfg, media=dark), ["a"]))
        await refused("must differ", engine.score(question(cfg), ["a", "a"]))
        await refused("tokens, wanted at", engine.score(question(cfg), ["x" * 200]))

    asyncio.run(all_refused())
    found = asyncio.run(engine.look(picture(0), 1))
    assert found.face == 1 and len(found.boxes) == 2
    assert sum(found.age.values()) == pytest.approx(1, abs=1e-5)
    assert engine.figures().failure is None


def test_who_goes_away_makes_room_and_a_full_queue_is_busy(cfg, make):
    engine = make(EngineSizes(slots=SIZES.slots, waiting=2))
    long = question(cfg, how={"max_new_tokens": 110, "temperature": 2.0})

    async def crowd():
        first = [engine.ask(long) for _ in range(SIZES.slots)]
        for answer in first:
            assert isinstance(await anext(answer), Piece)
        others = [asyncio.ensure_future(read(engine.ask(question(cfg, n)))) for n in (1, 2)]
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="the queue is full"):
            await anext(engine.ask(question(cfg)))
        assert engine.figures().waiting == 2
        for answer in first:
            await answer.aclose()
        await asyncio.gather(*others)

    asyncio.run(crowd())
    figures = engine.figures()
    assert (figures.running, figures.waiting, figures.requests) == (0, 0, SIZES.slots + 2)


def test_a_failure_of_a_step_is_told_to_all(cfg, make, monkeypatch):
    engine = make()

    def fail():
        raise FloatingPointError("made up")

    async def crowd():
        monkeypatch.setattr(engine._slots, "advance", fail)
        asked = (read(engine.ask(question(cfg, n))) for n in range(3))
        return await asyncio.gather(*asked, return_exceptions=True)

    told = asyncio.run(crowd())
    assert [type(one) for one in told] == [Stopped] * 3
    assert "FloatingPointError: made up" in engine.figures().failure
    with pytest.raises(Stopped, match="made up"):
        together(engine, question(cfg))


def test_on_a_mesh_the_answers_are_the_same(cfg, make, engine):
    asked = [question(cfg, n) for n in range(4)]
    wanted = [text for text, *_ in together(engine, *asked)]
    sizes = MeshConfig(data=1, fsdp=1, tensor=2)
    _, spread = load_for_inference(PACKAGE, mesh=sizes)
    both = make(model=spread, mesh=make_mesh(sizes))
    k = jax.tree.leaves(both._slots._cache)[0]
    assert k.sharding.shard_shape(k.shape)[3] * 2 == k.shape[3]  # heads are split
    assert [text for text, *_ in together(both, *asked)] == wanted
    assert both.figures().compilations == 0


def test_the_stacked_decoder_answers_the_same(cfg, make, engine, monkeypatch):
    """As it decodes where there is no CPU."""
    assert isinstance(engine._slots._cache, list)
    monkeypatch.setattr(slots, "laid_out", lambda llama, least: llama)
    stacked = make()
    assert isinstance(stacked._slots._cache, KVCache)
    media = picture(3)
    first = question(cfg, media=media)
    asked = [question(cfg, 1), first, question(cfg, 2)]
    found, wanted = together(stacked, *asked), together(engine, *asked)
    assert [text for text, *_ in found] == [text for text, *_ in wanted]
    follow = dataclasses.replace(first, text="Why?", earlier=(Turn(ASKED, found[1][0]),))
    ((text, _, end),) = together(stacked, follow)
    assert text == together(engine, follow)[0][0] and end.cached_tokens > 20
    rated = [asyncio.run(one.score(first, ["happy", "sad"])) for one in (stacked, engine)]
    np.testing.assert_allclose(*(list(one.log_likelihoods.values()) for one in rated), rtol=1e-5)


def test_lengths_of_prompts_are_few():
    assert lengths_of([112, 184], 512) == (112, 184, 368, 512)
    assert lengths_of([112, 2048], 2048) == (112, 2048)


def test_what_is_kept_is_bounded():
    kept = Kept(10, size=len)
    for key in ("abc", "defg", "hi"):
        kept.put(key, key)
    assert kept.get("abc") == "abc"
    kept.put("jklm", "jklm")  # the one that was not asked for for longest goes
    assert kept.get("defg") is None and kept.get("abc") == "abc"
    kept.put("far too large", "far too large")
    assert (len(kept), kept.nbytes, kept.hits, kept.misses) == (3, 9, 2, 1)


def test_closing_tells_who_waits(cfg, make):
    engine = make()

    async def ask():
        answer = engine.ask(question(cfg, how={"max_new_tokens": 100}))
        await anext(answer)
        await asyncio.to_thread(engine.close)
        with pytest.raises(Stopped, match="was closed"):
            while True:
                await anext(answer)

    asyncio.run(ask())
