"""The npm package `@vladmandic/face-api` (MIT): fetched, checked, and its weights read.

The weights are TensorFlow.js's: a manifest in JSON names arrays, one after the other in a binary
file, either float32 or bytes that stand for `byte · scale + min`.
"""

import hashlib
import json
import pathlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping

import numpy as np

from emollama_jax.errors import UserError

NAME, VERSION = "@vladmandic/face-api", "1.7.15"
FILE = "vladmandic-face-api-1.7.15.tgz"
SHA256 = "0d77fffeef362ef9c0939cf6c567f3a2e8e177f114fa257a3270cbd2e509b031"
MODELS = ("face_landmark_68", "age_gender")

Weights = Mapping[str, np.ndarray]


def fetch(folder: pathlib.Path) -> pathlib.Path:
    """The package's file in a folder, fetched with npm where it is missing.

    Raises:
        UserError: npm is missing or fails.
    """
    path = folder / FILE
    if path.exists():
        return path
    wanted = f"{NAME}@{VERSION}"
    otherwise = f"fetch {FILE} elsewhere with `npm pack {wanted}` and name it with --package"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        try:
            command = ["npm", "pack", "--silent", wanted]
            done = subprocess.run(command, cwd=work, capture_output=True, text=True)
        except FileNotFoundError:
            raise UserError(f"{wanted}: npm is not installed; {otherwise}") from None
        if done.returncode or not (fetched := pathlib.Path(work, FILE)).exists():
            said = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()
            raise UserError(f"{wanted}: npm pack failed ({said[0]}); {otherwise}")
        shutil.move(fetched, path)
    return path


def read_weights(path: pathlib.Path, *, sha256: str) -> dict[str, Weights]:
    """Model → name → float32 array.

    Args:
        path: package file.
        sha256: expected hash.

    Raises:
        UserError: missing, or another file.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); wanted {FILE} of npm's {NAME}"
        ) from None
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise UserError(
            f"{path}: SHA-256 is {found}, wanted {sha256} ({NAME} {VERSION}): delete it and "
            "re-run without --package to fetch it again"
        )
    with tarfile.open(path) as archive:

        def read(name: str) -> bytes:
            member = archive.extractfile(f"package/model/{name}")
            assert member is not None
            return member.read()

        return {
            model: decode(
                json.loads(read(f"{model}_model-weights_manifest.json")),
                read(f"{model}_model.bin"),
            )
            for model in MODELS
        }


def decode(manifest: list[dict], content: bytes) -> Weights:
    """The arrays of one weight file, float32."""
    weights, start = {}, 0
    for entry in manifest[0]["weights"]:
        shape, packed = entry["shape"], entry.get("quantization")
        stored = np.dtype("uint8" if packed else "<f4")
        count = int(np.prod(shape))
        values = np.frombuffer(content, stored, count, start)
        start += count * stored.itemsize
        if packed:
            values = values * packed["scale"] + packed["min"]  # in float64, as in JavaScript
        weights[entry["name"]] = values.astype(np.float32).reshape(shape)
    return weights
