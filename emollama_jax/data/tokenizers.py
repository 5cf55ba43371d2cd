"""The tokenizers of the two text inputs, behind one small interface.

- `sentencepiece`: LLaMA's and Vicuna's `tokenizer.model`, with the ids of Hugging Face's slow
  `LlamaTokenizer(legacy=True)`, which LLaMA-VID was trained with: every piece of text between two
  special tokens is encoded by itself and so gets its own dummy-prefix space.
- `bpe`: a byte-level BPE in the JSON format of the `tokenizers` library; the package carries one.
- `bert`: WordPiece from a `vocab.txt`, lower-cased, as `bert-base-uncased` (the Q-Former's text).
- `json`: a `tokenizer.json` as Hugging Face's models carry it, with the special tokens that the
  `tokenizer_config.json` beside it names. Without a token for padding, `eos` pads.

What differs from those libraries: `encode` never reads special tokens out of the text. A question
that spells "</s>" becomes the characters of "</s>"; only the prompt builder places special tokens.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import sentencepiece
import tokenizers
from etils import epath
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from emollama_jax import config_weights, foreign_json
from emollama_jax.config import TokenizerConfig
from emollama_jax.data.templates import CONTROL
from emollama_jax.errors import UserError
from emollama_jax.paths import as_path

TINY = pathlib.Path(__file__).parent.parent / "models" / "weights" / "tiny_bpe.json"
SPECIAL = ("<unk>", "<s>", "</s>")  # of the small BPE: ids 0, 1, 2, as LLaMA's; padding is <unk>
TOKENIZER, TOKENIZER_CONFIG, SENTENCEPIECE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
)
CARRIED = {"json": TOKENIZER, "sentencepiece": SENTENCEPIECE}  # by a folder of converted weights
_NEXT = "check data.llm_tokenizer and data.question_tokenizer in the config"


class Tokenizer(Protocol):
    """Text to ids and back. Instances pickle, so that worker processes can hold them."""

    size: int  # ids are 0 … size − 1
    bos: int | None  # BERT: [CLS]; Qwen has none
    eos: int  # BERT: [SEP]
    pad: int

    def __hash__(self) -> int: ...  # a key of caches

    def encode(self, text: str) -> list[int]:
        """The ids of a piece of text, without special tokens."""
        ...

    def token(self, text: str) -> int | None:
        """The id of a special token; None: there is no such one."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens and visual places give nothing.

        A piece that starts a word may bring its space along: strip the text before comparing it.
        """
        ...


class SentencePieceTokenizer:
    """LLaMA's tokenizer file. LLaMA has no padding token; LLaMA-VID pads with <unk>."""

    def __init__(self, model: bytes):
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.size = self._processor.vocab_size()
        self.bos, self.eos = self._processor.bos_id(), self._processor.eos_id()
        self.pad = self._processor.unk_id()
        self._special = {self.bos, self.eos, self.pad}

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def token(self, text: str) -> int | None:
        i = self._processor.piece_to_id(text)
        return i if self._processor.is_control(i) else None

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids if i >= 0 and i not in self._special])


class JsonTokenizer:
    """A tokenizer of the `tokenizers` library, from its JSON text."""

    def __init__(self, text: str, *, bos: str | None, eos: str, pad: str):
        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        self._tokenizer.encode_special_tokens = True  # "</s>" in a text is text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        wanted = [token for token in (bos, eos, pad) if token is not None]
        missing = [token for token in wanted if self._tokenizer.token_to_id(token) is None]
        if missing:
            raise ValueError(f"its vocabulary lacks {', '.join(dict.fromkeys(missing))}")
        self._names = (bos, eos, pad)
        self.bos = None if bos is None else self._tokenizer.token_to_id(bos)
        self.eos, self.pad = map(self._tokenizer.token_to_id, (eos, pad))
        added = self._tokenizer.get_added_tokens_decoder().values()
        special = [*wanted, *(token.content for token in added if token.special)]
        self._special = {self._tokenizer.token_to_id(token) for token in special}

    def __reduce__(self):
        return _json_tokenizer, (self._tokenizer.to_str(), *self._names)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def token(self, text: str) -> int | None:
        i = self._tokenizer.token_to_id(text)
        return i if i in self._special else None

    def decode(self, ids: Sequence[int]) -> str:
        kept = [int(i) for i in ids if i >= 0 and i not in self._special]
        return self._tokenizer.decode(kept, skip_special_tokens=False)


def _json_tokenizer(text: str, bos: str | None, eos: str, pad: str) -> JsonTokenizer:
    return JsonTokenizer(text, bos=bos, eos=eos, pad=pad)


