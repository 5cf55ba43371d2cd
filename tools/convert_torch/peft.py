"""PEFT's LoRA adapters: their names, their settings, and ours from them.

A PEFT adapter names its matrices after the Linear that they sit on; so do we. What PEFT can do and
our `Linear` cannot (rank patterns, DoRA, scaling by √r, trained biases) is refused.
"""

from collections.abc import Mapping
from typing import Any

from emollama_jax.config import LlamaConfig
from tools.convert_torch.engine import TRANSPOSE, Row

SIGN = r"(.*)layers\.0\.(?:self_attn|mlp)\.\w+\.lora_A\.weight"
PREFIX = "base_model.model.model."  # of a causal LM's adapter
HOME = {  # projection → the module that holds it
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp"),
}
# Settings of adapter_config.json that must be as here, or absent.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "exclude_modules": (None, []),
    "lora_bias": (False, None),
}


def adapter(cfg: LlamaConfig, prefix: str = PREFIX) -> list[Row]:
    """The rows of an adapter on the config's targets."""
    return [
        Row(
            f"{prefix}layers.{{i}}.{HOME[target]}.{target}.lora_{side}.weight",
            f"llama/layers/{target}/lora_{side}",
            TRANSPOSE,
        )
        for target in cfg.lora.targets
        for side in "AB"
    ]


def lora_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Fields of our `LoraConfig` out of an `adapter_config.json`, and what we cannot represent."""
    problems = [
        f"adapter_config.json: {key} is {settings[key]!r}, wanted {allowed[0]!r}"
        for key, allowed in PLAIN.items()
        if key in settings and settings[key] not in allowed
    ]
    missing = [key for key in ("r", "lora_alpha", "target_modules") if key not in settings]
    problems += [f"adapter_config.json: {key} is missing" for key in missing]
    if missing:
        return {}, problems
    targets = settings["target_modules"]
    if targets == "all-linear":
        targets = list(HOME)
    if isinstance(targets, str):
        problems.append(
            f"adapter_config.json: target_modules is the pattern {targets!r}, wanted a list of "
            f"{', '.join(HOME)}"
        )
        return {}, problems
    unknown = sorted(set(targets) - set(HOME))
    if unknown:
        problems.append(
            f"adapter_config.json: target_modules has {', '.join(unknown)}, wanted some of "
            f"{', '.join(HOME)}"
        )
    fields = {
        "rank": settings["r"],
        "alpha": float(settings["lora_alpha"]),
        "dropout": float(settings.get("lora_dropout", 0.0)),
        "targets": tuple(target for target in HOME if target in targets),
    }
    return fields, problems


def to_settings(cfg: LlamaConfig) -> dict[str, Any]:
    """The `adapter_config.json` of our adapters."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": cfg.lora.rank,
        "lora_alpha": cfg.lora.alpha,
        "lora_dropout": cfg.lora.dropout,
        "target_modules": list(cfg.lora.targets),
        "bias": "none",
        "inference_mode": True,
    }
