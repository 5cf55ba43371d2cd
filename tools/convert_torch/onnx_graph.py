"""What an ONNX file of DINOv2 holds, under the names of `transformers`.

Exporters keep the names of vectors (biases, norms, LayerScale). Kernels of Linears are transposed
and lose theirs (`onnx::MatMul_1966`), positions are cut into the class token's and the patches'. So
a kernel is what the product before a named bias takes, and positions are what is added to the class
token and the patches. What no tensor shows (heads, epsilon, activation) is read off the operators.
"""

import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from tools.convert_torch.files import Tensor, in_memory
from tools.convert_torch.pickled import Unreadable

PASSING = ("Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze")  # change no number
SPREADING = (*PASSING, "Expand", "Tile", "Transpose", "Slice", "Gather", "Resize")
TOWER = re.compile(r"(.*)encoder\.layer\.0\.norm1\.weight")
PARTS = ("embeddings.", "encoder.", "layernorm.")
ANOTHER = "take the float32 export, not optimised"


class Graph:
    """The constants and operators of one ONNX file, all in memory.

    Attributes:
        names: names of all constants; equal ones share one under other names.
    """

    def __init__(self, path: pathlib.Path):
        """Reads the file.

        Raises:
            Unreadable: not a complete ONNX file.
        """
        model = _load(path)
        nodes = list(model.graph.node)
        self._makers = {out: node for node in nodes for out in node.output}
        self._users: dict[str, list[Any]] = {}
        for node in nodes:
            for name in dict.fromkeys(node.input):
                self._users.setdefault(name, []).append(node)
        self._held = {tensor.name: tensor for tensor in model.graph.initializer}
        for name, node in self._makers.items():
            if node.op_type == "Constant":
                self._held[name] = _attribute(node, "value")
        alias = [n for n, node in self._makers.items() if node.op_type == "Identity"]
        self.names = [*self._held, *(n for n in alias if self._source(n) in self._held)]

    def operators(self, *kinds: str) -> list[Any]:
        """All nodes of some kinds."""
        return [node for node in self._makers.values() if node.op_type in kinds]

    def constant(self, name: str) -> np.ndarray | None:
        """A constant's value; None: `name` is computed."""
        from onnx import numpy_helper

        tensor = self._held.get(self._source(name))
        if tensor is None:
            return None
        try:
            return np.asarray(numpy_helper.to_array(tensor))
        except Exception as error:  # whatever a damaged tensor makes of it
            raise Unreadable(f"{name}: {' '.join(str(error).split())[:160]}") from None

    def _source(self, name: str) -> str:
        while (node := self._makers.get(name)) is not None and node.op_type in ("Identity", "Cast"):
            name = node.input[0]
        return name

    def back(self, name: str, kinds: Iterable[str]) -> Any:
        """The operator that makes a value, before those of some kinds; None: there is none."""
        node = self._makers.get(name)
        while node is not None and node.op_type in kinds:
            node = self._makers.get(node.input[0])
        return node

    def ahead(self, name: str, kinds: Iterable[str]) -> Iterator[Any]:
        """The operators that read a value, also behind those of some kinds."""
        for node in self._users.get(name, []):
            if node.op_type in kinds and node.input[0] == name:
                yield from self.ahead(node.output[0], kinds)
            else:
                yield node

    def linear(self, bias: str) -> np.ndarray:
        """The kernel that a bias belongs to, as PyTorch holds it: [out, in].

        Raises:
            Unreadable: no product of a constant matrix stands before the bias.
        """
        found = ""
        for node in self._users.get(bias, []):
            if node.op_type == "Gemm" and len(node.input) > 2 and node.input[2] == bias:
                product, turned = node, not _attribute(node, "transB", 0)
            elif node.op_type == "Add":
                product = self.back(next(x for x in node.input if x != bias), PASSING)
                turned = True
            else:
                continue
            found = "an input" if product is None else product.op_type
            if product is None or product.op_type not in ("MatMul", "Gemm"):
                continue
            name = product.input[1]
            while (maker := self._makers.get(name)) is not None and maker.op_type == "Transpose":
                name, turned = maker.input[0], not turned
            kernel = self.constant(name)
            if kernel is not None and kernel.ndim == 2:
                return kernel.T if turned else kernel
            found = f"a {product.op_type} of no constant matrix"
        raise Unreadable(
            f"{bias}: added to {found or 'nothing'}, wanted the product with its kernel: {ANOTHER}"
        )

    def constants(self, name: str) -> dict[str, np.ndarray]:
        """The constants that a value is put together from, by what changes no number."""
        value = self.constant(name)
        if value is not None:
            return {self._source(name): value}
        node = self._makers.get(name)
        if node is None or node.op_type not in (*SPREADING, "Concat"):
            return {}
        inputs = node.input if node.op_type == "Concat" else node.input[:1]
        found: dict[str, np.ndarray] = {}
        for each in inputs:
            found |= self.constants(each)
        return found

    def dimensions(self, name: str) -> list[int | None]:
        """A shape that a Reshape is given; None for what is not known."""
        value = self.constant(name)
        if value is not None:
            return [int(x) for x in value.reshape(-1)]
        node = self.back(name, PASSING)
        if node is None or node.op_type != "Concat":
            return [None]
        return [size for each in node.input for size in self.dimensions(each)]


