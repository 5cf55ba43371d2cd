"""A LLaMA in one GGUF file, as llama.cpp writes it: tensors, sizes, tokenizer, chat template.

Tensors get their names of `transformers` and are dequantised when they are read. llama.cpp turns
the rows of q and k so that pairs to be rotated stand side by side; they are turned back. The sizes
are those of the file's own metadata, put as a `config.json` would have them.
"""

import functools
import importlib.metadata
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from tools.convert_torch import gguf_tokenizer
from tools.convert_torch.files import Opened, Tensor
from tools.convert_torch.gguf_rope import from_factors

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FACTORS = "rope_freqs.weight"  # by which Llama 3.1's wavelengths are stretched
ARCHITECTURE = "llama"
NEEDED = {  # fields of `config.json` by their keys here, without "llama."
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
}
OTHERS = {
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
    # What our LLaMA has not, under the names by which it is refused.
    "num_local_experts": "expert_count",
    "attention_multiplier": "attention.scale",
    "logit_scale": "logit_scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "use_parallel_residual": "use_parallel_residual",
}
ROWS = 4096  # that are dequantised at once


def add(opened: Opened, path: pathlib.Path) -> None:
    """Adds what a file holds; what is wrong goes to the problems, one line each."""
    try:
        import gguf
    except ImportError:
        opened.problems.append(f"{path}: needs gguf: pip install 'emollama-jax[convert]'")
        return
    try:
        reader = gguf.GGUFReader(path)
        held = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # it raises whatever NumPy and enum raise
        opened.problems.append(f"{path}: {_unreadable(error)}")
        return
    problems = _problems(reader, held, gguf)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if not problems:
        try:
            settings = _settings(held, tensors)
            opened.carried |= gguf_tokenizer.files(held)
        except ValueError as error:
            problems = [str(error)]
    if problems:
        opened.problems += [f"{path}: {problem}" for problem in problems]
        return
    opened.files[path] = path.stat().st_size
    opened.settings[path] = settings
    for name, tensor in tensors.items():
        if name == FACTORS:
            continue
        key = _renamed(name)
        if key in opened.tensors:
            opened.problems.append(f"{key}: in {opened.tensors[key].file} and in {path.name}")
            continue
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
        turned = next((settings[to] for part, to in heads.items() if f".{part}." in name), None)
        opened.tensors[key] = _tensor(tensor, path.name, heads=turned, gguf=gguf)
    opened.notes.append(
        f"{path.name}: sizes are those of its metadata; stored as {_types(tensors.values())}"
    )


def _unreadable(error: Exception) -> str:
    unknown = re.search(r"(\d+)\)? is not a valid GGMLQuantizationType", str(error))
    if unknown:
        return (
            f"a tensor is of type {unknown[1]}, which the package gguf {_version()} does not know: "
            "quantize the model to another type"
        )
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return f"not a complete GGUF file ({reason}): download it again"


def _version() -> str:
    return importlib.metadata.version("gguf")


def _problems(reader: Any, held: Mapping[str, Any], gguf: Any) -> list[str]:
    """Why a file is not read, the weightiest reason alone."""
    found = held.get("general.architecture")
    if found != ARCHITECTURE:
        return [
            f"general.architecture is {found!r}, wanted {ARCHITECTURE!r}: other architectures have "
            "LLaMA's names and different arithmetic"
        ]
    if reader.byte_order != "I":
        return ["its bytes are in the order of another kind of machine: convert it on one"]
    if (parts := held.get("split.count", 1)) > 1:
        return [f"one of {parts} parts: join them with llama-gguf-split --merge"]
    problems = []
    for kind in dict.fromkeys(tensor.tensor_type for tensor in reader.tensors):
        try:
            size = gguf.GGML_QUANT_SIZES[kind][1]
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)
        except RuntimeError:  # its "not yet implemented"
            names = [tensor.name for tensor in reader.tensors if tensor.tensor_type == kind]
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            problems.append(
                f"{names[0]}{more}: of type {kind.name}, which the package gguf {_version()} does "
                "not dequantize: quantize the model to another type"
            )
    keys = [f"{ARCHITECTURE}.{key}" for key in NEEDED.values()]
    missing = [key for key in keys if key not in held]
    if missing:
        problems.append(f"its metadata lacks {', '.join(missing)}")
    return problems


