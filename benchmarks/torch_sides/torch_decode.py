"""The PyTorch side of `emollama bench decode`: `transformers`' LLaMA and its `generate`, on a CPU.

Started by `emollama_jax/bench/decode.py` in a process of its own: reads one JSON request a line,
answers with one line. `build` describes the model and names the file with its weights (our names,
see `rows`); `generate` answers prompts greedily.

Written as people run it: float32, eager, `sdpa` attention, the default cache.
"""

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

HOME = {name: "self_attn" for name in ("q_proj", "k_proj", "v_proj", "o_proj")} | {
    name: "mlp" for name in ("gate_proj", "up_proj", "down_proj")
}


def rows(ours: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The state dict from our parameters: layers apart, kernels turned to [out, in]."""
    yield "model.embed_tokens.weight", ours["embed_tokens"]
    yield "model.norm.weight", ours["norm/scale"]
    yield (
        "lm_head.weight",
        ours["lm_head/kernel"].T if "lm_head/kernel" in ours else ours["embed_tokens"],
    )
    for path, stacked in ours.items():
        if not path.startswith("layers/"):
            continue
        _, name, leaf = path.split("/")
        for i, tensor in enumerate(stacked):
            home = f"model.layers.{i}." + (f"{HOME[name]}.{name}" if name in HOME else name)
            yield f"{home}.weight", tensor.T if leaf == "kernel" else tensor


def build(setup: dict[str, Any]) -> transformers.LlamaForCausalLM:
    """The model; nothing ends an answer but its length."""
    torch.set_num_threads(setup["threads"])
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**setup["model"]))
    model.load_state_dict(dict(rows(load_file(setup["weights"]))), strict=True)
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    return model.eval()


def generate(
    model: transformers.LlamaForCausalLM, prompts: list[list[int]], new: int
) -> dict[str, Any]:
    """Greedy answers of `new` tokens, and the seconds that they took."""
    ids = torch.tensor(prompts)
    start = time.perf_counter()
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new)
    seconds = time.perf_counter() - start
    return {"ids": found[:, ids.shape[1] :].tolist(), "seconds": seconds}


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print must not be taken for an answer
    model = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "build":
            model = build(request)
            answer = {"torch": torch.__version__, "transformers": transformers.__version__}
        else:
            answer = generate(model, request["prompts"], request["new"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