def read_dinov2(path: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, Any], int]:
    """The tensors of a DINOv2 in an ONNX file.

    Args:
        path: ONNX file.

    Returns:
        Tensors under `transformers`' names, behind what the export put before them; what a
        `config.json` would say; and how many more named tensors the file holds, e.g. of a decoder.

    Raises:
        Unreadable: not a complete ONNX file, or no DINOv2 that can be read off its graph.
    """
    graph = Graph(path)
    prefix = next((match[1] for name in graph.names if (match := TOWER.fullmatch(name))), None)
    if prefix is None:
        raise Unreadable(
            "no tensor named encoder.layer.0.norm1.weight: wanted DINOv2 as exported from "
            f"transformers ({ANOTHER})"
        )
    starts = tuple(prefix + part for part in PARTS)
    named = {name: graph.constant(name) for name in graph.names if name.startswith(starts)}
    named = {name: value for name, value in named.items() if value is not None}
    for bias in [name for name in named if name.endswith(".bias")]:
        weight = f"{bias.removesuffix('bias')}weight"
        # A named matrix is looked up in the graph too: only that says whether it is transposed.
        if weight not in named or named[weight].ndim == 2:
            named[weight] = graph.linear(bias)
    cls, positions, patch = _embeddings(graph, f"{prefix}embeddings.")
    named |= {
        f"{prefix}embeddings.cls_token": cls,
        f"{prefix}embeddings.position_embeddings": positions,
    }
    width = cls.shape[-1]
    layers, first = f"{prefix}encoder.layer.", f"{prefix}encoder.layer.0."
    numbers = {n.removeprefix(layers).split(".")[0] for n in named if n.startswith(layers)}
    settings = {
        "model_type": "dinov2",
        "hidden_size": width,
        "num_hidden_layers": len(numbers),
        "num_attention_heads": _heads(graph, first, width),
        "mlp_ratio": len(named.get(f"{first}mlp.fc1.bias", ())) / width,
        "patch_size": patch,
        "layer_norm_eps": _epsilon(graph, f"{first}norm1.weight"),
        "hidden_act": _activation(graph),
    }
    others = [name for name in graph.names if _speaks(name) and not name.startswith(starts)]
    tensors = {name: in_memory(value, file=path.name) for name, value in named.items()}
    return tensors, settings, len(others)


