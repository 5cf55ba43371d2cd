#!/usr/bin/env bash
# Pillow 13.0.0: `convert("RGB")` (or "L") of a 16-bit grey picture clips: each sample above 255 reads
# 255, so nearly all of it turns white, with no error or warning. Such a picture opens as "I;16". PNGs
# of 16 bits with colour or with alpha open as 8 bits already and are scaled. One would guess that
# a grey ramp becomes the same grey ramp, whichever of these PNGs holds it.
#
# Seen: a ramp of 256 steps of 257 (0, 257, ... 65535) as grey reads 255 in all pixels but the first,
# by way of RGB and of L; as RGB, as RGBA and as grey with alpha it reads 0, 1, ... 255. Exits with 1
# if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0

cat >"$folder/program.py" <<'PROGRAM'
import io
import struct
import warnings
import zlib

from PIL import Image

warnings.simplefilter("error")
RAMP = [257 * step for step in range(256)]


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(colour_type, channels, alpha):
    """A PNG of 256x1 pixels of 16 bits: the ramp in each channel, opaque where there is alpha."""
    pixels = [[sample] * channels + [65535] * alpha for sample in RAMP]
    row = b"\0" + b"".join(struct.pack(f">{len(pixel)}H", *pixel) for pixel in pixels)
    header = struct.pack(">IIBBBBB", 256, 1, 16, colour_type, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + parts)


for name, kind, wanted in (
    ("grey", (0, 1, 0), [0] + [255] * 255),
    ("grey with alpha", (4, 1, 1), list(range(256))),
    ("RGB", (2, 3, 0), list(range(256))),
    ("RGBA", (6, 3, 1), list(range(256))),
):
    picture = Image.open(png(*kind))
    red = list(picture.convert("RGB").getchannel("R").tobytes())
    print(f"{name}: opens as {picture.mode}; red of every 50th step: {red[::50]}")
    assert red == list(picture.convert("L").tobytes()) == wanted, "changed"
PROGRAM
"$folder/venv/bin/python" "$folder/program.py"
