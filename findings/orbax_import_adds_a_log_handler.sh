#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: importing its v1 API gives the root logger a handler that writes to
# stderr. A program that shows a progress bar and adds a handler of its own afterwards prints each
# record twice, once into the bar; `logging.basicConfig()` called after the import does nothing.
# One would guess that importing a library leaves the root logger alone, as Python's documentation
# asks of libraries.
#
# Seen: no handler before the import, one after it. Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 orbax-checkpoint==0.12.8

"$folder/venv/bin/python" - <<'PROGRAM'
import logging

import jax  # which leaves it alone

root = logging.getLogger()
before = len(root.handlers)
import orbax.checkpoint.experimental.v1

after = [type(handler).__name__ for handler in root.handlers]
logging.basicConfig(format="mine: %(message)s")
kept = root.handlers[0].formatter is None or "mine" not in root.handlers[0].formatter._fmt
print(f"jax {jax.__version__}: {before} handlers before the import, {after} after it")
print("basicConfig() after the import has no effect:", kept)
assert before == 0 and after, "changed: the root logger is left alone"
assert kept
PROGRAM
