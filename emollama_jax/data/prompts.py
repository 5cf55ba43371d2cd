"""LLaMA-VID's conversation template `imgsp_v1` as token ids, the label mask, and the AGR sentence.

    <s> SYSTEM USER: [visual]\\n{AGR sentence}\\n{question} ASSISTANT: {answer}</s>
    USER: [visual]\\n{question} ASSISTANT: {answer}</s> …

Every human turn carries the visual tokens, so that each question gets its own context tokens. Text
is encoded in pieces, cut at every visual place and every `</s>`; each piece has its own
dummy-prefix space, one <s> stands at the start of all. Loss is borne by the answers and their
`</s>` alone. Ids equal those of LLaMA-VID's `tokenizer_image_token` and `preprocess_imgsp_v1`.

What differs: the visual place is expanded here, to one IMAGE_TOKEN for each visual token, so that
`text_length` bounds the real length (LLaMA-VID cuts before the expansion); the Q-Former reads the
question as it is, in training as in evaluation (LLaMA-VID deletes its line breaks in training
only); the AGR sentence (EMO-LLaMA) stands after the first visual place.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int32

from emollama_jax.batch import IGNORE, IMAGE_TOKEN
from emollama_jax.data.tokenizers import Tokenizer
from emollama_jax.errors import UserError
from emollama_jax.faces.labels import AGE_LABELS, GENDER_LABELS, RACE_LABELS

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
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
    kind: Literal["image", "clip"],
    age: int,
    gender: int,
    race: int,
    probability: Sequence[float],
    threshold: float,
    race_labels: Literal["measured", "as_published"],
) -> str:
    """The age-gender-race sentence, e.g. "The person in the image is a 20-29 year old Asian woman."

    Args:
        kind: a clip is called a video.
        age: FaceXFormer's class, as are `gender` and `race`.
        gender: 0 male, 1 female.
        race: "Others" says nothing and is left out.
        probability: of the three classes, in this order.
        threshold: attributes below it are left out.
        race_labels: which order of the race classes holds (`faces/labels.py`).

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
    medium = {"image": "image", "clip": "video"}[kind]
    return f"The person in the {medium} is {article} {words}."


def read_turns(conversation: Conversation) -> tuple[Turn, ...]:
    """The turns of a LLaVA conversation; place holders are taken out, wherever they stand.

    Raises:
        UserError: the turns do not alternate, human first, or an answer is empty.
    """
    values = []
    for number, sentence in enumerate(conversation, 1):
        wanted = "human" if number % 2 else "gpt"
        if sentence.get("from") != wanted:
            raise UserError(
                f"sentence {number} of a conversation is from {sentence.get('from')!r}, wanted "
                f"{wanted!r}: mend the data set's items"
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
    tokenizer: Tokenizer,
    text_length: int,
    rng: np.random.Generator | None = None,
) -> Encoded:
    """A training prompt.

    Args:
        turns: of one conversation.
        n_visual: visual tokens of a turn (frames × tokens of a frame); 0 for text alone.
        agr: the AGR sentence, or "".
        tokenizer: the LLM's.
        text_length: T; what goes beyond is cut off at the right. `labels` of a prompt whose
            answers are all cut off holds IGNORE alone.
        rng: draws for every turn but the first whether the visual tokens stand before or after
            the question, as LLaMA-VID does; None: before.
    """
    ids, labels = [tokenizer.bos], [IGNORE]
    for number, turn in enumerate(turns):
        after = number > 0 and rng is not None and rng.random() < 0.5
        before, human = _human(turn.question, agr=agr, first=number == 0, after=after)
        head = [*_encode(tokenizer, before), *[IMAGE_TOKEN] * n_visual]
        prompt = list(_encode(tokenizer, human))
        whole = tokenizer.encode(f"{human} {turn.answer}")
        if whole[: len(prompt)] != prompt:
            raise UserError(
                f"the LLM's tokenizer joins 'ASSISTANT:' with the answer {turn.answer!r}, so that "
                "the loss has no border; use one that splits words at spaces"
            )
        answer = [*whole[len(prompt) :], tokenizer.eos]
        ids += head + prompt + answer
        labels += [IGNORE] * (len(head) + len(prompt)) + answer
    return _fit(ids, labels, pad=tokenizer.pad, text_length=text_length)


def build_prompt(
    question: str,
    *,
    n_visual: int,
    agr: str,
    tokenizer: Tokenizer,
    text_length: int,
    earlier: Sequence[Turn] = (),
) -> Encoded:
    """A prompt that ends in `ASSISTANT:`, to be continued. Arguments as `build_training`.

    Args:
        question: to be answered.
        earlier: turns of the same conversation, each with its own visual tokens.

    Raises:
        UserError: it is longer than `text_length`.
    """
    ids = [tokenizer.bos]
    for number, turn in enumerate([*earlier, Turn(question, "")]):
        before, human = _human(turn.question, agr=agr, first=number == 0, after=False)
        ids += [*_encode(tokenizer, before), *[IMAGE_TOKEN] * n_visual]
        if number < len(earlier):
            ids += [*tokenizer.encode(f"{human} {turn.answer}"), tokenizer.eos]
        else:
            ids += _encode(tokenizer, human)
    if len(ids) > text_length:
        raise UserError(
            f"the prompt has {len(ids)} tokens, {n_visual * (len(earlier) + 1)} of them visual, "
            f"and the text length is {text_length}: ask a shorter question or raise "
            "data.text_length, for clips data.clip_text_length"
        )
    return _fit(ids, [IGNORE] * len(ids), pad=tokenizer.pad, text_length=text_length)


def answer_ids(answer: str, *, tokenizer: Tokenizer) -> list[int]:
    """The ids that an answer has after `ASSISTANT:`, its space included, its end left out."""
    opening = tokenizer.encode("ASSISTANT:")
    return tokenizer.encode(f"ASSISTANT: {answer}")[len(opening) :]


def render(turns: Sequence[Turn], *, agr: str) -> list[str]:
    """The text pieces that `build_training` encodes, e.g. to train a tokenizer on."""
    pieces = []
    for number, turn in enumerate(turns):
        before, human = _human(turn.question, agr=agr, first=number == 0, after=False)
        pieces += [before, f"{human} {turn.answer}"]
    return pieces


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


def _human(question: str, *, agr: str, first: bool, after: bool) -> tuple[str, str]:
    """The text before and after a turn's visual tokens, up to `ASSISTANT:`."""
    opening = f"{SYSTEM} USER: " if first else "USER: "
    if after:
        return f"{opening}{question}\n", " ASSISTANT:"
    prior = f"{agr}\n" if agr and first else ""
    return opening, f"\n{prior}{question} ASSISTANT:"


def _fit(ids: list[int], labels: list[int], *, pad: int, text_length: int) -> Encoded:
    length = min(len(ids), text_length)
    padded = np.full(text_length, pad, np.int32)
    padded[:length] = ids[:length]
    masked = np.full(text_length, IGNORE, np.int32)
    masked[:length] = labels[:length]
    return Encoded(ids=padded, labels=masked, length=length, lost=len(ids) - length)
