"""Answering about one file, and evaluation, on an untrained tiny model: everything but skill."""

import dataclasses
import types

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from emollama_jax import compile_cache
from emollama_jax.data.media import read_image
from emollama_jax.data.prompts import Turn
from emollama_jax.data.rows import shape_of_kind, stack
from emollama_jax.data.sets import label_space
from emollama_jax.data.split import Split
from emollama_jax.errors import UserError
from emollama_jax.evaluate.options import Asking
from emollama_jax.evaluate.protocol import evaluate, read_predictions
from emollama_jax.evaluate.speaker import Speaker, predict
from emollama_jax.faces.priors import prepare_priors
from emollama_jax.faces.reader import Reader, cut_out, read_faces
from emollama_jax.generate.prompt import Prompt
from emollama_jax.models import llama_by_token
from emollama_jax.models.emollama import EmoLlama
from emollama_jax.serve.answer import Answerer, Conversation, probabilities
from emollama_jax.tiny import builder
from emollama_jax.tiny.actionfaces.sample import sample_image

SIZES = {"train": 2, "validation": 1, "test": 3}


@pytest.fixture(scope="module")
def cfg(tiny_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    short = dataclasses.replace(tiny_config.generate, max_new_tokens=3)
    return dataclasses.replace(
        tiny_config,
        data=dataclasses.replace(tiny_config.data, dir=str(folder), clip_frames=4),
        generate=short,
    )


@pytest.fixture(scope="module")
def model(cfg):
    return EmoLlama(cfg.model, rngs=nnx.Rngs(0))


def detector(boxes):
    """A detector that always finds the same boxes."""

    def detect(pictures):
        found = types.SimpleNamespace(
            boxes=np.asarray(boxes, np.float32).reshape(-1, 4),
            probabilities=np.ones(len(boxes), np.float32),
        )
        return [found] * len(pictures)

    return detect


@pytest.fixture(scope="module")
def answerer(cfg, model):
    return Answerer(cfg, model, detect=detector([[20, 20, 70, 80], [0, 0, 9, 9]]))


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "face.png"
    Image.fromarray(sample_image("test", 0).picture).save(path)
    return path


def test_a_picture_is_answered(answerer, photo):
    media = answerer.look(photo)
    assert (media.kind, len(media.boxes), media.face) == ("image", 2, 0)
    assert media.prior.found.tolist() == [True]
    np.testing.assert_array_equal(media.prior.boxes[0], [20, 20, 70, 80])
    pieces = list(answerer.ask(media, "How does the person feel?"))
    assert pieces and all(isinstance(piece, str) for piece in pieces)


def test_many_answers_come_from_the_laid_out_decoder(cfg, model, monkeypatch):
    rng, llama = np.random.default_rng(0), cfg.model.llama
    embeds = rng.standard_normal((2, 9, llama.width), np.float32).astype(llama.dtype)
    prompt = Prompt(embeds=embeds, length=np.array([9, 4], np.int32))
    words = []
    for least in (llama_by_token.LEAST, 0):
        monkeypatch.setattr(llama_by_token, "LEAST", least)
        speaker = Speaker(cfg, model)
        words.append(speaker.write(prompt, max_new_tokens=3))
        assert (nnx.merge(*speaker._writer).by_token is None) == (least > 0)
    assert words[0] == words[1]


def test_another_face_can_be_named(answerer, photo):
    media = answerer.look(photo, face=1)
    np.testing.assert_array_equal(media.prior.boxes[0], [0, 0, 9, 9])
    with pytest.raises(UserError, match="2 faces"):
        answerer.look(photo, face=2)


def test_without_a_face_the_model_is_not_asked(cfg, model, photo):
    blind = Answerer(cfg, model, detect=detector([]))
    media = blind.look(photo)
    assert not media.found and media.face is None and len(media.boxes) == 0
    assert list(blind.ask(media, "How does the mouth look?")) == ["No face was found in the image."]
    wish = Conversation(blind, media, without_face=True)
    assert "".join(wish.ask("What is there?")) != "No face was found in the image."
    assert len(wish.turns) == 1


def test_a_face_is_read_as_priors_are(cfg, model, answerer, photo):
    """One pass of the towers says of the face what `data prepare` stores."""
    media = answerer.look(photo)
    reader = Reader(model.face, margin=cfg.data.face_margin, batch=4)
    picture = read_image(photo)
    seen = cut_out([picture], media.boxes[:1], np.ones(1, bool), reader=reader)
    wanted = read_faces([seen], reader)[0]
    np.testing.assert_allclose(media.prior.landmarks, wanted.landmarks, atol=1e-5)
    np.testing.assert_array_equal(media.prior.agr, wanted.agr)
    np.testing.assert_allclose(media.prior.agr_probability, wanted.agr_probability, atol=1e-5)


def test_the_answer_is_that_of_a_batch(cfg, model, answerer, photo):
    """Looking once and asking in parts gives the words of one whole pass, as evaluation runs it."""
    media = answerer.look(photo)
    question = "Describe the face in the image."
    look = answerer.encoder.look(photo, kind="image", prior=media.prior)
    row = answerer.encoder.prompt_row(look, kind="image", question=question, index=0)
    speaker, shape = Speaker(cfg, model), shape_of_kind(cfg, "image", rounds=1)
    batch = stack([row], shape=shape, encoder=answerer.encoder)
    (wanted,) = speaker.write(speaker.read(batch), max_new_tokens=3)
    assert "".join(answerer.ask(media, question)) == wanted
    assert wanted  # an empty answer would prove nothing


def test_a_conversation_remembers(answerer, photo):
    media = answerer.look(photo)
    talk = Conversation(answerer, media)
    first = "".join(talk.ask("How does the person feel?"))
    "".join(talk.ask("Why?"))
    assert talk.turns[0] == Turn("How does the person feel?", first)
    assert [turn.question for turn in talk.turns] == ["How does the person feel?", "Why?"]
    for number in range(5):  # more than the model's positions hold
        list(talk.ask(f"And what of these {number}: " + "eyes and mouth, " * 20))
    assert 0 < talk.forgotten < len(talk.turns)


def test_another_size_compiles_nothing(cfg, model, tmp_path):
    """The real detector: three pictures of other sizes after the first one."""
    whole = Answerer(cfg, model)
    compile_cache.count()
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate([(90, 120), (300, 200), (40, 41), (256, 700)]):
        path = tmp_path / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(path)
        list(Conversation(whole, whole.look(path), without_face=True).ask("Who?"))
        if number == 0:
            before = compile_cache.counted()
    after = compile_cache.counted()
    assert (after.compiled, after.found) == (before.compiled, before.found)
    assert before.compiled + before.found > 0


def test_label_scores_are_those_of_evaluation(cfg, model, answerer, photo):
    media = answerer.look(photo)
    classes = label_space("actionfaces/images").classes
    scores = answerer.scores(media, classes)
    assert list(scores) == list(classes) and max(scores.values()) < 0
    shares = probabilities(scores)
    assert sum(shares.values()) == pytest.approx(1)
    assert max(shares, key=shares.get) == max(scores, key=scores.get)


def test_a_clip_is_searched_only_where_it_is_seen(answerer, cfg, tmp_path):
    for index in range(9):
        picture = sample_image("test", index).picture
        Image.fromarray(picture).save(tmp_path / f"{index}.png")
    media = answerer.look(tmp_path)
    assert media.kind == "clip"
    assert len(media.prior.found) == 9
    assert media.prior.found.sum() == cfg.data.clip_frames
    list(answerer.ask(media, "How does the person feel?"))
    with pytest.raises(UserError, match="pictures only"):
        answerer.look(tmp_path, face=0)


@pytest.fixture(scope="module")
def prepared(cfg, model):
    builder.prepare(cfg.data.dir, config_name="images", sizes=SIZES, processes=1)
    name = "actionfaces/images"
    prepare_priors(
        Split(cfg.data.dir, name, "test").examples,
        Split(cfg.data.dir, name, "test").priors_folder,
        reader=Reader(model.face, margin=cfg.data.face_margin, batch=4),
        detect=detector([]),
        progress=lambda done, total: None,
    )
    return dataclasses.replace(cfg.data.sources[0], name=name, split="test")


def test_both_ways_of_answering(cfg, model, prepared, tmp_path):
    from emollama_jax.evaluate.of_run import evaluate_run
    from emollama_jax.evaluate.publish import publish

    found = predict(cfg, model, prepared, Asking(batch=2))
    scored, written = found["score"], found["generate"]
    assert len(scored) == len(written) == 3
    assert {item.parsed for item in scored} == {"score"}
    assert all(item.predicted is not None for item in scored)
    assert [item.label for item in scored] == [item.label for item in written]
    priors = Split(cfg.data.dir, prepared.name, "test").priors
    assert len(priors) == 3
    assert evaluate(scored, label_space(prepared.name)).n == 3

    from rich.console import Console

    asking = Asking(answering="score", batch=2)
    quiet = Console(quiet=True)
    publish(
        evaluate_run(cfg, model, prepared.name, "test", asking, console=quiet), tmp_path / "eval"
    )
    assert read_predictions(tmp_path / "eval" / "predictions.jsonl") == scored
    assert "<html" in (tmp_path / "eval" / "report.html").read_text()
    assert (tmp_path / "eval" / "evaluation.json").exists()
