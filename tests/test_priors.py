"""Face priors: computed once, resumable, read lazily, defined where there is no face."""

import io
import pickle
import types

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from emollama_jax.errors import UserError
from emollama_jax.faces import priors
from emollama_jax.models.facexformer import FaceXFormer


@pytest.fixture(scope="module")
def reader(tiny_config):
    face = FaceXFormer(tiny_config.model.face, rngs=nnx.Rngs(0))
    return priors.Reader(face, margin=tiny_config.data.face_margin, batch=4)


def no_faces(picture):
    return types.SimpleNamespace(
        boxes=np.zeros((0, 4), np.float32), probabilities=np.zeros(0, np.float32)
    )


def example(rng, boxes):
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
    return {"media": buffer.getvalue(), "kind": "image", "boxes": np.asarray(boxes, np.float32)}


@pytest.fixture
def examples(rng):
    box = [[16, 12, 48, 56]]
    return [example(rng, box) for _ in range(5)] + [example(rng, np.zeros((0, 4)))]


def prepare(examples, folder, reader, progress=lambda done, total: None):
    priors.prepare_priors(examples, folder, reader=reader, detect=no_faces, progress=progress)


def test_stored_priors_are_those_of_each_example_alone(examples, tmp_path, reader):
    prepare(examples, tmp_path / "p", reader)
    stored = priors.Priors(tmp_path / "p")
    assert len(stored) == len(examples)
    picture = np.asarray(Image.open(io.BytesIO(examples[3]["media"])))
    alone = priors.find_face([picture], boxes=examples[3]["boxes"], detect=no_faces, reader=reader)
    wanted = priors.read_faces([alone], reader)[0]
    np.testing.assert_allclose(stored[3].landmarks, wanted.landmarks, atol=1e-5)
    np.testing.assert_array_equal(stored[3].agr, wanted.agr)
    np.testing.assert_allclose(stored[3].agr_probability, wanted.agr_probability, atol=1e-5)
    assert stored[3].found.all()
    assert 1 / 8 <= stored[3].agr_probability[0] <= 1


def test_no_face_is_a_defined_result(examples, tmp_path, reader):
    prepare(examples, tmp_path / "p", reader)
    prior = priors.Priors(tmp_path / "p")[5]
    assert not prior.found.any()
    assert not prior.landmarks.any()
    assert not prior.agr_probability.any()


def test_a_finished_split_is_not_computed_again(examples, tmp_path, reader):
    prepare(examples, tmp_path / "p", reader)
    calls = []
    prepare(examples, tmp_path / "p", reader, progress=lambda done, total: calls.append(done))
    assert not calls


def test_a_stopped_preparation_continues(examples, tmp_path, reader, monkeypatch):
    monkeypatch.setattr(priors, "CHUNK", 2)

    def stop(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(examples, tmp_path / "p", reader, progress=stop)
    with pytest.raises(UserError, match="no face priors"):
        priors.Priors(tmp_path / "p")
    read = []
    monkeypatch.setattr(priors, "read_image", lambda media: read.append(1) or _read(media))
    prepare(examples, tmp_path / "p", reader)
    assert len(read) == 2  # the third part alone
    assert len(priors.Priors(tmp_path / "p")) == 6


def _read(media):
    return np.asarray(Image.open(io.BytesIO(media)))


def test_other_weights_make_stored_priors_void(examples, tmp_path, reader, tiny_config):
    prepare(examples, tmp_path / "p", reader)
    before = priors.Priors(tmp_path / "p")[0].landmarks
    other = priors.Reader(
        FaceXFormer(tiny_config.model.face, rngs=nnx.Rngs(1)), margin=reader.margin, batch=4
    )
    prepare(examples, tmp_path / "p", other)
    assert np.abs(priors.Priors(tmp_path / "p")[0].landmarks - before).max() > 1e-3


def test_priors_pickle_for_worker_processes(examples, tmp_path, reader):
    prepare(examples, tmp_path / "p", reader)
    stored = priors.Priors(tmp_path / "p")
    again = pickle.loads(pickle.dumps(stored))
    np.testing.assert_array_equal(again[1].boxes, stored[1].boxes)
    with pytest.raises(IndexError):
        again[6]
