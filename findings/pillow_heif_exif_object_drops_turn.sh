#!/usr/bin/env bash
# pillow-heif 1.8.1 with Pillow 13.0.0: `save(..., exif=EXIF)` takes a `PIL.Image.Exif` object or
# its bytes, yet only the bytes turn the picture. HEIF readers go by the `irot` property and not
# by the EXIF tag; pillow-heif writes it from the tag, but looks into the object as if it were bytes
# and drops the AttributeError. The other tags are written. On reading, the tag (6) is reset to 1,
# as for a picture that `irot` has turned, so `ImageOps.exif_transpose` does not turn it either. One
# would guess that both forms save the same file, as they do for JPEG, PNG, WebP and AVIF.
#
# Seen: a picture of 64x32 with orientation 6 comes back as 32x64 from bytes, and as 64x32 with
# orientation 1 from the object. Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0 pillow_heif==1.8.1

cat >"$folder/program.py" <<'PROGRAM'
import io

import pillow_heif
from PIL import Image, ImageOps

MAKE, ORIENTATION = 0x10F, 0x112
pillow_heif.register_heif_opener()
tags = Image.Exif()
tags[MAKE], tags[ORIENTATION] = "Maker", 6


def saved(kind, exif):
    """Size, size after exif_transpose, make and orientation as read, whether irot is there."""
    file = io.BytesIO()
    Image.new("RGB", (64, 32), "red").save(file, kind, exif=exif)
    picture = Image.open(file)
    read = picture.getexif()
    turned = ImageOps.exif_transpose(picture).size
    return picture.size, turned, read[MAKE], read[ORIENTATION], b"irot" in file.getvalue()


form = {"bytes": tags.tobytes(), "object": tags}
seen = {name: saved("HEIF", exif) for name, exif in form.items()}
for name, what in seen.items():
    print(f"{name}: size, after exif_transpose, make, orientation, irot: {what}")
assert seen["bytes"] == ((32, 64), (32, 64), "Maker", 1, True)
assert seen["object"] == ((64, 32), (64, 32), "Maker", 1, False), "changed: the object turns too"
for kind in ("JPEG", "PNG", "WEBP", "AVIF"):
    assert saved(kind, form["bytes"])[1] == saved(kind, form["object"])[1] == (32, 64), kind
PROGRAM
"$folder/venv/bin/python" "$folder/program.py"
