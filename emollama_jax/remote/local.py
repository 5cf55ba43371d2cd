"""An image-text model of Hugging Face on this machine, through `transformers`."""

import asyncio
import importlib.util
import io
import pathlib
from typing import Any

from PIL import Image

from emollama_jax.errors import UserError
from emollama_jax.remote.request import Reply, Request


class Local:
    """A model and its processor from a folder or from the hub's cache; one question at a time."""

    def __init__(self, path: str):
        """Loads the model onto the best device that PyTorch finds.

        Args:
            path: a folder, or a name of the hub.

        Raises:
            UserError: no PyTorch, or no such model.
        """
        if path.startswith((".", "/", "~")) and not pathlib.Path(path).expanduser().is_dir():
            raise UserError(f"hf:{path}: no such folder")
        if importlib.util.find_spec("torch") is None:
            raise UserError("a Hugging Face model needs PyTorch: pip install 'emollama-jax[hf]'")
        from transformers import AutoModelForImageTextToText, AutoProcessor

        where = str(pathlib.Path(path).expanduser()) if path.startswith("~") else path
        try:
            self._processor = AutoProcessor.from_pretrained(where)
            self._model = AutoModelForImageTextToText.from_pretrained(where, dtype="auto").eval()
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"hf:{path}: {' '.join(str(error).split())[:200]}") from None
        device = _device()
        self._model.to(device)
        self.name = f"hf:{path}"

    async def ask(self, request: Request) -> Reply:
        """One answer. See `Client`."""
        return await asyncio.to_thread(self._ask, request)

    def _ask(self, request: Request) -> Reply:
        content: list[dict[str, Any]] = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image", "image": Image.open(io.BytesIO(part)).convert("RGB")}
            for part in request.parts
        ]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if request.system:
            system = [{"type": "text", "text": request.system}]
            messages.insert(0, {"role": "system", "content": system})
        inputs = self._processor.apply_chat_template(
            messages,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self._model.device)
        count = inputs["input_ids"].shape[1]
        sampling = (
            {"do_sample": True, "temperature": request.temperature}
            if request.temperature > 0
            else {"do_sample": False}
        )
        ids = self._model.generate(**inputs, max_new_tokens=request.max_tokens, **sampling)
        fresh = ids[0, count:]
        return Reply(
            text=self._processor.decode(fresh, skip_special_tokens=True).strip(),
            finish="cut" if len(fresh) >= request.max_tokens else "stop",
            input_tokens=count,
            output_tokens=len(fresh),
        )

    async def close(self) -> None:
        """Nothing is open. See `Client`."""


def _device() -> str:
    """The accelerator that PyTorch has, or the CPU."""
    from transformers.utils import is_torch_cuda_available, is_torch_mps_available

    if is_torch_cuda_available():
        return "cuda"
    return "mps" if is_torch_mps_available() else "cpu"
