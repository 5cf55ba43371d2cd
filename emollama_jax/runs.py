"""Where a run keeps its checkpoints: RUN/checkpoints/STEP. No JAX here: bad paths fail at once."""

from etils import epath

from emollama_jax.errors import UserError
from emollama_jax.paths import as_path, is_remote

FOLDER = "checkpoints"
COMMITTED = "commit_success.txt"  # Orbax' mark of a complete checkpoint in a bucket


def find(path: epath.PathLike) -> epath.Path:
    """The checkpoint folder that a user means: a run (its newest), or one step of it.

    Raises:
        UserError: no such folder, or no checkpoint in it.
    """
    path = as_path(path)
    if not path.is_dir():
        raise UserError(
            f"{path}: no such folder (wanted: a run of `emollama train`; `make demo` leaves one in "
            "demo_out/run)"
        )
    if path.parent.name == FOLDER and path.name.isdigit():
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
