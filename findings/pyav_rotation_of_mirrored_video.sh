#!/usr/bin/env bash
# PyAV 18.1.0 (FFmpeg 8): `frame.rotation` gives an angle for a display matrix that mirrors too, and
# the angle does not tell: a video to be flipped top to bottom has rotation 0, like one to be shown
# as it is, and one to be mirrored left to right has -180, like one to be turned upside down. So
# turning frames by `rotation` shows the first unflipped and the second upside down. One would guess
# that 0 means upright, or that a mirror is marked beside the angle. Only the raw DISPLAYMATRIX side
# data tells: the determinant of its upper left part is negative.
#
# Seen: as is 0, flipped 0; turned by 180 -180, mirrored -180; turned right -90, transposed -90;
# turned left 90, transposed the other way 90. Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet av==18.1.0 numpy==2.3.5

cat >"$folder/program.py" <<'PROGRAM'
import io
import struct

import av
import numpy as np

WIDTH, HEIGHT = 64, 48
# a, b, c, d of x' = a x + c y + tx, y' = b x + d y + ty, with the shift that keeps the corner at 0.
MATRICES = {
    "as is": ((1, 0, 0, 1), (0, 0), 0),
    "flipped": ((1, 0, 0, -1), (0, HEIGHT), 0),
    "turned by 180": ((-1, 0, 0, -1), (WIDTH, HEIGHT), -180),
    "mirrored": ((-1, 0, 0, 1), (WIDTH, 0), -180),
    "turned right": ((0, 1, -1, 0), (HEIGHT, 0), -90),
    "transposed": ((0, 1, 1, 0), (0, 0), -90),
    "turned left": ((0, -1, 1, 0), (0, WIDTH), 90),
    "transposed the other way": ((0, -1, -1, 0), (HEIGHT, WIDTH), 90),
}
file = io.BytesIO()
with av.open(file, "w", format="mp4") as movie:
    stream = movie.add_stream("mpeg4", rate=25)
    stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
    frame = av.VideoFrame.from_ndarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8), format="rgb24")
    for packet in [*stream.encode(frame), *stream.encode()]:
        movie.mux(packet)
start = file.getvalue().index(b"tkhd") + 4 + 40  # the matrix of a tkhd box of version 0

for name, ((a, b, c, d), (x, y), angle) in MATRICES.items():
    data = bytearray(file.getvalue())
    fixed = [value << 16 for value in (a, b, 0, c, d, 0, x, y)]
    data[start : start + 36] = struct.pack(">9i", *fixed, 1 << 30)
    with av.open(io.BytesIO(data)) as movie:
        frame = next(movie.decode(video=0))
        sides = [struct.unpack("<9i", bytes(side)) for side in frame.side_data]
    signs = [np.sign(m[0] * m[4] - m[1] * m[3]) for m in sides]
    assert signs == ([] if name == "as is" else [a * d - b * c]), (name, sides)
    print(f"{name}: rotation {frame.rotation}")
    assert frame.rotation == angle, f"changed: {angle} before"
PROGRAM
"$folder/venv/bin/python" "$folder/program.py"
