"""Face priors: computed once, resumable, read lazily, defined where there is no face."""

import io
import pathlib
import pickle
import types

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from emollama_jax.data.priors import Priors
from emollama_jax.data.split import Split
from emollama_jax.errors import UserError
from emollama_jax.faces import priors
from emollama_jax.faces.reader import Reader, cut_out, local_mesh, read_faces
from emollama_jax.models.facexformer import FaceXFormer
from tests.helpers import official_trees
from tests.helpers.prepared_sets import prepare as prepare_set


@pytest.fixture(scope="module")
def reader(tiny_config):
    face = FaceXFormer(tiny_config.model.face, rngs=nnx.Rngs(0))
    return Reader(face, margin=tiny_config.data.face_margin, batch=4)


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


def prepare(examples, folder, reader, progress=lambda done, total: None, **more):
    def detect(pictures):
        return [no_faces(picture) for picture in pictures]

    return priors.prepare_priors(
        examples, folder, reader=reader, detect=detect, progress=progress, **more
    )


def test_stored_priors_are_those_of_each_example_alone(examples, tmp_path, reader):
    prepare(examples, tmp_path / "p", reader)
    stored = Priors(tmp_path / "p")
    assert len(stored) == len(examples)
    picture = np.asarray(Image.open(io.BytesIO(examples[3]["media"])))
    seen = cut_out([picture], examples[3]["boxes"], np.ones(1, bool), reader=reader)
    wanted = read_faces([seen], reader)[0]
    np.testing.assert_allclose(stored[3].landmarks, wanted.landmarks, atol=1e-5)
    np.testing.assert_array_equal(stored[3].agr, wanted.agr)
    np.testing.assert_allclose(stored[3].agr_probability, wanted.agr_probability, atol=1e-5)
    assert stored[3].found.all()
    assert 1 / 8 <= stored[3].agr_probability[0] <= 1


def test_no_face_is_a_defined_result(examples, tmp_path, reader):
    prepare(examples, tmp_path / "p", reader)
    prior = Priors(tmp_path / "p")[5]
    assert not prior.found.any()
    assert not prior.landmarks.any()
    assert not prior.agr_probability.any()


def test_a_finished_split_is_not_computed_again(examples, tmp_path, reader):
    prepare(examples, tmp_path / "p", reader)
    calls = []
    prepare(examples, tmp_path / "p", reader, progress=lambda done, total: calls.append(done))
    assert not calls


def test_a_stopped_preparation_continues(examples, tmp_path, reader, monkeypatch):
    monkeypatch.setitem(priors.CHUNK, "image", 2)

    def stop(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(examples, tmp_path / "p", reader, progress=stop)
    with pytest.raises(UserError, match="no face priors"):
        Priors(tmp_path / "p")
    read = []
    monkeypatch.setattr(priors, "read_image", lambda media: read.append(1) or _read(media))
    prepare(examples, tmp_path / "p", reader)
    assert len(read) == 2  # the third part alone
    assert len(Priors(tmp_path / "p")) == 6


def test_unreadable_media_and_own_boxes_off_the_picture_are_marked_and_kept(
    examples, rng, tmp_path, reader, caplog
):
    broken = {"id": "bad-1", "media": b"no picture", "kind": "image", "boxes": np.zeros((0, 4))}
    outside = {**example(rng, [[90, 90, 120, 120]]), "id": "bad-2"}
    summary = prepare([*examples, broken, outside], tmp_path / "p", reader)
    assert (summary.examples, summary.frames) == (8, 7)
    assert (summary.without_face, summary.unreadable) == (2, 1)  # `examples` has one without a face
    assert summary.frames_done == 7 and summary.rate > 0
    stored = Priors(tmp_path / "p")
    assert len(stored) == 8 and stored[4].found.all()
    assert len(stored[6].found) == 0 and not stored[7].found.any()
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if "bad-1" in line and "not a picture" in line]
    assert [line for line in lines if "bad-2" in line and "outside its picture" in line]
    again = prepare([*examples, broken, outside], tmp_path / "p", reader)
    assert again.unreadable == 1 and again.frames_done == 0  # counted from what is stored


def test_other_examples_make_stored_priors_void(examples, tmp_path, reader):
    prepare(examples, tmp_path / "p", reader, fingerprint="one")
    assert prepare(examples, tmp_path / "p", reader, fingerprint="one").frames_done == 0
    assert prepare(examples, tmp_path / "p", reader, fingerprint="two").frames_done == 6


