#!/usr/bin/env bash
# PyAV 19.0.2: iterating over `VideoFrame.side_data` gives the types (the keys of a mapping); up to
# 18.1.0 it gave the side data themselves. No warning stands between: a loop that reads `data.type`
# raises AttributeError, and only for frames that carry side data, such as x264's own. One would guess
# that iteration keeps its meaning, since the container was a `Mapping` before too. `side_data.get(
# "SEI_UNREGISTERED")` is the same in both.
#
# Seen: a frame that libx264 encoded: 18.1.0 iterates `SideData`, 19.0.2 iterates `Type`. Exits with 1
# if that changes. PyAV 19 wants Python 3.12 or newer: PYTHON=python3.13 names another one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat >"$folder/program.py" <<'PROGRAM'
import io
import sys

import av
import numpy as np

file = io.BytesIO()
with av.open(file, "w", format="mp4") as container:
    stream = container.add_stream("libx264", rate=12)
    stream.width = stream.height = 64
    stream.pix_fmt = "yuv420p"
    picture = np.full((64, 64, 3), 128, np.uint8)
    container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    container.mux(stream.encode())
with av.open(io.BytesIO(file.getvalue())) as container:
    frame = next(container.decode(video=0))
    kinds = {type(item).__name__ for item in frame.side_data}
    by_name = type(frame.side_data.get("SEI_UNREGISTERED")).__name__
print(f"av {av.__version__}: iterates {kinds}, by name {by_name}")
assert (kinds, by_name) == ({sys.argv[1]}, "SideData"), "changed"
PROGRAM
for pair in 18.1.0:SideData 19.0.2:Type; do
  "${PYTHON:-python3.12}" -m venv "$folder/${pair%:*}"
  "$folder/${pair%:*}/bin/pip" install --quiet "av==${pair%:*}" numpy==2.3.5
  "$folder/${pair%:*}/bin/python" "$folder/program.py" "${pair#*:}"
done
