"""Model FLOPs of a step, from the config alone: what the mathematics needs, whoever computes it.

Matrix products only, two operations a multiply-add. The backward pass counts a product's gradient
for its input where something before it trains, and for its kernel where that trains: a frozen
kernel has none. Nothing that is run again counts. Causal attention counts the half that is seen.
"""

import collections
import dataclasses
from collections.abc import Collection, Iterator

from emollama_jax.config import Config
from emollama_jax.models.facexformer import PARSING_CLASSES, TASKS
from emollama_jax.terms import LANDMARKS


@dataclasses.dataclass(frozen=True)
class Product:
    """One kind of matrix product."""

    part: str  # as in `cost.PARTS`
    forward: float  # FLOPs of one pass
    kernel: str = ""  # path of the parameter; "" for products of activations (attention)
    leaf: bool = False  # what it multiplies comes from frozen towers: no gradient goes there
    attention: bool = False


@dataclasses.dataclass(frozen=True)
class Load:
    """What the networks of a step read, over all devices."""

    tokens: float  # that the LLM reads
    pairs: float  # of one of them and one that it sees, itself included
    labels: float  # tokens with logits
    frames: float
    asked: float  # pairs of a frame and a question
    question: float  # tokens of such a question

    def __add__(self, other: "Load") -> "Load":
        asked = self.asked + other.asked
        return Load(
            tokens=self.tokens + other.tokens,
            pairs=self.pairs + other.pairs,
            labels=self.labels + other.labels,
            frames=self.frames + other.frames,
            asked=asked,
            question=(self.asked * self.question + other.asked * other.question) / max(asked, 1),
        )

    def times(self, count: float) -> "Load":
        """Of so many like it."""
        each = {name: value * count for name, value in vars(self).items() if name != "question"}
        return dataclasses.replace(self, **each)


@dataclasses.dataclass(frozen=True)
class ModelFlops:
    """Model FLOPs of a whole step, over all devices."""

    forward: dict[str, float]  # by part
    backward: dict[str, float]
    attention: dict[str, float]  # of both, what attention's own products take

    @property
    def total(self) -> float:
        return sum(self.forward.values()) + sum(self.backward.values())


ORDER = ("vision", "face", "fim", "qformer", "visual_tokens", "llm", "loss")
FOLDER = {"llm": "llama", "loss": "llama"}  # where a part's parameters are, if not by its name


def train_flops(cfg: Config, trainable: Collection[str], load: Load) -> ModelFlops:
    """A train step's.

    Args:
        cfg: config of the run.
        trainable: paths of the parameters that train.
        load: what is read, with its padding or without.
    """
    products = [
        *_towers(cfg, load),
        *_llm(cfg, load.tokens, cfg.model.llama.heads * load.pairs),
    ]
    head = _matrix(load.labels, cfg.model.llama.width, cfg.model.llama.vocab_rows)
    kernel = "llama/embed_tokens" if cfg.model.llama.tied else "llama/lm_head/kernel"
    products.append(Product("loss", head, kernel))
    return _sum(products, trainable)


def prefill_flops(cfg: Config, load: Load) -> ModelFlops:
    """Model FLOPs of reading prompts, up to the first token; one has logits in each."""
    head = _matrix(load.labels, cfg.model.llama.width, cfg.model.llama.vocab_rows)
    products = [
        *_towers(cfg, load),
        *_llm(cfg, load.tokens, cfg.model.llama.heads * load.pairs),
        Product("llm", head),
    ]
    return _sum(products, ())


def decode_flops(cfg: Config, *, examples: int, slots: int) -> ModelFlops:
    """Model FLOPs of one more token for each example, with a cache of `slots`."""
    products = [
        *_llm(cfg, examples, examples * cfg.model.llama.heads * slots),
        Product("llm", 2 * examples * cfg.model.llama.width * cfg.model.llama.vocab_rows),
    ]
    return _sum(products, ())


def _sum(products: list[Product], trainable: Collection[str]) -> ModelFlops:
    trained = {
        part: any(path.startswith(f"{FOLDER.get(part, part)}/") for path in trainable)
        for part in ORDER
    }
    reached = {  # by a gradient: something in the part, or before it, trains
        part: any(trained[before] for before in ORDER[: place + 1])
        for place, part in enumerate(ORDER)
    }
    forward, backward, attention = (collections.Counter[str]() for _ in range(3))
    for product in products:
        gradients = 0
        if trainable and reached[product.part]:
            gradients = 2 if not product.kernel else int(not product.leaf)
            gradients += product.kernel in trainable
        forward[product.part] += product.forward
        backward[product.part] += product.forward * gradients
        if product.attention:
            attention[product.part] += product.forward * (1 + gradients)
    return ModelFlops(dict(forward), dict(backward), dict(attention))