def from_files(text: str, settings: Mapping[str, Any]) -> JsonTokenizer:
    """A tokenizer of Hugging Face's files.

    Args:
        text: text of `tokenizer.json`.
        settings: text of `tokenizer_config.json`, which names the special tokens.

    Raises:
        ValueError: no end of a text is named, or tokens that the vocabulary lacks.
    """

    def named(*keys: str) -> str | None:
        for key in keys:
            token = settings.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and token:
                return token
        return None

    bos, eos = named("bos_token", "cls_token"), named("eos_token", "sep_token")
    if eos is None:
        raise ValueError(f"{TOKENIZER_CONFIG} names no eos_token")
    pad = named("pad_token") or eos
    tree = foreign_json.parse(text)
    special = {*CONTROL, bos, eos, pad, named("unk_token")}
    for token in tree.get("added_tokens", []):  # what only formats may place is never read in text
        token["special"] = token["special"] or token["content"] in special
    return JsonTokenizer(json.dumps(tree), bos=bos, eos=eos, pad=pad)


def load_tokenizer(
    cfg: TokenizerConfig, *, weights: str | tuple[str, ...] | None = None
) -> Tokenizer:
    """Reads a tokenizer file; the path "tiny" is the package's own small BPE.

    Args:
        cfg: kind and path.
        weights: the config's `weights`, one of whose folders the path "weights" means; None where
            that path is not allowed.

    Raises:
        UserError: no such file, or a file of another kind.
    """
    path = TINY if cfg.path == "tiny" else as_path(cfg.path)
    if cfg.path == "weights":
        path = _carried(cfg, weights)
    elif cfg.kind == "json" and path.is_dir():
        path = path / TOKENIZER
    try:
        content = path.read_bytes()
        beside = (path.parent / TOKENIZER_CONFIG).read_bytes() if cfg.kind == "json" else b""
    except OSError as error:
        reason = error.strerror or str(error)
        missing = f" ({TOKENIZER_CONFIG} is wanted beside it)" if cfg.kind == "json" else ""
        raise UserError(
            f"{path}: cannot read the {cfg.kind} tokenizer: {reason}{missing}; {_NEXT}"
        ) from None
    try:
        if cfg.kind == "json":
            return from_files(content.decode(), foreign_json.parse(beside))
        if cfg.kind == "sentencepiece":
            return SentencePieceTokenizer(content)
        if cfg.kind == "bpe":
            return JsonTokenizer(content.decode(), bos="<s>", eos="</s>", pad="<unk>")
        wordpiece = _bert(content.decode())
        return JsonTokenizer(wordpiece.to_str(), bos="[CLS]", eos="[SEP]", pad="[PAD]")
    except Exception as error:  # the Rust and C++ libraries raise bare Exception and RuntimeError
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a {cfg.kind} tokenizer: {reason}; {_NEXT}") from None


def carried_by(weights: str | tuple[str, ...], file: str, *, key: str) -> epath.Path:
    """A file of the folder of converted weights that carries it.

    Args:
        weights: the config's `weights`.
        file: its name.
        key: config key that asks for it, for messages.

    Raises:
        UserError: no such folder, or several.
    """
    folders = [*map(as_path, config_weights.folders(weights))]
    found = [folder / file for folder in folders if (folder / file).exists()]
    if len(found) != 1:
        there = f"{len(found)} of them carry" if found else "none of them carries"
        listed = ", ".join(map(str, folders)) or "it names none"
        raise UserError(
            f"{key} is of the folders in `weights` ({listed}), but {there} {file}: convert the LLM "
            f"again from a folder or GGUF that has it, or name another {key}"
        )
    return found[0]


def _carried(cfg: TokenizerConfig, weights: str | tuple[str, ...] | None) -> epath.Path:
    if weights is None:
        raise UserError(
            "data.question_tokenizer: a folder of weights holds only the LLM's tokenizer: give "
            "this tokenizer's file"
        )
    if cfg.kind not in CARRIED:
        raise UserError(
            f"path weights of a {cfg.kind} tokenizer: wanted kind {' or '.join(CARRIED)}; {_NEXT}"
        )
    return carried_by(weights, CARRIED[cfg.kind], key="data.llm_tokenizer")


def train_bpe(texts: Iterable[str], vocab_size: int) -> str:
    """Trains the small byte-level BPE.

    The result does not depend on the order of the texts. Text that repeats itself can hold fewer
    merges than asked for; the vocabulary is smaller then.

    Args:
        texts: training text; include the prompt's fixed words, or they cost many tokens.
        vocab_size: the special tokens, 256 bytes, and the merges.

    Returns:
        The JSON that the kind "bpe" reads.
    """
    smallest = len(SPECIAL) + 256
    if vocab_size < smallest:
        raise UserError(f"a byte-level BPE has at least {smallest} entries, found {vocab_size}")
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def _bert(vocabulary: str) -> tokenizers.Tokenizer:
    """`bert-base-uncased`'s WordPiece from the lines of its `vocab.txt`."""
    words = vocabulary.splitlines()
    ids = {word: i for i, word in enumerate(words)}
    if len(ids) < len(words):
        raise ValueError(f"{len(words) - len(ids)} of its {len(words)} lines are repeated")
    if "[UNK]" not in ids:
        raise ValueError("its vocabulary lacks [UNK]")
    tokenizer = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer
