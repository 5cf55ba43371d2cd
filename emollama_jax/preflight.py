"""Checks that a command makes before any work: light, so that a typo fails at once."""

import itertools
import os
import pathlib
import tempfile

from emollama_jax.errors import UserError


def at_least(least: float, **values: float | None) -> None:
    """Raises for numbers on the command line that are too small; None is fine.

    Raises:
        UserError: names the option.
    """
    for name, value in values.items():
        if value is not None and not value >= least:
            option = name.replace("_", "-")
            raise UserError(f"--{option} is {value:g}, wanted at least {least:g}")


def check_writable(folder: str | os.PathLike, *, option: str = "--out") -> None:
    """Raises for a folder that cannot be made or written; leaves nothing behind.

    Args:
        folder: folder that the user gave; in a bucket, nothing is tried.
        option: option that it was given with.

    Raises:
        UserError: a file is in its place, no permission to write, a full or read-only disk.
    """
    if "://" in os.fspath(folder):
        return
    wanted = pathlib.Path(folder)
    way = [wanted, *wanted.parents]
    missing = list(itertools.takewhile(lambda path: not os.path.lexists(path), way))
    there = way[len(missing)]
    if not there.is_dir():
        raise UserError(f"{option} {folder}: {there} is not a folder: choose another {option}")
    made: list[pathlib.Path] = []
    try:
        for path in reversed(missing):
            path.mkdir()
            made.append(path)
        with tempfile.TemporaryFile(dir=wanted) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise UserError(
            f"{option} {folder}: cannot be written ({error.strerror}): make it writable, or choose "
            f"another {option}"
        ) from None
    finally:
        for path in reversed(made):
            path.rmdir()


def check_picture(file: pathlib.Path, *, option: str) -> None:
    """Raises for a picture file that cannot be written.

    Raises:
        UserError: a folder, one in a folder that cannot be written, or not PNG, JPEG or WebP.
    """
    if file.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"{option} {file}: wanted a name that ends in .png, .jpg or .webp")
    if file.is_dir():
        raise UserError(f"{option} {file}: is a folder, wanted a file")
    if not file.parent.is_dir():
        raise UserError(f"{option} {file}: no folder {file.parent}: make it first")
    check_writable(file.parent, option=option)
