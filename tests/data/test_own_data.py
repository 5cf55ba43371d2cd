"""`docs/own_data.md`: its five commands run, from a folder to a report; and `train --data`.

The networks are stand-ins, since only what leads from one command to the next is looked at here;
the real ones go the whole way in test_six_sets.py.
"""

import functools
import json
import re
import shlex
import types

import numpy as np
import pytest

from emollama_jax import base, cli, config
from emollama_jax import prepare as faces
from emollama_jax.checkpoint import load_for_inference
from emollama_jax.data.items import DONE
from emollama_jax.data.split import Split
from emollama_jax.errors import UserError
from emollama_jax.evaluate import of_run, speaker
from emollama_jax.testing.toy_model import Toy
from emollama_jax.train import loop, sources
from tests.helpers import official_trees
from tests.helpers.prepared_sets import prepare

CLASSES = ("anger", "happiness", "sadness")
# What makes the toy a model of the config, and the run short.
SHORT = (
    "weights=none",
    "train.steps=2",
    "train.save_every=2",
    "train.image_batch=4",
    "train.trainable=['llama/.*lora_[AB]','fim/.*']",
    "train.projector=['fim/.*']",
    "model.llama.layers=1",
    "model.llama.width=16",
)


class Reader:
    """FaceXFormer: the same landmarks for every face."""

    fingerprint = "stand-in"

    def __init__(self, face, *, margin, mesh):
        self.size, self.margin = face.swin.image_size, margin

    def __call__(self, crops):
        count = len(crops)
        classes = (np.full((count, n), 1 / n, np.float32) for n in (8, 2, 5))
        return np.zeros((count, 68, 2), np.float32), tuple(classes)


class Detector:
    """MTCNN: a face in the middle of every picture."""

    def __init__(self, *, mesh):
        pass

    def many(self, pictures):
        face = types.SimpleNamespace(
            boxes=np.array([[20, 20, 76, 76]], np.float32), probabilities=np.ones(1, np.float32)
        )
        return [face for _ in pictures]


class Speaker:
    """A model that sees the first class in every picture."""

    def __init__(self, cfg, model):
        self.chat = speaker.open_chat(cfg)

    def read(self, batch):
        return len(batch.weight)

    def write(self, prompt, *, max_new_tokens):
        return [CLASSES[0]] * prompt

    def rate(self, prompt, labels):
        return np.tile(-np.arange(len(CLASSES), dtype=np.float32), (prompt, 1))


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(base, "load_face", lambda cfg: cfg.model.face)
    monkeypatch.setattr(faces, "Reader", Reader)
    monkeypatch.setattr(faces, "Detector", Detector)
    monkeypatch.setattr(loop, "fit", functools.partial(loop.fit, build=Toy))
    load = functools.partial(load_for_inference, build=Toy)
    monkeypatch.setattr(of_run, "load_for_inference", load)
    monkeypatch.setattr(speaker, "Speaker", Speaker)


def photos(folder, *, each=10):
    for n, emotion in enumerate(CLASSES):
        for i in range(each):
            data = official_trees.encode_picture(
                official_trees.face(emotion, each * n + i, "train")
            )
            official_trees.write(folder / emotion / f"{i}.jpg", data)


