#!/bin/sh
# One NVIDIA GPU in at most ten minutes: our attention, LoRA step and decoding, beside PyTorch's, from
# wheels and random weights alone.
#
#     benchmarks/gpu.sh [--dry-run] [--out FOLDER]
#
# FOLDER (gpu_results) gets gpu.json, and gpu.md, a table for docs/performance.md. Each part is a
# process of its own with a limit of its own: neither side's memory disturbs the other's, and what
# fails is named in the table. --dry-run does all of it in small on a CPU, with the Python of PYTHON
# (.venv/bin/python), and installs nothing.
set -eu
cd "$(dirname "$0")/.."
out=gpu_results small=
while [ $# -gt 0 ]; do
    case $1 in
    --dry-run) small=--small ;;
    --out) out=$2 && shift ;;
    *) echo "gpu.sh: $1: unknown (known: --dry-run, --out FOLDER)" >&2 && exit 2 ;;
    esac
    shift
done
mkdir -p "$out"
rm -f "$out"/*.json
if [ -n "$small" ]; then
    python=${PYTHON:-.venv/bin/python}
    export JAX_PLATFORMS=cpu
else
    python=.venv-gpu/bin/python
    [ -x "$python" ] || python3 -m venv .venv-gpu
    "$python" -m pip install -q -e '.[cuda,parity]'
fi

part() { # seconds, name, arguments
    limit=$1 name=$2 && shift 2
    echo "$name" >&2
    PYTHONPATH=. timeout "$limit" "$python" benchmarks/gpu.py $small --out "$out/$name.json" "$@" ||
        echo "{\"failed\": \"exit status $?\"}" >"$out/$name.json"
}

part 100 attention attention
part 110 train_bfloat16 train
part 110 train_int8 train --frozen int8
part 80 train_torch train --torch
part 60 decode_bfloat16 decode
part 60 decode_int8 decode --frozen int8
part 60 decode_torch decode --torch
"$python" benchmarks/gpu.py --out "$out" table
cat "$out/gpu.md"
