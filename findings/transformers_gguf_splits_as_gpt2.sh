#!/usr/bin/env bash
# transformers 5.24.0: `AutoTokenizer.from_pretrained(folder, gguf_file=...)` splits text by GPT-2's
# rule wherever it does not know the rule that `tokenizer.ggml.pre` names, and logs no warning. Its
# table has "llama-bpe", "qwen2" and about 20 more; "smollm" and a name that nobody uses are alike.
# llama.cpp's "smollm" (SmolLM and SmolLM2) parts every digit first, so that the merges were learned
# on other pieces: one would guess the same ids as before, or an error, as llama.cpp gives for a
# name that it does not know.
#
# Seen: of a BPE learned with digits parted, "\n\n1" is 2 tokens in its own tokenizer and 3 from the
# GGUF; over the text 31 against 36. A BPE learned by GPT-2's rule, with "gpt-2", gives the same ids
# as before. Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.13.0 tokenizers==0.23.3 \
  gguf==0.19.0 numpy==2.3.5

cat >"$folder/program.py" <<'PROGRAM'
import json
import logging
import pathlib
import sys

import gguf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEXT = "Chapters:\n\n1. Bread\n\n2. Water  3 x 4 = 12, in  2024\n\n10. Wine"
CONTROL, NORMAL = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
folder = pathlib.Path(sys.argv[1])
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)


def learned(rule):
    """A byte-level BPE, and the tokenizer that transformers makes of its tokenizer.json."""
    splits = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if rule == "smollm":
        splits.insert(0, pre_tokenizers.Digits(individual_digits=True))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence(splits), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT] * 4, trainer)
    own = PreTrainedTokenizerFast(tokenizer_object=bpe)
    own.save_pretrained(folder / rule)
    return json.loads(bpe.to_str())["model"], AutoTokenizer.from_pretrained(folder / rule)


def from_gguf(bpe, pre):
    path = folder / f"{pre}.gguf"
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    file = gguf.GGUFWriter(path, "llama")
    file.add_name("tiny")
    file.add_context_length(64)
    file.add_block_count(1)
    file.add_embedding_length(8)
    file.add_feed_forward_length(8)
    file.add_head_count(1)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre(pre)
    file.add_token_list(tokens)
    file.add_token_types([CONTROL] + [NORMAL] * (len(tokens) - 1))
    file.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    file.add_eos_token_id(0)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return AutoTokenizer.from_pretrained(folder, gguf_file=path.name)


def ids(tokenizer, text=TEXT):
    return tokenizer(text).input_ids


for rule, pre in (("gpt-2", "gpt-2"), ("smollm", "smollm"), ("smollm", "of-nobody")):
    bpe, own = learned(rule)
    read = from_gguf(bpe, pre)
    assert own.decode(ids(own)) == read.decode(ids(read)) == TEXT
    count = [len(ids(each, text)) for text in (TEXT, "\n\n1") for each in (own, read)]
    same = ids(own) == ids(read)
    print(f"learned by {rule}, pre {pre}: the same ids {same}; tokens {count}; logged {said}")
    if rule == "gpt-2":
        assert same
    else:
        assert count == [31, 36, 2, 3], "changed: another rule splits"
    assert not said, "changed: it is logged"
PROGRAM
HF_HUB_OFFLINE=1 TQDM_DISABLE=1 "$folder/venv/bin/python" "$folder/program.py" "$folder/model" 2>&1