def _matrix(tokens: float, i: int, o: int) -> float:
    return 2.0 * tokens * i * o


def _llm(cfg: Config, tokens: float, pairs: float) -> Iterator[Product]:
    """The decoder's layers; `pairs` of a query and a key that it sees, over all heads."""
    llama = cfg.model.llama
    heads, kv_heads = llama.heads * llama.head_dim, llama.kv_heads * llama.head_dim
    sizes = {
        "q_proj": (llama.width, heads),
        "k_proj": (llama.width, kv_heads),
        "v_proj": (llama.width, kv_heads),
        "o_proj": (heads, llama.width),
        "gate_proj": (llama.width, llama.mlp_width),
        "up_proj": (llama.width, llama.mlp_width),
        "down_proj": (llama.mlp_width, llama.width),
    }
    for name, (i, o) in sizes.items():
        path = f"llama/layers/{name}"
        yield Product("llm", llama.layers * _matrix(tokens, i, o), f"{path}/kernel")
        if llama.lora.rank and name in llama.lora.targets:
            rank = llama.lora.rank
            yield Product("llm", llama.layers * _matrix(tokens, i, rank), f"{path}/lora_A")
            yield Product("llm", llama.layers * _matrix(tokens, rank, o), f"{path}/lora_B")
    yield Product("llm", llama.layers * 4.0 * pairs * llama.head_dim, attention=True)


def _towers(cfg: Config, load: Load) -> Iterator[Product]:
    """All that stands before the LLM."""
    frames = load.frames
    yield from _vision(cfg, frames)
    if cfg.model.fim.branches != "none":
        yield from _face(cfg, frames)
        yield from _fim(cfg, frames)
    yield from _qformer(cfg, load)
    yield from _visual_tokens(cfg, frames, load.asked)


def _vision(cfg: Config, frames: float) -> Iterator[Product]:
    vit = cfg.model.vision
    tokens, width = frames * (1 + vit.patches), vit.width
    yield Product(
        "vision",
        _matrix(frames * vit.patches, 3 * vit.patch_size**2, width),
        "vision/patch_embed/kernel",
        leaf=True,
    )
    for path, size in {
        "attn/qkv": 3 * width,
        "attn/proj/kernel": width,
        "fc1/kernel": vit.mlp_width,
        "fc2/kernel": vit.mlp_width,
    }.items():
        yield Product("vision", vit.depth * _matrix(tokens, width, size), f"vision/blocks/{path}")
    pairs = 4.0 * tokens * (1 + vit.patches) * width
    yield Product("vision", vit.depth * pairs, attention=True)