def _speaks(name: str) -> bool:
    """Whether a name is a module's, and not one that the exporter made up."""
    return bool(re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", name))


def _load(path: pathlib.Path) -> Any:
    try:
        import onnx
    except ImportError:
        raise Unreadable("needs onnx: pip install 'emollama-jax[convert]'") from None
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's, onnx' own, or the system's
        reason = " ".join(str(error).split())[:160]
        raise Unreadable(f"not a complete ONNX file ({reason})") from None
    if not model.graph.node:
        raise Unreadable("not a complete ONNX file (no operator in it)")
    return model


def _attribute(node: Any, name: str, *default: Any) -> Any:
    """An attribute of a node; of a Constant, its value as a tensor."""
    from onnx import helper, numpy_helper

    for attribute in node.attribute:
        if attribute.name == name:
            return helper.get_attribute_value(attribute)
    if name == "value" and node.attribute:  # value_ints, value_float, …
        return numpy_helper.from_array(np.asarray(helper.get_attribute_value(node.attribute[0])))
    return default[0]


def _embeddings(graph: Graph, prefix: str) -> tuple[np.ndarray, np.ndarray, int]:
    """The class token [1, 1, D], positions [1, 1 + P, D], and the patches' side."""
    kernel = f"{prefix}patch_embeddings.projection.weight"
    convolution = next((n for n in graph.operators("Conv") if kernel in n.input), None)
    value = graph.constant(kernel)
    if convolution is None or value is None:
        raise Unreadable(f"{kernel}: no constant that a convolution reads: {ANOTHER}")
    width, patch = value.shape[0], value.shape[-1]
    joined = _first(graph, convolution.output[0], "Concat", "Transpose")
    added = joined and _first(graph, joined.output[0], "Add")
    if not added:
        raise Unreadable(f"{prefix}position_embeddings: no Add after the class token: {ANOTHER}")
    cls = [x for x in graph.constants(joined.input[0]).values() if x.shape[-1] == width]
    other = next(x for x in added.input if graph.back(x, PASSING) is not joined)
    held = [x for x in graph.constants(other).values() if x.ndim > 2]
    found = [rows for x in held if (rows := _by_row(x, width)) is not None]
    if len(cls) != 1 or not found or len(found) < len(held):
        shapes = ", ".join(str(x.shape) for x in graph.constants(other).values())
        raise Unreadable(
            f"{prefix}position_embeddings: made from constants of shape {shapes or 'none'}, wanted "
            f"the class token's and the patches' of width {width}: {ANOTHER}"
        )
    found.sort(key=len)  # the class token's before the patches'
    return cls[0].reshape(-1, width)[None, :1], np.concatenate(found)[None], patch


def _by_row(x: np.ndarray, width: int) -> np.ndarray | None:
    """Positions [1, …, D] or, as a picture, [1, D, h, w] as [P, D]; None: another shape."""
    if x.ndim == 4 and x.shape[1] == width != x.shape[3]:
        x = x.transpose(0, 2, 3, 1)
    return x.reshape(-1, width) if x.shape[0] == 1 and x.shape[-1] == width else None


def _first(graph: Graph, name: str, kind: str, *through: str) -> Any:
    return next((n for n in graph.ahead(name, (*PASSING, *through)) if n.op_type == kind), None)


def _heads(graph: Graph, layer: str, width: int) -> int:
    """Read off the shape that queries are given."""
    for name in (f"{layer}attention.attention.query.bias", f"{layer}attention.q_proj.bias"):
        added = _first(graph, name, "Add") or _first(graph, name, "Gemm")
        for node in graph.ahead(added.output[0], ("Cast", "Identity")) if added else ():
            sizes = graph.dimensions(node.input[1]) if node.op_type == "Reshape" else []
            heads, inner = sizes[-2:] if len(sizes) > 2 else (None, None)
            if inner is not None and inner > 0 and width % inner == 0:
                return width // inner
            if heads is not None and heads > 0:
                return heads
    raise Unreadable(f"{layer}attention: no Reshape gives the number of heads: {ANOTHER}")


def _epsilon(graph: Graph, weight: str) -> float:
    """Of LayerNormalization, or of the operators that it was taken apart into."""
    steps: dict[str, Callable[[Any], str]] = {
        "Mul": lambda node: next(x for x in node.input if x != weight),
        "Div": lambda node: node.input[1],
        "Sqrt": lambda node: node.input[0],
    }
    for node in graph.ahead(weight, ("Cast",)):
        if node.op_type == "LayerNormalization":
            return _decimal(_attribute(node, "epsilon", 1e-5))
        while node is not None and node.op_type in steps:
            node = graph.back(steps[node.op_type](node), ("Cast", "Identity"))
        if node is not None and node.op_type == "Add":
            for value in map(graph.constant, node.input):
                if value is not None and value.size == 1:
                    return _decimal(value.item())
    raise Unreadable(f"{weight}: no operator gives the norm's epsilon: {ANOTHER}")


def _decimal(x: float) -> float:
    """A float32 as it was written: 1e-6, not 9.999999974752427e-07."""
    return float(str(np.float32(x)))


def _activation(graph: Graph) -> str:
    if graph.operators("Erf"):
        return "gelu"
    found = [_attribute(node, "approximate", b"none") for node in graph.operators("Gelu")]
    return "gelu" if found and set(found) == {b"none"} else "not the exact GELU"
