"""Training batches of small data sets: order, resuming, hosts, workers, mixtures, broken media."""

import contextlib
import dataclasses
import json
import logging

import numpy as np
import pytest

from emollama_jax.batch import IGNORE, IMAGE_TOKEN, Batch
from emollama_jax.data.elements import Encoder
from emollama_jax.data.pipeline import balanced
from emollama_jax.errors import UserError
from emollama_jax.testing.toy_sets import (
    CLASSES,
    FIELDS,
    FRAMES,
    assert_equal,
    clip,
    iterator,
    make_config,
    prior,
)


def take(iterator, count: int) -> list[Batch]:
    return [next(iterator) for _ in range(count)]


def is_clip(batch: Batch) -> bool:
    return batch.frames.shape[1] > 1


@pytest.mark.parametrize(("balance", "wanted"), [(0, [8, 2, 1]), (0.5, [8, 4, 3]), (1, [8, 8, 8])])
def test_rare_classes_are_drawn_more_often(balance, wanted):
    labels = [0] * 8 + [9] + [1] * 2 + [2]  # position 8 may not be drawn
    positions = [i for i, label in enumerate(labels) if label != 9]
    drawn = balanced(positions, labels, balance=balance)
    assert [sum(labels[i] == label for i in drawn) for label in range(3)] == wanted
    assert set(drawn) == set(positions) and drawn == sorted(drawn)
    assert drawn.count(9) == drawn.count(10)  # a class's examples stand equally often


def test_a_balanced_source_draws_its_classes_equally_often(bpe, store):
    source = "{name: actionfaces/images, split: train, kind: image, weight: 1, balance: 1}"
    cfg = make_config(bpe, f"data.sources=[{source}]")
    two_epochs = take(iterator(cfg, store), 7)  # of 7 classes, twice each
    levels = np.concatenate([batch.frames[:, 0, 0, 0, 0] for batch in two_epochs])
    drawn = [int(level) // 5 % len(CLASSES) for level in levels]  # see Store
    assert sorted(drawn) == sorted([*range(len(CLASSES))] * 4)


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
            "segment": ((b, t), np.int32),
            "position": ((b, t), np.int32),
            "visual": ((b, t), np.int32),
            "question": ((b, m * r), np.int32),
            "again": ((b, m * (r - 1)), np.int32),
            "questions": ((b, r, 32), np.int32),
            "question_mask": ((b, r, 32), np.bool_),
            "weight": ((b, 1), np.float32),
            "index": ((b, 1), np.int32),
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
            index = int(batch.index[row, 0])
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
    epochs = [batch.index[:, 0].tolist() for batch in take(iterator(cfg, store), 3)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = (
        next(
            iterator(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, seed=1)), store)
        )
        .index[:, 0]
        .tolist()
    )
    assert other != epochs[0]


def test_the_seed_of_an_element_differs_between_epochs(bpe, store):
    """Random frames of the same clip, time after time."""
    cfg = make_config(
        bpe,
        "data.sources=[{name: actionfaces/clips, split: train, kind: clip, weight: 1}]",
        "train.clip_batch=6",
    )
    frames = [
        batch.frames[batch.index[:, 0].tolist().index(1)] for batch in take(iterator(cfg, store), 3)
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
            both = np.concatenate([getattr(left, name), getattr(right, name)])
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
        for row in np.flatnonzero(batch.weight[:, 0] == 0):
            broken[is_clip(batch)].add(int(batch.index[row, 0]))
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


def test_broken_media_are_judged_once_per_split(bpe, store):
    """Two sources that read the same split have 11 examples, not 22."""
    store.data["actionfaces/images"][5]["media"] = store.data["actionfaces/images"][8]["media"] = (
        b""
    )
    twice = (
        "data.sources=[{name: actionfaces/images, split: train, kind: image, weight: 1, "
        "items: category}, {name: actionfaces/images, split: train, kind: image, weight: 1, "
        "items: conversation}]"
    )
    with pytest.raises(UserError, match=r"2 broken examples among the first 11"):
        take(iterator(make_config(bpe, twice, "data.broken_share=0.15"), store), 12)
    take(iterator(make_config(bpe, twice, "data.broken_share=0.2"), store), 12)


def test_an_answer_that_does_not_fit_is_a_sentinel(bpe, store):
    cfg = make_config(bpe, "data.text_length=60")
    batch = next(b for b in take(iterator(cfg, store), 3) if not is_clip(b))
    assert (batch.weight == 0).all() and (batch.ids != IMAGE_TOKEN).all()
    strict = make_config(bpe, "data.text_length=60", "data.broken_share=0")
    with pytest.raises(UserError, match=r"its \d+ tokens do not fit into T = 60"):
        take(iterator(strict, store), 3)
