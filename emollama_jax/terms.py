"""Words and numbers that every part of the package shares, in one place and without imports."""

from typing import Literal

Kind = Literal["image", "clip"]  # of an example
LANDMARKS = 68  # points of a face, in iBUG's order
DType = Literal["float32", "bfloat16"]
Branches = Literal["both", "global", "local", "none"]  # of Face Info Mining
Attention = Literal["xla", "auto", "splash", "cudnn"]  # see models/attention.py
Preset = Literal["fsdp", "fsdp+tensor", "replicated-frozen"]  # see sharding/rules.py
Template = Literal["vicuna", "chatml", "llama3", "weights"]  # see data/templates.py
