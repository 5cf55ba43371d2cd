"""The process in which PyTorch is measured, and a LLaMA as it reads one.

The package never imports PyTorch: scripts beside it do (`benchmarks/torch_sides`, which a wheel
carries inside the package), in a process of their own, asked one thing at a time.
"""

import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from emollama_jax.config import LlamaConfig
from emollama_jax.errors import UserError


def script(name: str) -> pathlib.Path:
    """A script of PyTorch's sides: inside an installed package, else the checkout's."""
    inside = pathlib.Path(__file__).parent / "torch_sides"
    checkout = pathlib.Path(__file__).parent.parent.parent / "benchmarks" / "torch_sides"
    return (inside if inside.is_dir() else checkout) / name


def progress(console: Console) -> Progress:
    """The bar of a comparison."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=console)


def check_cpu(command: str) -> None:
    """Refuses other devices.

    Raises:
        UserError: JAX has found one.
    """
    if jax.default_backend() != "cpu":
        raise UserError(
            f"{command} compares CPUs, found {jax.default_backend()}: set JAX_PLATFORMS=cpu"
        )


class TorchProcess:
    """A request a line in, an answer a line out, both JSON."""

    def __init__(self, name: str, *, command: str, needs: tuple[str, ...]):
        """Starts it.

        Args:
            name: file name of the script.
            command: the verb that asks, for messages.
            needs: packages that the script imports.

        Raises:
            UserError: one of them is missing.
        """
        missing = [name for name in needs if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(
                f"{command} compares with PyTorch; {', '.join(missing)} not found: "
                "pip install -e '.[parity]'"
            )
        self._path = script(name)
        self._process = subprocess.Popen(
            [sys.executable, str(self._path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def ask(self, **request: Any) -> Mapping[str, Any]:
        """Waits for the answer.

        Raises:
            UserError: the process ended.
        """
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise UserError(
                f"{self._path.name} ended with status {self._process.wait()}; its message is above"
            )
        return json.loads(answer)

    def cpu_seconds(self) -> float:
        """CPU seconds that the process has taken so far; of Linux, else NaN."""
        stat = pathlib.Path(f"/proc/{self._process.pid}/stat")
        if not stat.exists():
            return math.nan
        user, system = stat.read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def transformers_llama(cfg: LlamaConfig) -> dict[str, Any]:
    """Arguments of `transformers.LlamaConfig` for the same network, without rows of padding."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if cfg.rope_llama3 is not None:
        llama3 = cfg.rope_llama3
        rope = {
            "rope_type": "llama3",
            "factor": llama3.factor,
            "low_freq_factor": llama3.low_freq_factor,
            "high_freq_factor": llama3.high_freq_factor,
            "original_max_position_embeddings": llama3.original_max_positions,
        }
    elif cfg.rope_scaling != 1:
        rope = {"rope_type": "linear", "factor": cfg.rope_scaling}
    return {
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.width,
        "intermediate_size": cfg.mlp_width,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "rms_norm_eps": cfg.norm_eps,
        "rope_parameters": {"rope_theta": cfg.rope_theta, **rope},
        "max_position_embeddings": cfg.max_positions,
        "tie_word_embeddings": cfg.tied,
        "attn_implementation": "sdpa",
    }
