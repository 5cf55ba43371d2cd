"""The PyTorch side of `benchmarks/gpu.py`: `transformers`' LLaMA, with PEFT's LoRA to train.

    torch_gpu.py train|decode < sizes.json > result.json

Written as people run it: bfloat16 weights, eager, `sdpa` attention, gradient checkpointing.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> None:
    """For what was launched."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def median_seconds(run: Callable[[], Any], times: int) -> float:
    """Median of several runs, after one that is not timed."""
    run()
    taken = []
    for _ in range(times):
        wait()
        start = time.perf_counter()
        run()
        wait()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def llama(sizes: dict[str, Any]) -> transformers.LlamaForCausalLM:
    """The model, born on the device in its dtype."""
    config = transformers.LlamaConfig(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["width"],
        intermediate_size=sizes["mlp_width"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["heads"],
        max_position_embeddings=4096,
        attn_implementation="sdpa",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, sizes["dtype"]))
    try:
        with torch.device(DEVICE):
            return transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def train(sizes: dict[str, Any]) -> dict[str, Any]:
    """The LoRA step."""
    lora = LoraConfig(
        r=sizes["rank"], lora_alpha=16, lora_dropout=0.0, target_modules=list(TARGETS)
    )
    model = get_peft_model(llama(sizes), lora)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(0, sizes["vocab"], (sizes["examples"], sizes["tokens"]), device=DEVICE)
    dtype, last = getattr(torch, sizes["dtype"]), 0.0

    def step() -> None:
        nonlocal last
        with torch.autocast(DEVICE, dtype=dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        last = loss.item()

    return {"seconds": median_seconds(step, sizes["times"]), "loss": last}


def decode(sizes: dict[str, Any]) -> dict[str, Any]:
    """Greedy answers, by rows."""
    model, found = llama(sizes).eval(), {}
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    for rows in sizes["rows"]:
        ids = torch.randint(1, sizes["vocab"], (rows, sizes["prompt"]), device=DEVICE)
        given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": sizes["new"]}

        def run(ids: torch.Tensor = ids, given: dict[str, Any] = given) -> None:
            with torch.no_grad():
                model.generate(ids, **given)

        found[str(rows)] = median_seconds(run, sizes["times"])
    return {"seconds": found}


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print must not be taken for an answer
    found = {"train": train, "decode": decode}[sys.argv[1]](json.load(sys.stdin))
    on_gpu = DEVICE == "cuda"
    found["peak_bytes"] = torch.cuda.max_memory_allocated() if on_gpu else None
    found["device"] = torch.cuda.get_device_name() if on_gpu else "cpu"
    print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
