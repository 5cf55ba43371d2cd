"""Rows of single examples: frame sampling, evaluation and its views, and what is refused."""

import json

import numpy as np
import pytest

from emollama_jax.batch import IGNORE
from emollama_jax.data.elements import Encoder, Examples
from emollama_jax.data.pipeline import make_eval_batches
from emollama_jax.data.split import Split
from emollama_jax.errors import UserError
from emollama_jax.testing.toy_sets import Store, assert_equal, iterator, make_config


def test_fps_sampling_keeps_the_static_shape(bpe):
    encoder = Encoder(make_config(bpe, "data.sampling=fps", "data.fps=4"))
    assert encoder.indices(24, 12.0, None).tolist() == [0, 3, 6, 9, 12, 15, 18] + [21] * 9
    long = encoder.indices(960, 12.0, None)  # 320 frames at 4 a second
    assert len(long) == 16 and long[0] == 30 and (np.diff(long) == 60).all()
    with pytest.raises(UserError, match="no frame rate"):
        encoder.indices(24, None, None)


@pytest.mark.parametrize("kind", ["image", "clip"])
def test_evaluation_covers_everything_once(cfg, store, kind):
    def run(**kwargs):
        return list(make_eval_batches(cfg, store.split(f"actionfaces/{kind}s"), batch=4, **kwargs))

    batches = run()
    data = store.data[f"actionfaces/{kind}s"]
    assert [e["id"] for b in batches for e in b.examples] == [e["id"] for e in data]
    assert [len(b.batch.weight) for b in batches] == [4] * len(batches)
    weight = np.concatenate([b.batch.weight[:, 0] for b in batches])
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
    def first(shown):
        batches = make_eval_batches(cfg, store.split("actionfaces/clips"), batch=2, shown=shown)
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
    batch = next(make_eval_batches(cfg, store.split("actionfaces/images"), batch=3))
    assert [bool(line) for line in batch.trouble] == [False, True, False]
    assert (batch.batch.weight == 1).all() and batch.batch.length[1] > 50
    assert not batch.batch.frames[1].any()


def test_what_does_not_fit_is_refused(bpe, store):
    with pytest.raises(UserError, match=r"nowhere: no such data set; known: .*raf_db"):
        Split("data", "nowhere", "train")
    with pytest.raises(UserError, match=r"unknown config 'video'; choose one of images, clips"):
        Split("data", "actionfaces/video", "train")
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
    pictures = store.split("actionfaces/images")
    examples = Examples(Encoder(cfg), pictures, kind="image", items="conversation")
    with pytest.raises(UserError, match=r"example image-0 has no conversation: set items"):
        examples.training(0, seed=0)
    first["items"] = json.dumps([[{"from": "gpt", "value": "joy"}]])
    with pytest.raises(UserError, match=r"example image-0: sentence 1 .* from 'gpt'"):
        Examples(Encoder(cfg), pictures, kind="image", items="both").training(0, seed=0)


def test_some_training_examples_are_blank(bpe, store):
    def rows(share):
        cfg = make_config(bpe, f"data.blank_share={share}")
        pictures = store.split("actionfaces/images")
        examples = Examples(Encoder(cfg), pictures, kind="image", items="both")
        return [examples.training(1, seed=seed) for seed in range(60)]

    blank = [not row.look.frames.any() for row in rows(0.4)]
    assert 12 < sum(blank) < 36
    for row, is_blank in zip(rows(0.4), blank, strict=True):
        assert row.weight == 1 and (row.text.labels != IGNORE).any() and not row.trouble
        assert row.look.found.any() != is_blank
    assert all(row.look.frames.any() for row in rows(0))
