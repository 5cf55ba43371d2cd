#!/usr/bin/env bash
# PyAV 18.1.0 (FFmpeg 8, libavcodec 62.28): a TIFF stored in tiles and not in strips decodes to a
# frame of the right size and format that is all zeros. There is no error, no warning in FFmpeg's
# log, and `is_corrupt` is False. The decoder follows TileOffsets only for DNG; for any other file
# it goes on to strips, finds none and hands the blank frame out. One would guess that it decodes
# tiles or says "Tiled images are not supported", as older versions did.
#
# Seen: 8 and 16 bits, grey and RGB, raw and deflated: strips 100 % of the samples right, tiles 0 %
# with no sample but 0, and no log line of level "warning" or worse. Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet av==18.1.0 tifffile==2026.3.3 numpy==2.3.5

cat >"$folder/program.py" <<'PROGRAM'
import io
import itertools

import av
import numpy as np
import tifffile

av.logging.set_level(av.logging.WARNING)


def decoded(samples, **layout):
    file = io.BytesIO()
    tifffile.imwrite(file, samples, **layout)
    file.seek(0)
    assert (tifffile.imread(file) == samples).all()
    with av.logging.Capture() as said, av.open(file, format="tiff_pipe") as movie:
        (frame,) = movie.decode(video=0)
    assert not said, said
    assert not frame.is_corrupt
    return frame.to_ndarray()


for kind, channels, compression in itertools.product(
    (np.uint8, np.uint16), ((), (3,)), (None, "zlib")
):
    top = np.iinfo(kind).max
    samples = np.random.default_rng(0).integers(1, top, (64, 64, *channels), kind, endpoint=True)
    how = {"photometric": "rgb" if channels else "minisblack", "compression": compression}
    strips, tiles = decoded(samples, **how), decoded(samples, tile=(32, 32), **how)
    assert strips.shape == tiles.shape == samples.shape
    share = [f"{(read == samples).mean():.0%}" for read in (strips, tiles)]
    print(f"{kind.__name__}, {how}: strips {share[0]} right, tiles {share[1]}, top {tiles.max()}")
    assert (strips == samples).all()
    assert not tiles.any(), "changed: something is decoded"
PROGRAM
"$folder/venv/bin/python" "$folder/program.py"
