"""The tiny towers that the package carries, and weights of any module as one safetensors file.

The real model starts from pretrained EVA-ViT, FaceXFormer and Vicuna; the tiny one starts from
these (made by `emollama pretrain tiny`, docs/tiny.md).
"""

import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from emollama_jax import config_weights
from emollama_jax.errors import UserError

WEIGHTS = pathlib.Path(__file__).parent / "weights"
TINY = {tower: f"tiny_{tower}" for tower in config_weights.TOWERS}  # tower → file


def named_parameters(module: nnx.Module) -> dict[str, nnx.Param]:
    """Every parameter by its path, e.g. `llama/layers/q_proj/kernel`, sorted."""
    leaves = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return dict(sorted(("/".join(map(str, path)), leaf) for path, leaf in leaves))


def save(module: nnx.Module, path: pathlib.Path, *, dtype: str = "float16") -> None:
    """Writes a module's parameters, adapters left out, rounded to `dtype`."""
    tensors = {
        name: np.asarray(leaf[...]).astype(dtype)
        for name, leaf in named_parameters(module).items()
        if _kept(name)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def load(module: nnx.Module, path: pathlib.Path) -> None:
    """Fills a module's parameters in place as float32; adapters keep their start.

    The module may be abstract (`rngs.abstract`): nothing that the file holds need be made first.

    Raises:
        UserError: the file is absent, not safetensors, or of another shape or set of names.
    """
    leaves = {name: leaf for name, leaf in named_parameters(module).items() if _kept(name)}
    for name, tensor in read(path, {name: leaf.shape for name, leaf in leaves.items()}).items():
        leaves[name].set_value(jax.device_put(tensor))  # of this host, wherever it was


def read(path: pathlib.Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """A file's tensors as float32, all of these names and shapes.

    Raises:
        UserError: as of `load`.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({error})") from None
    problems = []
    for name, shape in shapes.items():
        if name not in tensors:
            problems.append(f"{name} is missing")
        elif tensors[name].shape != tuple(shape):
            problems.append(f"{name} is {tensors[name].shape}, wanted {tuple(shape)}")
    problems += [f"{name} has no place in the model" for name in tensors if name not in shapes]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{path}: weights of another config: {'; '.join(problems[:3])}{more}")
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def towers(start: config_weights.Weights) -> list[str]:
    """Those of `TINY` that a config's `weights` name."""
    named = config_weights.towers(start)
    return [tower for tower in TINY if tower in named]


def read_tiny(shapes: Mapping[str, Sequence[int]], towers: Sequence[str]) -> dict[str, np.ndarray]:
    """The package's towers for a model.

    Args:
        shapes: of the model's parameters by path, e.g. `vision/cls_token`.
        towers: of `TINY`.

    Raises:
        UserError: as of `load`.
    """
    found = {}
    for tower in towers:
        mine = {
            path.removeprefix(f"{tower}/"): shape
            for path, shape in shapes.items()
            if path.startswith(f"{tower}/") and _kept(path)
        }
        tensors = read(WEIGHTS / f"{TINY[tower]}.safetensors", mine)
        found |= {f"{tower}/{name}": tensor for name, tensor in tensors.items()}
    return found


def _kept(path: str) -> bool:
    return not path.endswith(("lora_A", "lora_B"))
