"""A checkpoint's own `config.json` into the model's config, or why it cannot be.

Only a `model_type` whose language model computes what our LLaMA computes is read, and of it every
field that changes a number. Whatever else would change one is refused by name; a field that the
format leaves out has the format's own default, never our config's.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from emollama_jax.config import EmoLlamaConfig, LlamaConfig, RopeLlama3Config
from tools.convert_torch.files import CONFIG, Opened

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
MODEL_TYPES = ("llama", "mistral", "llava", "llava_llama", "llava_mistral")
# What `transformers` leaves out of a text_config of model_type llama, since it is its default.
NESTED: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
}
ROPE_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")
ORIGINAL = "original_max_position_embeddings"
ROPE_THETA = 10000.0  # where a config.json names none: it is older than the field
MISTRAL_WINDOW = 4096  # the same
MOST = 1 << 24  # of any size
MOST_LAYERS = 1 << 10
OFF = (False, None)
ONE = (1, None)
NONE = (None, 0, [])
# Settings that must be as here, or absent: what our LLaMA does not do.
PLAIN: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish", None),
    **dict.fromkeys(("attention_bias", "qkv_bias", "mlp_bias", "use_bias", "bias"), OFF),
    "pretraining_tp": ONE,
    **dict.fromkeys(("qk_norm", "use_qk_norm", "qk_layernorm"), OFF),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "logit_softcap"), NONE),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "rope_percent"), ONE),
    **dict.fromkeys(("rope_interleaved", "rope_interleave", "alibi", "use_alibi"), OFF),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling"), ONE),
    **dict.fromkeys(("logit_scale", "scale_emb", "mup_multiplier"), ONE),
    **dict.fromkeys(("attention_multiplier", "query_pre_attn_scalar", "scale_depth"), NONE),
    **dict.fromkeys(("clip_qkv", "attention_chunk_size", "no_rope_layers", "attn_scale"), NONE),
    **dict.fromkeys(("parallel_attn", "use_parallel_residual", "parallel_residual"), OFF),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), NONE),
}


class Wrong(Exception):
    """A setting that has no place in ours."""


def from_transformers(
    cfg: EmoLlamaConfig, opened: Opened, *, sections: Collection[str]
) -> EmoLlamaConfig:
    """The model's config with the LLaMA of the `config.json` beside the weights.

    Args:
        cfg: the config to start from.
        opened: with the settings; what cannot be read goes to its problems, what a person should
            know to its notes.
        sections: sections of the config to read; with "vision", a `config.json` of another network
            may be beside the LLaMA's.
    """
    sees = "vision" in sections
    found: dict[pathlib.Path, LlamaConfig] = {}
    for path, settings in opened.of_models().items():
        if sees and not _speaks(settings):
            opened.notes.append(f"{path}: not of a LLaMA, not read")
            continue
        llama, problems = _llama(cfg.llama, settings)
        if sees:
            problems += _vision(cfg, settings)
        quantized = _quantized(settings)
        if quantized and "lora" in sections:  # of the base, while the adapter was trained
            opened.notes.append(f"{path}: the base was quantized by {quantized} in training")
        elif quantized:
            problems.append(f"quantization_config ({quantized}), wanted weights as floats")
        if problems:
            opened.problems += [f"{path}: {problem}" for problem in problems]
            return cfg
        if left := _left_out(settings):
            opened.notes.append(
                f"{path}: its text_config leaves out {', '.join(left)}: transformers' defaults"
            )
        found[path] = llama
    if not found:
        if opened.tensors:
            opened.notes.append(
                f"no {CONFIG} of a LLaMA beside the weights: sizes, rope_theta and norm_eps are "
                "those of --config"
            )
        return cfg
    first = next(iter(found))
    for path, llama in found.items():
        if llama != found[first]:
            opened.problems.append(f"{path}: another LLaMA than {first} has: keep one of them")
    return dataclasses.replace(cfg, llama=found[first])


def _text(settings: Mapping[str, Any]) -> tuple[Any, bool]:
    """The settings of the language model, and whether they are nested."""
    text = settings.get("text_config")
    return (settings, False) if text is None else (text, True)


def _speaks(settings: Mapping[str, Any]) -> bool:
    text, _ = _text(settings)
    return isinstance(text, dict) and ("rms_norm_eps" in text or _type(settings) in MODEL_TYPES)


def _type(settings: Mapping[str, Any]) -> Any:
    """The model_type of the language model; None where nothing names it."""
    text, nested = _text(settings)
    kind = text.get("model_type")
    return "llama" if nested and kind is None and settings.get("model_type") == "llava" else kind


def _left_out(settings: Mapping[str, Any]) -> list[str]:
    text, nested = _text(settings)
    return [key for key in NESTED if key not in text] if nested else []


def _llama(cfg: LlamaConfig, settings: Mapping[str, Any]) -> tuple[LlamaConfig, list[str]]:
    """Our LLaMA's config out of a `config.json`, and what we cannot represent."""
    text, nested = _text(settings)
    if not isinstance(text, dict):
        return cfg, [f"text_config is {text!r}, wanted an object"]
    kind = _type(settings)
    if kind is not None and kind not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        return cfg, [
            f"model_type is {kind!r}, wanted one of {known} (if it computes exactly what LLaMA "
            "does, write llama there)"
        ]
    if nested and kind == "llama":
        text = NESTED | text
    missing = [theirs for theirs in LLAMA.values() if theirs not in text]
    if missing:
        return cfg, [f"{', '.join(missing)} missing: write what the model was made with"]
    problems = [
        f"{key} is {text[key]!r}, wanted {allowed[0]!r}"
        for key, allowed in PLAIN.items()
        if key in text and text[key] not in allowed
    ]
    fields: dict[str, Any] = {}
    for ours, theirs in LLAMA.items():
        read = number if ours == "norm_eps" else size
        problems += _into(fields, ours, lambda read=read, theirs=theirs: read(text, theirs))
    problems += _into(fields, "kv_heads", lambda: size(text, "num_key_value_heads", None))
    problems += _into(fields, "head_dim", lambda: size(text, "head_dim", None))
    problems += _into(fields, "rope", lambda: _rope(text))
    problems += _into(fields, "tied", lambda: _truth(text, "tie_word_embeddings"))
    if problems:
        return cfg, problems
    theta, scaling, llama3 = fields.pop("rope")
    heads, width = fields["heads"], fields["width"]
    fields["kv_heads"] = fields["kv_heads"] or heads
    if fields["head_dim"] is None and width % heads:
        return cfg, [f"hidden_size {width} is not a multiple of num_attention_heads {heads}"]
    fields["head_dim"] = fields["head_dim"] or width // heads
    if heads % fields["kv_heads"] or fields["head_dim"] % 2:
        return cfg, [
            f"num_attention_heads {heads}, num_key_value_heads {fields['kv_heads']}, head_dim "
            f"{fields['head_dim']}: the second must divide the first, the third be even"
        ]
    rope = {"rope_theta": theta, "rope_scaling": scaling, "rope_llama3": llama3}
    llama = dataclasses.replace(cfg, **fields, **rope)
    return llama, _window(text, kind, reach=llama.reach)


