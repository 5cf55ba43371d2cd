#!/usr/bin/env bash
# transformers 5.24.0: `from_pretrained(folder, gguf_file=...)` of a LLaMA leaves out how its rotary
# angles are scaled. llama.cpp stores the scaling of Llama 3.1 and 3.2 as a tensor of factors,
# `rope_freqs.weight`, and a linear one as metadata, `llama.rope.scaling.type` and `.factor`. All
# of it is ignored, with no warning; the config says `rope_type` "default". One would guess that the
# model computes what it did before it was written, as its weights come back bit for bit.
#
# Seen: Llama 3.2's scaling (by 32) and a linear one by 4 load as "default"; over 400 tokens the
# logits are off by 0.29 and 1.30 of the largest, and are those of the same weights without scaling.
# A file without scaling loads right. Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.13.0 accelerate==1.15.0 \
  gguf==0.19.0 numpy==2.3.5

cat >"$folder/program.py" <<'PROGRAM'
import logging
import pathlib
import sys

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

LAYERS, WIDTH, INNER, HEADS, GROUPS, HEAD, WORDS, PLACES = 2, 256, 512, 4, 2, 64, 128, 131072
BASE = {"rope_theta": 500000.0}
ROPES = {
    "none": {"rope_type": "default", **BASE},
    "linear": {"rope_type": "linear", "factor": 4.0, **BASE},
    "llama3": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        **BASE,
    },
}
NAMES = {  # llama.cpp's
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)


def made(rope):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=HEAD,
        max_position_embeddings=PLACES,
        tie_word_embeddings=True,
        initializer_range=0.1,
        rope_parameters=ROPES[rope],
    )
    return LlamaForCausalLM(config).eval()


def write(path, model, rope):
    file = gguf.GGUFWriter(path, "llama")
    file.add_name("tiny")
    file.add_vocab_size(WORDS)
    file.add_context_length(PLACES)
    file.add_block_count(LAYERS)
    file.add_embedding_length(WIDTH)
    file.add_feed_forward_length(INNER)
    file.add_head_count(HEADS)
    file.add_head_count_kv(GROUPS)
    file.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    file.add_rope_freq_base(BASE["rope_theta"])
    file.add_rope_dimension_count(HEAD)
    if rope == "linear":
        file.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        file.add_rope_scaling_factor(ROPES[rope]["factor"])
    if rope == "llama3":  # what llama.cpp divides the frequencies by
        factors = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
        assert factors.min() == 1 and factors.max() == 32
        file.add_tensor("rope_freqs.weight", factors.numpy())
    for name, weight in model.model.state_dict().items():
        *before, last, _ = name.split(".")
        weight = weight.numpy()
        if last in ("q_proj", "k_proj"):  # llama.cpp turns neighbours, not halves
            halves = weight.reshape(-1, 2, HEAD // 2, WIDTH)
            weight = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
        layer = f"blk.{before[1]}." if before else ""
        file.add_tensor(f"{layer}{NAMES[last]}.weight", weight)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def logits(model):
    with torch.no_grad():
        return model(torch.arange(400)[None] * 37 % WORDS).logits


def off(one, other):
    return float((one - other).abs().max() / other.abs().max())


folder, plain = pathlib.Path(sys.argv[1]), made("none")
folder.mkdir()
for rope in ROPES:
    model = made(rope)
    write(folder / f"{rope}.gguf", model, rope)
    read = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=f"{rope}.gguf", dtype=torch.float32
    ).eval()
    weights = model.state_dict()
    assert all((weights[name] == weight).all() for name, weight in read.state_dict().items())
    kind, seen = read.config.rope_parameters["rope_type"], logits(read)
    there, without = off(seen, logits(model)), off(seen, logits(plain))
    print(f"{rope}: read as {kind}, off by {there:.2f}; by {without:.0e} from no scaling", said)
    assert kind == "default", "changed: the scaling is read"
    assert without < 1e-5, "changed: the angles are scaled"
    assert there < 1e-5 if rope == "none" else there > 0.1
    assert not said, "changed: it is logged"
PROGRAM
HF_HUB_OFFLINE=1 TQDM_DISABLE=1 "$folder/venv/bin/python" "$folder/program.py" \
  "$folder/model" 2>&1
