"""DINOv2 (Oquab et al. 2023) as a vision tower: an EVA-ViT of ours, exactly.

Read from Hugging Face's files or from an ONNX export, under the names of `transformers`' Dinov2.
What DINOv2 has and EVA-ViT has not goes where it changes no number:

- LayerScale, λ·(W x + b), into the projection before it: kernel λ·W and bias λ·b.
- The bias of k adds the same to all logits of a query: no softmax changes, so it is left out.
- The last norm is the tower's own, `vision/norm`: `model.vision.last_norm` must be true. EVA has
  one too, which LLaMA-VID does not run; DINOv2's features are meant to be read behind it.

Positions are resized by PyTorch's bicubic interpolation, as `transformers` does. Siblings with
register tokens or a SwiGLU have no place in ours and are refused.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from emollama_jax.config import EmoLlamaConfig
from tools.convert_torch.engine import FLOATS, PATCHES, QKV, Row, drop_leading, linear, norm
from tools.convert_torch.files import CONFIG, ONNX, Opened, Tensor, open_paths
from tools.convert_torch.onnx_graph import read_dinov2
from tools.convert_torch.pickled import Unreadable
from tools.convert_torch.settings import Wrong, number, read_sizes, size

SIGN = r"(.*)encoder\.layer\.0\.norm1\.weight"
MODULES = {  # what `transformers` 5 calls in memory what its files call otherwise
    "attention.q_proj.": "attention.attention.query.",
    "attention.k_proj.": "attention.attention.key.",
    "attention.v_proj.": "attention.attention.value.",
    "attention.o_proj.": "attention.output.dense.",
}
SCALED = {"layer_scale1": "attention.output.dense", "layer_scale2": "mlp.fc2"}
IGNORE = {
    r".*\.attention\.attention\.key\.bias": "bias of k: changes no softmax",
    r".*embeddings\.mask_token": "of DINOv2's training",
    r"classifier\.(weight|bias)": "head of another task",
}
REFUSED = {
    r"embeddings\.register_tokens": "register tokens",
    r"encoder\.layer\.0\.mlp\.(weights_in|gate_proj)\.bias": "a SwiGLU feed-forward (the giant)",
}
PLAIN: dict[str, tuple[Any, ...]] = {  # settings that must be as here, or absent
    "model_type": ("dinov2",),
    "hidden_act": ("gelu",),
    "qkv_bias": (True,),
    "use_swiglu_ffn": (False,),
    "num_channels": (3,),
}
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def rows(prefix: str) -> list[Row]:
    """The table, for what `open_dinov2` gives; `prefix` is what its keys begin with."""
    embeddings = f"{prefix}embeddings"
    block, ours = f"{prefix}encoder.layer.{{i}}", "vision/blocks"
    attention = f"{block}.attention.attention"
    return [
        Row(f"{embeddings}.cls_token", "vision/cls_token", drop_leading(2)),
        Row(f"{embeddings}.position_embeddings", "vision/pos_embed", drop_leading(1)),
        Row(
            f"{embeddings}.patch_embeddings.projection.weight", "vision/patch_embed/kernel", PATCHES
        ),
        Row(f"{embeddings}.patch_embeddings.projection.bias", "vision/patch_embed/bias"),
        *norm(f"{block}.norm1", f"{ours}/norm1"),
        Row(f"{attention}.qkv.weight", f"{ours}/attn/qkv", QKV),
        Row(f"{attention}.query.bias", f"{ours}/attn/q_bias"),
        Row(f"{attention}.value.bias", f"{ours}/attn/v_bias"),
        *linear(f"{block}.attention.output.dense", f"{ours}/attn/proj", bias=True),
        *norm(f"{block}.norm2", f"{ours}/norm2"),
        *linear(f"{block}.mlp.fc1", f"{ours}/fc1", bias=True),
        *linear(f"{block}.mlp.fc2", f"{ours}/fc2", bias=True),
        *norm(f"{prefix}layernorm", "vision/norm"),
    ]


def open_dinov2(paths: Sequence[pathlib.Path]) -> Opened:
    """Opens Hugging Face's files or one ONNX file; q, k and v are joined, LayerScale is folded."""
    onnx = [path for path in paths if path.suffix == ONNX]
    opened = _open_onnx(paths) if onnx else open_paths(paths)
    tensors = {_as_in_files(key): tensor for key, tensor in opened.tensors.items()}
    prefix = next((found[1] for key in tensors if (found := re.fullmatch(SIGN, key))), None)
    if prefix is None:
        return opened
    for pattern, what in REFUSED.items():
        if found := [key for key in tensors if re.fullmatch(re.escape(prefix) + pattern, key)]:
            opened.problems.append(
                f"{found[0]}: DINOv2 with {what}, which our EVA-ViT does not have: take "
                "dinov2-small, -base or -large"
            )
            return opened
    others = [key for key in tensors if not key.startswith(prefix)]
    for key in others:  # of a head or decoder on a backbone
        del tensors[key]
    if others:
        names = ", ".join(dict.fromkeys(key.split(".")[0] for key in others))
        opened.notes.append(f"left out {len(others)} tensors: not of the backbone ({names})")
    layer = re.compile(rf"{re.escape(prefix)}encoder\.layer\.(\d+)\..*")
    for i in sorted({int(found[1]) for key in tensors if (found := layer.fullmatch(key))}):
        opened.problems += _fold(tensors, f"{prefix}encoder.layer.{i}.")
    opened.tensors = tensors
    return opened