def test_the_five_commands_lead_to_a_report(root, tmp_path, monkeypatch, capsys, stand_ins):
    text = (root / "docs" / "own_data.md").read_text()
    block = re.search(r"^```sh\n(.*?)^```", text, re.M | re.S)
    commands = [shlex.split(line)[1:] for line in block[1].splitlines()]
    assert [words[:2] for words in commands[:2]] == [["data", "prepare"], ["data", "inspect"]]
    assert [words[0] for words in commands[2:]] == ["train", "eval", "eval"]
    photos(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    said = []
    for words in commands:
        cli.main([*words, *(SHORT if words[0] == "train" else ())])
        said.append("".join(capsys.readouterr()))
    assert "train 24, validation 3, test 3" in said[0]
    assert "happiness             8   33.3%" in said[1]
    assert "data: own/mine, 24 pictures of its split 'train'" in said[2]
    line = " ".join("".join(said[2]).split())
    fitted = re.search(r"data\.packed: (\d+) examples in a row of (\d+) tokens and (\d+)", line)
    assert fitted[1] == fitted[3]  # pictures have a frame each
    assert 352 * 0.7 < int(fitted[2]) < 352 * 1.2
    assert "step 2 of 2" in said[2]
    assert "n 3: runs/mine/eval/report.html" in said[3]
    tree = json.loads((tmp_path / "runs" / "mine" / "eval" / "evaluation.json").read_text())
    assert (tree["n"], tree["war"]) == (3, pytest.approx(1 / 3))
    assert "<html" in (tmp_path / "runs" / "mine" / "eval" / "report.html").read_text()
    assert "WAR 33.33" in said[4] and "n 3" in said[4]
    with pytest.raises(SystemExit) as stop:  # what was trained on is not tested
        cli.main(["eval", "runs/mine", "--source", "own/mine", "--split", "train"])
    assert stop.value.code == 2
    assert "was trained on its split 'train'" in capsys.readouterr().err


# ---- train --data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """own/mine of pictures, own/clips, own/many of many long words, own/only of a test split."""
    folder = tmp_path_factory.mktemp("data")
    photos(folder / "photos", each=4)
    prepare("own/mine", folder / "photos", folder)
    official_trees.own_folders(folder / "clips", each=1, clips=True)
    prepare("own/clips", folder / "clips", folder)
    for n in range(24):
        picture = official_trees.encode_picture(np.full((16, 16, 3), 10 * n, np.uint8))
        official_trees.write(folder / "many" / f"quite a long class name {n}x" / "1.jpg", picture)
    prepare("own/many", folder / "many", folder)
    (folder / "only").mkdir()
    (folder / "photos").rename(folder / "only" / "test")
    prepare("own/only", folder / "only", folder)
    return folder


def use(data, *names, more=()):
    return sources.use(config.load("tiny", [f"data.dir={data}", "data.packed=null", *more]), names)


def test_kind_and_split_are_found(data):
    cfg, told = use(data, "own/mine")
    (source,) = cfg.data.sources
    assert (source.name, source.split, source.kind) == ("own/mine", "train", "image")
    assert source.items == "category" and told == [
        "data: own/mine, 6 pictures of its split 'train'"
    ]
    assert config.from_dict(config.to_dict(cfg), origin="") == cfg
    cfg, told = use(data, "own/clips")
    assert cfg.data.sources[0].kind == "clip" and "3 clips" in told[0]


def test_several_sets_are_mixed_by_their_size(data):
    cfg, _ = use(data, "own/mine", "own/clips")
    assert [s.weight for s in cfg.data.sources] == [pytest.approx(6 / 9), pytest.approx(3 / 9)]
    with pytest.raises(UserError, match="name each set once"):
        use(data, "own/mine", "own/mine")


def test_conversations_are_read_where_there_are_some(data):
    done = Split(data, "own/clips", "train").instruct_folder / DONE
    done.parent.mkdir(parents=True)
    done.write_text("{}")
    cfg, told = use(data, "own/clips")
    assert cfg.data.sources[0].items == "both" and "and their conversations" in told[0]


def test_the_text_length_is_raised_for_long_class_words(data):
    cfg, told = use(data, "own/many")
    assert cfg.data.text_length > 112 and cfg.data.text_length % 8 == 0
    assert told[1].startswith("data.text_length: raised from 112 to ")
    with pytest.raises(UserError, match=r"more than model\.llama\.max_positions = 128"):
        use(data, "own/many", more=["model.llama.max_positions=128"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own/none", "own/none is not prepared; run `emollama data prepare own/none --source DIR`"),
        ("raf_db", "raf_db is not prepared; run `emollama data prepare raf_db --source DIR`"),
        ("actionfaces/images", "run `emollama data prepare actionfaces/images` first"),
        ("own/only", "no split 'train'; choose one of test"),
        ("dfew", "dfew has folds: name one, e.g. dfew/fold1"),
        ("mine", "mine: no such data set; known:"),
    ],
)
def test_data_that_cannot_be_trained_on(data, capsys, name, said):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "tiny", f"data.dir={data}", "--data", name, "--out", str(data / "run")])
    assert stop.value.code == 2 and said in capsys.readouterr().err
    assert not (data / "run").exists()
