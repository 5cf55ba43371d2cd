#!/usr/bin/env bash
# tyro 1.0.17: a positional of any length takes words before an option or after it, but not both.
# `KEY=VALUE` settings on either side of `--out` are an everyday command line; the later ones are
# "unrecognized options". One would guess that they are joined, or that the message says so.
#
# Seen: both sides alone are read, together status 2. Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tyro==1.0.17

cat >"$folder/program.py" <<'PROGRAM'
import tyro


def main(settings: tyro.conf.Positional[tuple[str, ...]] = (), out: str = "runs") -> None:
    print(settings, out)


tyro.cli(main)
PROGRAM

run() { "$folder/venv/bin/python" "$folder/program.py" "$@"; }
run a=1 b=2 --out here
run --out here a=1 b=2
status=0
said=$(run a=1 --out here b=2 2>&1) || status=$?
grep -o "Unrecognized options: b=2" <<<"$said" || { echo "changed: $said"; exit 1; }
echo "status $status"
[ "$status" -eq 2 ]
