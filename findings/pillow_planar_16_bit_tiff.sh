#!/usr/bin/env bash
# Pillow 13.0.0: an RGB TIFF of 16 bits a sample, stored uncompressed in separate planes
# (PlanarConfiguration 2), opens without an error or a warning with wrong pixels. Each plane is read
# as if a sample had 8 bits: the low and the high byte become neighbouring pixels, each row of the
# upper half fills two rows, and the lower half is lost. One would guess that it opens like the same
# samples interleaved, or deflated, or at 8 bits (all three are right), or else is refused.
#
# Seen: of 64x64 random pixels 0.0 % are right (each sample within 1 of its high byte), and each
# plane holds the bytes of the file's first 32 rows. The other three ways: 100.0 %. Exits with 1 if
# that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0 tifffile==2026.3.3 numpy==2.3.5

cat >"$folder/program.py" <<'PROGRAM'
import io
import warnings

import numpy as np
import tifffile
from PIL import Image

warnings.simplefilter("error")
samples = np.random.default_rng(0).integers(0, 65536, (64, 64, 3), dtype=np.uint16)
high = (samples >> 8).astype(np.uint8)


def opened(pixels, planar, compression=None):
    """What Pillow reads; tifffile must read what was written."""
    file = io.BytesIO()
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1)) if planar else pixels
    config = "separate" if planar else "contig"
    tifffile.imwrite(file, planes, photometric="rgb", planarconfig=config, compression=compression)
    file.seek(0)
    assert (tifffile.imread(file) == planes).all()
    picture = Image.open(file)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def right(pixels):
    return float((abs(pixels.astype(int) - high) <= 1).all(-1).mean())


raw = opened(samples, planar=True)
others = {
    "interleaved": right(opened(samples, planar=False)),
    "planes, deflated": right(opened(samples, planar=True, compression="zlib")),
    "planes of 8 bits": right(opened(high, planar=True)),
}
print("pixels right:", {name: f"{share:.1%}" for name, share in others.items()})
print(f"pixels right: planes of 16 bits, uncompressed: {right(raw):.1%}")
assert min(others.values()) == 1.0
assert right(raw) < 0.01, "changed: the pixels are right"
for plane in range(3):
    upper = samples[:32, :, plane].astype("<u2").tobytes()
    assert raw[..., plane].tobytes() == upper, "changed: other bytes"
PROGRAM
"$folder/venv/bin/python" "$folder/program.py"
