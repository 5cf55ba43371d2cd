"""The sizes of the LLaMA-VIDs whose outputs golden files hold.

Sizes come from a state dict's shapes or from the file's own words; what no shape shows (heads,
norms' eps) is what the original was built with, as tests/golden/README.md states it.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from emollama_jax.config import EvaVitConfig, LlamaConfig, LoraConfig, QFormerConfig
from tools.convert_torch.llama_vid import TOWER

FLOAT32 = {"dtype": "float32", "remat": "none"}
NO_LORA = LoraConfig(rank=0, alpha=1.0, dropout=0.0, targets=())
BERT = "model.vlm_att_encoder.bert"


def llama_vid_sizes(
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[LlamaConfig, EvaVitConfig, QFormerConfig]:
    """The networks of `llama_vid.json`, from its shapes.

    Raises:
        KeyError: a shape that is missing.
    """

    def layers(pattern: str) -> int:
        found = [re.fullmatch(pattern, key) for key in shapes]
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    vocab, width = shapes["model.embed_tokens.weight"]
    heads = 8
    patch = shapes[f"{TOWER}patch_embed.proj.weight"][-1]
    patches = shapes[f"{TOWER}pos_embed"][1] - 1
    visual = shapes[f"{TOWER}cls_token"][-1]
    words, inner = shapes[f"{BERT}.embeddings.word_embeddings.weight"]
    return (
        _llama(
            vocab_size=vocab,
            width=width,
            mlp_width=shapes["model.layers.0.mlp.gate_proj.weight"][0],
            layers=layers(r"model\.layers\.(\d+)\.input_layernorm\.weight"),
            heads=heads,
            kv_heads=shapes["model.layers.0.self_attn.k_proj.weight"][0] * heads // width,
            norm_eps=1e-5,
            rope_theta=10000.0,
            max_positions=4096,
        ),
        _vision(
            image_size=patch * math.isqrt(patches),
            patch_size=patch,
            width=visual,
            depth=layers(re.escape(TOWER) + r"blocks\.(\d+)\.norm1\.weight"),
            heads=16,
            mlp_width=shapes[f"{TOWER}blocks.0.mlp.fc1.weight"][0],
            norm_eps=1e-6,
        ),
        _qformer(
            vocab_size=words,
            width=inner,
            layers=layers(
                re.escape(f"{BERT}.encoder.layer.") + r"(\d+)\.attention\.self\.query\.weight"
            ),
            heads=12,
            mlp_width=shapes[f"{BERT}.encoder.layer.0.intermediate.dense.weight"][0],
            max_positions=shapes[f"{BERT}.embeddings.position_embeddings.weight"][0],
            encoder_width=visual,
            encoder_norm_eps=1e-5,
            cross_attention_every=2,
            queries=shapes["model.vlm_att_query"][1],
            norm_eps=1e-12,
        ),
    )


def tiny_sizes(meta: Mapping[str, Any]) -> tuple[LlamaConfig, EvaVitConfig, QFormerConfig]:
    """The networks of `llama_vid_tiny.npz`, from its `meta_json`.

    Raises:
        KeyError: a size that is missing.
    """
    llama, eva, bert = meta["llama"], meta["eva"], meta["qformer"]
    return (
        _llama(
            vocab_size=llama["vocab"],
            width=llama["hidden"],
            mlp_width=llama["inter"],
            layers=llama["layers"],
            heads=llama["heads"],
            kv_heads=llama["heads"],
            norm_eps=llama["rms_eps"],
            rope_theta=llama["theta"],
            max_positions=llama["max_pos"],
        ),
        _vision(
            image_size=meta["image_size"],
            patch_size=meta["patch"],
            width=eva["dim"],
            depth=eva["depth"],
            heads=eva["heads"],
            mlp_width=eva["mlp"],
            norm_eps=eva["ln_eps"],
        ),
        _qformer(
            vocab_size=bert["vocab"],
            width=bert["hidden"],
            layers=bert["layers"],
            heads=bert["heads"],
            mlp_width=bert["inter"],
            max_positions=bert["max_pos"],
            encoder_width=eva["dim"],
            encoder_norm_eps=meta["vlm_att_ln_eps"],
            cross_attention_every=bert["cross_freq"],
            queries=bert["num_query"],
            norm_eps=bert["ln_eps"],
        ),
    )


def _llama(**fields: Any) -> LlamaConfig:
    """A LLaMA without padding of its vocabulary, scaling of positions or adapters."""
    head_dim = fields["width"] // fields["heads"]
    plain = {"vocab_multiple": 1, "lora": NO_LORA, "tied": False}
    rope = {"rope_scaling": 1.0, "rope_llama3": None}
    return LlamaConfig(**fields, **plain, **rope, **FLOAT32, head_dim=head_dim, attention="xla")


def _vision(**fields: Any) -> EvaVitConfig:
    """A tower; its pictures come normalised."""
    plain = {"image_mean": (0.0,) * 3, "image_std": (1.0,) * 3, "last_norm": False}
    return EvaVitConfig(**fields, **FLOAT32, **plain, attention="xla")


def _qformer(**fields: Any) -> QFormerConfig:
    return QFormerConfig(**fields, **FLOAT32, dropout=0.0)