def test_groups_hold_many_pictures_and_whole_clips(monkeypatch):
    monkeypatch.setattr(priors, "GROUP", 5)
    frame = np.zeros((4, 4, 3), np.uint8)
    given = [priors._Decoded(str(i), [frame] * n, None) for i, n in enumerate((1, 1, 9, 0, 2, 2))]
    groups = [[one.id for one in group] for group in priors._groups(given)]
    assert groups == [["0", "1", "2"], ["3", "4", "5"]]
    monkeypatch.setattr(priors, "GROUP_BYTES", 2 * frame.nbytes)
    groups = [[one.id for one in group] for group in priors._groups(given)]
    assert groups == [["0", "1"], ["2"], ["3", "4"], ["5"]]


def test_a_clip_keeps_one_face_with_a_smooth_box(tmp_path, reader):
    """Detected in one call for all frames of a group; the larger bystander comes too late."""
    number = 12
    faces = [np.array([[8 + i % 2, 8, 40, 48]], np.float32) for i in range(number)]
    faces[5] = np.concatenate([[[0, 0, 64, 64]], faces[5]]).astype(np.float32)
    calls = []

    def detect(pictures):
        calls.append(len(pictures))
        return [types.SimpleNamespace(boxes=boxes) for boxes in faces[: len(pictures)]]

    clip = official_trees.video("happy", 1, frames=number)
    examples = [{"id": "c", "media": clip, "kind": "clip", "boxes": np.zeros((0, 4))}]
    priors.prepare_priors(
        examples, tmp_path / "p", reader=reader, detect=detect, progress=lambda done, total: None
    )
    boxes = Priors(tmp_path / "p")[0].boxes
    assert calls == [number]
    np.testing.assert_allclose(boxes[2:-2, 0], [8.4, 8.6] * 4, atol=1e-6)
    assert boxes[5, 2] == 40  # of the face, not of the bystander


def test_devices_share_a_batch(reader, tiny_config, rng):
    """Eight devices read what one reads, whatever is left of a batch."""
    import jax

    mesh = local_mesh()
    assert mesh.size == jax.local_device_count() == 8
    face = FaceXFormer(tiny_config.model.face, rngs=nnx.Rngs(0))
    many = Reader(face, margin=reader.margin, batch=2, mesh=mesh)
    crops = rng.integers(0, 256, (19, reader.size, reader.size, 3), dtype=np.uint8)
    one, all_devices = reader(crops), many(crops)
    np.testing.assert_allclose(all_devices[0], one[0], atol=1e-5)
    for a, b in zip(all_devices[1], one[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert many.fingerprint == reader.fingerprint


def test_priors_of_a_fold_are_a_view(tmp_path, reader):
    root = official_trees.dfew(tmp_path / "src", clips=6)
    prepare_set("dfew", root, tmp_path, fold=2)
    split = Split(tmp_path, "dfew/fold2", "train")
    prepare(split.stored.examples("clips"), pathlib.Path(split.priors_folder), reader)
    found = pickle.loads(pickle.dumps(split)).priors
    assert len(found) == len(split.examples) == 5
    assert all(len(prior.found) == official_trees.FRAMES for prior in found)
    with pytest.raises(IndexError):
        found[5]


def _read(media):
    return np.asarray(Image.open(io.BytesIO(media)))


def test_other_weights_make_stored_priors_void(examples, tmp_path, reader, tiny_config):
    prepare(examples, tmp_path / "p", reader)
    before = Priors(tmp_path / "p")[0].landmarks
    other = Reader(
        FaceXFormer(tiny_config.model.face, rngs=nnx.Rngs(1)), margin=reader.margin, batch=4
    )
    prepare(examples, tmp_path / "p", other)
    assert np.abs(Priors(tmp_path / "p")[0].landmarks - before).max() > 1e-3


def test_priors_pickle_for_worker_processes(examples, tmp_path, reader):
    prepare(examples, tmp_path / "p", reader)
    stored = Priors(tmp_path / "p")
    again = pickle.loads(pickle.dumps(stored))
    np.testing.assert_array_equal(again[1].boxes, stored[1].boxes)
    with pytest.raises(IndexError):
        again[6]
