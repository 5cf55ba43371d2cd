"""Where a run keeps its parameters, and what `package` means. No JAX here: bad paths fail at once.

    RUN/checkpoints/STEP/    a run of `emollama train`
    RUN/run.safetensors      a packed run (`packed.py`): read-only, as the package carries one

Wherever a run may be named, `package` names the one that the package carries; a folder of that name
goes by its whole path.
"""

import os
import pathlib

from etils import epath

from emollama_jax.errors import UserError
from emollama_jax.paths import as_path, is_remote

FOLDER = "checkpoints"
COMMITTED = "commit_success.txt"  # Orbax' mark of a complete checkpoint in a bucket
PACKED = "run.safetensors"  # the parameters of a packed run
PACKAGE = "package"
SHIPPED = pathlib.Path(__file__).parent / "models" / "weights" / "run"


def find(path: epath.PathLike) -> epath.Path:
    """The folder that a user means: a run's newest checkpoint, one step of it, or a packed run.

    Raises:
        UserError: no such folder, or no checkpoint in it.
    """
    if os.fspath(path) == PACKAGE:
        if not (SHIPPED / PACKED).is_file():
            raise UserError(
                f"{PACKAGE}: this installation has no trained run ({SHIPPED / PACKED} is "
                "missing): reinstall it, or name a run of `emollama train` with --run"
            )
        return as_path(SHIPPED)
    path = as_path(path)
    if not path.is_dir():
        raise UserError(
            f"{path}: no such folder (wanted: a run of `emollama train`; `make demo` leaves one in "
            f"demo_out/run; {PACKAGE} is the run that ships with the package)"
        )
    if path.parent.name == FOLDER and path.name.isdigit():
        return path
    if is_packed(path):
        return path
    folder = path if path.name == FOLDER else path / FOLDER
    # On a disk, a folder still being written has a longer name; Orbax renames it when it is
    # complete. In a bucket, which cannot rename, it puts a file into it.
    steps = [
        int(p.name)
        for p in folder.glob("*")
        if p.name.isdigit() and (p / COMMITTED if is_remote(p) else p).exists()
    ]
    if not steps:
        raise UserError(
            f"{path}: no checkpoint here (wanted: a run of `emollama train`, which holds "
            f"{FOLDER}/STEP)"
        )
    return folder / str(max(steps))


def is_packed(path: epath.PathLike) -> bool:
    """Whether a folder is a packed run."""
    return (as_path(path) / PACKED).exists()


def is_run(path: epath.PathLike) -> bool:
    """Whether a path names a run or one step of it, rather than a folder of another kind."""
    if os.fspath(path) == PACKAGE:
        return True
    path = as_path(path)
    return path.parent.name == FOLDER or (path / FOLDER).is_dir() or is_packed(path)


def refuse_packed(out: epath.PathLike) -> None:
    """Refuses to train in a packed run, which has no optimizer state to resume from.

    Raises:
        UserError: it is one, or `package`.
    """
    # A packed run lies on a disk (`packed.read_origin`): no bucket is asked.
    if os.fspath(out) == PACKAGE or (not is_remote(out) and is_packed(out)):
        raise UserError(
            f"--out {out}: a packed run is read-only and cannot be resumed: name another folder"
        )
