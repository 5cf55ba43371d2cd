"""Logs of a run: `metrics.jsonl`, TensorBoard event files, a progress display.

`metrics.jsonl` holds only what is the same in every repetition of a run, floats with all their
digits, so that two loss curves can be compared bit for bit; a resumed run first cuts off what lies
after its checkpoint. Speed goes to the display and to TensorBoard.

In a bucket, files cannot grow. There both are written to this host's disk and copied, at every
checkpoint and now and then between.

The event files are written by hand: TFRecord frames around protocol buffers (TensorFlow's
event.proto and summary.proto, scalars only). Of the writers that exist, TensorBoard's own brings
gRPC and a web server; tensorboardX 2.6 imports torch where it is installed, and names files by the
second, so that a run resumed at once empties its own
(`findings/tensorboardx_resume_in_the_same_second.sh`).
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import struct
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from emollama_jax import foreign_json
from emollama_jax.disk import room
from emollama_jax.errors import UserError
from emollama_jax.paths import as_path, is_remote

METRICS = "metrics.jsonl"
EVENTS = "tensorboard"
LINES = 50  # that a whole run prints where there is no terminal
COPY_EVERY = 60.0  # seconds between copies to a bucket
SPEED_MEMORY = 0.9  # of the running mean of a step's seconds, per step


class JsonLines:
    """`metrics.jsonl`: one line per logged step, flushed at once."""

    def __init__(self, path: pathlib.Path, *, step: int):
        """Opens the file behind the line of `step`, the restored one; 0 starts a new file."""
        self.last: dict[str, float] | None = None  # the newest line
        if path.exists():
            text = path.read_text(encoding="utf-8", errors="replace")
            kept = [line for line in text.splitlines() if _is_before(line, step)]
            if kept:
                self.last = json.loads(kept[-1])
            new = path.with_name(path.name + ".new")
            new.write_text("".join(line + "\n" for line in kept))
            os.replace(new, path)  # a crash between the two loses neither file
        self._folder = path.parent
        self._file = path.open("a")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a line; UserError where the disk is full."""
        line = json.dumps({"step": step, **values}) + "\n"
        with room(self._folder, len(line)):
            self._file.write(line)
            self._file.flush()
        self.last = {"step": step, **values}

    def close(self) -> None:
        self._file.close()


