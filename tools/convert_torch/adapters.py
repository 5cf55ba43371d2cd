"""A folder with a PEFT adapter, and what LLaVA's trainers put beside it.

The keys of the tensors say on which projections of which layers the adapter sits; layers that it
leaves alone get zeros, which change nothing. `non_lora_trainables.bin` and `mm_projector.bin` hold
the projector and the Q-Former that were trained with it: their leaves are read where they are
whole, and named where they are not.
"""

import dataclasses
import functools
import itertools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from emollama_jax.config import EmoLlamaConfig, LlamaConfig
from tools.convert_torch import llama_vid, peft
from tools.convert_torch.engine import Row, problem_of
from tools.convert_torch.files import ADAPTER, Opened, Tensor, open_paths
from tools.convert_torch.leaves import every_leaf
from tools.convert_torch.settings import from_transformers

NAMES = (
    "adapter_model.safetensors.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin.index.json",
    "adapter_model.bin",
)
BESIDE = ("non_lora_trainables.safetensors", "non_lora_trainables.bin", "mm_projector.bin")
WHOLE = "base_model.model."  # what PEFT puts before the keys of the model that it wraps
SIZES = "put its config.json beside the adapter, or name its --config"
OF_LLAMA = re.compile(peft.SEEING + r"(embed_tokens|lm_head|layers\.\d+\..*|norm)\.(weight|bias)")


def open_adapter(paths: Sequence[pathlib.Path]) -> Opened:
    """Opens an adapter's folder, or its files one by one, with the settings beside them."""
    return open_paths(paths, names=NAMES, beside=BESIDE)


def fit(opened: Opened, model: EmoLlamaConfig) -> tuple[EmoLlamaConfig, list[Row]]:
    """Brings an adapter's tensors into one naming and finds what of the model they fill.

    Args:
        opened: its tensors are renamed, those of untouched layers added, those without a place
            taken out; problems and notes are added.
        model: the config to start from.

    Returns:
        The config with the adapter's LLaMA and LoRA, and the rows of what was trained beside it.
    """
    model = from_transformers(model, opened, sections=("llama", "lora"))
    settings = _settings(opened)
    if opened.problems or settings is None:
        return model, []
    fields, problems = peft.lora_settings(settings)
    opened.problems += [f"{ADAPTER}: {problem}" for problem in problems]
    if problems:
        return model, []
    found = _one_naming(opened)
    if opened.problems or not found:
        return model, []
    present = {key["place"].rsplit(".", 1)[1] for key in found.values()}
    targets = tuple(target for target in peft.HOME if target in present)
    opened.problems += _sizes(opened, found, fields["rank"], model.llama)
    lora = dataclasses.replace(model.llama.lora, **fields, targets=targets)
    model = dataclasses.replace(model, llama=dataclasses.replace(model.llama, lora=lora))
    if opened.problems:
        return model, []
    _compare(opened, found, settings.get("target_modules"))
    _fill_layers(opened, found, settings.get("target_modules"), model.llama.layers)
    opened.notes.append(
        f"set model.llama.lora to rank {lora.rank}, alpha {lora.alpha!r}, "
        f"targets [{', '.join(targets)}]"
    )
    return model, _beside(opened, set(found), model)


def _settings(opened: Opened) -> dict[str, Any] | None:
    held = opened.named(ADAPTER)
    if opened.tensors and not held:
        opened.problems.append(f"no {ADAPTER} beside the weights: it holds r and lora_alpha")
    first, wanted = next(iter(held.items()), (None, None))
    for path, settings in held.items():
        if settings != wanted:
            opened.problems.append(f"{path}: other settings than {first} has: name one adapter")
    return wanted


