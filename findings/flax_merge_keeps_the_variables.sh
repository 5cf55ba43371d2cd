#!/usr/bin/env bash
# flax 0.12.8 with jax 0.10.2: `nnx.merge(graphdef, state)` makes a module out of the very Variables
# of the state, not out of their values. So a BatchNorm that runs after it changes the state that was
# merged, in place; and inside `jax.value_and_grad`, where the statistics come from outside, it
# raises TraceContextError, "Cannot mutate BatchStat from a different trace level". One would guess
# that split and merge are the pure way through: values in, values out. `copy=True` makes them so.
#
# Seen: the state's mean goes from 0 to 0.045 by running a merged module; with `copy=True` it stays 0,
# and the gradient comes with the new mean as a result. Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 flax==0.12.8

cat >"$folder/program.py" <<'PROGRAM'
import jax
import jax.numpy as jnp
from flax import errors, nnx

x = jnp.arange(12.0).reshape(4, 3)
graphdef, params, statistics = nnx.split(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.Param, ...)


def mean():
    return round(float(statistics["mean"][...][0]), 3)


def loss(params, **how):
    module = nnx.merge(graphdef, params, statistics, **how)
    return (module(x) ** 2).sum(), nnx.state(module, nnx.BatchStat)


def gradient(**how):
    _, new = jax.value_and_grad(lambda p: loss(p, **how), has_aux=True)(params)[0]
    return round(float(new["mean"][...][0]), 3)


assert gradient(copy=True) == 0.045
try:
    raised = str(gradient())
except errors.TraceContextError as error:
    raised = str(error).split(" (")[0]
print("gradient without copy:", raised)
assert raised == "Cannot mutate BatchStat from a different trace level", "changed"

assert mean() == 0
loss(params, copy=True)
assert mean() == 0, "changed: copy=True no longer copies"
loss(params)
print("mean of the state after a merged module ran:", mean())
assert mean() == 0.045, "changed: merging copies now"
PROGRAM
"$folder/venv/bin/python" "$folder/program.py"
