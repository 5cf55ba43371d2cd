"""A BERT (Devlin et al. 2018) as the start of a Q-Former, as LAVIS starts its own.

Self-attention, embeddings and the text's feed-forward are BERT's; the queries' feed-forward begins
as a copy of it. The queries themselves, cross-attention and the norm of the vision tokens are in no
BERT: they are drawn when training starts. The Q-Former has no token types, so the first one's
embedding, which every token of a question has, goes into the positions.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from emollama_jax.config import EmoLlamaConfig
from tools.convert_torch.engine import FLOATS, Row, Transform, linear, norm
from tools.convert_torch.files import CONFIG, Opened, Tensor, open_paths
from tools.convert_torch.settings import Wrong, number, read_sizes, size

VOCABULARY = "vocab.txt"  # that the folder carries
SIGN = r"((?:.*\.)?)embeddings\.token_type_embeddings\.weight"
FILLS = r"qformer/(?!query$)(?!.*/crossattention/).*"
FREE = ("queries", "encoder_width", "encoder_norm_eps")  # of what is not BERT's
IGNORE = {
    r"(.*\.)?pooler\..*": "head of a pretraining task",
    r"(cls|classifier|qa_outputs)\..*": "head of another task",
    r".*embeddings\.position_ids": "buffer: 0, 1, 2, …",
    r".*embeddings\.token_type_embeddings\.weight": "its first row is added to the positions",
}
PLAIN: dict[str, tuple[Any, ...]] = {  # settings that must be as here, or absent
    "model_type": ("bert",),
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
}
SIZES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "max_positions": "max_position_embeddings",
}


def _twice(x: np.ndarray) -> np.ndarray:
    return np.broadcast_to(x, (2, *x.shape))


# For text and for queries. Only the text's is what BERT has.
TWICE = Transform("twice", _twice, lambda x: x[0])
TRANSPOSE_TWICE = Transform("transpose, twice", lambda x: _twice(np.transpose(x)), lambda x: x[0].T)


def rows(every: int, prefix: str) -> list[Row]:
    """The table, for what `open_bert` gives.

    Args:
        every: cross-attention in every n-th layer of the Q-Former.
        prefix: before all keys.
    """
    embeddings = f"{prefix}embeddings"
    found = [
        Row(f"{embeddings}.word_embeddings.weight", "qformer/word_embeddings"),
        Row(f"{embeddings}.position_embeddings.weight", "qformer/position_embeddings"),
        *norm(f"{embeddings}.LayerNorm", "qformer/norm"),
    ]
    layer = f"{prefix}encoder.layer.{{i}}"
    for k in range(every):
        ours = "qformer/groups/" + ("cross" if k == 0 else f"plain/{k - 1}")
        numbering = {"first": k, "stride": every}
        attention = f"{layer}.attention"
        for part in ("query", "key", "value"):
            path = f"{ours}/attention/{part}"
            found += linear(f"{attention}.self.{part}", path, bias=True, **numbering)
        found += linear(
            f"{attention}.output.dense", f"{ours}/attention/dense", bias=True, **numbering
        )
        found += norm(f"{attention}.output.LayerNorm", f"{ours}/attention/norm", **numbering)
        for theirs, mine, change in (
            ("intermediate.dense.weight", "intermediate/kernel", TRANSPOSE_TWICE),
            ("intermediate.dense.bias", "intermediate/bias", TWICE),
            ("output.dense.weight", "output/kernel", TRANSPOSE_TWICE),
            ("output.dense.bias", "output/bias", TWICE),
            ("output.LayerNorm.weight", "norm/scale", TWICE),
            ("output.LayerNorm.bias", "norm/bias", TWICE),
        ):
            both = (f"{ours}/text_ffn/{mine}", f"{ours}/query_ffn/{mine}")
            found.append(Row(f"{layer}.{theirs}", both, change, **numbering))
    return found


def open_bert(paths: Sequence[pathlib.Path]) -> Opened:
    """Opens Hugging Face's files; the first token type's embedding goes into the positions."""
    opened = open_paths(paths, carried=(VOCABULARY,))
    prefix = next((found[1] for key in opened.tensors if (found := re.fullmatch(SIGN, key))), None)
    if prefix is None:
        return opened
    key = f"{prefix}embeddings.position_embeddings.weight"
    types = opened.tensors[f"{prefix}embeddings.token_type_embeddings.weight"]
    positions = opened.tensors.get(key)
    if positions is None:
        return opened
    if len(types.shape) != 2 or types.shape[1:] != positions.shape[1:]:
        opened.problems.append(
            f"{key}: shape {positions.shape}, token types {types.shape}: wanted one width"
        )
        return opened
    wrong = [part.dtype for part in (positions, types) if part.dtype not in FLOATS]
    opened.tensors[key] = Tensor(
        positions.shape,
        wrong[0] if wrong else np.dtype(np.float32),
        positions.file,
        lambda: positions.read().astype(np.float32) + types.read()[0].astype(np.float32),
    )
    return opened


def fit(opened: Opened, cfg: EmoLlamaConfig) -> tuple[EmoLlamaConfig, list[Row]]:
    """The config with a Q-Former of BERT's sizes; what BERT has not stays the config's."""
    found = opened.named(CONFIG)
    cfg = read_sizes(opened, found, cfg, plain=PLAIN, sized=_sized)
    if found and not opened.problems:
        said = ", ".join(f"{ours}: {getattr(cfg.qformer, ours)}" for ours in SIZES)
        opened.notes.append(
            f"model.qformer must have {said}, norm_eps: {cfg.qformer.norm_eps:g}, "
            f"cross_attention_every: {cfg.qformer.cross_attention_every}"
        )
    return cfg, []


def _sized(cfg: EmoLlamaConfig, held: Mapping[str, Any]) -> EmoLlamaConfig:
    fields = {ours: size(held, theirs) for ours, theirs in SIZES.items()}
    every = cfg.qformer.cross_attention_every
    if fields["width"] % fields["heads"]:
        raise Wrong(
            f"num_attention_heads is {fields['heads']}, wanted a divisor of hidden_size "
            f"{fields['width']}"
        )
    if fields["layers"] % every:
        raise Wrong(
            f"num_hidden_layers is {fields['layers']}, wanted a multiple of "
            f"model.qformer.cross_attention_every {every}: change that with --set"
        )
    qformer = dataclasses.replace(cfg.qformer, **fields, norm_eps=number(held, "layer_norm_eps"))
    return dataclasses.replace(cfg, qformer=qformer)
