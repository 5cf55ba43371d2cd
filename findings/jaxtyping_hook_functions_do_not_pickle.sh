#!/usr/bin/env bash
# jaxtyping 0.3.11 with beartype 0.23.1: a function inside a function, in a module that was imported
# under `install_import_hook`, cannot be pickled by cloudpickle: its checker holds a weak reference.
# Without the hook the same function pickles. One would guess that checking annotations changes no
# more than what is checked; but a Grain dataset with such a `batch_fn` works until the hook is on (in
# tests, say), and then fails as soon as it has worker processes. `functools.partial` of a function
# of the module pickles either way, by name.
#
# Seen: without the hook "pickles", with it "TypeError: cannot pickle 'weakref.ReferenceType' object".
# Exits with 1 if that changes. PYTHON names another Python than python3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat >"$folder/rows.py" <<'PROGRAM'
import numpy as np
from jaxtyping import Float32


def scaler(factor: float):
    def scaled(x: Float32[np.ndarray, " n"]) -> Float32[np.ndarray, " n"]:
        return x * np.float32(factor)

    return scaled
PROGRAM
cat >"$folder/program.py" <<'PROGRAM'
import contextlib
import sys

import cloudpickle
import jaxtyping

hooked = sys.argv[1] == "with"
hook = jaxtyping.install_import_hook("rows", "beartype.beartype")
with hook if hooked else contextlib.nullcontext():
    if not hooked:
        hook.uninstall()
    import rows
try:
    cloudpickle.dumps(rows.scaler(2.0))
    said = "pickles"
except TypeError as error:
    said = f"TypeError: {error}"
print(f"{sys.argv[1]} the hook: {said}")
assert said == sys.argv[2], "changed"
PROGRAM
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jaxtyping==0.3.11 beartype==0.23.1 cloudpickle==3.1.3 numpy==2.3.5
cd "$folder"
venv/bin/python program.py without pickles
venv/bin/python program.py with "TypeError: cannot pickle 'weakref.ReferenceType' object"
