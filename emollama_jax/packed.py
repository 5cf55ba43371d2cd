"""A packed run: what training changed, as small as it can be passed on.

    RUN/run.safetensors   the trained parameters by path, float16
        config.yaml       the run's config
        run.json          its base, where it comes from, and a hash of the parameters

It is read wherever a run is, and cannot be trained on. The package carries one
(`runs.PACKAGE`); `python -m tools.package_run` writes them.
"""

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml
from etils import epath
from safetensors.numpy import save

from emollama_jax import foreign_json, yaml_file
from emollama_jax.config import Config, to_dict
from emollama_jax.disk import whole_file
from emollama_jax.errors import UserError
from emollama_jax.models import parameters
from emollama_jax.paths import as_path, on_disk
from emollama_jax.runs import PACKED

CONFIG, ABOUT = "config.yaml", "run.json"
VERSION = 1
DTYPE = "float16"


def write(
    folder: pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    cfg: Config,
    *,
    base: Mapping[str, Any],
    learned_from: Sequence[str],
    about: Mapping[str, Any],
) -> None:
    """Writes a packed run; its parameters, which make it one, appear last.

    Args:
        folder: folder for the three files.
        tensors: trained tensors, by path.
        cfg: config of the run.
        base: reference from `base.base_reference`.
        learned_from: sets and splits, e.g. "ferplus:train".
        about: other entries of `run.json` about its origin.

    Raises:
        UserError: a number that float16 cannot hold.
    """
    rounded = {}
    for name, tensor in tensors.items():
        with np.errstate(over="ignore"):
            rounded[name] = np.asarray(tensor).astype(DTYPE)
        if not np.isfinite(rounded[name]).all():
            raise UserError(
                f"{name}: largest value {np.abs(tensor).max():g}, {DTYPE} ends at 65504"
            )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PACKED).unlink(missing_ok=True)
    text = yaml.safe_dump(json.loads(json.dumps(to_dict(cfg))), sort_keys=False)
    (folder / CONFIG).write_text(text, encoding="utf-8")
    data = save(rounded)
    tree = {
        "format": VERSION,
        "learned_from": list(learned_from),
        **about,
        "dtype": DTYPE,
        "parameters": sum(tensor.size for tensor in rounded.values()),
        "base": base,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    (folder / ABOUT).write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n")
    with whole_file(folder / PACKED, wanted=len(data)) as half:
        half.write_bytes(data)  # as others may read it: `save_file` writes for its owner alone


def read_origin(folder: epath.PathLike) -> dict[str, Any]:
    """Entries of `run.json`: `base`, `sha256`, `step`, `learned_from` and more.

    Raises:
        UserError: it is missing or broken, or of another format.
    """
    folder = on_disk(folder, instead="copy it here first: gcloud storage cp -r gs://… FOLDER")
    try:
        about = foreign_json.parse((folder / ABOUT).read_bytes())
        found = about["format"]
        missing = {"base", "sha256", "learned_from"} - about.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / ABOUT}: missing or broken: {_again(folder)}") from None
    if found != VERSION:
        raise UserError(f"{folder}: packed in format {found}, this version reads {VERSION}")
    if missing:
        raise UserError(f"{folder / ABOUT}: {', '.join(sorted(missing))} missing: {_again(folder)}")
    return about


def read_about(folder: epath.PathLike) -> dict[str, Any]:
    """What reading needs: `config`, a plain tree; `base`, its weights; `sha256` of the parameters.

    Raises:
        UserError: as of `read_origin`, or a broken config.
    """
    about = read_origin(folder)
    return {
        "config": yaml_file.read(as_path(folder) / CONFIG),
        "base": about["base"],
        "sha256": about["sha256"],
    }


def load(
    folder: epath.PathLike, shapes: Mapping[str, Sequence[int]], *, sha256: str
) -> dict[str, np.ndarray]:
    """The parameters as float32, all of these names and shapes.

    Args:
        folder: folder of a packed run.
        shapes: by path.
        sha256: expected hash of the file, from `read_about`.

    Raises:
        UserError: another file than was packed, or one that does not fit.
    """
    file = pathlib.Path(as_path(folder)) / PACKED
    if hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
        raise UserError(f"{file}: not the file that was packed with {ABOUT}: {_again(folder)}")
    return parameters.load(file, shapes)


def _again(folder: epath.PathLike) -> str:
    return f"reinstall the package, or pack the run again into {folder}"
