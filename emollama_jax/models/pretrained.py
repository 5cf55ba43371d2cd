"""The tiny towers that the package carries, and weights of any module as one safetensors file.

The real model starts from pretrained EVA-ViT, FaceXFormer and Vicuna; the tiny one starts from
these (made by `emollama pretrain tiny`, docs/tiny.md).
"""

import pathlib

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from emollama_jax.errors import UserError

WEIGHTS = pathlib.Path(__file__).parent / "weights"
TINY = {"vision": "tiny_vision", "face": "tiny_face", "llama": "tiny_llama"}  # tower → file


def named_parameters(module: nnx.Module) -> dict[str, nnx.Param]:
    """Every parameter by its path, e.g. `llama/layers/q_proj/kernel`, sorted."""
    leaves = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return dict(sorted(("/".join(map(str, path)), leaf) for path, leaf in leaves))


def save(module: nnx.Module, path: pathlib.Path, *, dtype: str = "float16") -> None:
    """Writes a module's parameters, adapters left out, rounded to `dtype`."""
    tensors = {
        name: np.asarray(leaf[...]).astype(dtype)
        for name, leaf in named_parameters(module).items()
        if not name.endswith(("lora_A", "lora_B"))
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def load(module: nnx.Module, path: pathlib.Path) -> None:
    """Fills a module's parameters in place as float32; adapters keep their start.

    Raises:
        UserError: the file is absent, not safetensors, or of another shape or set of names.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({error})") from None
    problems = []
    for name, leaf in named_parameters(module).items():
        if name.endswith(("lora_A", "lora_B")):
            continue
        tensor = tensors.pop(name, None)
        if tensor is None:
            problems.append(f"{name} is missing")
        elif tensor.shape != leaf.shape:
            problems.append(f"{name} is {tensor.shape}, wanted {leaf.shape}")
        else:
            leaf.set_value(jnp.asarray(tensor, jnp.float32))  # of this host, wherever it was
    problems += [f"{name} has no place in the model" for name in tensors]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{path}: weights of another config: {'; '.join(problems[:3])}{more}")


def load_tiny(model: nnx.Module) -> None:
    """Fills the vision tower, FaceXFormer and the LLaMA of a tiny EmoLlama in place."""
    for tower, name in TINY.items():
        load(getattr(model, tower), WEIGHTS / f"{name}.safetensors")
