"""The converted DINOv2 against the ONNX file that it came from, on a real photograph.

The file's own operators are run, by onnxruntime where it is installed and else by the reference
implementation in the package onnx; what they give after the last norm is compared with our tower.

    python benchmarks/real_parts.py parts/dinov2_small vit_s_focus.onnx
"""

import argparse
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import skimage
from flax import nnx
from onnx import helper
from PIL import Image

from emollama_jax import config, imported
from emollama_jax.models.eva_vit import EvaVit
from emollama_jax.models.layers import normalise
from emollama_jax.models.parameters import named_parameters
from emollama_jax.models.rngs import abstract

LAST = ".layernorm.bias"  # whose sum is the backbone's output


def theirs(path: pathlib.Path, pixels: np.ndarray) -> np.ndarray:
    """The backbone's output [B, 1 + P, D] as the file computes it, for float32 [B, 3, S, S]."""
    model = onnx.load(path)
    node = next(n for n in model.graph.node if any(name.endswith(LAST) for name in n.input))
    del model.graph.output[:]
    output = helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None)
    model.graph.output.append(output)
    feed = {model.graph.input[0].name: pixels}
    try:
        import onnxruntime

        print(f"onnxruntime {onnxruntime.__version__}")
        session = onnxruntime.InferenceSession(model.SerializeToString())
        return session.run(None, feed)[0]
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        print(f"onnx {onnx.__version__}, its reference implementation")
        return ReferenceEvaluator(model).run(None, feed)[0]


def main() -> None:
    """Prints the largest difference, absolute and relative to the largest value."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="that tools.parts made")
    parser.add_argument("onnx", type=pathlib.Path, help="that it was made from")
    args = parser.parse_args()
    cfg = config.load("emollama_135m").model.vision
    tower = abstract(lambda rngs: EvaVit(cfg, rngs=rngs))
    leaves = named_parameters(tower)
    paths = [f"vision/{name}" for name in leaves]
    for path, value in imported.load_numpy(args.folder, paths).items():
        leaves[path.removeprefix("vision/")].set_value(jnp.asarray(value))
    picture = pathlib.Path(skimage.__file__).parent / "data" / "astronaut.png"
    size = (cfg.image_size, cfg.image_size)
    frame = np.asarray(Image.open(picture).convert("RGB").resize(size))[None]
    pixels = np.asarray(normalise(jnp.asarray(frame), cfg.image_mean, cfg.image_std))
    graphdef, state = nnx.split(tower)
    with jax.default_matmul_precision("highest"):
        run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)).lower(state, pixels).compile()
        start = time.perf_counter()
        ours = np.asarray(run(state, pixels))
    seconds = time.perf_counter() - start
    wanted = theirs(args.onnx, pixels.transpose(0, 3, 1, 2))
    apart, largest = np.abs(ours - wanted).max(), np.abs(wanted).max()
    print(f"tower {ours.shape} in {seconds:.2f} s; largest value {largest:.3f}")
    print(f"largest difference {apart:.2e}, {apart / largest:.2e} of the largest value")


if __name__ == "__main__":
    main()
