#!/usr/bin/env bash
# jax 0.10.2: an entry of the persistent compilation cache that was cut short (a kill, a full disk)
# is never replaced. Each later process warns, compiles again, and leaves the broken file as it is:
# `LRUCache.put` returns where a file of that key exists. One would guess that the new program takes
# the broken one's place.
#
# Seen: three processes in a row warn "Error reading persistent compilation cache entry", and the
# file, about 3500 bytes cut to 10, keeps its 10. Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2

cat >"$folder/program.py" <<'PROGRAM'
import sys

import jax
import jax.numpy as jnp

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: jnp.tanh(x) @ x.T)(jnp.ones((3, 4))).block_until_ready()
PROGRAM

run() { "$folder/venv/bin/python" "$folder/program.py" "$folder/cache" 2>&1; }
run
entry=$(ls -S "$folder"/cache/*-cache | head -1)
size=$(stat -c %s "$entry")
head -c 10 "$entry" >"$folder/short" && cp "$folder/short" "$entry"
for _ in 1 2 3; do
  said=$(run)
  grep -q "Error reading persistent compilation cache entry" <<<"$said" || {
    echo "changed: no warning"
    exit 1
  }
done
left=$(stat -c %s "$entry")
echo "entry of $size bytes, cut to 10; after three more processes: $left bytes, a warning in each"
[ "$left" -eq 10 ] || { echo "changed: the entry was replaced"; exit 1; }
