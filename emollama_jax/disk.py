"""Files that appear whole or not at all, on disks that may be full.

What is written has a name of its own process until it is whole, so that two processes never write
one file, and what a kill leaves is known by that name. Where the bytes wanted are known, they are
compared with the room that is left before anything is written.
"""

import contextlib
import errno
import os
import pathlib
import shutil
from collections.abc import Iterator

from emollama_jax.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
NO_SPACE = os.strerror(errno.ENOSPC)
SLACK = 2**14  # bytes for folders, and blocks that are not filled
UNFINISHED = ".partial"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that it came from, the outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def is_full(error: BaseException) -> bool:
    """Whether an exception comes from a full disk; other libraries say so in words alone."""
    return any(
        getattr(cause, "errno", None) in FULL or NO_SPACE.lower() in str(cause).lower()
        for cause in causes(error)
    )


@contextlib.contextmanager
def room(folder: str | os.PathLike, wanted: int) -> Iterator[None]:
    """Work that writes so many bytes into a folder on a disk.

    Args:
        folder: where, there already or not.
        wanted: bytes, at least.

    Raises:
        UserError: too little room before or during the work; names both numbers.
    """
    if free(folder) < wanted + SLACK:
        raise lacking(folder, wanted)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_full(error):
            raise lacking(folder, wanted) from error
        raise


def lacking(folder: str | os.PathLike, wanted: int) -> UserError:
    """The line about too little room."""
    return UserError(
        f"{os.fspath(folder)}: {NO_SPACE}: {wanted:,} bytes wanted, {free(folder):,} free: free "
        "some space, then re-run the command to resume"
    )


def free(folder: str | os.PathLike) -> int:
    """Bytes that a user may still write where a folder is, or will be."""
    path = pathlib.Path(folder).absolute()
    there = next(place for place in (path, *path.parents) if place.exists())
    return shutil.disk_usage(there).free


@contextlib.contextmanager
def whole_file(path: str | os.PathLike, *, wanted: int = 0) -> Iterator[pathlib.Path]:
    """A name to write a file under; the file gets its own name at the end, or is removed.

    Args:
        path: the file's name on a disk.
        wanted: its bytes, where they are known.

    Raises:
        UserError: too little room.
    """
    path = pathlib.Path(path)
    half = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        with room(path.parent, wanted):
            yield half
            half.replace(path)
    finally:
        half.unlink(missing_ok=True)


def sweep(folder: str | os.PathLike) -> None:
    """Removes what killed processes left in a folder; its lock is held."""
    for half in pathlib.Path(folder).glob(f"*{UNFINISHED}"):
        half.unlink(missing_ok=True)