def _face(cfg: Config, frames: float) -> Iterator[Product]:
    """FaceXFormer without its heads, which training does not ask. Frozen or trained as one."""
    face, swin = cfg.model.face, cfg.model.face.swin
    side = swin.image_size // swin.patch_size
    total = _matrix(side**2, 3 * swin.patch_size**2, swin.width)
    attention = 0.0
    finest = side**2
    for stage, depth in enumerate(swin.depths):
        width = swin.width * 2**stage
        if stage:
            side = -(-side // 2)
            total += _matrix(side**2, 2 * width, width)
        padded = (-(-side // swin.window) * swin.window) ** 2
        total += depth * _matrix(side**2, width, (4 + 2 * swin.mlp_ratio) * width)
        attention += depth * 4.0 * padded * swin.window**2 * width
        total += _matrix(side**2, width, face.width) + _matrix(side**2, face.width, face.width)
    tokens, width = len(TASKS) + PARSING_CLASSES, face.width
    inner = width // face.attention_downsample
    crossing = _matrix(2 * (tokens + finest), width, inner)  # q, k, v and out of one attention
    layers = face.decoder_depth
    total += layers * (_matrix(tokens, width, 4 * width) + 2 * crossing)
    total += layers * 2 * _matrix(tokens, width, face.decoder_mlp_width) + crossing
    attention += 4.0 * (layers * tokens**2 * width + (2 * layers + 1) * tokens * finest * inner)
    yield Product("face", frames * total, "face/linear_fuse/kernel")
    yield Product("face", frames * attention, attention=True)


def _fim(cfg: Config, frames: float) -> Iterator[Product]:
    fim, width, face = cfg.model.fim, cfg.model.vision.width, cfg.model.face
    patches, llm = cfg.model.vision.patches, cfg.model.llama.width
    inner = fim.heads * fim.head_dim
    cells = (face.swin.image_size // face.swin.patch_size) ** 2

    def branch(name: str, keys: int, key_width: int) -> Iterator[Product]:
        for module, queries in (("attention", patches), ("token_attention", 1)):
            path = f"fim/{name}_branch/{module}"
            looks = _matrix(frames * queries, width, inner)
            reads = _matrix(frames * keys, key_width, inner)
            for leaf, flops in (("q", looks), ("k", reads), ("v", reads), ("o", looks)):
                yield Product("fim", flops, f"{path}/{leaf}_proj/kernel")
            yield Product("fim", 4.0 * frames * queries * keys * inner, attention=True)
        path = f"fim/{name}_branch/projector"
        yield Product("fim", _matrix(frames, width, llm), f"{path}_in/kernel")
        yield Product("fim", _matrix(frames, llm, llm), f"{path}_out/kernel")

    if fim.branches in ("both", "global"):
        keys = fim.pool**2 + len(TASKS) + PARSING_CLASSES
        into = _matrix(frames * keys, face.width, width)
        yield Product("fim", into, "fim/global_in/kernel", leaf=True)
        yield from branch("global", keys, width)
    if fim.branches in ("both", "local"):
        side = int(cells**0.5)
        # Two products with weights that no gradient reaches: counted as if with a frozen kernel.
        samples = _matrix(LANDMARKS, cells, face.width) + _matrix(LANDMARKS, side, face.width)
        yield Product("fim", frames * samples, "samples", leaf=True)
        where = _matrix(frames * LANDMARKS, 4 * fim.fourier_bands, face.width)
        yield Product("fim", where, "fim/position/kernel", leaf=True)
        yield from branch("local", LANDMARKS, face.width)


def _qformer(cfg: Config, load: Load) -> Iterator[Product]:
    former, frames, asked = cfg.model.qformer, load.frames, load.asked
    text, width = load.question, former.width
    both, seen = former.queries + text, 1 + cfg.model.vision.patches
    groups, every = former.layers // former.cross_attention_every, former.cross_attention_every
    for layer in range(every):
        name = "cross" if layer == 0 else f"plain/{layer - 1}"
        path = f"qformer/groups/{name}"
        for leaf in ("query", "key", "value", "dense"):
            flops = groups * _matrix(asked * both, width, width)
            yield Product("qformer", flops, f"{path}/attention/{leaf}/kernel")
        yield Product("qformer", groups * 4.0 * asked * both**2 * width, attention=True)
        for leaf, tokens in (("query_ffn", former.queries), ("text_ffn", text)):
            flops = groups * _matrix(asked * tokens, width, former.mlp_width)
            yield Product("qformer", flops, f"{path}/{leaf}/intermediate/kernel")
            yield Product("qformer", flops, f"{path}/{leaf}/output/kernel")
    path = "qformer/groups/cross/crossattention"
    for leaf in ("query", "dense"):
        flops = groups * _matrix(asked * former.queries, width, width)
        yield Product("qformer", flops, f"{path}/{leaf}/kernel")
    for leaf in ("key", "value"):
        flops = groups * _matrix(frames * seen, former.encoder_width, width)
        yield Product("qformer", flops, f"{path}/{leaf}/kernel")
    pairs = groups * 4.0 * asked * former.queries * seen * width
    yield Product("qformer", pairs, attention=True)


def _visual_tokens(cfg: Config, frames: float, asked: float) -> Iterator[Product]:
    former, width, llm = cfg.model.qformer, cfg.model.vision.width, cfg.model.llama.width
    patches, content = cfg.model.vision.patches, cfg.model.content_tokens
    for leaf, flops in {
        "projector": _matrix(asked * former.queries, former.width, width),
        "key_projector": _matrix(frames * patches, width, width),
        "val_projector": _matrix(asked, width, llm),
        "mm_projector_in": _matrix(frames * content, width, llm),
        "mm_projector_out": _matrix(frames * content, llm, llm),
    }.items():
        yield Product("visual_tokens", flops, f"visual_tokens/{leaf}/kernel")
    logits = _matrix(asked * former.queries, width, patches)
    looked = _matrix(asked, patches, width)
    yield Product("visual_tokens", logits + looked, attention=True)