def fit(opened: Opened, cfg: EmoLlamaConfig) -> tuple[EmoLlamaConfig, list[Row]]:
    """The config with the tower that the file says it is; the picture's size stays the config's."""
    found = {
        path: held
        for path, held in opened.settings.items()
        if path.name == CONFIG or path.suffix == ONNX
    }
    cfg = read_sizes(opened, found, cfg, plain=PLAIN, sized=_sized)
    if found and not opened.problems:
        vision = cfg.vision
        opened.notes.append(
            f"model.vision must have width: {vision.width}, depth: {vision.depth}, heads: "
            f"{vision.heads}, mlp_width: {vision.mlp_width}, patch_size: {vision.patch_size}, "
            f"norm_eps: {vision.norm_eps:g}, last_norm: true, image_mean: "
            f"{list(vision.image_mean)}, image_std: {list(vision.image_std)}"
        )
    return cfg, []


def _sized(cfg: EmoLlamaConfig, held: Mapping[str, Any]) -> EmoLlamaConfig:
    width, patch = size(held, "hidden_size"), held.get("patch_size")
    if isinstance(patch, list | tuple) and len(set(patch)) == 1:
        held = {**held, "patch_size": patch[0]}
    heads = size(held, "num_attention_heads")
    if width % heads:
        raise Wrong(f"num_attention_heads is {heads}, wanted a divisor of hidden_size {width}")
    vision = dataclasses.replace(
        cfg.vision,
        width=width,
        depth=size(held, "num_hidden_layers"),
        heads=heads,
        mlp_width=round(width * number(held, "mlp_ratio")),
        patch_size=size(held, "patch_size"),
        norm_eps=number(held, "layer_norm_eps"),
        last_norm=True,
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
    )
    return dataclasses.replace(cfg, vision=vision)


def _open_onnx(paths: Sequence[pathlib.Path]) -> Opened:
    opened, path = Opened(), paths[0]
    if len(paths) > 1:
        opened.problems.append(f"--src: {len(paths)} paths, wanted only one ONNX file")
    elif not path.is_file():
        opened.problems.append(f"{path}: no such file")
    else:
        try:
            opened.tensors, settings, others = read_dinov2(path)
        except Unreadable as error:
            opened.problems.append(f"{path}: {error}")
            return opened
        opened.files[path], opened.settings[path] = path.stat().st_size, settings
        if others:
            opened.notes.append(f"left out {others} tensors: not of the backbone")
    return opened


def _as_in_files(key: str) -> str:
    for name, other in MODULES.items():
        key = key.replace(name, other)
    return key


def _fold(tensors: dict[str, Tensor], layer: str) -> list[str]:
    """Joins a layer's q, k and v, and folds its LayerScale, in place; returns what is wrong."""
    kernels = [f"{layer}attention.attention.{part}.weight" for part in ("query", "key", "value")]
    pairs = [
        (f"{layer}{scale}.lambda1", f"{layer}{linear}.{part}")
        for scale, linear in SCALED.items()
        for part in ("weight", "bias")
    ]
    problems = [
        f"{key}: missing"
        for key in dict.fromkeys([*kernels, *(key for pair in pairs for key in pair)])
        if key not in tensors
    ]
    if problems:
        return problems
    q, k, v = (tensors.pop(key) for key in kernels)
    if not (len(q.shape) == 2 and q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype):
        found = ", ".join(f"{part.shape} {part.dtype}" for part in (q, k, v))
        return [f"{kernels[0]}: q, k and v are {found}, wanted three equal ones"]
    tensors[f"{layer}attention.attention.qkv.weight"] = Tensor(
        (3 * q.shape[0], q.shape[1]),
        q.dtype,
        q.file,
        lambda: np.concatenate([q.read(), k.read(), v.read()]),
    )
    for scale, key in pairs:
        if tensors[scale].shape != tensors[key].shape[:1]:
            problems.append(
                f"{scale}: shape {tensors[scale].shape}, wanted {tensors[key].shape[:1]}"
            )
        else:
            tensors[key] = _product(tensors[key], tensors[scale])
    for scale in dict.fromkeys(scale for scale, _ in pairs):
        del tensors[scale]
    return problems


def _product(tensor: Tensor, scale: Tensor) -> Tensor:
    """λ·x along the first axis, in float32: a product has more digits than its factors."""
    wrong = [part.dtype for part in (tensor, scale) if part.dtype not in FLOATS]

    def read() -> np.ndarray:
        x, factor = tensor.read().astype(np.float32), scale.read().astype(np.float32)
        return x * factor.reshape(-1, *(1,) * (x.ndim - 1))

    return Tensor(tensor.shape, wrong[0] if wrong else np.dtype(np.float32), tensor.file, read)
