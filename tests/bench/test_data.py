"""`bench data`: both sides do the same work, pixel for pixel; what is skipped changes nothing."""

import dataclasses
import importlib.util
import io
import types

import av
import numpy as np
import pytest
from rich.console import Console

from emollama_jax.bench import data, torch_side
from emollama_jax.data import video
from emollama_jax.data.elements import Encoder, Examples
from emollama_jax.data.media import read_frames, read_video
from emollama_jax.data.split import InMemory


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder with one clip, and its example."""
    folder = tmp_path_factory.mktemp("clips")
    return folder, data.make_example(folder, 0)


@pytest.fixture(scope="module")
def cfg():
    return data.bench_config("tiny", batch=2)


def test_clips_are_what_is_said(drawn):
    _, example = drawn
    with av.open(io.BytesIO(example["media"])) as container:
        stream = container.streams.video[0]
        assert stream.codec.name == "h264"
        assert (stream.width, stream.height) == (640, 360)
        assert stream.frames == 120 and float(stream.duration * stream.time_base) == 4
    boxes = example["prior"].boxes
    assert boxes.shape == (120, 4)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= [640, 360]).all()
    assert (np.ptp(boxes, axis=0) > 5).all()  # the face moves


def test_frames_that_are_skipped_change_no_other(drawn):
    """Of these clips a third is never decoded; what is wanted equals a full decode."""
    media = drawn[1]["media"]
    every = list(read_video(media))
    rng = np.random.default_rng(0)
    for wanted in (np.arange(120), np.array([119]), np.array([7, 3, 7]), rng.permutation(120)[:16]):
        clip = read_frames(media, lambda count, fps, wanted=wanted: wanted)
        assert clip.count == 120
        for index, frame in zip(wanted, clip.frames, strict=True):
            np.testing.assert_array_equal(frame, every[index])


def test_fewer_frames_are_decoded_than_a_full_decode_needs(drawn):
    counted = []

    class Counting:
        """A stream that counts what comes out of the decoder."""

        def __init__(self, stream):
            self._stream = stream
            self.codec_context = stream.codec_context

        def decode(self, packet):
            frames = self._stream.decode(packet)
            counted.extend(frames)
            return frames

    with av.open(io.BytesIO(drawn[1]["media"])) as container:
        stream = container.streams.video[0]
        packets = list(container.demux(stream))
        wanted = set(range(3, 120, 7))
        assert video.select(Counting(stream), packets, wanted, name="clip").keys() == wanted
    assert len(wanted) < len(counted) < 100


@pytest.fixture(scope="module")
def torch_data():
    """PyTorch's side as a module."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    spec = importlib.util.spec_from_file_location("torch_data", torch_side.script("torch_data.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_sides_make_the_same_row(drawn, cfg, torch_data):
    folder, example = drawn
    split = InMemory(data.NAME, "train", [example], [example["prior"]])
    ours = Examples(Encoder(cfg), split, kind="clip", items="category")
    look = ours.encoder.look(example["media"], kind="clip", prior=example["prior"])
    text = ours.training(0, seed=0).text
    theirs = torch_data.Clips(cfg, folder, 1, length=4).example(0, None)
    for name in ("frames", "faces", "landmarks"):
        np.testing.assert_array_equal(getattr(look, name), theirs[name].numpy(), err_msg=name)
    length = int(theirs["length"])
    for name in ("ids", "labels"):  # one turn: nothing is drawn
        said = getattr(text, name)
        assert len(said) == length
        np.testing.assert_array_equal(said, theirs[name].numpy()[:length], err_msg=name)
    (question,) = text.questions
    np.testing.assert_array_equal(question, theirs["questions"].numpy()[: len(question)])


def test_both_sides_are_measured_in_turns(cfg, torch_data, monkeypatch):
    monkeypatch.setattr(data, "SECONDS", 1)
    small = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, clip_frames=4))
    speeds = data.run(small, clips=1, batches=2, rounds=2, console=Console(quiet=True))
    assert len(speeds) == 2
    assert all(speed.ours > 0 and speed.torch > 0 for speed in speeds)
    assert f"in {len(speeds)} rounds" in data.table(speeds)


def test_the_table_gives_medians_and_the_spread():
    speeds = [data.Speed(ours=150, torch=100), data.Speed(ours=120, torch=100)]
    speeds.append(data.Speed(ours=140, torch=100))
    lines = data.table(speeds).splitlines()
    assert lines[0].split()[-2:] == ["140", "frames/s"]
    assert "1.40 (1.20 to 1.50 in 3 rounds)" in lines[2]
    alone = data.table([data.Speed(ours=150, torch=None)])
    assert "PyTorch is not installed" in alone


def test_a_measure_leaves_the_warm_up_out():
    cfg = types.SimpleNamespace(
        train=types.SimpleNamespace(clip_batch=3), data=types.SimpleNamespace(clip_frames=4)
    )
    asked, closed = [], []

    class Batches:
        def __next__(self):
            asked.append(1)

        def close(self):
            closed.append(1)

    assert data.measure(Batches, cfg, 5) > 0
    assert (len(asked), len(closed)) == (data.WARM + 5, 1)