def _quantized(settings: Mapping[str, Any]) -> str:
    text, _ = _text(settings)
    found = settings.get("quantization_config")
    if not found and isinstance(text, dict):
        found = text.get("quantization_config")
    if not found:
        return ""
    return str(found.get("quant_method") if isinstance(found, dict) else found)


def _into(fields: dict[str, Any], name: str, read: Callable[[], Any]) -> list[str]:
    try:
        fields[name] = read()
    except Wrong as error:
        return [str(error)]
    return []


def read_sizes(
    opened: Opened,
    found: Mapping[pathlib.Path, Mapping[str, Any]],
    cfg: EmoLlamaConfig,
    *,
    plain: Mapping[str, Sequence[Any]],
    sized: Callable[[EmoLlamaConfig, Mapping[str, Any]], EmoLlamaConfig],
) -> EmoLlamaConfig:
    """The config with the sizes that settings beside weights tell; what does not fit is a problem.

    Args:
        opened: opened files, to which problems are added.
        found: settings by their file.
        cfg: to change.
        plain: key → the values it may have, wherever it is.
        sized: the config with the sizes of one file; may raise `Wrong`.
    """
    if not found and opened.tensors:
        opened.problems.append(
            f"no {CONFIG} beside the weights: it gives the number of heads and the norms' epsilon: "
            "put it there"
        )
    for path, held in found.items():
        opened.problems += [
            f"{path}: {key} is {held[key]!r}, wanted {allowed[0]!r}"
            for key, allowed in plain.items()
            if key in held and held[key] not in allowed
        ]
        if opened.problems:
            break
        try:
            cfg = sized(cfg, held)
        except Wrong as error:
            opened.problems.append(f"{path}: {error}")
            break
    return cfg


