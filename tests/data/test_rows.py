"""Rows of several examples: what shares a row, how it is laid out, what does not fit."""

import contextlib
import dataclasses
import json
import logging

import numpy as np
import pytest

from emollama_jax.batch import IGNORE, IMAGE_TOKEN, TEXT, Batch
from emollama_jax.data.elements import Encoder, Text
from emollama_jax.data.pipeline import make_eval_batches
from emollama_jax.data.rows import Longest, RowShape, longest, pack, real, shortened
from emollama_jax.errors import UserError
from emollama_jax.testing.toy_sets import FIELDS, assert_equal, clip, iterator, make_config
from tests.data.test_pipeline import take

# 7 pictures and 5 clips a step, of up to 170 and 240 tokens.
PACKED = "data.packed={rows: 4, examples: 3, tokens: 700, frames: 36, question_length: 32}"


@pytest.fixture
def packed(bpe):
    return make_config(bpe, PACKED, SHARES)


SHARES = (
    "data.sources=[{name: actionfaces/images, split: train, kind: image, weight: 7}, "
    "{name: actionfaces/clips, split: train, kind: clip, weight: 5}]"
)


def whole_rows(batch: Batch, encoder: Encoder) -> list[dict]:
    """Every example of a batch, cut out of its row again."""
    found = []
    each, frames = encoder.cfg.model.tokens_per_frame, batch.frames.shape[1]
    for row in range(len(batch.ids)):
        of_pair = np.concatenate([np.arange(frames), batch.again[row]])
        for number in range(1, batch.segment[row].max() + 1):
            here = batch.segment[row] == number
            pairs = batch.visual[row][here & (batch.visual[row] != TEXT)] // each
            found.append(
                {
                    "index": int(batch.index[row][number - 1]),
                    "ids": batch.ids[row][here],
                    "labels": batch.labels[row][here],
                    "position": batch.position[row][here],
                    "places": batch.visual[row][here][batch.ids[row][here] == IMAGE_TOKEN] % each,
                    "frames": batch.frames[row][of_pair[pairs[::each]]],
                    "questions": [
                        encoder.question.decode(
                            batch.questions[row][q][batch.question_mask[row][q]]
                        )
                        for q in dict.fromkeys(batch.question[row][pairs].tolist())
                    ],
                }
            )
    return found


def test_examples_are_those_of_one_a_row(bpe, packed, store):
    """Text, media and questions of every example of a step, wherever it lies."""
    encoder = Encoder(packed)
    for batch in take(iterator(packed, store), 3):
        assert batch.packed and batch.ids.shape == (4, 700)
        examples = whole_rows(batch, encoder)
        assert real(batch) == {
            "tokens": sum(len(one["ids"]) for one in examples),
            "frames": 7 + 5 * 16,
            "examples": 12,
        }
        for one in examples:
            frames, length = len(one["frames"]), len(one["ids"])
            text = encoder.llm.decode(one["ids"])
            level = one["frames"][:, 1, 1, 0]
            if frames == 1:
                assert abs(int(level[0]) - 5 * one["index"]) <= 1
            else:
                assert frames == 16 and (np.diff(level.astype(int)) >= 0).all()
            np.testing.assert_array_equal(one["position"], np.arange(length))
            assert one["labels"][0] == IGNORE and (one["labels"] != IGNORE).any()
            np.testing.assert_array_equal(
                one["places"], np.tile(np.arange(packed.model.tokens_per_frame), frames)
            )
            (question,) = one["questions"]
            assert question in text


def test_a_second_round_looks_at_its_frames_again(bpe, store):
    cfg = make_config(bpe, PACKED, SHARES, "data.rounds=2", "data.packed.again=64")
    encoder = Encoder(cfg)
    rounds = []
    for batch in take(iterator(cfg, store), 3):
        for one in whole_rows(batch, encoder):
            frames = one["frames"]
            rounds.append(len(one["questions"]))
            if rounds[-1] == 2:
                assert one["questions"] == ["Describe the face.", "Why?"]
                np.testing.assert_array_equal(*np.split(frames, 2))
    assert set(rounds) == {1, 2}
    assert (batch.question >= 0).sum() == sum(
        len(one["places"]) // cfg.model.tokens_per_frame for one in whole_rows(batch, encoder)
    )


