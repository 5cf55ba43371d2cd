"""The PyTorch side of `emollama bench train`: `transformers`' LLaMA with PEFT's LoRA, on a CPU.

Started by `emollama_jax/bench/train.py` in a process of its own, so that neither side's threads or
memory disturb the other's: reads one JSON request a line, answers with one line. `build` describes
the model, names the files with its weights (our names, see `rows`) and the batch; `step` is one
training step of a model built before; `rate` times float32 matrix products.

Written as people run it: eager, `sdpa` attention, no gradient checkpointing.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

HOME = {name: "self_attn" for name in ("q_proj", "k_proj", "v_proj", "o_proj")} | {
    name: "mlp" for name in ("gate_proj", "up_proj", "down_proj")
}


def rows(ours: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """PEFT's state dict from our parameters: layers apart, kernels turned to [out, in]."""
    prefix = "base_model.model."
    yield f"{prefix}model.embed_tokens.weight", ours.pop("llama/embed_tokens")
    yield f"{prefix}model.norm.weight", ours.pop("llama/norm/scale")
    yield f"{prefix}lm_head.weight", ours.pop("llama/lm_head/kernel").T
    adapted = {path.split("/")[2] for path in ours if path.endswith("lora_A")}
    for path, stacked in ours.items():
        _, _, name, leaf = path.split("/")
        for i, tensor in enumerate(stacked):
            layer = f"{prefix}model.layers.{i}."
            if leaf == "scale":
                yield f"{layer}{name}.weight", tensor
            elif leaf == "kernel":
                base = ".base_layer" if name in adapted else ""
                yield f"{layer}{HOME[name]}.{name}{base}.weight", tensor.T
            else:
                yield f"{layer}{HOME[name]}.{name}.{leaf}.default.weight", tensor.T


def build(setup: dict[str, Any]) -> Callable[[float], tuple[float, float]]:
    """The model, and what trains it.

    Args:
        setup: `model`, `lora`, `optimizer` (arguments of their classes), `dtype` of the frozen
            weights and of the computation, `clip_norm`, `threads`, files `weights` and `batch`.

    Returns:
        learning rate → (loss before the update, seconds).
    """
    torch.set_num_threads(setup["threads"])
    dtype = getattr(torch, setup["dtype"])
    config = transformers.LlamaConfig(**setup["model"])
    model = transformers.LlamaForCausalLM(config)
    model = get_peft_model(model, LoraConfig(**setup["lora"], task_type="CAUSAL_LM"))
    model.load_state_dict(dict(rows(load_file(setup["weights"]))), strict=True)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, **setup["optimizer"])
    batch = {name: tensor.long() for name, tensor in load_file(setup["batch"]).items()}
    model.train()

    def step(learning_rate: float) -> tuple[float, float]:
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, setup["clip_norm"])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), time.perf_counter() - start

    return step


def product_rate(products: list[list[int]], runs: int) -> float:
    """float32 FLOP per second of products (times, m, k, n), each at its best of several runs."""
    flops = seconds = 0.0
    for times, m, k, n in products:
        a, b = torch.ones(m, k), torch.ones(n, k)  # a Linear's weight is [out, in]
        best = float("inf")
        for _ in range(1 + runs):
            start = time.perf_counter()
            torch.nn.functional.linear(a, b)
            best = min(best, time.perf_counter() - start)
        flops, seconds = flops + times * 2.0 * m * k * n, seconds + times * best
    return flops / seconds


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print must not be taken for an answer
    steps = {}
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "build":
            steps[request["name"]] = build(request)
            answer = {"torch": torch.__version__}
        elif request["do"] == "rate":
            answer = {"rate": product_rate(request["products"], request["runs"])}
        else:
            loss, seconds = steps[request["name"]](request["learning_rate"])
            answer = {"loss": loss, "seconds": seconds}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
