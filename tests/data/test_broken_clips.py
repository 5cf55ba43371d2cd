"""Broken and odd clips, from the file to the batch: read rightly, or named once; too many stop."""

import logging

import numpy as np
import pytest

from benchmarks.broken_clips import (
    FRAMES,
    KINDS,
    Names,
    frames,
    prepare,
    read_all,
    write_set,
)
from emollama_jax.data.media import read_frames, read_video, segment_indices
from emollama_jax.data.split import Split
from emollama_jax.errors import UserError

UNREADABLE = [kind for kind, (_, _, count) in KINDS.items() if count == 0]
READABLE = [kind for kind in KINDS if kind not in UNREADABLE]


@pytest.mark.parametrize("kind", READABLE)
def test_odd_clips_are_read_rightly(tmp_path, kind):
    ending, make, count = KINDS[kind]
    path = tmp_path / f"clip{ending}"
    path.write_bytes(make(3))
    wanted = [float(picture.mean()) for picture in frames(3, count=count)]
    clip = read_frames(path, lambda n, fps: np.arange(n))
    assert clip.count == count
    for found in (clip.frames, list(read_video(path.read_bytes()))):
        np.testing.assert_allclose([f.mean() for f in found], wanted, atol=3)
    shape = {"rotated": (64, 48), "odd_size": (47, 63)}.get(kind, (64, 64))
    assert clip.frames[0].shape == (*shape, 3) and clip.frames[0].dtype == np.uint8
    sampled = read_frames(path, lambda n, fps: segment_indices(n, segments=16, rng=None))
    assert len(sampled.frames) == 16 and sampled.indices.max() == count - 1


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_clips_say_why(tmp_path, kind):
    ending, make, _ = KINDS[kind]
    path = tmp_path / f"clip{ending}"
    path.write_bytes(make(3))
    said = {
        "truncated": "not a readable video",
        "zero_bytes": "is empty",
        "no_video_stream": "no video stream",
    }
    with pytest.raises(UserError, match=rf"clip\.mp4: .*{said[kind]}") as caught:
        read_frames(path, lambda n, fps: np.arange(n))
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def broken_set(tmp_path_factory):
    """270 clips, 27 odd ones, 9 of which cannot be read."""
    folder = tmp_path_factory.mktemp("broken")
    odd = write_set(folder / "src", clips=270, every=10)
    prepare(folder / "src", folder / "data")
    return folder / "data", {path for path, kind in odd.items() if kind in UNREADABLE}


def test_a_set_with_broken_clips_is_read_through(broken_set):
    """Each is a row without weight and a line in the log; the odd ones count like all others."""
    data, unreadable = broken_set
    names, log = Names(), logging.getLogger("emollama_jax.data.pipeline")
    log.addHandler(names)
    try:
        rows, broken = read_all(data, share=9 / 270, batch=27)
    finally:
        log.removeHandler(names)
    assert (rows, broken) == (270, 9)
    assert len(unreadable) == 9
    assert names.times == dict.fromkeys(unreadable, 1)


def test_their_priors_are_marked_and_kept(broken_set):
    data, unreadable = broken_set
    stored = Split(data, "own/broken", "train").priors
    assert len(stored) == 270
    counts = [len(prior.found) for prior in stored]
    assert counts.count(0) == len(unreadable) and counts.count(1) == 3
    assert counts.count(FRAMES) == 270 - 9 - 3


def test_too_many_broken_clips_stop_the_run(broken_set):
    data, _ = broken_set
    with pytest.raises(UserError, match=r"9 broken examples among the first 270.*broken_share"):
        read_all(data, share=8.5 / 270, batch=27)
