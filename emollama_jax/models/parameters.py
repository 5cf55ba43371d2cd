"""Parameters by their paths: names, patterns over them, and one module's as a safetensors file.

A path is what checkpoints, patterns, shardings and imported weights speak of, e.g.
`llama/layers/q_proj/kernel`.
"""

import difflib
import pathlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from emollama_jax.errors import UserError, some

WEIGHTS = pathlib.Path(__file__).parent / "weights"  # files that the package carries
ADAPTERS = ("lora_A", "lora_B")


def named_parameters(module: nnx.Module) -> dict[str, nnx.Param]:
    """Every parameter by its path, sorted."""
    leaves = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return dict(sorted(("/".join(map(str, path)), leaf) for path, leaf in leaves))


def is_adapter(path: str) -> bool:
    """Whether a path is one of LoRA's, which a base does not hold."""
    return path.endswith(ADAPTERS)


def matching(
    patterns: Iterable[str],
    paths: Collection[str],
    *,
    key: str,
    elsewhere: Callable[[], Collection[str]] = tuple,
) -> frozenset[str]:
    """The parameter paths that any of the regular expressions matches as a whole.

    Args:
        patterns: e.g. "llama/.*lora_[AB]".
        paths: all parameter paths of a model.
        key: config key that holds the patterns, for the message.
        elsewhere: parameter paths of parts that this model was told to do without; a pattern may
            match one of them alone.

    Raises:
        UserError: not a regular expression, or one that matches nothing.
    """
    found: set[str] = set()
    for pattern in patterns:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise UserError(f"{key}: {pattern!r} is not a regular expression: {error}") from None
        matched = set(filter(compiled.fullmatch, paths))
        if not matched and not any(map(compiled.fullmatch, elsewhere())):
            near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0) or sorted(paths)[:3]
            raise UserError(
                f"{key}: {pattern!r} matches no parameter (near: {', '.join(near)}): patterns "
                "match whole paths"
            )
        found |= matched
    return frozenset(found)


def save(module: nnx.Module, path: pathlib.Path, *, dtype: str = "float16") -> None:
    """Writes a module's parameters, adapters left out, rounded to `dtype`."""
    tensors = {
        name: np.asarray(leaf[...]).astype(dtype)
        for name, leaf in named_parameters(module).items()
        if not is_adapter(name)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def fill(module: nnx.Module, path: pathlib.Path) -> None:
    """Sets a module's parameters, as float32, to those of a file; adapters keep their start.

    The module may be abstract (`rngs.abstract`): nothing that the file holds need be made first.

    Raises:
        UserError: as of `load`.
    """
    leaves = {name: leaf for name, leaf in named_parameters(module).items() if not is_adapter(name)}
    for name, tensor in load(path, {name: leaf.shape for name, leaf in leaves.items()}).items():
        leaves[name].set_value(jax.device_put(tensor))  # of this host, wherever it was


def load(path: pathlib.Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """A file's tensors as float32, all of these names and shapes.

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
    for name, shape in shapes.items():
        if name not in tensors:
            problems.append(f"{name} is missing")
        elif tensors[name].shape != tuple(shape):
            problems.append(f"{name} is {tensors[name].shape}, wanted {tuple(shape)}")
    problems += [f"{name} has no place in the model" for name in tensors if name not in shapes]
    if problems:
        raise UserError(f"{path}: weights of another config: {some(problems)}")
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
