#!/usr/bin/env bash
# transformers 5.24.0: where a LLaMA config.json holds `rope_parameters` (the name since version 5)
# and the older `rope_scaling` too, the older one wins whole, with no log line. The `rope_theta`
# inside `rope_parameters` goes with it: the model turns with the default base of 10000. One would
# guess that the newer name wins, as the comment in `convert_rope_params_to_dict` says ("Priority:
# 1. Values in `rope_parameters` dict"), or that both are merged, or that two answers are an error.
#
# Seen: llama3 scaling by 8 with base 500000, beside a linear `rope_scaling` by 2, loads as linear
# by 2 with base 10000.0; nothing is logged. Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0

cat >"$folder/program.py" <<'PROGRAM'
import json
import logging
import pathlib
import sys

from transformers import AutoConfig

MODEL = {"model_type": "llama", "max_position_embeddings": 131072}
NEW = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)


def loaded(**fields):
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**MODEL, **fields}))
    rope = AutoConfig.from_pretrained(folder).rope_parameters
    return rope["rope_type"], rope["factor"], rope["rope_theta"]


alone = loaded(rope_parameters=NEW)
both = loaded(rope_parameters=NEW, rope_scaling={"rope_type": "linear", "factor": 2.0})
print("rope_parameters alone:", alone)
print("with rope_scaling too:", both, "log lines:", len(said))
assert alone == ("llama3", 8.0, 500000.0)
assert both == ("linear", 2.0, 10000.0), "changed: rope_scaling no longer wins whole"
assert not said, "changed: it is logged"
PROGRAM
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/program.py" "$folder/model" 2>&1