def read_metrics(path: epath.PathLike) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`.

    Raises:
        UserError: no such file, or a line that is not JSON.
    """
    path = as_path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file (wanted: the metrics.jsonl of a run)")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            rows.append(foreign_json.parse(line))
        except ValueError as error:
            raise UserError(f"{path}: line {number} is not JSON ({error})") from None
    return rows


def _is_before(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (json.JSONDecodeError, KeyError, TypeError):
        return False  # the torn last line of a killed process


class EventFile:
    """A TensorBoard event file with scalars."""

    def __init__(self, folder: pathlib.Path, *, step: int):
        """Starts a new file; TensorBoard drops what older ones hold after `step`."""
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("xb")
        self._write(_bytes(3, b"brain.Event:2"))
        session_start = _bytes(7, _varint(1 << 3) + _varint(1))  # SessionLog.status = START
        self._write(_varint(2 << 3) + _varint(step + 1) + session_start)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one event with all values, e.g. {"train/loss": 0.5}."""
        summary = b"".join(
            _bytes(1, _bytes(1, tag.encode()) + _varint(2 << 3 | 5) + struct.pack("<f", value))
            for tag, value in values.items()
        )
        self._write(_varint(2 << 3) + _varint(step) + _bytes(5, summary))

    def close(self) -> None:
        self._file.close()

    def _write(self, fields: bytes) -> None:
        """One event, its wall time first, as a TFRecord: length, its CRC, data, its CRC."""
        data = _varint(1 << 3 | 1) + struct.pack("<d", time.time()) + fields
        length = struct.pack("<Q", len(data))
        self._file.write(length + _masked_crc(length) + data + _masked_crc(data))
        self._file.flush()


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _bytes(field: int, value: bytes) -> bytes:
    """A length-delimited protocol buffer field."""
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ 0x82F63B78 * (byte & 1)  # Castagnoli's polynomial, reflected
        table.append(byte)
    return table


_CRC_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _masked_crc(data: bytes) -> bytes:
    """TFRecord's mask: a CRC of data that holds CRCs would be weak."""
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


@dataclasses.dataclass(frozen=True)
class Size:
    """What a step's batch held, and its places, padding included."""

    tokens: int  # visual ones included
    frames: int
    examples: int
    places: int  # for tokens
    frame_places: int

    @property
    def padding(self) -> float:
        """Share of the tokens' places that hold none."""
        return 1 - self.tokens / self.places


class Display:
    """A progress bar in a terminal, plain lines elsewhere; a context manager."""

    def __init__(self, console: Console, *, steps: int, done: int):
        """Shows a run of `steps`, of which `done` lie behind."""
        self._console = console
        self._steps = steps
        self._start = self._last = time.monotonic()
        self._first = done
        self._seconds: float | None = None  # of a step, running mean
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=done, text="compiling")

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def show(self, step: int, *, loss: float | None, size: Size) -> dict[str, float]:
        """Shows a finished step.

        Args:
            step: its number, from 1 on.
            loss: None for a step that is not logged.
            size: what its batch held.

        Returns:
            Of this step: tokens, examples and frames per second, without padding; places for
            tokens and frames per second, with it; the share of padding.
        """
        now = time.monotonic()
        seconds, self._last = max(now - self._last, 1e-9), now
        # The first step compiles: it would spoil the mean for long.
        if step > self._first + 1:
            old = seconds if self._seconds is None else self._seconds
            self._seconds = SPEED_MEMORY * old + (1 - SPEED_MEMORY) * seconds
        counts = dataclasses.asdict(size)
        speed = {f"{name}_per_second": count / seconds for name, count in counts.items()}
        speed["padding"] = size.padding
        text = (
            f"{size.tokens / seconds:,.0f} tokens/s ({size.places / seconds:,.0f} with padding, "
            f"{size.padding:.0%})  {size.examples / seconds:,.1f} examples/s  "
            f"{size.frames / seconds:,.0f} frames/s"
        )
        if loss is not None:
            text = f"loss {loss:.4f}  {text}"
        self._bar.update(self._task, completed=step, text=text)
        plain_every = max(1, self._steps // LINES)
        if not self._console.is_terminal and (step % plain_every == 0 or step == self._steps):
            left = (self._steps - step) * (seconds if self._seconds is None else self._seconds)
            minutes, rest = divmod(round(left), 60)
            line = f"step {step}/{self._steps}  {text}  {minutes}:{rest:02d} left"
            self._console.print(line, highlight=False)
        return speed


class _Mirror:
    """Files that grow on this host's disk, and their copies in a bucket."""

    def __init__(self, here: pathlib.Path, there: epath.Path):
        self._here, self._there = here, there
        self._copied = time.monotonic()
        if (there / METRICS).exists():
            (here / METRICS).write_bytes((there / METRICS).read_bytes())

    def copy(self) -> None:
        for file in sorted(path for path in self._here.rglob("*") if path.is_file()):
            (self._there / file.relative_to(self._here).as_posix()).write_bytes(file.read_bytes())
        self._copied = time.monotonic()

    def copy_now_and_then(self) -> None:
        if time.monotonic() - self._copied > COPY_EVERY:
            self.copy()


class RunLog:
    """All three records of a run, kept by the first host alone; a context manager."""

    def __init__(self, out: epath.PathLike, console: Console, *, steps: int, done: int):
        """Continues the records in `out` behind step `done`."""
        self._stack = contextlib.ExitStack()
        self._leads = jax.process_index() == 0
        self._mirror: _Mirror | None = None
        if self._leads:
            folder = pathlib.Path(out)
            if is_remote(out):
                folder = pathlib.Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
                self._mirror = _Mirror(folder, as_path(out))
                self._stack.callback(self._mirror.copy)  # after the files below are closed
            self._lines = self._stack.enter_context(
                contextlib.closing(JsonLines(folder / METRICS, step=done))
            )
            self._events = self._stack.enter_context(
                contextlib.closing(EventFile(folder / EVENTS, step=done))
            )
            self._display = self._stack.enter_context(Display(console, steps=steps, done=done))

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def keep(self) -> None:
        """Brings what was recorded where a restarted run will look; before every checkpoint."""
        if self._mirror is not None:
            self._mirror.copy()

    @property
    def loss(self) -> float | None:
        """Loss of the last logged step, on the first host."""
        return self._lines.last["loss"] if self._leads and self._lines.last else None

    def step(self, step: int, values: Mapping[str, float] | None, size: Size) -> None:
        """Records a finished step.

        Args:
            step: its number, from 1 on.
            values: its metrics, with "loss"; None for a step that is not logged.
            size: what its batch held.
        """
        if not self._leads:
            return
        loss = None if values is None else values["loss"]
        speed = self._display.show(step, loss=loss, size=size)
        if values is not None:
            held = {"frames": size.frames, "examples": size.examples, "padding": size.padding}
            self._lines.write(step, {**values, **held})
            scalars = {**values, **speed}
            self._events.write(step, {f"train/{name}": v for name, v in scalars.items()})
            if self._mirror is not None:
                self._mirror.copy_now_and_then()
