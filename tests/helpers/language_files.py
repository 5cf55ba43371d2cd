"""Small tokenizers of the kinds that people's models have, their chat templates, and GGUF files."""

import json
import pathlib

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

SMOLLM2 = (  # the real one
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
LLAMA3 = (  # the real one
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
TEXTS = [
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face system user assistant",
    "What is the facial expression of the person? happiness, sadness, surprise. The brows are up.",
    "def face(x): return {'a': 12, 'b': 345}\n\n    # I'll don't it's",
    "Überraschung 表情 微笑 улыбка 😀 1 22 333 4444",
]
SPECIAL = {
    "smollm": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"),
    "llama-bpe": (
        *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>"),
        *("<|end_header_id|>", "<|eot_id|>"),
    ),
}
NAMED = {  # bos, eos, pad
    "smollm": ("<|im_start|>", "<|im_end|>", "<|im_end|>"),
    "llama-bpe": ("<|begin_of_text|>", "<|eot_id|>", None),
}
PROGRAM = {"smollm": SMOLLM2, "llama-bpe": LLAMA3}
# As in the `tokenizer.json` of Llama 3.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def splitter(kind: str):
    if kind == "smollm":
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_WORDS), behavior="isolated")
    alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, alone])


def tokenizer_json(kind: str, size: int = 420) -> str:
    """A byte-level BPE; the special tokens come first ("smollm") or last ("llama-bpe")."""
    special = list(SPECIAL[kind])
    first = kind == "smollm"
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=not first))
    tokenizer.pre_tokenizer = splitter(kind)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special if first else [],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_special_tokens(special)
    return tokenizer.to_str()


def write_tokenizer(folder: pathlib.Path, kind: str, **changes) -> pathlib.Path:
    """`tokenizer.json` and `tokenizer_config.json`; a change of None leaves a field out."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json(kind))
    bos, eos, pad = NAMED[kind]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": {"__type": "AddedToken", "content": eos},  # one of the two ways
        "pad_token": pad,
        "chat_template": PROGRAM[kind],
    } | changes
    settings = {key: value for key, value in settings.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(key: str) -> str:
    stem, _, end = key.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, name = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[name]}.{end}"
    return f"{GGUF_NAMES[stem]}.{end}"


def turned(x: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k."""
    return (
        x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
    )


def llama3_factors(rope: dict, head_dim: int) -> np.ndarray:
    """What llama.cpp's converter writes as `rope_freqs.weight`."""
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    factors = []
    for i in range(0, head_dim, 2):
        wave = 2 * np.pi * rope["rope_theta"] ** (i / head_dim)
        if wave < high:
            factors.append(1.0)
        elif wave > low:
            factors.append(rope["factor"])
        else:
            smooth = rope["original_max_position_embeddings"] / wave - rope["low_freq_factor"]
            smooth /= rope["high_freq_factor"] - rope["low_freq_factor"]
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def write_gguf(
    path: pathlib.Path,
    state: dict[str, np.ndarray],
    cfg,
    *,
    types: dict[str, str] | None = None,
    kind: str | None = None,
    fields: dict | None = None,
) -> None:
    """A LLaMA as llama.cpp writes it.

    Args:
        path: of the file.
        state: float32, by `transformers`' names.
        cfg: `transformers`' LlamaConfig.
        types: part of a tensor's name → type that it is quantized to.
        kind: of tokenizer; None for none.
        fields: integers and texts of the metadata that are otherwise; None leaves one out.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    integers = {
        "llama.block_count": cfg.num_hidden_layers,
        "llama.context_length": cfg.max_position_embeddings,
        "llama.embedding_length": cfg.hidden_size,
        "llama.feed_forward_length": cfg.intermediate_size,
        "llama.attention.head_count": cfg.num_attention_heads,
        "llama.attention.head_count_kv": cfg.num_key_value_heads,
        "llama.rope.dimension_count": cfg.head_dim,
        "llama.vocab_size": cfg.vocab_size,
    }
    held: dict = integers | {
        "llama.rope.freq_base": float(cfg.rope_parameters["rope_theta"]),
        "llama.attention.layer_norm_rms_epsilon": float(cfg.rms_norm_eps),
    }
    if kind is not None:
        tree = json.loads(tokenizer_json(kind))
        vocabulary = tree["model"]["vocab"] | {t["content"]: t["id"] for t in tree["added_tokens"]}
        tokens = sorted(vocabulary, key=vocabulary.__getitem__)
        merges = [m if isinstance(m, str) else " ".join(m) for m in tree["model"]["merges"]]
        held |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": kind,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3 if t in SPECIAL[kind] else 1 for t in tokens],
            "tokenizer.ggml.merges": merges,
            "tokenizer.chat_template": PROGRAM[kind],
        }
        for name, token in zip(("bos", "eos", "padding"), NAMED[kind], strict=True):
            if token is not None:
                held[f"tokenizer.ggml.{name}_token_id"] = vocabulary[token]
    for key, value in (held | (fields or {})).items():
        if key == "general.architecture":
            writer.kv_data[0][key].value = value
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    heads = {"q_proj": cfg.num_attention_heads, "k_proj": cfg.num_key_value_heads}
    for key, value in state.items():
        n = next((heads[part] for part in heads if part in key), None)
        value = np.ascontiguousarray(value if n is None else turned(value, n))
        chosen = next((to for part, to in (types or {}).items() if part in key), "F32")
        if value.ndim < 2 or chosen == "F32":
            writer.add_tensor(gguf_name(key), value)
            continue
        quantized = gguf.quantize(value, gguf.GGMLQuantizationType[chosen])
        writer.add_tensor(gguf_name(key), quantized, raw_dtype=gguf.GGMLQuantizationType[chosen])
    if cfg.rope_parameters["rope_type"] == "llama3":
        factors = llama3_factors(cfg.rope_parameters, cfg.head_dim)
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
