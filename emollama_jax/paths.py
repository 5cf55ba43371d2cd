"""Files on a disk or in a bucket: `gs://bucket/folder` works wherever a folder does.

`pathlib` makes `gs:/bucket` of `gs://bucket`, so what a user names stays text until `as_path` makes
an `epath.Path` of it, which has pathlib's methods for both.
"""

import json
import os
import pathlib
import re
import shutil
from typing import Any

import fsspec
from etils import epath

from emollama_jax.disk import whole_file
from emollama_jax.errors import UserError

REMOTE = re.compile(r"\w+://")
COLLAPSED = re.compile(r"(gs|s3|az|hf):/[^/]")


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path names a bucket."""
    return REMOTE.match(os.fspath(path)) is not None


def as_path(path: epath.PathLike) -> epath.Path:
    """A path of either kind.

    Raises:
        UserError: a bucket's path that lost a slash, or one that no installed package can open.
    """
    text = os.fspath(path)
    if COLLAPSED.match(text):
        raise UserError(f"{text}: a slash is missing (pathlib removes it): give the path as text")
    if is_remote(text):
        _check_filesystem(text)
    return epath.Path(text)


def on_disk(path: epath.PathLike, *, instead: str) -> epath.Path:
    """A path that must not be a bucket's.

    Args:
        path: path that the user gave.
        instead: advice to the user.

    Raises:
        UserError: it is one.
    """
    found = as_path(path)
    if is_remote(found):
        raise UserError(f"{found}: wanted a folder on a disk; {instead}")
    return found


def from_root(path: epath.Path) -> epath.Path:
    """The path from the root, which a bucket's always is."""
    return path if is_remote(path) else path.absolute()


def parts_folder(folder: pathlib.Path, of: Any) -> pathlib.Path:
    """A folder for the parts of long work, so that it resumes; parts of other work are removed.

    Args:
        folder: parent folder of the parts.
        of: values that the work depends on, as JSON.
    """
    mark, text = folder / "of.json", json.dumps(of)
    if not mark.exists() or mark.read_text() != text:
        shutil.rmtree(folder, ignore_errors=True)
        write_whole(epath.Path(mark), text)
    return folder


def write_whole(path: epath.Path, text: str) -> None:
    """Writes a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(path):  # an object appears when it is complete
        path.write_text(text)
        return
    data = text.encode()
    with whole_file(path, wanted=len(data)) as half:
        half.write_bytes(data)


def _check_filesystem(text: str) -> None:
    protocol = text.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise UserError(
            f"{text}: {error}: for gs://, pip install 'emollama-jax[gcs]', or mount the bucket"
        ) from None
    except ValueError:
        raise UserError(f"{text}: no such kind of storage as {protocol}://") from None
