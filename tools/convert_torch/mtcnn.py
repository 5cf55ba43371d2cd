"""MTCNN's weight table, and how the package's `mtcnn.safetensors` was made.

    pip download --no-deps facenet-pytorch==2.6.0 && unzip facenet_pytorch-2.6.0-*.whl
    python -m tools.convert_torch.mtcnn facenet_pytorch/data mtcnn.safetensors

The three files are plain state dicts; they are read with `weights_only=True` and checked against
the SHA-256 sums of the release.
"""

import argparse
import hashlib
import pathlib

import numpy as np
from flax import nnx

from emollama_jax.errors import UserError
from emollama_jax.models.mtcnn import Mtcnn
from emollama_jax.models.pretrained import save
from tools.convert_torch.engine import Row, Transform, assign, linear

SHA256 = {
    "pnet": "a2a71925e0b9996a42f63e47efc1ca19043e69558b5c523b978d611dfae49c8f",
    "rnet": "bbb937de72efc9ef83b186c49f5f558467a1d7e3453a8ece0d71a886633f6a86",
    "onet": "165bfbe42940416ccfb977545cf0e976d5bf321f67083ae2aaaa5c764280118d",
}
CONV = Transform(  # [out, in, h, w], ours [h, w, in, out]
    "conv", lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
)
LAYERS = {  # network → (convolutions, dense layers, PReLUs)
    "pnet": (("conv1", "conv2", "conv3", "conv4_1", "conv4_2"), (), 3),
    "rnet": (("conv1", "conv2", "conv3"), ("dense4", "dense5_1", "dense5_2"), 4),
    "onet": (
        ("conv1", "conv2", "conv3", "conv4"),
        ("dense5", "dense6_1", "dense6_2", "dense6_3"),
        5,
    ),
}


def table(network: str) -> list[Row]:
    """The rows of one network, keys as in its file, paths as in that network's module."""
    convolutions, dense, slopes = LAYERS[network]
    rows = []
    for name in convolutions:
        rows += [Row(f"{name}.weight", f"{name}/kernel", CONV), Row(f"{name}.bias", f"{name}/bias")]
    for name in dense:
        rows += linear(name, name, bias=True)
    return rows + [Row(f"prelu{i}.weight", f"prelu{i}/slope") for i in range(1, slopes + 1)]


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The state dict of one of the release's files.

    Raises:
        UserError: absent, or not the release's bytes.
    """
    import torch

    if not path.is_file():
        raise UserError(f"{path}: no such file; wanted facenet_pytorch/data/{path.name}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256[path.stem]:
        raise UserError(f"{path}: SHA-256 {found}, wanted {SHA256[path.stem]} of release 2.6.0")
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {key: tensor.numpy() for key, tensor in state.items()}


def convert(folder: pathlib.Path) -> Mtcnn:
    """MTCNN with the weights of the release's data folder."""
    mtcnn = Mtcnn(rngs=nnx.Rngs(0))
    for network in LAYERS:
        state = read(folder / f"{network}.pt")
        assign(getattr(mtcnn, network), state, table(network), ignore={})
    return mtcnn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="facenet_pytorch/data of the wheel")
    parser.add_argument("out", type=pathlib.Path, help="the .safetensors file to write")
    arguments = parser.parse_args()
    try:
        save(convert(arguments.folder), arguments.out, dtype="float32")
    except UserError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
