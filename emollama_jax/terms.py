"""Words and numbers that every part of the package shares, in one place and without imports."""

from typing import Literal

Kind = Literal["image", "clip"]  # of an example
LANDMARKS = 68  # points of a face, in iBUG's order
DType = Literal["float32", "bfloat16"]
Branches = Literal["both", "global", "local", "none"]  # of Face Info Mining
Attention = Literal["xla", "auto", "splash", "cudnn"]  # see models/attention.py
Preset = Literal["fsdp", "fsdp+tensor", "replicated-frozen"]  # see sharding/rules.py
Template = Literal["vicuna", "chatml", "llama3", "weights"]  # see data/templates.py
Remat = Literal["none", "dots", "full"]  # what a scanned layer keeps for its backward pass

# Of a network's large kernels that do not train: in `train.frozen_dtype`, or in 8 bits with a scale
# for each output channel. "int8": products as the chip gains by them; else they are fixed, with
# weights alone narrow or activations too. See models/eight_bits.py
Frozen = Literal["float", "int8", "int8_weights", "int8_products"]
# The same of a decoder layer, and names of what it may keep: models/remat.py
LlamaRemat = Literal[
    "none",
    "dots",
    "full",
    "save_out_proj",
    "save_qkv_proj",
    "save_dot_except_mlp",
    "save_dot_with_context_except_mlp",
    "minimal",
    "minimal_with_context",
    "qkv_proj_offloaded",
    "minimal_offloaded",
]
Kept = Literal[
    "q_proj", "k_proj", "v_proj", "attention", "o_proj", "gate_proj", "up_proj", "down_proj"
]
