"""Answering about one file, and evaluation, on an untrained tiny model: everything but skill."""

import dataclasses
import types

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from emollama_jax.data.actionfaces.sample import sample_image
from emollama_jax.data.builders import actionfaces
from emollama_jax.data.pipeline import open_source
from emollama_jax.errors import UserError
from emollama_jax.evaluate.protocol import evaluate, read_predictions
from emollama_jax.evaluate.run import predict
from emollama_jax.faces.priors import Reader, open_priors, prepare_priors, priors_folder
from emollama_jax.models.emollama import EmoLlama
from emollama_jax.serve.answer import Answerer

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

    def detect(picture):
        return types.SimpleNamespace(
            boxes=np.asarray(boxes, np.float32).reshape(-1, 4),
            probabilities=np.ones(len(boxes), np.float32),
        )

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
    assert (media.kind, media.faces) == ("image", 2)
    assert media.prior.found.tolist() == [True]
    np.testing.assert_array_equal(media.prior.boxes[0], [20, 20, 70, 80])
    pieces = list(answerer.ask(media, "How does the person feel?"))
    assert all(isinstance(piece, str) for piece in pieces)


def test_another_face_can_be_named(answerer, photo):
    media = answerer.look(photo, face=1)
    np.testing.assert_array_equal(media.prior.boxes[0], [0, 0, 9, 9])
    with pytest.raises(UserError, match="2 faces"):
        answerer.look(photo, face=2)


def test_no_face_still_gives_an_answer(cfg, model, photo):
    blind = Answerer(cfg, model, detect=detector([]))
    media = blind.look(photo)
    assert media.faces == 0
    assert not media.prior.found.any()
    list(blind.ask(media, "How does the person feel?"))


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
    actionfaces.prepare(cfg.data.dir, config_name="images", sizes=SIZES, processes=1)
    name = "actionfaces/images"
    prepare_priors(
        open_source(cfg.data.dir, name, "test"),
        priors_folder(cfg.data.dir, name, "test"),
        reader=Reader(model.face, margin=cfg.data.face_margin, batch=4),
        detect=detector([]),
        progress=lambda done, total: None,
    )
    return dataclasses.replace(cfg.data.sources[0], name=name, split="test")


def test_both_ways_of_answering(cfg, model, prepared, tmp_path):
    from emollama_jax.data.emotions import label_space
    from emollama_jax.evaluate.command import evaluate_run

    found = predict(cfg, model, prepared, answerings=("score", "generate"), batch=2)
    scored, written = found["score"], found["generate"]
    assert len(scored) == len(written) == 3
    assert {item.parsed for item in scored} == {"score"}
    assert all(item.predicted is not None for item in scored)
    assert [item.label for item in scored] == [item.label for item in written]
    priors = open_priors(cfg.data.dir, prepared.name, "test")
    assert len(priors) == 3
    assert evaluate(scored, label_space(prepared.name)).n == 3

    from rich.console import Console

    evaluate_run(
        cfg,
        model,
        prepared.name,
        "test",
        answering="score",
        batch=2,
        out=tmp_path / "eval",
        console=Console(quiet=True),
    )
    assert read_predictions(tmp_path / "eval" / "predictions.jsonl") == scored
    assert "<html" in (tmp_path / "eval" / "report.html").read_text()
    assert (tmp_path / "eval" / "evaluation.json").exists()