def size(text: Mapping[str, Any], key: str, *default: Any) -> Any:
    """A whole number above 0; where it is absent, the default, if one is given."""
    value = text.get(key)
    if value is None and default:
        return default[0]
    most = MOST_LAYERS if key == LLAMA["layers"] else MOST
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
        raise Wrong(f"{key} is {value!r}, wanted a whole number from 1 to {most}")
    return value


def number(held: Mapping[str, Any], key: str) -> float:
    """A finite number above 0."""
    value = held.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Wrong(f"{key} is {value!r}, wanted a number above 0")
    if not (math.isfinite(value) and value > 0):
        raise Wrong(f"{key} is {value!r}, wanted a number above 0")
    return float(value)


def _truth(text: Mapping[str, Any], key: str) -> bool:
    """A setting that is false where it is left out."""
    value = text.get(key)
    if value not in (True, False, None):
        raise Wrong(f"{key} is {value!r}, wanted true or false")
    return bool(value)


def _rope(text: Mapping[str, Any]) -> tuple[float, float, RopeLlama3Config | None]:
    """Rotary angles' theta, what positions are divided by, and Llama 3.1's scaling."""
    old, new = text.get("rope_scaling") or {}, text.get("rope_parameters") or {}
    for key, held in (("rope_scaling", old), ("rope_parameters", new)):
        if not isinstance(held, dict):
            raise Wrong(f"{key} is {held!r}, wanted an object")
        if any(isinstance(value, dict) for value in held.values()):
            raise Wrong(f"{key} has parameters for each kind of layer, wanted one set for all")
    if old and new and _scaling(old, "rope_scaling") != _scaling(new, "rope_parameters"):
        raise Wrong(f"rope_scaling is {old!r} and rope_parameters {new!r}: keep one of them")
    scaling = _scaling(new, "rope_parameters") if new else _scaling(old, "rope_scaling")
    for held in (new, old, text):
        if held.get("rope_theta") is not None:
            return number(held, "rope_theta"), *scaling
    return ROPE_THETA, *scaling


def _scaling(rope: Mapping[str, Any], name: str) -> tuple[float, RopeLlama3Config | None]:
    kind = rope.get("rope_type", rope.get("type"))
    if kind is None and not set(rope) - {"rope_theta", "partial_rotary_factor"}:
        kind = "default"
    if kind not in ("default", "linear", "llama3"):
        raise Wrong(f"{name} is of type {kind!r}, wanted 'linear', 'llama3' or none")
    if rope.get("partial_rotary_factor") not in ONE:
        raise Wrong(f"partial_rotary_factor is {rope['partial_rotary_factor']!r}, wanted 1")
    if kind != "llama3":
        return (number(rope, "factor") if kind == "linear" else 1.0), None
    fields = {key: number(rope, key) for key in ROPE_LLAMA3}
    first = size(rope, ORIGINAL)
    low, high = fields["low_freq_factor"], fields["high_freq_factor"]
    if high <= low:
        raise Wrong(f"high_freq_factor is {high:g}, wanted more than low_freq_factor {low:g}")
    return 1.0, RopeLlama3Config(**fields, original_max_positions=first)


