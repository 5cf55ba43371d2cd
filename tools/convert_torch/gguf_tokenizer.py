"""The tokenizer in a GGUF's metadata as files that other programs read.

Byte-level BPE ("gpt2") becomes `tokenizer.json` and `tokenizer_config.json`. How text is split
before BPE is not in the file: it names a rule of llama.cpp's, and each has its pattern here.
SentencePiece's BPE ("llama") becomes `tokenizer.model`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

GGML = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # of `token_type`
IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_WORDS = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
GPT2 = ("gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "dbrx")
DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
# Patterns of what becomes a word; what they leave between matches stands alone.
PATTERNS = {
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3"), rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), rf"{_WORDS}|\p{{N}}|{_REST}"),
    "tekken": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")  # known words are not merged
STARTED = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")  # with bos, if nothing is said


def files(held: Mapping[str, Any]) -> dict[str, bytes]:
    """The tokenizer's files by name; none where the GGUF has no tokenizer.

    Args:
        held: its metadata.

    Raises:
        ValueError: a tokenizer of another kind, or one that is not whole.
    """
    kind = held.get(f"{GGML}model", "none")
    if kind in ("none", "no_vocab"):
        return {}
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"its tokenizer is of kind {kind!r}, wanted 'gpt2' or 'llama'")
    tokens = held.get(f"{GGML}tokens") or []
    types = held.get(f"{GGML}token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ValueError(f"its tokenizer has {len(tokens)} tokens and {len(types)} types")
    if repeated := len(tokens) - len(set(tokens)):
        raise ValueError(f"{repeated} of its tokenizer's {len(tokens)} tokens are repeated")
    named = _named(held, tokens)
    if kind == "llama":
        return {"tokenizer.model": _sentencepiece(held, tokens, types, named)} | _template(held)
    return {
        "tokenizer.json": _byte_level(held, tokens, types, named).encode(),
        "tokenizer_config.json": json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                **{name: tokens[i] for name, i in named.items()},
                "model_max_length": held.get("llama.context_length"),
                "clean_up_tokenization_spaces": False,
                **({"chat_template": held[TEMPLATE]} if TEMPLATE in held else {}),
            },
            indent=2,
            ensure_ascii=False,
        ).encode(),
    }


def _template(held: Mapping[str, Any]) -> dict[str, bytes]:
    return {"chat_template.jinja": held[TEMPLATE].encode()} if TEMPLATE in held else {}


def _named(held: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, int]:
    """Ids of the special tokens that it names."""
    named = {name: held[GGML + key] for name, key in IDS.items() if GGML + key in held}
    for name, i in named.items():
        if not 0 <= i < len(tokens):
            raise ValueError(f"{GGML}{IDS[name]} is {i}, but there are {len(tokens)} tokens")
    if "eos_token" not in named:
        raise ValueError(f"{GGML}{IDS['eos_token']} is missing: no token ends an answer")
    return {name: int(i) for name, i in named.items()}


def _byte_level(
    held: Mapping[str, Any],
    tokens: Sequence[str],
    types: Sequence[int],
    named: Mapping[str, int],
) -> str:
    """`tokenizer.json` of a byte-level BPE."""
    pre = held.get(f"{GGML}pre")
    merges = [tuple(merge.split(" ", 1)) for merge in held.get(f"{GGML}merges") or []]
    broken = [merge for merge in merges if len(merge) != 2]
    if broken:
        raise ValueError(f"its tokenizer's merge {broken[0][0]!r} is not of two parts")
    try:
        model = models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=pre in WHOLE_WORDS,
        )
    except Exception as error:  # the Rust library raises bare Exception
        raise ValueError(f"its tokenizer's merges do not fit its tokens ({error})") from None
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = _splitter(pre)
    if pre in ("qwen2", "deepseek-r1-qwen"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    special = {i for i, kind in enumerate(types) if kind == CONTROL} | set(named.values())
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if i in special:
            added = tokenizers.AddedToken(token, special=True, normalized=False)
            tokenizer.add_special_tokens([added])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False)])
    bos = named.get("bos_token")
    if bos is not None and held.get(f"{GGML}add_bos_token", pre in STARTED):
        start = [{"SpecialToken": {"id": tokens[bos], "type_id": 0}}]
        tree = json.loads(tokenizer.to_str())
        text = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
        tree["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [*start, text[0]],
            "pair": [*start, text[0], *start, text[1]],
            "special_tokens": {
                tokens[bos]: {"id": tokens[bos], "ids": [bos], "tokens": [tokens[bos]]}
            },
        }
        return json.dumps(tree, indent=2, ensure_ascii=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer.to_str(pretty=True)


def _splitter(pre: str | None) -> pre_tokenizers.PreTokenizer:
    """How text is split before BPE."""
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in GPT2:
        return plain
    if pre in DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    if pre in PATTERNS:
        split = pre_tokenizers.Split(tokenizers.Regex(PATTERNS[pre]), behavior="isolated")
        bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, bytes_alone])
    known = ", ".join((*GPT2, *DIGITS, *PATTERNS))
    raise ValueError(f"{GGML}pre is {pre!r}, a rule that is not known here (known: {known})")


def _sentencepiece(
    held: Mapping[str, Any],
    tokens: Sequence[str],
    types: Sequence[int],
    named: Mapping[str, int],
) -> bytes:
    """`tokenizer.model` of SentencePiece's BPE, as LLaMA's."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    scores = held.get(f"{GGML}scores") or []
    if len(scores) != len(tokens):
        raise ValueError(f"its tokenizer has {len(tokens)} tokens and {len(scores)} scores")
    model = proto.ModelProto()  # ty: ignore[missing-attribute]  # protobuf makes it on import
    for token, score, kind in zip(tokens, scores, types, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    unknown = [i for i, kind in enumerate(types) if kind == UNKNOWN]
    if len(unknown) != 1:
        raise ValueError(f"its tokenizer has {len(unknown)} unknown tokens, wanted one")
    if "bos_token" not in named:
        raise ValueError(f"{GGML}{IDS['bos_token']} is missing: no token starts a text")
    spec = model.trainer_spec
    spec.model_type = spec.BPE
    spec.vocab_size = len(tokens)
    spec.byte_fallback = BYTE in types
    spec.unk_id, spec.bos_id, spec.eos_id = unknown[0], named["bos_token"], named["eos_token"]
    spec.unk_piece, spec.bos_piece, spec.eos_piece = (
        tokens[i] for i in (unknown[0], named["bos_token"], named["eos_token"])
    )
    spec.pad_id = named.get("pad_token", -1)
    rules = model.normalizer_spec
    rules.name = "identity"
    rules.add_dummy_prefix = held.get(f"{GGML}add_space_prefix", True)
    rules.remove_extra_whitespaces = held.get(f"{GGML}remove_extra_whitespaces", False)
    rules.escape_whitespaces = True
    rules.precompiled_charsmap = bytes(held.get(f"{GGML}precompiled_charsmap") or b"")
    return model.SerializeToString()
