#!/usr/bin/env bash
# tensorboardX 2.6.5: an event file's name holds the time in whole seconds, the host and no more, and
# the file is opened with "wb". A writer opened on a folder within the second in which the one before
# it was opened (a short run that is stopped and resumed) empties its file: those scalars are lost,
# without a word. TensorBoard's own writer and PyTorch's add the process and a counter to the name, so
# one would guess that two writers never share a file.
#
# Seen: two writers of one folder, one after the other, in one second: one file, in which only the
# second writer's scalar is left. In two seconds: two files. Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tensorboardX==2.6.5 numpy==2.3.5 protobuf==6.33.2 \
  tensorboard==2.20.0 "setuptools<81"

"$folder/venv/bin/python" - "$folder" <<'PROGRAM'
import pathlib
import sys
import time

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboardX import SummaryWriter


def steps(run: pathlib.Path) -> list[list[int]]:
    """The steps whose scalar each file of a folder holds."""
    return [
        [event.step for event in EventFileLoader(str(file)).Load() if event.HasField("summary")]
        for file in sorted(run.iterdir())
    ]


def write(run: pathlib.Path, step: int) -> None:
    with SummaryWriter(str(run)) as writer:
        writer.add_scalar("loss", 1.0, step)


def at_the_beginning_of_a_second() -> None:
    time.sleep(1.001 - time.time() % 1)


apart = pathlib.Path(sys.argv[1], "apart")
for step in (1, 2):
    at_the_beginning_of_a_second()
    write(apart, step)
together = pathlib.Path(sys.argv[1], "together")
at_the_beginning_of_a_second()
began = int(time.time())
for step in (1, 2):
    write(together, step)
assert int(time.time()) == began, "too slow a machine to tell"
print("in two seconds:", steps(apart))
print("in one second: ", steps(together))
assert steps(apart) == [[1], [2]] and steps(together) == [[2]], "changed"
PROGRAM
