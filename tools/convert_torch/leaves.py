"""Our leaves that a checkpoint fills: their paths and shapes, without numbers."""

import functools
from collections.abc import Sequence

from flax import nnx

from emollama_jax.config import EmoLlamaConfig
from emollama_jax.models.eva_vit import EvaVit
from emollama_jax.models.facexformer import FaceXFormer
from emollama_jax.models.llama import Llama
from emollama_jax.models.mtcnn import Mtcnn
from emollama_jax.models.parameters import named_parameters
from emollama_jax.models.qformer import QFormer
from emollama_jax.models.rngs import Rngs, abstract
from emollama_jax.models.visual_tokens import VisualTokens


class _Parts(nnx.Module):
    """Some networks of `EmoLlama` under its names."""

    def __init__(self, parts: Sequence[str], cfg: EmoLlamaConfig, rngs: Rngs):
        if "llama" in parts:
            self.llama = Llama(cfg.llama, rngs=rngs)
        if "vision" in parts:
            self.vision = EvaVit(cfg.vision, rngs=rngs)
        if "qformer" in parts:
            self.qformer = QFormer(cfg.qformer, rngs=rngs)
            self.visual_tokens = VisualTokens(
                cfg.qformer,
                visual_width=cfg.vision.width,
                llm_width=cfg.llama.width,
                dtype=cfg.llama.dtype,
                rngs=rngs,
            )
        if "face" in parts:
            self.face = FaceXFormer(cfg.face, rngs=rngs)


@functools.lru_cache(maxsize=8)
def every_leaf(parts: tuple[str, ...], model: EmoLlamaConfig) -> dict[str, nnx.Param]:
    """All leaves of some networks, abstract, by path.

    Args:
        parts: parts of `EmoLlama`, or "mtcnn" alone.
        model: their sizes.
    """
    if parts == ("mtcnn",):
        return named_parameters(abstract(lambda rngs: Mtcnn(rngs=rngs)))
    return named_parameters(abstract(lambda rngs: _Parts(parts, model, rngs)))
