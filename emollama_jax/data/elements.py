"""One example of a data set as an `Element`: media decoded, faces cut out, text encoded.

What it says is drawn and encoded first, by its seed alone and without its media (`Told`), so that
rows can be packed by length before anything is decoded. A sentinel stands for media that cannot be
read: black frames, no labels and no weight.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, UInt8

from emollama_jax.batch import IGNORE
from emollama_jax.config import Config, DataConfig
from emollama_jax.data import prompts
from emollama_jax.data.chat import open_chat
from emollama_jax.data.face_crop import crop_face
from emollama_jax.data.items import category_item
from emollama_jax.data.media import (
    Sampling,
    Source,
    read_frames,
    read_image,
    sample_indices,
    to_model_frame,
)
from emollama_jax.data.priors import Prior
from emollama_jax.data.split import Split
from emollama_jax.data.tokenizers import load_tokenizer
from emollama_jax.errors import UserError
from emollama_jax.terms import LANDMARKS, Kind

Shown = Literal["all", "middle", "blank"]  # in an evaluation: what of the media the model gets


@dataclasses.dataclass(frozen=True)
class Look:
    """The frames of one example that the model sees."""

    frames: UInt8[np.ndarray, "m s s 3"]
    faces: UInt8[np.ndarray, "m f f 3"]
    found: Bool[np.ndarray, " m"]
    landmarks: Float32[np.ndarray, "m 68 2"]
    agr: str  # the sentence, "" for none


@dataclasses.dataclass(frozen=True)
class Text:
    """What is said about one example, not padded."""

    ids: Int32[np.ndarray, " t"]
    labels: Int32[np.ndarray, " t"]  # IGNORE where no loss is borne
    questions: tuple[Int32[np.ndarray, " _"], ...]  # the Q-Former's, one a round


@dataclasses.dataclass(frozen=True)
class Told:
    """What training says about an example, before its media are decoded."""

    text: Text
    blank: bool  # it is shown black
    trouble: str  # why it is a sentinel, "" if it is none


@dataclasses.dataclass(frozen=True)
class Element:
    """One example, to be laid out in a row of a `Batch`."""

    look: Look
    text: Text
    weight: float
    index: int  # its position in its source
    trouble: str  # why it is a sentinel, "" if it is none


def sampling_of(data: DataConfig) -> Sampling:
    """How a config samples clips."""
    return Sampling(data.clip_frames, data.fps if data.sampling == "fps" else None)


class Encoder:
    """Everything that the rows of a config share: tokenizers and static shapes."""

    def __init__(self, cfg: Config):
        """Reads the tokenizers.

        Raises:
            UserError: they or the text lengths do not fit the model.
        """
        self.cfg = cfg
        self.chat = open_chat(cfg)
        self.llm = self.chat.tokenizer
        self.question = load_tokenizer(cfg.data.question_tokenizer)
        for name, size, rows in (
            ("llm", self.llm.size, cfg.model.llama.vocab_size),
            ("question", self.question.size, cfg.model.qformer.vocab_size),
        ):
            if size > rows:
                part = {"llm": "llama", "question": "qformer"}[name]
                raise UserError(
                    f"data.{name}_tokenizer has {size} entries and model.{part}.vocab_size is "
                    f"{rows}: use the tokenizer that the weights were trained with"
                )
        if not 3 <= cfg.data.question_length <= cfg.model.qformer.max_positions:
            raise UserError(
                f"data.question_length is {cfg.data.question_length}, wanted 3 … "
                f"{cfg.model.qformer.max_positions} (model.qformer.max_positions)"
            )
        for kind in sorted({source.kind for source in cfg.data.sources}):
            if self.visual(kind) >= self.text_length(kind):
                field = {"image": "text_length", "clip": "clip_text_length"}[kind]
                raise UserError(
                    f"data.{field} is {self.text_length(kind)}, and one {kind} alone takes "
                    f"{self.visual(kind)} visual tokens: raise it"
                )
            packed = cfg.data.packed
            if packed is not None and self.visual(kind) >= packed.tokens:
                raise UserError(
                    f"data.packed.tokens is {packed.tokens}, and one {kind} alone takes "
                    f"{self.visual(kind)} visual tokens: raise it"
                )

    def frames(self, kind: Kind) -> int:
        """M."""
        return {"image": 1, "clip": self.cfg.data.clip_frames}[kind]

    def text_length(self, kind: Kind) -> int:
        """T."""
        return {"image": self.cfg.data.text_length, "clip": self.cfg.data.clip_text_length}[kind]

    @property
    def room(self) -> int:
        """Tokens that the model's positions leave behind the longer of the two prompts."""
        longest = max(self.text_length("image"), self.text_length("clip"))
        return self.cfg.model.llama.reach - longest

    def visual(self, kind: Kind) -> int:
        """Visual tokens of a turn."""
        return self.frames(kind) * self.cfg.model.tokens_per_frame

    def indices(
        self, count: int, fps: float | None, rng: np.random.Generator | None
    ) -> Int[np.ndarray, " m"]:
        """The frames of a clip that the model sees; see `media.sample_indices`."""
        return sample_indices(count, fps, sampling=sampling_of(self.cfg.data), rng=rng)

    def look(
        self,
        media: Source,
        *,
        kind: Kind,
        prior: Prior,
        rng: np.random.Generator | None = None,
        shown: Shown = "all",
    ) -> Look:
        """Decodes what the model sees of a picture or clip.

        Args:
            media: the encoded file or its path.
            kind: kind of media.
            prior: face prior.
            rng: as in `indices`.
            shown: "middle" repeats a clip's middle frame; "blank" shows black frames and no face.

        Raises:
            UserError: the media cannot be read, or the prior is of other media.
        """
        if kind == "image":
            pictures, indices, count = [read_image(media)], np.zeros(1, int), 1
        else:

            def pick(count: int, fps: float | None) -> Int[np.ndarray, " m"]:
                if shown == "middle":
                    return np.full(self.cfg.data.clip_frames, count // 2)
                return self.indices(count, fps, rng)

            clip = read_frames(media, pick)
            pictures, indices, count = clip.frames, clip.indices, clip.count
        if len(prior.found) == 0:
            raise UserError("could not be read when its face priors were computed")
        if count != len(prior.found):
            raise UserError(
                f"{count} frames, but face priors of {len(prior.found)}: compute the priors again"
            )
        if shown == "blank":
            return self.empty_look(kind)
        look = self.cut(
            pictures,
            kind=kind,
            which=indices,
            boxes=prior.boxes[indices],
            found=prior.found[indices],
        )
        look.landmarks[look.found] = prior.landmarks[indices][look.found]
        return dataclasses.replace(look, agr=self.agr(kind, prior))

    def cut(
        self,
        pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]],
        *,
        kind: Kind,
        which: Int[np.ndarray, " m"],
        boxes: Float32[np.ndarray, "m 4"],
        found: Bool[np.ndarray, " m"],
    ) -> Look:
        """Decoded frames as the model sees them; what only the networks know of the face is empty.

        Args:
            pictures: the M frames.
            kind: kind of media.
            which: stored frame of each; short clips repeat frames.
            boxes: face boxes, (x1, y1, x2, y2) in pixels.
            found: whether there is one.
        """
        data = self.cfg.data
        size, face_size = self.cfg.model.vision.image_size, self.cfg.model.face.swin.image_size
        look = _empty_look(len(pictures), size, face_size)
        pad = data.pad_images and kind == "image"
        done: dict[int, int] = {}  # stored frame → its place
        for place, (index, picture) in enumerate(zip(which.tolist(), pictures, strict=True)):
            if (same := done.setdefault(index, place)) != place:
                look.frames[place], look.faces[place] = look.frames[same], look.faces[same]
                continue
            look.frames[place] = to_model_frame(picture, size, pad=pad)
            if found[place]:
                look.faces[place], _ = crop_face(picture, boxes[place], data.face_margin, face_size)
        look.found[:] = found
        return look

    def training_text(
        self, turns: Sequence[prompts.Turn], *, kind: Kind, agr: str, rng: np.random.Generator
    ) -> tuple[Text, str]:
        """Text with labels of at most `data.rounds` turns, and why it is a sentinel's."""
        packed = self.cfg.data.packed
        longest = self.text_length(kind) if packed is None else packed.tokens
        encoded = prompts.build_training(
            turns,
            n_visual=self.visual(kind),
            agr=agr,
            chat=self.chat,
            text_length=longest,
            rng=rng,
        )
        if (encoded.labels == IGNORE).all():
            needed = encoded.length + encoded.lost
            return self._no_text(), f"its {needed} tokens do not fit into T = {longest}"
        return self._text(encoded, [turn.question for turn in turns]), ""

    def prompt_row(self, look: Look, *, kind: Kind, question: str, index: int) -> Element:
        """An example to be answered: no labels, one round.

        Raises:
            UserError: the question is too long.
        """
        question = prompts.question_text(question)
        encoded = self._prompt(question, kind, look.agr, (), self.text_length(kind))
        return Element(look, self._text(encoded, [question]), 1.0, index, "")

    def prompt(
        self,
        question: str,
        *,
        kind: Kind,
        agr: str,
        earlier: Sequence[prompts.Turn],
        room: int,
    ) -> prompts.Encoded:
        """A prompt alone, after any turns before it.

        Its padded length is the config's, doubled as often as the turns need: few shapes.

        Args:
            question: to be answered.
            kind: kind of media.
            agr: the AGR sentence, or "".
            earlier: turns of the same conversation.
            room: tokens that will follow; prompt and they share the model's positions.

        Raises:
            UserError: it is too long.
        """
        reach = self.cfg.model.llama.reach - room
        length = self.text_length(kind)
        longest = self._prompt(question, kind, agr, earlier, max(reach, length))
        while length < longest.length:
            length = min(2 * length, reach)
        return dataclasses.replace(
            longest, ids=longest.ids[:length], labels=longest.labels[:length]
        )

    def fits(self, question: str, **which: Any) -> bool:
        """Whether there is a `prompt` of these arguments."""
        try:
            self.prompt(question, **which)
        except UserError:
            return False
        return True

    def _prompt(
        self, question: str, kind: Kind, agr: str, earlier: Sequence[prompts.Turn], length: int
    ) -> prompts.Encoded:
        return prompts.build_prompt(
            question,
            n_visual=self.visual(kind),
            agr=agr,
            chat=self.chat,
            text_length=length,
            earlier=earlier,
        )

    def question_ids(self, question: str) -> tuple[Int32[np.ndarray, " l"], Bool[np.ndarray, " l"]]:
        """The Q-Former's tokens of a question, and where they are not padding."""
        return prompts.encode_question(
            question, tokenizer=self.question, length=self.cfg.data.question_length
        )

    def sentinel(self, kind: Kind, index: int, trouble: str) -> Element:
        """Stand-in for a training example that cannot be shown."""
        return Element(self.empty_look(kind), self._no_text(), 0.0, index, trouble)

    def _no_text(self) -> Text:
        """A sentinel's: a row without a token would have nothing to attend to."""
        ids, labels = (np.array([x], np.int32) for x in (self.chat.first, IGNORE))
        return Text(ids, labels, ())

    def _text(self, encoded: prompts.Encoded, questions: Sequence[str]) -> Text:
        asked = (ids[real] for ids, real in map(self.question_ids, questions))
        n = encoded.length
        return Text(encoded.ids[:n], encoded.labels[:n], tuple(asked))

    def empty_look(self, kind: Kind) -> Look:
        """Black frames without a face."""
        model = self.cfg.model
        return _empty_look(self.frames(kind), model.vision.image_size, model.face.swin.image_size)

    def agr(self, kind: Kind, prior: Prior) -> str:
        """The AGR sentence of a prompt; "" where there is none."""
        if not (self.cfg.data.agr and prior.found.any()):
            return ""
        age, gender, race = (int(x) for x in prior.agr)
        return prompts.agr_sentence(
            kind=kind,
            age=age,
            gender=gender,
            race=race,
            probability=[float(p) for p in prior.agr_probability],
            threshold=self.cfg.data.agr_threshold,
            race_labels=self.cfg.model.face.race_labels,
        )


