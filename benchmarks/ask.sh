#!/usr/bin/env bash
# CPU seconds of one question about a photograph, this checkout against an earlier commit, in turns:
# cold (nothing compiled before) and warm. The same run answers on both sides, and the words must be
# the same: so both commits must carry the towers that the run was trained on. Those of ea800f5 are
# the same up to 562d55c: check that out to compare with it.
# Usage: benchmarks/ask.sh RUN [PHOTO] [COMMIT] [ROUNDS]
set -euo pipefail
cd "$(dirname "$0")/.."
run=$(realpath "${1:?a trained run, e.g. demo_out/run}")
python=$PWD/.venv/bin/python
photo=${2:-$($python -c 'import pathlib, skimage; print(pathlib.Path(skimage.__file__).parent / "data/astronaut.png")')}
commit=${3:-ea800f5}
rounds=${4:-3}
question="Describe the face in the image and name the emotion."

work=$(mktemp -d)
now=$PWD
trap 'git -C "$now" worktree remove --force "$work/earlier"; rm -rf "$work"' EXIT
git worktree add --quiet --detach "$work/earlier" "$commit"
cd "$work" # so that each side imports its own tree

# Prints user + system seconds; the answer goes to a file.
ask() { # tree, cache, answer file
  local TIMEFORMAT="%U %S"
  { time env PYTHONPATH="$1" EMOLLAMA_CACHE="$2" "$python" -m emollama_jax.cli \
    ask "$photo" "$question" --run "$run" >"$3" 2>/dev/null; } 2>&1 | awk '{print $1 + $2}'
}

for round in $(seq "$rounds"); do
  rm -rf "$work/cache"
  earlier=$(ask "$work/earlier" none "$work/a")
  cold=$(ask "$now" "$work/cache" "$work/b")
  warm=$(ask "$now" "$work/cache" "$work/c")
  cmp "$work/a" "$work/b" && cmp "$work/a" "$work/c"
  awk -v r="$round" -v e="$earlier" -v c="$cold" -v w="$warm" 'BEGIN {
    printf "round %d: %s %.1f s, cold %.1f s (%.2f of it), warm %.1f s (%.3f of it)\n",
      r, "earlier", e, c, c / e, w, w / e }'
done
cat "$work/b"
