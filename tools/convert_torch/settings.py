"""A checkpoint's own settings (`config.json`, `adapter_config.json`) into the model's config."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from emollama_jax.config import EmoLlamaConfig
from tools.convert_torch.peft import lora_settings

# Fields of our LlamaConfig by their names in `transformers`.
LLAMA = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "mlp_width": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "norm_eps": "rms_norm_eps",
    "max_positions": "max_position_embeddings",
}
# Settings that must be as here, or absent: what our LLaMA does not do.
PLAIN: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "tie_word_embeddings": (False, None),
    "pretraining_tp": (1, None),
    "mm_projector_type": ("mlp2x_gelu", None),
}


def from_transformers(
    cfg: EmoLlamaConfig, settings: Mapping[str, Any]
) -> tuple[EmoLlamaConfig, list[str]]:
    """The model's config with the LLaMA of a `config.json`, and what we cannot represent.

    A `config.json` that is not of a LLaMA (of a vision tower, of an adapter) changes nothing.
    """
    if "target_modules" in settings:
        return _with_adapter(cfg, settings)
    text = settings.get("text_config", settings)
    if settings.get("model_type") not in ("llama", "llava", None) or "rms_norm_eps" not in text:
        return cfg, []
    problems = [
        f"config.json: {key} is {text[key]!r}, wanted {allowed[0]!r}"
        for key, allowed in PLAIN.items()
        if key in text and text[key] not in allowed
    ]
    seen = text.get("mm_hidden_size", cfg.vision.width)
    if seen != cfg.vision.width:
        problems.append(
            f"config.json: mm_hidden_size is {seen}, wanted model.vision.width {cfg.vision.width}"
        )
    missing = [theirs for theirs in LLAMA.values() if theirs not in text]
    if missing:
        return cfg, [*problems, f"config.json: {', '.join(missing)} missing"]
    heads = text["num_attention_heads"]
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear"):
        problems.append(f"config.json: rope scaling {kind!r}, wanted 'linear' or none")
    fields = {ours: text[theirs] for ours, theirs in LLAMA.items()}
    llama = dataclasses.replace(
        cfg.llama,
        **fields,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        rope_theta=float(rope.get("rope_theta") or text.get("rope_theta") or 10000.0),
        rope_scaling=float(rope.get("factor", 1.0)) if kind == "linear" else 1.0,
    )
    return dataclasses.replace(cfg, llama=llama), problems


def _with_adapter(
    cfg: EmoLlamaConfig, settings: Mapping[str, Any]
) -> tuple[EmoLlamaConfig, list[str]]:
    fields, problems = lora_settings(settings)
    if not fields:
        return cfg, problems
    lora = dataclasses.replace(cfg.llama.lora, **fields)
    return dataclasses.replace(cfg, llama=dataclasses.replace(cfg.llama, lora=lora)), problems


def to_transformers(cfg: EmoLlamaConfig, *, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model's LLaMA, read by `transformers` 4 and 5."""
    llama = cfg.llama
    scaling = None
    if llama.rope_scaling != 1.0:
        scaling = {"type": "linear", "rope_type": "linear", "factor": llama.rope_scaling}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(llama, ours) for ours, theirs in LLAMA.items()},
        "num_key_value_heads": llama.kv_heads,
        "head_dim": llama.head_dim,
        "rope_theta": llama.rope_theta,
        "rope_scaling": scaling,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype,
    }
