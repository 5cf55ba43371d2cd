"""EMO-LLaMA in JAX: the public names, imported when first used."""

import importlib
from typing import Any

_PUBLIC = {
    "Batch": "emollama_jax.batch",
    "Config": "emollama_jax.config",
    "load": "emollama_jax.config",
    "UserError": "emollama_jax.errors",
    "EmoLlama": "emollama_jax.models.emollama",
    "FaceXFormer": "emollama_jax.models.facexformer",
    "Detector": "emollama_jax.models.mtcnn",
    "load_for_inference": "emollama_jax.checkpoint",
    "Answerer": "emollama_jax.serve.answer",
    "fit": "emollama_jax.train.loop",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