def test_resuming_hosts_and_workers_change_nothing(bpe, packed, store):
    wanted = take(iterator(packed, store), 3)
    with contextlib.closing(iterator(packed, store)) as run:
        next(run)
        state = json.loads(json.dumps(run.get_state()))
    assert state == {"step": 1}
    more = dataclasses.replace(packed, data=dataclasses.replace(packed.data, workers=1))
    with contextlib.closing(iterator(more, store)) as run:
        run.set_state(state)
        for batch in wanted[1:]:
            assert_equal(batch, next(run))
    parts = [take(iterator(packed, store, host_index=i, host_count=2), 2) for i in range(2)]
    for batch, left, right in zip(wanted, *parts, strict=False):
        for name in FIELDS:
            both = np.concatenate([getattr(left, name), getattr(right, name)])
            np.testing.assert_array_equal(getattr(batch, name), both, err_msg=name)
    with pytest.raises(UserError, match=r"packed\.rows is 4, wanted a multiple of 3 hosts"):
        iterator(packed, store, host_index=0, host_count=3)


def test_no_example_is_lost(packed, store):
    """Eleven steps of seven pictures are seven epochs, whatever the rows hold."""
    indices = np.concatenate([batch.index.ravel() for batch in take(iterator(packed, store), 11)])
    sizes = np.unique(indices[indices >= 0], return_counts=True)[1]
    assert sizes.sum() == 12 * 11
    assert sizes[6:].tolist() == [7] * 5  # pictures 6 to 10; the others share numbers with clips


def test_broken_media_become_sentinels(packed, store, caplog):
    store.data["actionfaces/images"][8]["media"] = b"no picture"
    store.data["actionfaces/clips"][2]["media"] = clip([0, 9])[:200]
    with caplog.at_level(logging.WARNING):
        batches = take(iterator(packed, store), 3)
    broken = {int(i) for b in batches for i in b.index[(b.weight == 0) & (b.index >= 0)]}
    assert broken == {8, 2}
    for batch in batches:
        for row, place in np.argwhere((batch.weight == 0) & (batch.index >= 0)):
            here = batch.segment[row] == place + 1
            assert here.sum() == 1 and (batch.labels[row][here] == IGNORE).all()
    assert len([r for r in caplog.records if "example" in r.getMessage()]) == 2


def test_what_does_not_fit_gets_a_larger_shape(bpe, store, caplog):
    """Nothing is cut: shape by shape it is said what was too small."""
    small = {"tokens": 520, "frames": 17, "question_length": 16}
    text = ", ".join(f"{name}: {size}" for name, size in small.items())
    tight = make_config(bpe, f"data.packed={{rows: 4, examples: 3, {text}}}", SHARES)
    with caplog.at_level(logging.WARNING):
        (batch,) = take(iterator(tight, store), 1)
    (wanted,) = take(iterator(make_config(bpe, PACKED, SHARES), store), 1)
    assert batch.ids.shape[1] > 520 and batch.frames.shape[1] > 32
    assert batch.questions.shape[2] == 32
    assert (batch.ids.shape[1] - 520) % (520 // 8) == 0
    encoder = Encoder(tight)
    found, other = (
        sorted(one["ids"].tobytes() for one in whole_rows(each, encoder))
        for each in (batch, wanted)
    )
    assert found == other
    (line,) = [r.getMessage() for r in caplog.records]
    for name, size in small.items():
        assert f"(data.packed.{name} is {size})" in line


def test_rows_are_filled_evenly(packed, rng):
    """Clips first, pictures where there is room: no row is longer than need be."""
    encoder = Encoder(packed)

    def text(length: int) -> Text:
        return Text(
            np.zeros(length, np.int32), np.zeros(length, np.int32), (np.zeros(9, np.int32),)
        )

    clips = [("clip", text(int(n))) for n in rng.integers(150, 210, 56)]
    pictures = [("image", text(int(n))) for n in rng.integers(90, 112, 56)]
    shape = RowShape(2048, 120, 0, 99, 32, 99)
    packing = pack(clips + pictures, encoder=encoder, rows=8, shape=shape)
    assert packing.shape == shape
    assert sorted(i for row in packing.rows for i in row) == list(range(112))
    for row in packing.rows:
        assert sum(i < 56 for i in row) == 7
    used = sum(len(one.ids) for _, one in clips + pictures)
    assert used > 0.93 * 8 * 2048


def test_prompts_are_cut_to_half_while_they_fit(bpe, store):
    """Short prompts do not pay for the longest; what is kept is the same."""
    cfg = make_config(bpe, "data.text_length=640", "data.question_length=64")
    batch = next(make_eval_batches(cfg, store.split("actionfaces/images"), batch=4)).batch
    needed = longest(batch)
    assert needed == Longest(int(batch.length.max()), int(batch.question_mask.sum(-1).max()))
    assert 80 < needed.tokens <= 160 and 32 < needed.question <= 64
    short = shortened(batch, [needed])
    assert short.ids.shape[1] == 160 and (batch.segment[:, 160:] == 0).all()
    np.testing.assert_array_equal(short.ids, batch.ids[:, :160])
    assert short.questions.shape[2] == 64
    assert shortened(batch, [needed, Longest(161, 1)]).ids.shape[1] == 320