def _one_naming(opened: Opened) -> dict[str, re.Match[str]]:
    """Renames the adapter's tensors as PEFT's own files have them; returns their keys."""
    found = {key: match for key in opened.tensors if (match := peft.KEY.fullmatch(key))}
    if not found:
        return {}
    prefix, *others = sorted({match["prefix"] for match in found.values()})
    if others:
        opened.problems.append(f"adapters of several models ({prefix}, {', '.join(others[:3])})")
        return {}
    names = sorted({match["name"] or "" for match in found.values()})
    if len(names) > 1:
        said = ", ".join(name or "one without a name" for name in names)
        opened.problems.append(f"several adapters in one file ({said}): save only one of them")
        return {}
    renamed: dict[str, re.Match[str]] = {}
    for key, match in found.items():
        plain = f"{prefix}layers.{match['layer']}.{match['place']}.lora_{match['side']}.weight"
        renamed[plain] = match
        if plain != key:
            opened.tensors[plain] = opened.tensors.pop(key)
    return renamed


def _sizes(
    opened: Opened, found: Mapping[str, re.Match[str]], rank: int, cfg: LlamaConfig
) -> list[str]:
    """Ranks, layers and widths that are not those of the settings."""
    held = {key: opened.tensors[key].shape for key in found}
    sides = {key: match["side"] for key, match in found.items()}
    ranks = {shape[sides[key] == "B"] for key, shape in held.items() if len(shape) == 2}
    if ranks - {rank}:
        said = ", ".join(map(str, sorted(ranks)))
        return [f"{ADAPTER}: r is {rank}, but the tensors have rank {said}"]
    last = max(int(match["layer"]) for match in found.values())
    if last >= cfg.layers:
        return [f"the adapter has a layer {last}, the LLaMA layers 0 to {cfg.layers - 1}: {SIZES}"]
    heads, kv_heads = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    wanted = {  # width in, width out
        "q_proj": (cfg.width, heads),
        **dict.fromkeys(("k_proj", "v_proj"), (cfg.width, kv_heads)),
        "o_proj": (heads, cfg.width),
        **dict.fromkeys(("gate_proj", "up_proj"), (cfg.width, cfg.mlp_width)),
        "down_proj": (cfg.mlp_width, cfg.width),
    }
    for target, widths in wanted.items():
        for side, width in zip("AB", widths, strict=True):
            is_b = side == "B"
            seen = {
                held[key][0 if is_b else 1]
                for key, match in found.items()
                if match["side"] == side and match["place"].endswith(target) and len(held[key]) == 2
            }
            if len(seen) == 1 and seen != {width}:
                way = "gives" if is_b else "reads"
                return [f"the adapter's {target} {way} {seen.pop()}, the LLaMA's {width}: {SIZES}"]
    return []


def _compare(opened: Opened, found: Mapping[str, re.Match[str]], targets: Any) -> None:
    """Notes where `target_modules` says other than the keys do; the keys decide."""
    modules = {key: key.removeprefix(WHOLE).rsplit(".lora_", 1)[0] for key in found}
    more = [
        match["place"] for key, match in found.items() if not peft.is_target(targets, modules[key])
    ]
    if more:
        said = ", ".join(dict.fromkeys(more))
        opened.notes.append(f"{ADAPTER}: target_modules does not name {said}: read anyway")
    if isinstance(targets, list):
        none = [
            name
            for name in targets
            if not any(map(functools.partial(peft.is_target, [name]), modules.values()))
        ]
        if none:
            opened.notes.append(f"{ADAPTER}: no tensor for {_some(none)} of target_modules")


