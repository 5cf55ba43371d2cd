"""PEFT's LoRA adapters: their names, their settings, and ours from them.

A PEFT adapter names its matrices after the Linear that they sit on; so do we. Settings go by an
allow-list: what is neither known to leave the numbers alone nor its default is refused by name, so
that a kind of LoRA that is not invented yet is refused too.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from emollama_jax.config import LlamaConfig
from tools.convert_torch.engine import TRANSPOSE, Row

PREFIX = "base_model.model.model."  # of a causal LM's adapter
HOME = {  # projection → the module that holds it
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp"),
}
_PLACES = "|".join(rf"{home}\.{target}" for target, home in HOME.items())
SEEING = r"(?:(?!vision|visual|encoder).)*?"  # not a tower, whose projections are called alike
KEY = re.compile(  # layer, place, side and, in what `torch.save` wrote, the adapter's name
    rf"(?P<prefix>{SEEING})layers\.(?P<layer>\d+)\.(?P<place>{_PLACES})"
    r"\.lora_(?P<side>[AB])(?:\.(?P<name>[^.]+))?\.weight"
)
SIGN = rf"({SEEING})layers\.\d+\.(?:{_PLACES})\.lora_A(?:\.[^.]+)?\.weight"
READ = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules")
# Settings that change no number of a finished adapter, whatever they are.
FREE = (
    *("base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping"),
    *("peft_version", "megatron_core", "qalora_group_size", "runtime_config"),
)
# Settings that may be as here; every other one must be null, false or empty.
EXACT: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # How the matrices began. All others begin by changing the base, or need more than this file.
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
}
EMPTY = (None, False, {}, [])
INSTEAD = "merge it into its base with PEFT (merge_and_unload) and convert that as llama"


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
    """Rank, alpha and dropout of our `LoraConfig`, and what we cannot represent.

    The scale by √r of rsLoRA is a larger alpha. The targets follow from the keys.
    """
    problems = []
    for key, value in settings.items():
        if key in READ or key in FREE or _is_one_of(value, EXACT.get(key, EMPTY)):
            continue
        wanted = " or ".join(map(_said, EXACT[key] if key in EXACT else (_like(value),)))
        problems.append(f"{key} is {_said(value)}, wanted {wanted}: {INSTEAD}")
    problems += [f"{key} is missing" for key in ("r", "lora_alpha") if key not in settings]
    rank, alpha = settings.get("r", 1), settings.get("lora_alpha", 1)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        problems.append(f"r is {_said(rank)}, wanted a whole number of at least 1")
    if not _finite(alpha):
        problems.append(f"lora_alpha is {_said(alpha)}, wanted a number")
    dropout = settings.get("lora_dropout") or 0.0
    if not _finite(dropout) or not 0 <= dropout <= 1:
        problems.append(f"lora_dropout is {_said(dropout)}, wanted a number from 0 to 1")
    rooted = settings.get("use_rslora") or False
    if not isinstance(rooted, bool):
        problems.append(f"use_rslora is {_said(rooted)}, wanted true or false")
    targets = settings.get("target_modules")
    words = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    if not (targets is None or isinstance(targets, str) or words):
        problems.append(f"target_modules is {_said(targets)}, wanted names or a pattern")
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            problems.append(f"target_modules is {_said(targets)}, which is not a pattern ({error})")
    if problems:
        return {}, problems
    scale = math.sqrt(rank) if rooted else 1.0
    return {"rank": rank, "alpha": float(alpha * scale), "dropout": float(dropout)}, []


def is_target(targets: list[str] | str | None, module: str) -> bool:
    """Whether PEFT puts an adapter on a module, by an adapter's `target_modules`."""
    if targets is None or targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


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


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """`in`, but 0 is not False."""
    return any(type(value) is type(each) and value == each for each in allowed)


def _finite(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _like(value: Any) -> Any:
    return False if isinstance(value, bool) else None


def _said(value: Any) -> str:
    """As the file has it, not longer than a line bears."""
    said = json.dumps(value)
    return said if len(said) <= 80 else f"{said[:77]}…"
