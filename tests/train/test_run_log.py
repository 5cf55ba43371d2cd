"""metrics.jsonl, TensorBoard event files and the display."""

import io
import json
import struct

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from rich.console import Console

from emollama_jax.errors import UserError
from emollama_jax.train.run_log import (
    Display,
    EventFile,
    JsonLines,
    RunLog,
    Size,
    crc32c,
    read_metrics,
)


def write(path, rows, *, step):
    lines = JsonLines(path, step=step)
    for number, values in rows:
        lines.write(number, values)
    lines.close()


def test_floats_come_back_with_every_digit(tmp_path):
    path = tmp_path / "metrics.jsonl"
    value = struct.unpack("<f", b"\x01\x00\x00\x3f")[0]  # 0.5 and one unit in the last place
    write(path, [(1, {"loss": value})], step=0)
    assert read_metrics(path) == [{"step": 1, "loss": value}]


def test_lines_after_the_restored_step_are_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [(n, {"loss": n / 3}) for n in range(1, 6)], step=0)
    whole = path.read_text()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    write(path, [(n, {"loss": n / 3}) for n in (4, 5)], step=3)
    assert path.read_text() == whole
    write(path, [], step=0)
    assert path.read_text() == ""


def test_broken_metrics_file_names_the_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nhello\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is not JSON"):
        read_metrics(path)
    with pytest.raises(UserError, match="no such file"):
        read_metrics(tmp_path / "other.jsonl")


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),  # RFC 3720, B.4
        (bytes([0xFF] * 32), 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_crc32c(data, crc):
    assert crc32c(data) == crc


def event_class():
    """tensorflow.Event as its .proto files declare the fields used here."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="event.proto", package="t", syntax="proto3")

    def message(name, *fields):
        proto = file.message_type.add(name=name)
        for number, label, kind, type_name in fields:
            proto.field.add(
                name=label.rstrip("*"),
                number=number,
                type=kind,
                type_name=type_name,
                label=field.LABEL_REPEATED if label.endswith("*") else field.LABEL_OPTIONAL,
            )

    message("Value", (1, "tag", field.TYPE_STRING, None), (2, "value", field.TYPE_FLOAT, None))
    message("Summary", (1, "value*", field.TYPE_MESSAGE, ".t.Value"))
    message("SessionLog", (1, "status", field.TYPE_INT32, None))
    message(
        "Event",
        (1, "wall_time", field.TYPE_DOUBLE, None),
        (2, "step", field.TYPE_INT64, None),
        (3, "file_version", field.TYPE_STRING, None),
        (5, "summary", field.TYPE_MESSAGE, ".t.Summary"),
        (7, "session_log", field.TYPE_MESSAGE, ".t.SessionLog"),
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Event"))


def read_events(path):
    """Parses a TFRecord file of events and checks every CRC."""

    def unmask(masked: int) -> int:
        rotated = (masked - 0xA282EAD8) & 0xFFFFFFFF
        return (rotated >> 17 | rotated << 15) & 0xFFFFFFFF

    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        record = data[12 : 12 + length]
        checks = struct.unpack("<I", data[8:12]) + struct.unpack("<I", data[12 + length :][:4])
        assert [unmask(check) for check in checks] == [crc32c(data[:8]), crc32c(record)]
        events.append(event_class().FromString(record))
        data = data[16 + length :]
    return events


def test_event_file_parses_back(tmp_path):
    file = EventFile(tmp_path / "tensorboard", step=299)
    file.write(300, {"train/loss": 0.25, "train/tokens_per_second": 12345.678})
    file.write(70_000, {"train/loss": -1.5})
    file.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert path.name.startswith("events.out.tfevents.")
    version, start, first, second = read_events(path)
    assert version.file_version == "brain.Event:2"
    # TensorBoard drops older files' events from this step on.
    assert (start.session_log.status, start.step) == (1, 300)
    assert {v.tag: v.value for v in first.summary.value} == {
        "train/loss": 0.25,
        "train/tokens_per_second": pytest.approx(12345.678),
    }
    assert (first.step, second.step) == (300, 70_000)
    assert second.summary.value[0].value == -1.5
    assert second.wall_time >= first.wall_time > 1e9


SIZE = Size(tokens=100, frames=4, examples=2, places=400, frame_places=16)


def test_display_prints_plain_lines_where_there_is_no_terminal():
    console = Console(file=io.StringIO(), width=200)
    with Display(console, steps=100, done=97) as display:
        for step in (98, 99, 100):
            display.show(step, loss=None if step == 99 else 1.25, size=SIZE)
    lines = console.file.getvalue().splitlines()
    assert [line.split("  ")[:2] for line in lines] == [
        ["step 98/100", "loss 1.2500"],
        ["step 100/100", "loss 1.2500"],
    ]
    for unit in ("tokens/s (", "with padding, 75%)", "examples/s", "frames/s"):
        assert unit in lines[0]
    assert lines[1].endswith("0:00 left")


def test_display_draws_a_bar_in_a_terminal():
    console = Console(file=io.StringIO(), width=160, force_terminal=True)
    with Display(console, steps=4, done=1) as display:
        display.show(2, loss=0.5, size=SIZE)
    shown = console.file.getvalue()
    assert "2/4" in shown and "loss 0.5000" in shown and "frames/s" in shown


def test_run_log_keeps_speed_out_of_the_loss_curve(tmp_path):
    with RunLog(tmp_path, Console(file=io.StringIO()), steps=2, done=0) as log:
        log.step(1, {"loss": 0.5}, SIZE)
        log.step(2, None, SIZE)
        assert log.loss == 0.5
    assert (tmp_path / "metrics.jsonl").read_text() == (
        json.dumps({"step": 1, "loss": 0.5, "frames": 4, "examples": 2, "padding": 0.75}) + "\n"
    )
    (path,) = (tmp_path / "tensorboard").iterdir()
    tags = {value.tag for event in read_events(path) for value in event.summary.value}
    counts = ("tokens", "frames", "examples", "places", "frame_places")
    speeds = {f"train/{name}_per_second" for name in counts}
    assert tags == {"train/loss", "train/padding", *speeds}
    with RunLog(tmp_path, Console(file=io.StringIO()), steps=2, done=1) as log:
        assert log.loss == 0.5
