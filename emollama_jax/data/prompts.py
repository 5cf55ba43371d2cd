"""Prompts as token ids: a conversation format (`templates.py`), the label mask, the AGR sentence.

With LLaMA-VID's format, `vicuna`:

    <s> SYSTEM USER: [visual]\\n{AGR sentence}\\n{question} ASSISTANT: {answer}</s>
    USER: [visual]\\n{question} ASSISTANT: {answer}</s> …

Every human turn carries the visual tokens, so that each question gets its own context tokens. Text
is encoded in pieces, cut at every visual place and every special token; with LLaMA's tokenizer each
piece has its own dummy-prefix space. Loss is borne by the answers and their end alone. Ids of
`vicuna` equal those of LLaMA-VID's `tokenizer_image_token` and `preprocess_imgsp_v1`.

What differs: the visual place is expanded here, to one IMAGE_TOKEN for each visual token, so that
`text_length` bounds the real length (LLaMA-VID cuts before the expansion); the Q-Former reads the
question as it is, in training as in evaluation (LLaMA-VID deletes its line breaks in training
only); the AGR sentence (EMO-LLaMA) stands after the first visual place.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int32

from emollama_jax.batch import IGNORE, IMAGE_TOKEN
from emollama_jax.data.chat import Chat
from emollama_jax.data.face_labels import AGE_LABELS, GENDER_LABELS, RACE_LABELS
from emollama_jax.data.items import MEDIUM
from emollama_jax.data.templates import Template, Token
from emollama_jax.data.tokenizers import Tokenizer
from emollama_jax.errors import UserError
from emollama_jax.terms import Kind

PLACE = "<image>"  # LLaMA-VID's place holder, of images and videos alike

Conversation = Sequence[Mapping[str, str]]  # LLaVA's [{"from": "human"|"gpt", "value": text}, …]


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question and its answer, without place holders."""

    question: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A prompt of static length."""

    ids: Int32[np.ndarray, " t"]  # right-padded
    labels: Int32[np.ndarray, " t"]  # IGNORE where no loss is borne
    length: int  # tokens before the padding
    lost: int  # tokens cut off at the right


def agr_sentence(
    *,
    kind: Kind,
    age: int,
    gender: int,
    race: int,
    probability: Sequence[float],
    threshold: float,
    race_labels: Literal["measured", "as_published", "untaught"],
) -> str:
    """The age-gender-race sentence, e.g. "The person in the image is a 20-29 year old Asian woman."

    Args:
        kind: a clip is called a video.
        age: FaceXFormer's class, as are `gender` and `race`.
        gender: 0 male, 1 female.
        race: "Others" says nothing and is left out.
        probability: probabilities of the three classes, in this order.
        threshold: attributes below it are left out.
        race_labels: order of the race classes (`face_labels.py`).

    Returns:
        The sentence; "" where nothing is left to say.
    """
    sure = [p >= threshold for p in probability]
    # "70 and over" does not go before "year old".
    age_word = f"{AGE_LABELS[age].replace(' and over', '+')} year old" if sure[0] else ""
    noun = {"Male": "man", "Female": "woman"}[GENDER_LABELS[gender]] if sure[1] else "person"
    race_word = RACE_LABELS[race_labels][race] if sure[2] else ""
    if race_word == "Others":
        race_word = ""
    if not age_word and not race_word and noun == "person":
        return ""
    words = " ".join(word for word in (age_word, race_word, noun) if word)
    article = "an" if words[0] in "AEIOU" else "a"
    return f"The person in the {MEDIUM[kind]} is {article} {words}."


def read_turns(conversation: Conversation) -> tuple[Turn, ...]:
    """The turns of a LLaVA conversation; placeholders are removed, wherever they are.

    Raises:
        UserError: the turns do not alternate, human first, or an answer is empty.
    """
    values = []
    for number, sentence in enumerate(conversation, 1):
        wanted = "human" if number % 2 else "gpt"
        if sentence.get("from") != wanted:
            raise UserError(
                f"sentence {number} of a conversation is from {sentence.get('from')!r}, wanted "
                f"{wanted!r}: fix the data set's items"
            )
        values.append(question_text(sentence["value"]))
        if wanted == "gpt" and not values[-1]:
            raise UserError(f"sentence {number} of a conversation is an empty answer")
    if not values or len(values) % 2:
        raise UserError(f"a conversation ends with an answer, found {len(values)} sentences")
    return tuple(map(Turn, values[::2], values[1::2]))


def question_text(value: str) -> str:
    """A sentence without its place holders: what the Q-Former reads."""
    return re.sub(r"\s*<image>\s*", " ", value).strip()


def split_rounds(turns: Sequence[Turn], rounds: int) -> list[Sequence[Turn]]:
    """Cuts a long conversation into pieces of at most `rounds` turns (LLaMA-VID's split_chat)."""
    return [turns[start : start + rounds] for start in range(0, len(turns), rounds)]


def build_training(
    turns: Sequence[Turn],
    *,
    n_visual: int,
    agr: str,
    chat: Chat,
    text_length: int,
    rng: np.random.Generator | None = None,
) -> Encoded:
    """A training prompt.

    Args:
        turns: turns of one conversation.
        n_visual: visual tokens of a turn (frames × tokens of a frame); 0 for text alone.
        agr: the AGR sentence, or "".
        chat: the conversation format and the LLM's tokenizer.
        text_length: T; what goes beyond is cut off at the right. `labels` of a prompt whose
            answers are all cut off holds IGNORE alone.
        rng: draws for every turn but the first whether the visual tokens stand before or after
            the question, as LLaMA-VID does; None: before.
    """
    pieces = _pieces(
        turns,
        n_visual=n_visual,
        agr=agr,
        template=chat.template,
        after=[n > 0 and rng is not None and rng.random() < 0.5 for n in range(len(turns))],
        open_ended=False,
    )
    return _fit(*_encoded(pieces, chat), pad=chat.pad, text_length=text_length)


def build_prompt(
    question: str,
    *,
    n_visual: int,
    agr: str,
    chat: Chat,
    text_length: int,
    earlier: Sequence[Turn] = (),
) -> Encoded:
    """A prompt that ends where the answer begins. Arguments as `build_training`.

    Args:
        question: to be answered.
        earlier: turns of the same conversation, each with its own visual tokens.

    Raises:
        UserError: it is longer than `text_length`.
    """
    pieces = _pieces(
        [*earlier, Turn(question, "")],
        n_visual=n_visual,
        agr=agr,
        template=chat.template,
        after=[False] * (len(earlier) + 1),
        open_ended=True,
    )
    ids, _ = _encoded(pieces, chat)
    if len(ids) > text_length:
        raise UserError(
            f"the prompt has {len(ids)} tokens, {n_visual * (len(earlier) + 1)} of them visual, "
            f"and the text length is {text_length}: ask a shorter question or raise "
            "data.text_length, for clips data.clip_text_length"
        )
    return _fit(ids, [IGNORE] * len(ids), pad=chat.pad, text_length=text_length)


def answer_ids(answer: str, *, chat: Chat) -> list[int]:
    """The ids that an answer has after its question, a space between included, its end too."""
    template, tokenizer = chat.template, chat.tokenizer
    opening = template.assistant[-1].lstrip(" ")
    whole = tokenizer.encode(f"{opening}{template.gap}{answer}")
    return [*whole[len(tokenizer.encode(opening)) :], chat.end]


def render(turns: Sequence[Turn], *, agr: str, template: Template) -> list[str]:
    """The text pieces that `build_training` encodes, e.g. to train a tokenizer on."""
    pieces = _pieces(
        turns,
        n_visual=1,
        agr=agr,
        template=template,
        after=[False] * len(turns),
        open_ended=False,
    )
    return [piece.text + piece.answer for piece in pieces if isinstance(piece, _Text)]


@dataclasses.dataclass(frozen=True)
class _Text:
    """Text that is encoded in one, and where it ends in an answer, that."""

    text: str
    answer: str = ""


@dataclasses.dataclass(frozen=True)
class _Visual:
    """A visual place."""

    tokens: int


class _End(Token):
    """A token that bears loss."""


_Piece = _Text | _Visual | Token


def _pieces(
    turns: Sequence[Turn],
    *,
    n_visual: int,
    agr: str,
    template: Template,
    after: Sequence[bool],
    open_ended: bool,
) -> Iterator[_Piece]:
    """A conversation piece by piece. Text that stands beside text is one piece with it.

    Args:
        turns: turns of one conversation.
        n_visual: visual tokens of a turn.
        agr: the AGR sentence, or "".
        template: the format.
        after: whether a turn's visual tokens stand after its question.
        open_ended: the last turn's answer is left out, with all behind it.
    """
    text = ""
    place = n_visual > 0 or template.placed
    for number, turn in enumerate(turns):
        question, answer = turn.question, turn.answer
        if template.trims:
            question, answer = question.strip(), answer.strip()
        line = "\n" if place else ""
        prior = f"{agr}\n" if agr and number == 0 else ""
        asked = [question, line, _Visual(n_visual)]
        if not after[number]:
            asked = [_Visual(n_visual), line, prior, question]
        opening = template.start if number == 0 else (template.between,)
        for piece in (*opening, *template.user, *asked, *template.assistant):
            if isinstance(piece, _Visual) and not place:
                continue
            if isinstance(piece, Token | _Visual):
                if text:
                    yield _Text(text)
                yield piece
                text = ""
            else:
                text += piece
        if open_ended and number == len(turns) - 1:
            break
        yield _Text(text, template.gap + answer)
        yield _End(template.end)
        text = ""
    text += "" if open_ended else template.between
    if text:
        yield _Text(text)


def _encoded(pieces: Iterable[_Piece], chat: Chat) -> tuple[list[int], list[int]]:
    """Ids and labels."""
    ids: list[int] = []
    labels: list[int] = []
    for piece in pieces:
        if isinstance(piece, _Visual):
            new, borne = [IMAGE_TOKEN] * piece.tokens, 0
        elif isinstance(piece, Token):
            new, borne = [chat.id(piece)], int(isinstance(piece, _End))
        elif not piece.answer:
            new, borne = list(_encode(chat.tokenizer, piece.text)), 0
        else:
            before = list(_encode(chat.tokenizer, piece.text))
            new = chat.tokenizer.encode(piece.text + piece.answer)
            if new[: len(before)] != before:
                raise UserError(
                    f"the LLM's tokenizer joins {piece.text.split(' ')[-1]!r} with the answer "
                    f"{piece.answer.strip()!r}, so that the loss has no boundary; use one that "
                    "splits words at spaces"
                )
            borne = len(new) - len(before)
        ids += new
        labels += [IGNORE] * (len(new) - borne) + new[len(new) - borne :]
    return ids, labels


def encode_question(
    question: str, *, tokenizer: Tokenizer, length: int
) -> tuple[Int32[np.ndarray, " l"], Bool[np.ndarray, " l"]]:
    """The Q-Former's text: [CLS] question [SEP]; a long question keeps its end.

    Returns:
        Right-padded ids, and where they are not padding.
    """
    text = _encode(tokenizer, question)
    kept = [tokenizer.bos, *text[max(0, len(text) - (length - 2)) :], tokenizer.eos]
    ids = np.full(length, tokenizer.pad, np.int32)
    ids[: len(kept)] = kept
    return ids, np.arange(length) < len(kept)


@functools.lru_cache(maxsize=4096)
def _encode(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of text that comes again and again: the system's, the questions of templates."""
    return tuple(tokenizer.encode(text))


def _fit(ids: list[int], labels: list[int], *, pad: int, text_length: int) -> Encoded:
    length = min(len(ids), text_length)
    padded = np.full(text_length, pad, np.int32)
    padded[:length] = ids[:length]
    masked = np.full(text_length, IGNORE, np.int32)
    masked[:length] = labels[:length]
    return Encoded(ids=padded, labels=masked, length=length, lost=len(ids) - length)