def _window(text: Mapping[str, Any], kind: str | None, *, reach: int) -> list[str]:
    """Attention that does not reach all that came before."""
    types = text.get("layer_types") or []
    if not isinstance(types, list) or any(each != "full_attention" for each in types):
        return [f"layer_types is {types!r}, wanted full_attention for every layer"]
    mistral = kind in ("mistral", "llava_mistral")
    window = text.get("sliding_window", MISTRAL_WINDOW if mistral else None)
    if window is None or (not mistral and text.get("use_sliding_window") is False):
        return []
    if isinstance(window, bool) or not isinstance(window, int) or window < reach:
        return [
            f"sliding_window is {window!r} and positions reach {reach}, wanted null: for texts no "
            "longer than the window, set max_position_embeddings to it"
        ]
    return []


def _vision(cfg: EmoLlamaConfig, settings: Mapping[str, Any]) -> list[str]:
    """What leads from the vision tower to LLaMA."""
    problems = []
    seen = settings.get("mm_hidden_size", cfg.vision.width)
    if seen != cfg.vision.width:
        problems.append(f"mm_hidden_size is {seen!r}, wanted model.vision.width {cfg.vision.width}")
    projector = settings.get("mm_projector_type")
    if projector not in ("mlp2x_gelu", None):
        problems.append(f"mm_projector_type is {projector!r}, wanted 'mlp2x_gelu'")
    return problems


# Fields of a tower that no shape shows, by their names in `transformers`.
TOWERS = {
    "vision": {"heads": "num_attention_heads", "norm_eps": "layer_norm_eps"},
    "qformer": {
        "heads": "num_attention_heads",
        "norm_eps": "layer_norm_eps",
        "cross_attention_every": "cross_attention_frequency",
    },
}


def check_tower(cfg: EmoLlamaConfig, opened: Opened, *, section: str) -> EmoLlamaConfig:
    """Refuses a tower of BLIP-2 or InstructBLIP whose settings are not the config's.

    Args:
        cfg: config of the model, as it is returned.
        opened: with the settings; problems are added.
        section: "vision" or "qformer".
    """
    ours = getattr(cfg, section)
    for path, settings in opened.named(CONFIG).items():
        held = settings.get(f"{section}_config")
        alone = settings if section in str(settings.get("model_type")) else {}
        held = held if isinstance(held, dict) else alone
        opened.problems += [
            f"{path}: {section}'s {key} is {held[key]!r}, wanted model.{section}.{name} "
            f"{getattr(ours, name)!r}: set it with --set"
            for name, key in TOWERS[section].items()
            if key in held and held[key] != getattr(ours, name)
        ]
        if held.get("hidden_act", "gelu") != "gelu":
            opened.problems.append(f"{path}: {section}'s hidden_act is not 'gelu'")
    return cfg


def to_transformers(cfg: EmoLlamaConfig, *, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model's LLaMA, read by `transformers` 4 and 5."""
    llama = cfg.llama
    scaling = None
    if llama.rope_scaling != 1.0:
        scaling = {"type": "linear", "rope_type": "linear", "factor": llama.rope_scaling}
    if (llama3 := llama.rope_llama3) is not None:
        scaling = {"rope_type": "llama3", ORIGINAL: llama3.original_max_positions}
        scaling |= {key: getattr(llama3, key) for key in ROPE_LLAMA3}
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
        "tie_word_embeddings": llama.tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype,
    }
