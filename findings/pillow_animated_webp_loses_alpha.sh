#!/usr/bin/env bash
# Pillow 13.0.0 (libwebp 1.6.0): frames with an opaque rectangle on a transparent ground, saved as a
# lossless animated WebP, come back as "RGB" with a black ground. The encoder crops each frame to
# its opaque rectangle, so no stored frame has alpha and the VP8X alpha flag stays off; Pillow takes
# "RGB" from the flag and drops the canvas's alpha. `background=` (white here) does not show either.
# One would guess that alpha survives, as it does for the first frame alone, for GIF and for APNG,
# and with one more opaque pixel that makes the crop include transparent ones.
#
# Seen: a corner outside the square reads (0, 0, 0) in both frames, mode RGB; with one more pixel,
# or as a single picture: (0, 0, 0, 0), mode RGBA. Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0

cat >"$folder/program.py" <<'PROGRAM'
import io

from PIL import Image, features

CLEAR, BLACK = ("RGBA", (0, 0, 0, 0)), ("RGB", (0, 0, 0))


def square(left, top, colour, pixel=None):
    picture = Image.new("RGBA", (32, 32))
    picture.paste(colour, (left, top, left + 8, top + 8))
    if pixel:
        picture.putpixel(pixel, Image.new("RGBA", (1, 1), colour).getpixel((0, 0)))
    return picture


def corners(kind, frames, **options):
    """Mode and right upper pixel of each frame, after saving and opening."""
    file = io.BytesIO()
    frames[0].save(
        file, kind, save_all=len(frames) > 1, append_images=frames[1:], duration=100, **options
    )
    picture, seen = Image.open(file), []
    for index in range(len(frames)):
        picture.seek(index)
        seen.append((picture.mode, picture.getpixel((31, 0))))
    return seen


red, green = square(8, 8, "red"), square(16, 16, "lime")
print("libwebp", features.version("webp"))
for name, frames, wanted in (
    ("one picture", [red], CLEAR),
    ("one more pixel", [square(8, 8, "red", (2, 2)), green], CLEAR),
    ("two squares", [red, green], BLACK),
):
    seen = corners("WEBP", frames, lossless=True, background=(255, 255, 255, 255))
    print(f"{name}: {seen}")
    assert seen == [wanted] * len(frames), "changed"
assert corners("PNG", [red, green], disposal=1) == [CLEAR] * 2
PROGRAM
"$folder/venv/bin/python" "$folder/program.py"
