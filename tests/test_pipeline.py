"""The pipeline on small pictures and clips: batches, order, resuming, hosts, broken media."""

import contextlib
import dataclasses
import io
import json
import logging

import av
import numpy as np
import pytest
from PIL import Image

from emollama_jax import config
from emollama_jax.batch import IGNORE, IMAGE_TOKEN, Batch
from emollama_jax.data import prompts
from emollama_jax.data.elements import Encoder, Examples
from emollama_jax.data.emotions import label_space
from emollama_jax.data.pipeline import make_eval_batches, make_train_iterator, open_source
from emollama_jax.data.tokenizers import train_bpe
from emollama_jax.errors import UserError

FIELDS = [field.name for field in dataclasses.fields(Batch)]
CLASSES = label_space("actionfaces").classes
FRAMES = (5, 24)  # of the two kinds of clips: fewer and more than M = 16


@dataclasses.dataclass(frozen=True)
class Prior:
    boxes: np.ndarray
    found: np.ndarray
    landmarks: np.ndarray
    agr: np.ndarray
    agr_probability: np.ndarray


def picture(level: int, size: int = 40) -> np.ndarray:
    """A grey picture with a bright square, which is the face."""
    pixels = np.full((size, size, 3), level, np.uint8)
    pixels[10:30, 10:30] = 255
    return pixels


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def clip(levels: list[int]) -> bytes:
    """A clip whose frame i is grey level levels[i], but for the face."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=12, options={"crf": "4"})
        stream.width = stream.height = 40
        stream.pix_fmt = "yuv420p"
        for level in levels:
            frame = av.VideoFrame.from_ndarray(picture(level), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def example(index: int, media: bytes, kind: str) -> dict:
    medium = {"image": "image", "clip": "video"}[kind]
    question = (
        f"<image>\nWhat is the facial expression of the person in the {medium}? Choose one from "
        f"the following options: {{{', '.join(CLASSES)}}}."
    )
    label = index % len(CLASSES)
    category = [
        {"from": "human", "value": question},
        {"from": "gpt", "value": CLASSES[label]},
    ]
    free = [
        {"from": "human", "value": "<image>\nDescribe the face."},
        {"from": "gpt", "value": f"The brows of {index} are raised."},
        {"from": "human", "value": "Why?"},
        {"from": "gpt", "value": "I can only say what I see."},
    ]
    return {
        "id": f"{kind}-{index}",
        "media": media,
        "label": label,
        "items": json.dumps([category, free]),
    }


def prior(frames: int, *, found: bool = True) -> Prior:
    boxes = np.tile(np.array([10, 10, 30, 30], np.float32), (frames, 1))
    landmarks = np.linspace(-1, 1, frames * 136).reshape(frames, 68, 2).astype(np.float32)
    return Prior(
        boxes, np.full(frames, found), landmarks, np.array([2, 1, 2]), np.array([0.9, 0.8, 0.7])
    )


class Store:
    """Prepared data sets and their priors, in memory."""

    def __init__(self):
        images = [example(i, png(picture(i * 5)), "image") for i in range(11)]
        levels = [list(range(0, 10 * count, 10)) for count in FRAMES]
        media = [clip(x) for x in levels]
        clips = [example(i, media[i % 2], "clip") for i in range(6)]
        self.data = {"actionfaces/images": images, "actionfaces/clips": clips, "more": images[:4]}
        self.priors = {
            "actionfaces/images": [prior(1) for _ in images],
            "actionfaces/clips": [prior(FRAMES[i % 2]) for i in range(6)],
            "more": [prior(1, found=False) for _ in images[:4]],
        }

    def open_data(self, folder: str, name: str, split: str) -> list:
        return self.data[name]

    def open_priors(self, folder: str, name: str, split: str) -> list:
        return self.priors[name]


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> str:
    """The path of a small tokenizer."""
    words = " ".join(CLASSES)
    texts = [prompts.SYSTEM, f"USER: ASSISTANT: the facial expression {words} Choose one from"] * 9
    path = tmp_path_factory.mktemp("bpe") / "bpe.json"
    path.write_text(train_bpe(texts, 420))
    return str(path)


@pytest.fixture
def cfg(bpe) -> config.Config:
    return make_config(bpe)


def make_config(bpe: str, *overrides: str) -> config.Config:
    both = f"{{kind: bpe, path: {bpe}}}"
    return config.load(
        "tiny",
        [
            f"data.llm_tokenizer={both}",
            f"data.question_tokenizer={both}",
            "data.text_length=260",
            "data.clip_text_length=340",
            "data.question_length=32",
            "data.broken_share=1",
            "model.vision.image_size=64",
            "model.face.swin.image_size=48",
            "train.image_batch=4",
            "train.clip_batch=2",
            *overrides,
        ],
    )


def iterator(cfg: config.Config, store: Store, **kwargs):
    return make_train_iterator(
        cfg, open_data=store.open_data, open_priors=store.open_priors, **kwargs
    )


def take(iterator, count: int) -> list[Batch]:
    return [next(iterator) for _ in range(count)]


def assert_equal(first: Batch, second: Batch) -> None:
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)


def is_clip(batch: Batch) -> bool:
    return batch.frames.shape[1] > 1


def test_shapes_and_dtypes(cfg, store):
    batches = take(iterator(cfg, store), 5)
    assert [is_clip(batch) for batch in batches].count(True) == 2  # of 5, weights 0.6 and 0.4
    for batch in batches:
        b, m, t, r = (2, 16, 340, 1) if is_clip(batch) else (4, 1, 260, 1)
        wanted = {
            "frames": ((b, m, 64, 64, 3), np.uint8),
            "faces": ((b, m, 48, 48, 3), np.uint8),
            "face_found": ((b, m), np.bool_),
            "landmarks": ((b, m, 68, 2), np.float32),
            "ids": ((b, t), np.int32),
            "labels": ((b, t), np.int32),
            "length": ((b,), np.int32),
            "questions": ((b, r, 32), np.int32),
            "question_mask": ((b, r, 32), np.bool_),
            "weight": ((b,), np.float32),
            "index": ((b,), np.int32),
        }
        found = {name: (getattr(batch, name).shape, getattr(batch, name).dtype) for name in FIELDS}
        assert found == wanted
        visual = (batch.ids == IMAGE_TOKEN).sum(axis=1)
        np.testing.assert_array_equal(visual, m * cfg.model.tokens_per_frame)
        assert (batch.weight == 1).all()
        for row in range(b):
            used = np.arange(t) < batch.length[row]
            assert (batch.labels[row][~used] == IGNORE).all()
            assert (batch.ids[row][used][1:] != 0).all()  # nothing is padding or unknown
            answer = batch.labels[row] != IGNORE
            assert answer.any()
            np.testing.assert_array_equal(batch.labels[row][answer], batch.ids[row][answer])


def test_rows_hold_their_examples_media(cfg, store):
    """Grey level of frame and face, landmarks and label belong together."""
    encoder = Encoder(cfg)
    seen = set()
    for batch in take(iterator(cfg, store), 12):
        for row in range(len(batch.index)):
            index = int(batch.index[row])
            text = encoder.llm.decode([i for i in batch.labels[row] if i != IGNORE]).strip()
            assert text in (
                CLASSES[index % 7],
                f"The brows of {index} are raised.",
                "I can only say what I see.",
            )
            kind = "clip" if is_clip(batch) else "image"
            seen.add((kind, text == CLASSES[index % 7], text.startswith("I can")))
            assert batch.face_found[row].all()
            corners = batch.frames[row, :, 1, 1, 0].astype(int)
            if kind == "image":
                assert abs(corners[0] - 5 * index) <= 1
                stored = [0]
            else:
                stored = np.round(corners / 10).astype(int)
                assert (np.diff(stored) >= 0).all() and stored.max() < FRAMES[index % 2]
            landmarks = store.priors[f"actionfaces/{kind}s"][index].landmarks[stored]
            np.testing.assert_array_equal(batch.landmarks[row], landmarks)
            # The crop is the bright square and half its size of grey around it.
            assert (batch.faces[row, :, 24, 24] > 240).all()
            assert np.abs(batch.faces[row, :, 2, 2, 0].astype(int) - corners).max() <= 4
    assert len(seen) == 6  # both kinds, and of each all three answers


def test_every_epoch_has_every_example_in_another_order(bpe, store):
    cfg = make_config(
        bpe,
        "data.sources=[{name: actionfaces/images, split: train, kind: image, weight: 1}]",
        "train.image_batch=11",
    )
    epochs = [batch.index.tolist() for batch in take(iterator(cfg, store), 3)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = next(
        iterator(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, seed=1)), store)
    ).index.tolist()
    assert other != epochs[0]


def test_the_seed_of_an_element_differs_between_epochs(bpe, store):
    """Random frames of the same clip, time after time."""
    cfg = make_config(
        bpe,
        "data.sources=[{name: actionfaces/clips, split: train, kind: clip, weight: 1}]",
        "train.clip_batch=6",
    )
    frames = [
        batch.frames[batch.index.tolist().index(1)] for batch in take(iterator(cfg, store), 3)
    ]
    assert not (frames[0] == frames[1]).all() and not (frames[1] == frames[2]).all()


@pytest.mark.parametrize("workers", [(0, 0), (2, 1)])
def test_resuming_is_exact(bpe, store, workers):
    """k batches, save, restore elsewhere: the rest is the uninterrupted run's, bit for bit.

    However many worker processes made either part.
    """
    uninterrupted = take(iterator(make_config(bpe), store), 7)
    assert len({is_clip(batch) for batch in uninterrupted[:3]}) == 2
    assert len({is_clip(batch) for batch in uninterrupted[3:]}) == 2
    with contextlib.closing(iterator(make_config(bpe, f"data.workers={workers[0]}"), store)) as run:
        for wanted in uninterrupted[:3]:
            assert_equal(wanted, next(run))
        state = json.loads(json.dumps(run.get_state()))
    with pytest.raises(ValueError, match="closed"):
        next(run)
    with contextlib.closing(iterator(make_config(bpe, f"data.workers={workers[1]}"), store)) as run:
        run.set_state(state)
        for wanted in uninterrupted[3:]:
            assert_equal(wanted, next(run))


def test_a_running_iterator_can_be_set_back(cfg, store):
    batches = iterator(cfg, store)
    first = take(batches, 3)
    batches.set_state({"step": 1})
    assert_equal(first[1], next(batches))
    assert batches.get_state() == {"step": 2}


def test_hosts_share_every_batch(cfg, store):
    whole = take(iterator(cfg, store), 6)
    parts = [take(iterator(cfg, store, host_index=i, host_count=2), 6) for i in range(2)]
    for batch, left, right in zip(whole, *parts, strict=True):
        for name in FIELDS:
            both = np.stack([getattr(left, name), getattr(right, name)], axis=1)
            both = both.reshape(-1, *both.shape[2:])  # rows of the hosts alternate
            np.testing.assert_array_equal(getattr(batch, name), both, err_msg=name)
    with pytest.raises(
        UserError, match=r"train\.image_batch is 4, wanted a multiple of the 3 hosts"
    ):
        iterator(cfg, store, host_index=0, host_count=3)


def test_sources_of_a_kind_mix_by_weight(bpe, store):
    """Three of four examples from the source of weight 3; only `more` has no faces."""
    sources = (
        "data.sources=[{name: actionfaces/images, split: train, kind: image, weight: 3, "
        "items: category}, {name: more, split: train, kind: image, weight: 1, items: conversation}]"
    )
    cfg = make_config(bpe, sources, "train.image_batch=8")
    encoder = Encoder(cfg)
    for batch in take(iterator(cfg, store), 4):
        assert (~batch.face_found).sum() == 2
        assert (batch.faces[~batch.face_found] == 0).all()
        assert (batch.landmarks[~batch.face_found] == 0).all()
        for row in range(8):
            text = encoder.llm.decode(batch.ids[row][: batch.length[row]])
            assert ("Choose one" in text) == batch.face_found[row, 0]
            sentence = "The person in the image is a 20-29 year old Asian woman.\n"
            assert (sentence in text) == batch.face_found[row, 0]


def test_rounds_split_long_conversations(bpe, store):
    two = make_config(bpe, "data.rounds=2", "data.text_length=400")
    masks = [
        batch.question_mask.any(-1) for batch in take(iterator(two, store), 8) if not is_clip(batch)
    ]
    turns = np.concatenate(masks).sum(axis=1)
    assert set(turns.tolist()) == {1, 2}
    batch = next(
        b for b in take(iterator(two, store), 8) if not is_clip(b) and b.question_mask[:, 1].any()
    )
    row = int(np.argmax(batch.question_mask[:, 1].any(-1)))
    assert (batch.ids[row] == IMAGE_TOKEN).sum() == 2 * two.model.tokens_per_frame
    encoder = Encoder(two)
    assert [encoder.question.decode(q) for q in batch.questions[row]] == [
        "Describe the face.",
        "Why?",
    ]


def test_broken_media_become_sentinels(cfg, store, caplog):
    store.data["actionfaces/images"][3]["media"] = b"no picture"
    store.data["actionfaces/clips"][2]["media"] = clip([0, 9])[:200]
    store.priors["actionfaces/clips"][4] = prior(7)  # of other media
    with caplog.at_level(logging.WARNING):
        batches = take(iterator(cfg, store), 24)
    broken = {True: set(), False: set()}
    for batch in batches:
        for row in np.flatnonzero(batch.weight == 0):
            broken[is_clip(batch)].add(int(batch.index[row]))
            assert (batch.labels[row] == IGNORE).all()
            assert not batch.frames[row].any() and not batch.face_found[row].any()
            assert batch.length[row] == 1
    assert broken == {False: {3}, True: {2, 4}}
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3  # each is named once, however often it comes
    assert any("example image-3: media of 10 bytes: not a picture" in line for line in lines)
    assert any("example clip-4: 5 frames, but face priors of 7" in line for line in lines)
    assert lines[2].endswith("(3 broken so far)")


def test_too_many_broken_media_stop_the_run(bpe, store):
    for i in range(3):
        store.data["actionfaces/images"][i]["media"] = b""
    cfg = make_config(bpe, "data.broken_share=0.15")  # of 17 examples: two may be broken
    with pytest.raises(UserError, match=r"3 broken examples among the first 17.*is empty"):
        take(iterator(cfg, store), 30)


def test_an_answer_that_does_not_fit_is_a_sentinel(bpe, store):
    cfg = make_config(bpe, "data.text_length=60")
    batch = next(b for b in take(iterator(cfg, store), 3) if not is_clip(b))
    assert (batch.weight == 0).all() and (batch.ids != IMAGE_TOKEN).all()
    strict = make_config(bpe, "data.text_length=60", "data.broken_share=0")
    with pytest.raises(UserError, match=r"its \d+ tokens do not fit into T = 60"):
        take(iterator(strict, store), 3)


def test_fps_sampling_keeps_the_static_shape(bpe):
    encoder = Encoder(make_config(bpe, "data.sampling=fps", "data.fps=4"))
    assert encoder.indices(24, 12.0, None).tolist() == [0, 3, 6, 9, 12, 15, 18] + [21] * 9
    long = encoder.indices(960, 12.0, None)  # 320 frames at 4 a second
    assert len(long) == 16 and long[0] == 30 and (np.diff(long) == 60).all()
    with pytest.raises(UserError, match="no frame rate"):
        encoder.indices(24, None, None)


def source(cfg, kind):
    return next(source for source in cfg.data.sources if source.kind == kind)


@pytest.mark.parametrize("kind", ["image", "clip"])
def test_evaluation_covers_everything_once(cfg, store, kind):
    def run(**kwargs):
        return list(
            make_eval_batches(
                cfg,
                source(cfg, kind),
                batch=4,
                open_data=store.open_data,
                open_priors=store.open_priors,
                **kwargs,
            )
        )

    batches = run()
    data = store.data[f"actionfaces/{kind}s"]
    assert [e["id"] for b in batches for e in b.examples] == [e["id"] for e in data]
    assert [len(b.batch.weight) for b in batches] == [4] * len(batches)
    weight = np.concatenate([b.batch.weight for b in batches])
    np.testing.assert_array_equal(weight, np.arange(len(weight)) < len(data))
    assert not any(line for b in batches for line in b.trouble)
    encoder = Encoder(cfg)
    for one, two in zip(batches, run(), strict=True):
        assert_equal(one.batch, two.batch)  # nothing is random
        assert (one.batch.labels == IGNORE).all()
        assert one.batch.questions.shape == (4, 1, 32)
        for ids, length in zip(one.batch.ids, one.batch.length, strict=True):
            text = encoder.llm.decode(ids[:length])
            assert text.endswith("sadness, anger, neutral}. ASSISTANT:")
            assert (ids[length:] == 0).all()


def test_views_of_an_evaluation(cfg, store):
    def first(view):
        batches = make_eval_batches(
            cfg,
            source(cfg, "clip"),
            batch=2,
            open_data=store.open_data,
            open_priors=store.open_priors,
            view=view,
        )
        batch = next(batches).batch
        batches.close()
        return batch

    whole, middle, blank = first("all"), first("middle"), first("blank")
    levels = np.round(whole.frames[1, :, 1, 1, 0] / 10).astype(int)
    assert levels.tolist() == [int((i + 0.5) * 1.5) for i in range(16)]  # segment centres of 24
    assert (np.round(middle.frames[1, :, 1, 1, 0] / 10) == 12).all()
    assert (middle.landmarks[1] == store.priors["actionfaces/clips"][1].landmarks[12]).all()
    assert middle.face_found.all() and (middle.ids == whole.ids).all()
    assert not blank.frames.any() and not blank.faces.any() and not blank.face_found.any()
    assert (blank.length < whole.length).all()  # nor is the AGR sentence told


def test_evaluation_asks_about_broken_media_too(cfg, store):
    store.data["actionfaces/images"][1]["media"] = b"no picture"
    batch = next(
        make_eval_batches(
            cfg,
            source(cfg, "image"),
            batch=3,
            open_data=store.open_data,
            open_priors=store.open_priors,
        )
    )
    assert [bool(line) for line in batch.trouble] == [False, True, False]
    assert (batch.batch.weight == 1).all() and batch.batch.length[1] > 50
    assert not batch.batch.frames[1].any()


def test_what_does_not_fit_is_refused(bpe, store):
    with pytest.raises(UserError, match=r"nowhere: no such data set; known are .*actionfaces"):
        open_source("data", "nowhere", "train")
    with pytest.raises(UserError, match=r"model\.llama\.vocab_size is 100"):
        Encoder(make_config(bpe, "model.llama.vocab_size=100"))
    with pytest.raises(UserError, match=r"question_length is 65, wanted 3 … 64"):
        Encoder(make_config(bpe, "data.question_length=65"))
    with pytest.raises(UserError, match=r"clip_text_length is 64, and one clip alone takes 64"):
        Encoder(make_config(bpe, "data.clip_text_length=64"))
    with pytest.raises(UserError, match=r"sources is empty"):
        iterator(make_config(bpe, "data.sources=[]"), store)
    store.priors["actionfaces/images"].pop()
    with pytest.raises(UserError, match=r"11 examples, but face priors of 10"):
        iterator(make_config(bpe), store)
    store = Store()
    first = store.data["actionfaces/images"][0]
    first["items"] = json.dumps(json.loads(first["items"])[:1])
    cfg = make_config(bpe)
    examples = Examples(
        Encoder(cfg),
        dataclasses.replace(source(cfg, "image"), items="conversation"),
        data=store.data["actionfaces/images"],
        priors=store.priors["actionfaces/images"],
    )
    with pytest.raises(UserError, match=r"example image-0 has no conversation: set items"):
        examples.training(0, seed=0)
    first["items"] = json.dumps([[{"from": "gpt", "value": "joy"}]])
    with pytest.raises(UserError, match=r"example image-0: sentence 1 .* from 'gpt'"):
        Examples(
            Encoder(cfg),
            source(cfg, "image"),
            data=store.data["actionfaces/images"],
            priors=store.priors["actionfaces/images"],
        ).training(0, seed=0)
