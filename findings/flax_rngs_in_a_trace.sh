#!/usr/bin/env bash
# flax 0.12.8 with jax 0.10.2: making a module under `nnx.eval_shape` (or `jax.jit`) takes time that
# grows with the square of its parameters. `nnx.Rngs` counts its draws in a Variable; inside a trace
# the count is a tracer, and each `count[...] += 1` asks it for `.sharding`. A tracer has none, so
# JAX raises an AttributeError whose message walks through all equations traced so far, and flax
# drops the error. The numbers are right. One would guess that shapes alone cost next to nothing.
#
# Seen: shapes of a module of 400 parameters take 10.9 times the function calls of one of 100 (7.20
# million against 0.66 million; linear: 4). With the count kept in Python: 4.0 times (0.51 million
# against 0.13). Calls are counted, as times vary: 800 parameters against 200 took 8 to 14 times as
# long. Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 flax==0.12.8

cat >"$folder/program.py" <<'PROGRAM'
import cProfile
import pstats

import jax
from flax import nnx


class Net(nnx.Module):
    def __init__(self, count, *, rngs):
        normal = nnx.initializers.normal(0.02)
        self.weights = nnx.List(nnx.Param(normal(rngs.params(), (4, 4))) for _ in range(count))


class Counted:
    """Keys as nnx.Rngs gives them, counted in Python."""

    def __init__(self, seed):
        self.key, self.count = jax.random.key(seed), 0

    def params(self):
        self.count += 1
        return jax.random.fold_in(self.key, self.count - 1)


def calls(rngs, count):
    profile = cProfile.Profile()
    profile.runcall(nnx.eval_shape, lambda: Net(count, rngs=rngs(0)))
    return pstats.Stats(profile).total_calls


ratios = {}
for rngs in (nnx.Rngs, Counted):
    calls(rngs, 10)  # imports
    few, many = calls(rngs, 100), calls(rngs, 400)
    ratios[rngs.__name__] = many / few
    print(f"{rngs.__name__}: {few} calls for 100 parameters, {many} for 400: {many / few:.1f} x")
assert ratios["Rngs"] > 7, "changed: no longer quadratic"
assert ratios["Counted"] < 5
PROGRAM
"$folder/venv/bin/python" "$folder/program.py"
