"""face-api's two networks with few channels and weights made from their names, in its own files."""

import hashlib
import io
import json
import tarfile

import numpy as np

# Channels: of the four dense blocks, and of Xception's stages.
DENSE = (3, 4, 6, 5, 8)
XCEPTION = (4, 6, 8, 10, 12)


def take(name, count):
    """Bytes that depend on a name alone."""
    return hashlib.shake_256(name.encode()).digest(count)


def separable(name, inside, outside):
    return [
        (f"{name}/depthwise_filter", (3, 3, inside, 1)),
        (f"{name}/pointwise_filter", (1, 1, inside, outside)),
        (f"{name}/bias", (outside,)),
    ]


def convolution(name, size, inside, outside):
    return [
        (f"{name}/filters", (size, size, inside, outside)),
        (f"{name}/bias", (outside,)),
    ]


def linear(name, inside, outside):
    return [(f"{name}/weights", (inside, outside)), (f"{name}/bias", (outside,))]


def reduction(name, inside, outside):
    return [
        *separable(f"{name}/separable_conv0", inside, outside),
        *separable(f"{name}/separable_conv1", outside, outside),
        *convolution(f"{name}/expansion_conv", 1, inside, outside),
    ]


def landmark_arrays():
    arrays = convolution("dense0/conv0", 3, DENSE[0], DENSE[1])
    for block in range(4):
        inside, outside = DENSE[block : block + 2]
        if block:
            arrays += separable(f"dense{block}/conv0", inside, outside)
        for number in (1, 2, 3):
            arrays += separable(f"dense{block}/conv{number}", outside, outside)
    return arrays + linear("fc", DENSE[-1], 136)


def person_arrays():
    a, b, c, d, e = XCEPTION
    arrays = convolution("entry_flow/conv_in", 3, 3, a)
    arrays += reduction("entry_flow/reduction_block_0", a, b)
    arrays += reduction("entry_flow/reduction_block_1", b, c)
    for block in range(2):
        for number in range(3):
            arrays += separable(f"middle_flow/main_block_{block}/separable_conv{number}", c, c)
    arrays += reduction("exit_flow/reduction_block", c, d)
    arrays += separable("exit_flow/separable_conv", d, e)
    return [*arrays, *linear("fc/age", e, 1), *linear("fc/gender", e, 2)]


def make_files():
    """File name → content, as in the package's folder `model`; biases of the second are floats."""
    files = {}
    for model, arrays in (("face_landmark_68", landmark_arrays()), ("age_gender", person_arrays())):
        entries, content = [], b""
        for name, shape in arrays:
            packed = take(f"{model} {name}", int(np.prod(shape)))
            entry = {"name": name, "shape": list(shape), "dtype": "float32"}
            if model == "age_gender" and name.endswith("bias"):
                content += (np.frombuffer(packed, np.uint8) / np.float32(256)).tobytes()
            else:
                fan = (
                    30
                    if name.endswith("bias")
                    else 9
                    if "depthwise" in name
                    else np.prod(shape[:-1])
                )
                reach = 1.75 / np.sqrt(fan)
                entry["quantization"] = {"dtype": "uint8", "scale": reach / 127, "min": -reach}
                content += packed
            entries.append(entry)
        manifest = [{"weights": entries, "paths": [f"{model}_model.bin"]}]
        files[f"{model}_model-weights_manifest.json"] = json.dumps(manifest).encode()
        files[f"{model}_model.bin"] = content
    return files


def make_pictures():
    """Coarse noise, uint8 [H, W, 3]: square, tall by an odd number, wide, and larger than 112."""
    pictures = []
    for height, width in ((48, 48), (60, 41), (33, 70), (150, 121)):
        coarse = np.frombuffer(take(f"picture {height}", 6 * 5 * 3), np.uint8).reshape(6, 5, 3)
        pictures.append(np.kron(coarse, np.ones((25, 25, 1), np.uint8))[:height, :width])
    return pictures


def write_package(path):
    """The npm package's file; returns its SHA-256."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in make_files().items():
            info = tarfile.TarInfo(f"package/model/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()
