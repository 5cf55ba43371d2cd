"""The tokenizers of the two text inputs, behind one small interface.

- `sentencepiece`: LLaMA's and Vicuna's `tokenizer.model`, with the ids of Hugging Face's slow
  `LlamaTokenizer(legacy=True)`, which LLaMA-VID was trained with: every piece of text between two
  special tokens is encoded by itself and so gets its own dummy-prefix space.
- `bpe`: a byte-level BPE in the JSON format of the `tokenizers` library; the package carries one.
- `bert`: WordPiece from a `vocab.txt`, lower-cased, as `bert-base-uncased` (the Q-Former's text).

What differs from those libraries: `encode` never reads special tokens out of the text. A question
that spells "</s>" becomes the characters of "</s>"; only the prompt builder places special tokens.
"""

import pathlib
from collections.abc import Iterable, Sequence
from typing import Protocol

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from emollama_jax.config import TokenizerConfig
from emollama_jax.errors import UserError
from emollama_jax.paths import as_path

TINY = pathlib.Path(__file__).parent.parent / "models" / "weights" / "tiny_bpe.json"
SPECIAL = ("<unk>", "<s>", "</s>")  # of the small BPE: ids 0, 1, 2, as LLaMA's; padding is <unk>
_NEXT = "check data.llm_tokenizer and data.question_tokenizer in the config"


class Tokenizer(Protocol):
    """Text to ids and back. Instances pickle, so that worker processes can hold them."""

    size: int  # ids are 0 … size − 1
    bos: int  # BERT: [CLS]
    eos: int  # BERT: [SEP]
    pad: int

    def encode(self, text: str) -> list[int]:
        """The ids of a piece of text, without special tokens."""
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

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids if i >= 0 and i not in self._special])


class JsonTokenizer:
    """A tokenizer of the `tokenizers` library, from its JSON text."""

    def __init__(self, text: str, *, bos: str, eos: str, pad: str):
        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        self._tokenizer.encode_special_tokens = True  # "</s>" in a text is text
        self.size = self._tokenizer.get_vocab_size()
        wanted = (bos, eos, pad)
        ids = [self._tokenizer.token_to_id(token) for token in wanted]
        missing = [token for token, i in zip(wanted, ids, strict=True) if i is None]
        if missing:
            raise ValueError(f"its vocabulary lacks {', '.join(missing)}")
        self.bos, self.eos, self.pad = ids
        self._special = set(ids)

    def __reduce__(self):
        tokens = [self._tokenizer.id_to_token(i) for i in (self.bos, self.eos, self.pad)]
        return _json_tokenizer, (self._tokenizer.to_str(), *tokens)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        kept = [int(i) for i in ids if i >= 0 and i not in self._special]
        return self._tokenizer.decode(kept, skip_special_tokens=False)


def _json_tokenizer(text: str, bos: str, eos: str, pad: str) -> JsonTokenizer:
    return JsonTokenizer(text, bos=bos, eos=eos, pad=pad)


def load_tokenizer(cfg: TokenizerConfig) -> Tokenizer:
    """Reads a tokenizer file; the path "tiny" is the package's own small BPE.

    Raises:
        UserError: no such file, or a file of another kind.
    """
    path = TINY if cfg.path == "tiny" else as_path(cfg.path)
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{path}: cannot read the {cfg.kind} tokenizer: {reason}; {_NEXT}"
        ) from None
    try:
        if cfg.kind == "sentencepiece":
            return SentencePieceTokenizer(content)
        if cfg.kind == "bpe":
            return JsonTokenizer(content.decode(), bos="<s>", eos="</s>", pad="<unk>")
        wordpiece = _bert(content.decode())
        return JsonTokenizer(wordpiece.to_str(), bos="[CLS]", eos="[SEP]", pad="[PAD]")
    except Exception as error:  # the Rust and C++ libraries raise bare Exception and RuntimeError
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a {cfg.kind} tokenizer: {reason}; {_NEXT}") from None


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
