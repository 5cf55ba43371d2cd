"""MTCNN's weight table, for the three files of facenet-pytorch's wheel.

How the package's `mtcnn.safetensors` was made:

    pip download --no-deps facenet-pytorch==2.6.0 && unzip facenet_pytorch-2.6.0-*.whl
    python -m tools.convert_torch mtcnn --src facenet_pytorch/data --out mtcnn
    python -m tools.convert_torch export ours --src mtcnn --out mtcnn.safetensors
"""

import hashlib
import pathlib
from collections.abc import Sequence

from tools.convert_torch.engine import Row, Transform, linear
from tools.convert_torch.files import Opened, name_unread

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


def table(network: str, *, torch: str = "", path: str = "") -> list[Row]:
    """The rows of one network, behind the prefixes `torch` and `path`."""
    convolutions, dense, slopes = LAYERS[network]
    rows = []
    for name in convolutions:
        rows.append(Row(f"{torch}{name}.weight", f"{path}{name}/kernel", CONV))
        rows.append(Row(f"{torch}{name}.bias", f"{path}{name}/bias"))
    for name in dense:
        rows += linear(f"{torch}{name}", f"{path}{name}", bias=True)
    for i in range(1, slopes + 1):
        rows.append(Row(f"{torch}prelu{i}.weight", f"{path}prelu{i}/slope"))
    return rows


def mtcnn() -> list[Row]:
    """All three, their keys behind the name of their file."""
    return [row for name in LAYERS for row in table(name, torch=f"{name}.", path=f"{name}/")]


def open_three(paths: Sequence[pathlib.Path]) -> Opened:
    """Opens `pnet.pt`, `rnet.pt` and `onet.pt`, named one by one or by their folder."""
    opened = Opened()
    for path in paths:
        files = [path / f"{name}.pt" for name in LAYERS] if path.is_dir() else [path]
        for file in files:
            if file.stem not in LAYERS:
                opened.problems.append(f"{file}: wanted {', '.join(f'{n}.pt' for n in LAYERS)}")
            elif not file.is_file():
                opened.problems.append(f"{file}: no such file")
            else:
                opened.add(file, prefix=f"{file.stem}.")
                if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256[file.stem]:
                    opened.notes.append(f"{file.name} is not the file of facenet-pytorch 2.6.0")
        if path.is_dir():
            name_unread(opened, path, files)
    return opened