def _settings(held: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The file's metadata as a `config.json` has it.

    Raises:
        ValueError: what our LLaMA does not do and `config.json` has no field for.
    """

    def of(key: str, default: Any = None) -> Any:
        value = held.get(f"{ARCHITECTURE}.{key}", default)
        # Numbers are float32 here: 1e-5, and not 9.999999747378752e-06.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    settings = {name: of(key) for name, key in (NEEDED | OTHERS).items()}
    settings = {name: value for name, value in settings.items() if value is not None}
    width, heads = settings["hidden_size"], settings["num_attention_heads"]
    if not isinstance(heads, int) or not isinstance(settings.get("num_key_value_heads", 1), int):
        raise ValueError("its layers have different numbers of heads, wanted one for all")
    settings.setdefault("num_key_value_heads", heads)
    settings.setdefault("head_dim", of("rope.dimension_count", width // max(heads, 1)))
    head_dim = settings["head_dim"]
    for key in ("rope.dimension_count", "attention.value_length"):
        if of(key, head_dim) != head_dim:
            raise ValueError(f"{ARCHITECTURE}.{key} is {of(key)}, wanted head_dim {head_dim}")
    embedding = tensors.get("token_embd.weight")
    rows = None if embedding is None else int(embedding.shape[-1])
    if of("vocab_size", rows) != rows:
        raise ValueError(f"{ARCHITECTURE}.vocab_size is {of('vocab_size')}, token_embd has {rows}")
    theta = settings.setdefault("rope_theta", 10000.0)  # llama.cpp's own
    kind = of("rope.scaling.type", "none")
    factor = of("rope.scaling.factor", of("rope.scale_linear", 1.0))
    scaling = None
    if kind != "none" or factor not in (0.0, 1.0):
        scaling = {"rope_type": "linear" if kind == "none" else kind, "factor": factor}
    if FACTORS in tensors:
        if scaling is not None:
            raise ValueError(f"{FACTORS} beside {ARCHITECTURE}.rope.scaling: wanted one of them")
        factors = np.array(tensors[FACTORS].data, np.float32)
        scaling = from_factors(factors, head_dim=head_dim, theta=theta)
    return settings | {
        "model_type": "llama",
        "vocab_size": rows,
        "rope_scaling": scaling,
        "tie_word_embeddings": "output.weight" not in tensors,
    }


def _renamed(name: str) -> str:
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(\w+)", name)
    if layer and layer[2] in NAMES:
        return f"model.layers.{layer[1]}.{NAMES[layer[2]]}.{layer[3]}"
    whole = re.fullmatch(r"(\w+)\.(\w+)", name)
    return f"{NAMES[whole[1]]}.{whole[2]}" if whole and whole[1] in NAMES else name


def _tensor(tensor: Any, file: str, *, heads: int | None, gguf: Any) -> Tensor:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    own = {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
    dtype = own.get(tensor.tensor_type.name, np.dtype(np.float32))
    read: Callable[[], np.ndarray] = functools.partial(_read, tensor, shape, dtype, gguf)
    if heads:
        read = functools.partial(_turned_back, read, heads)
    return Tensor(shape, dtype, file, read, raw=tensor.data)


def _read(tensor: Any, shape: tuple[int, ...], dtype: np.dtype, gguf: Any) -> np.ndarray:
    data = tensor.data
    if tensor.tensor_type.name in ("F32", "F16", "BF16"):
        return data.view(dtype).reshape(shape)
    if len(shape) < 2:
        return gguf.dequantize(data, tensor.tensor_type).reshape(shape)
    out = np.empty(shape, dtype)
    for start in range(0, shape[0], ROWS):
        out[start : start + ROWS] = gguf.dequantize(data[start : start + ROWS], tensor.tensor_type)
    return out


def _turned_back(read: Callable[[], np.ndarray], heads: int) -> np.ndarray:
    """A head's rows 0, 1, 2, 3, … were those of its halves in turn: first, second, first, …"""
    x = read()
    if x.shape[0] % (2 * heads):
        raise ValueError(f"{x.shape} does not hold {heads} heads of an even width")
    return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def _types(tensors: Any) -> str:
    sizes: dict[str, int] = {}
    for tensor in tensors:
        name = tensor.tensor_type.name
        sizes[name] = sizes.get(name, 0) + math.prod(int(size) for size in tensor.shape)
    return ", ".join(sorted(sizes, key=sizes.__getitem__, reverse=True))
