"""EMO-LLaMA in JAX: the public names, imported when first used."""

import importlib
import os
from typing import Any

# libtpu (seen with 0.0.42) lays out nested matrix products by recursion, on stacks of 64 KiB: the
# 7B's train step and the prefill of small prompts overflow them, and the process is killed. It
# reads its flags when JAX first looks for devices, so they stand before all imports of JAX.
_STACK = "--fibers_default_thread_stack_size"
if _STACK not in os.environ.get("LIBTPU_INIT_ARGS", ""):
    _FLAGS = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {_STACK}={4 << 20}"
    os.environ["LIBTPU_INIT_ARGS"] = _FLAGS.strip()

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
