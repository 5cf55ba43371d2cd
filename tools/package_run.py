"""Packs a finished run for the package to carry: `python -m tools.package_run RUN`.

What is written is a packed run (`emollama_jax/packed.py`), which any verb that takes a run reads.
With `--out` it goes elsewhere: a small form of a run to pass on.
"""

import dataclasses
import importlib.metadata
import json
import pathlib

import numpy as np
import tyro
from etils import epath

from emollama_jax import checkpoint, packed, runs
from emollama_jax.base import base_reference, chosen
from emollama_jax.config import Config
from emollama_jax.errors import UserError
from emollama_jax.evaluate.trace import folder_hash
from emollama_jax.models import parameters
from emollama_jax.train.run_log import METRICS, read_metrics
from tools.command import run

LIMIT = 30e6  # bytes of the towers and the run that the package carries, together
VERSIONS = ("emollama-jax", "jax", "flax")
KEYS = ("source", "war", "uar", "n", "command")  # of an evaluation.json


def pack(
    run: tyro.conf.Positional[pathlib.Path],
    out: pathlib.Path = runs.SHIPPED,
    evaluation: tuple[pathlib.Path, ...] = (),
) -> None:
    """Writes what training changed of a finished run, in float16, with its config and its origin.

    Args:
        run: a run of `emollama train`, or one checkpoint of it.
        out: folder to write; where the package carries its run by default.
        evaluation: evaluation.json files of this run, whose numbers run.json repeats.
    """
    path = runs.find(run)
    if runs.is_packed(path):
        raise UserError(f"{run}: already packed: copy it, or name the run that it was packed from")
    cfg, model = checkpoint.load_for_inference(path)
    shipped = out.resolve() == runs.SHIPPED.resolve()
    if shipped and cfg.weights != "tiny":
        raise UserError(f"{run}: its weights are {cfg.weights}, wanted the package's own: tiny")
    leaves = parameters.named_parameters(model)
    trained = chosen(cfg, "trainable", leaves)
    tensors = {name: np.asarray(leaves[name][...]) for name in sorted(trained)}
    # Where its maker kept the data is nobody's business; it is `data` for whoever reads it.
    public = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, dir="data"))
    about = {
        "step": int(path.name),
        "training": _last(path.parent.parent / METRICS),
        "evaluations": [_numbers(file) for file in evaluation],
        "checkpoint_sha256": folder_hash(path),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
    }
    count = sum(tensor.size for tensor in tensors.values())
    towers = sum(file.stat().st_size for file in parameters.WEIGHTS.glob("tiny_*"))
    if shipped and (size := towers + 2 * count) > LIMIT:
        raise UserError(
            f"{run}: {count:,} parameters, {size / 1e6:.1f} MB with the towers, wanted at most "
            f"{LIMIT / 1e6:g}: train fewer parts"
        )
    base = base_reference(cfg)
    packed.write(out, tensors, public, base=base, learned_from=_sources(cfg), about=about)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {count:,} parameters in float16, {size / 1e6:.2f} MB")
    if shipped:
        print(f"with the towers {(towers + size) / 1e6:.2f} MB of {LIMIT / 1e6:g}")


def _sources(cfg: Config) -> list[str]:
    return list(dict.fromkeys(f"{source.name}:{source.split}" for source in cfg.data.sources))


def _last(file: epath.Path) -> dict[str, float]:
    """The last step's metrics; nothing where the log is not beside the checkpoints."""
    rows = read_metrics(file) if file.exists() else []
    return {key: rows[-1][key] for key in ("step", "loss", "accuracy")} if rows else {}


def _numbers(file: pathlib.Path) -> dict[str, object]:
    try:
        tree = json.loads(file.read_text())
        return {key: tree[key] for key in KEYS}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file}: no evaluation.json of `emollama eval`") from None


def main(args: list[str] | None = None) -> None:
    """Runs the command; bad input is one line and exit status 2."""
    run("package_run", lambda: tyro.cli(pack, args=args, prog="python -m tools.package_run"))


if __name__ == "__main__":
    main()