def _fill_layers(
    opened: Opened, found: Mapping[str, re.Match[str]], targets: Any, layers: int
) -> None:
    """Zeros for the layers on which the adapter does not sit."""
    prefix = next(iter(found.values()))["prefix"]
    places: dict[str, set[int]] = {}
    for match in found.values():
        places.setdefault(match["place"], set()).add(int(match["layer"]))
    last = max(map(max, places.values()))
    for place, have in places.items():
        module = f"{prefix}layers.{{}}.{place}"
        free, missing = [], []
        for layer in sorted(set(range(layers)) - have):
            names = peft.is_target(targets, module.format(layer).removeprefix(WHOLE))
            (missing if names else free).append(layer)
        if missing == list(range(last + 1, layers)) and missing:
            opened.problems.append(
                f"the adapter has layers 0 to {last}, the LLaMA 0 to {layers - 1}: {SIZES}"
            )
            return
        for layer, side in itertools.product(free, "AB"):
            like = opened.tensors.get(f"{module.format(min(have))}.lora_{side}.weight")
            if like is not None:  # else it is missing, and that is said
                opened.tensors[f"{module.format(layer)}.lora_{side}.weight"] = _zeros(like)
        if free:
            some = f"layer {free[0]}" if len(free) == 1 else f"layers {', '.join(map(str, free))}"
            opened.notes.append(f"{place}: no adapter on {some}: zeros there")


def _zeros(like: Tensor) -> Tensor:
    return dataclasses.replace(like, file="zeros", read=lambda: np.zeros(like.shape, like.dtype))


def visual_rows(model: EmoLlamaConfig) -> list[Row]:
    """Projector and Q-Former in a LLaMA-VID's naming."""
    return [
        *llama_vid.projectors(),
        *llama_vid.qformer(model.qformer.cross_attention_every, llama_vid.LLAMA_VID),
    ]


def _beside(opened: Opened, adapter: set[str], model: EmoLlamaConfig) -> list[Row]:
    """The rows of what was trained beside the adapter; the rest is taken out and named."""
    visual = visual_rows(model)
    others = [
        key
        for key, tensor in opened.tensors.items()
        if key not in adapter
        and (tensor.file in BESIDE or any(row.matches(key.removeprefix(WHOLE)) for row in visual))
    ]
    extra = {key.removeprefix(WHOLE): opened.tensors.pop(key) for key in others}
    if not extra:
        return []
    trained = [key for key in extra if OF_LLAMA.fullmatch(key)]
    if trained:
        opened.problems.append(
            f"{extra[trained[0]].file}: {len(trained)} weights of LLaMA itself ({_some(trained)}), "
            f"wanted adapters only: {peft.INSTEAD}"
        )
        return []
    rows, odd = [], {}
    leaves = every_leaf(("qformer",), model)
    misfit = ""
    for row in visual:
        shape = leaves[row.paths[0]].shape
        keys = row.keys(shape)
        here = [key for key in keys if key in extra]
        wrong = [problem_of(row, extra[key], shape[1:] if row.stacked else shape) for key in here]
        misfit = misfit or next(filter(None, wrong), "")
        if here == keys:
            rows.append(row)
        else:
            odd |= dict.fromkeys(here, f"without {len(keys) - len(here)} of its layers")
    if misfit:  # of another size: half of it would be worse than nothing
        rows, odd = [], dict.fromkeys(extra, f"of another size than --config says ({misfit})")
    held = {key for row in rows for key in row.keys(leaves[row.paths[0]].shape)}
    opened.tensors |= {key: extra[key] for key in extra if key in held}
    for file in dict.fromkeys(tensor.file for tensor in extra.values()):
        keys = [key for key, tensor in extra.items() if tensor.file == file]
        read, left = [k for k in keys if k in held], [k for k in keys if k not in held]
        if read:
            opened.notes.append(
                f"read {_count(read)} of {file} into projector and Q-Former; over a base that "
                "holds them too, see docs/convert.md, 'PEFT adapters'"
            )
        if left:
            why = odd.get(left[0], "no place in projector or Q-Former")
            opened.notes.append(f"left out {_count(left)} of {file} ({_some(left)}): {why}")
    return rows


def _count(keys: Sequence[str]) -> str:
    return f"{len(keys)} tensor" + ("s" if len(keys) > 1 else "")


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (" …" if len(keys) > 3 else "")