class Examples:
    """A split's examples as elements. Pickles, so that worker processes can hold it.

    Args:
        encoder: encoder of the config.
        split: split to read.
        kind: kind of the split.
        items: those that training draws from: "category", "conversation" or "both".

    Raises:
        UserError: the split has no face priors, or those of another preparation.
    """

    def __init__(self, encoder: Encoder, split: Split, *, kind: Kind, items: str = "category"):
        if len(split.priors) != len(split.examples):
            raise UserError(
                f"{split.name}, split {split.split}: {len(split.examples)} examples, but face "
                f"priors of {len(split.priors)}: compute the priors again"
            )
        self.encoder, self.split, self.kind, self.items = encoder, split, kind, items

    def __len__(self) -> int:
        return len(self.split.examples)

    def told(self, index: int, *, seed: int) -> Told:
        """What is said about an example; the seed decides the conversation and its layout."""
        rng = np.random.Generator(np.random.PCG64([seed, 0]))
        data = self.encoder.cfg.data
        blank = bool(rng.random() < data.blank_share)
        pieces = prompts.split_rounds(self._choose(index, rng), data.rounds)
        turns = pieces[rng.integers(len(pieces))]
        agr = "" if blank else self.encoder.agr(self.kind, self.split.priors[index])
        text, trouble = self.encoder.training_text(turns, kind=self.kind, agr=agr, rng=rng)
        return Told(text, blank, trouble)

    def training(self, index: int, *, seed: int, told: Told | None = None) -> Element:
        """One example; the seed decides what is said, and the frames.

        Args:
            index: position in the split.
            seed: seed of all choices.
            told: what `told` gave for both; None: not asked yet.
        """
        told = told or self.told(index, seed=seed)
        kind, trouble = self.kind, told.trouble
        if told.blank and not trouble:
            return Element(self.encoder.empty_look(kind), told.text, 1.0, index, "")
        example = self.split.examples[index]
        if not trouble:
            rng = np.random.Generator(np.random.PCG64([seed, 1]))
            try:
                prior = self.split.priors[index]
                look = self.encoder.look(example["media"], kind=kind, prior=prior, rng=rng)
                return Element(look, told.text, 1.0, index, "")
            except UserError as error:
                trouble = str(error)
        return self.encoder.sentinel(kind, index, f"{self.name(example)}: {trouble}")

    def evaluation(self, index: int, *, shown: Shown) -> tuple[Element, Mapping[str, Any]]:
        """One prompt, the category question's, and the example it is of.

        Media that cannot be read are black frames: a prediction is asked for all the same.
        """
        example, kind = self.split.examples[index], self.kind
        try:
            look = self.encoder.look(
                example["media"], kind=kind, prior=self.split.priors[index], shown=shown
            )
            trouble = ""
        except UserError as error:
            look, trouble = self.encoder.empty_look(kind), f"{self.name(example)}: {error}"
        question = json.loads(example["items"])[0][0]["value"]  # the category item is the first
        element = self.encoder.prompt_row(look, kind=kind, question=question, index=index)
        return dataclasses.replace(element, trouble=trouble), example

    def name(self, example: Mapping[str, Any]) -> str:
        """For log lines."""
        return f"{self.split.name}, split {self.split.split}, example {example['id']}"

    def _choose(self, index: int, rng: np.random.Generator) -> Sequence[prompts.Turn]:
        category, *conversations = self._items(index)
        items = {
            "category": [category],
            "conversation": conversations,
            "both": [category, *conversations],
        }[self.items]
        if not items:
            name = self.name(self.split.examples[index])
            raise UserError(f"{name} has no conversation: set items: category for this source")
        try:
            return prompts.read_turns(items[rng.integers(len(items))])
        except UserError as error:
            raise UserError(f"{self.name(self.split.examples[index])}: {error}") from None

    def _items(self, index: int) -> list[Any]:
        """The example's items, read without its media where they can be had so."""
        if self.items == "category" and self._as_worded:
            label = int(self.split.index.labels[index])
            return [category_item(self.split.space.classes, label, self.kind)]
        return self.split.items(index)

    @functools.cached_property
    def _as_worded(self) -> bool:
        """Whether the set's category items are worded as today, so that a label gives them."""
        label = int(self.split.index.labels[0])
        return self.split.items(0)[0] == category_item(self.split.space.classes, label, self.kind)


def _empty_look(frames: int, size: int, face_size: int) -> Look:
    return Look(
        frames=np.zeros((frames, size, size, 3), np.uint8),
        faces=np.zeros((frames, face_size, face_size, 3), np.uint8),
        found=np.zeros(frames, bool),
        landmarks=np.zeros((frames, LANDMARKS, 2), np.float32),
        agr="",
    )
