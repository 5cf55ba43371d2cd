"""One example of a data set as one row of a `Batch`: media decoded, faces cut out, text encoded.

Rows are dictionaries of NumPy arrays named as the fields of `Batch`, without its axis B, plus
`trouble`: why the row is a sentinel, "" if it is none. A sentinel stands for media that cannot be
read; it has the same shapes, no labels and no weight.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, UInt8

from emollama_jax.batch import IGNORE, Batch
from emollama_jax.config import Config
from emollama_jax.data import prompts
from emollama_jax.data.chat import open_chat
from emollama_jax.data.face_crop import crop_face
from emollama_jax.data.media import (
    Source,
    fps_indices,
    read_frames,
    read_image,
    segment_indices,
    to_model_frame,
)
from emollama_jax.data.priors import Prior
from emollama_jax.data.split import Split
from emollama_jax.data.tokenizers import load_tokenizer
from emollama_jax.errors import UserError
from emollama_jax.terms import LANDMARKS, Kind

Shown = Literal["all", "middle", "blank"]  # in an evaluation: what of the media the model gets
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Look:
    """The frames of one example that the model sees."""

    frames: UInt8[np.ndarray, "m s s 3"]
    faces: UInt8[np.ndarray, "m f f 3"]
    found: Bool[np.ndarray, " m"]
    landmarks: Float32[np.ndarray, "m 68 2"]
    agr: str  # the sentence, "" for none


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
        """The frames of a clip: random ones in training, where `rng` is given, else central ones.

        "fps" takes LLaMA-VID's frames; the static shape thins them out, or repeats the last.
        """
        segments = self.cfg.data.clip_frames
        if self.cfg.data.sampling == "segments":
            return segment_indices(count, segments=segments, rng=rng)
        steady = fps_indices(count, fps, wanted_fps=self.cfg.data.fps)
        return steady[segment_indices(len(steady), segments=segments, rng=rng)]

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

    def training_row(
        self,
        look: Look,
        *,
        kind: Kind,
        turns: Sequence[prompts.Turn],
        index: int,
        rng: np.random.Generator,
    ) -> Row:
        """A row with labels; at most `data.rounds` turns."""
        encoded = prompts.build_training(
            turns,
            n_visual=self.visual(kind),
            agr=look.agr,
            chat=self.chat,
            text_length=self.text_length(kind),
            rng=rng,
        )
        if (encoded.labels == IGNORE).all():
            needed = encoded.length + encoded.lost
            return self.sentinel(
                kind, index, f"its {needed} tokens do not fit into T = {len(encoded.ids)}"
            )
        questions = [turn.question for turn in turns]
        return self._row(look, encoded, questions, rounds=self.cfg.data.rounds, index=index)

    def prompt_row(self, look: Look, *, kind: Kind, question: str, index: int) -> Row:
        """A row to be answered: no labels, one round.

        Raises:
            UserError: the question is too long.
        """
        question = prompts.question_text(question)
        encoded = self._prompt(question, kind, look.agr, (), self.text_length(kind))
        return self._row(look, encoded, [question], rounds=1, index=index)

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

    def sentinel(self, kind: Kind, index: int, trouble: str) -> Row:
        """Stand-in for a training row that cannot be made."""
        encoded = prompts.Encoded(
            ids=np.full(self.text_length(kind), self.chat.pad, np.int32),
            labels=np.full(self.text_length(kind), IGNORE, np.int32),
            length=1,  # a row without a token would have nothing to attend to
            lost=0,
        )
        encoded.ids[0] = self.chat.first
        look = self.empty_look(kind)
        row = self._row(look, encoded, [], rounds=self.cfg.data.rounds, index=index)
        return row | {"weight": np.float32(0), "trouble": trouble}

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

    def _row(
        self,
        look: Look,
        encoded: prompts.Encoded,
        questions: Sequence[str],
        *,
        rounds: int,
        index: int,
    ) -> Row:
        length = self.cfg.data.question_length
        ids = np.full((rounds, length), self.question.pad, np.int32)
        mask = np.zeros((rounds, length), bool)
        for number, question in enumerate(questions):
            ids[number], mask[number] = self.question_ids(question)
        return {
            "frames": look.frames,
            "faces": look.faces,
            "face_found": look.found,
            "landmarks": look.landmarks,
            "ids": encoded.ids,
            "labels": encoded.labels,
            "length": np.int32(encoded.length),
            "questions": ids,
            "question_mask": mask,
            "weight": np.float32(1),
            "index": np.int32(index),
            "trouble": "",
        }


class Examples:
    """A split's examples as rows. Pickles, so that worker processes can hold it.

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

    def training(self, index: int, *, seed: int) -> Row:
        """One row; the seed decides the conversation, its layout and the frames."""
        rng = np.random.Generator(np.random.PCG64(seed))
        example = self.split.examples[index]
        pieces = prompts.split_rounds(self._choose(example, rng), self.encoder.cfg.data.rounds)
        turns = pieces[rng.integers(len(pieces))]
        kind = self.kind
        try:
            if rng.random() < self.encoder.cfg.data.blank_share:
                look = self.encoder.empty_look(kind)
            else:
                prior = self.split.priors[index]
                look = self.encoder.look(example["media"], kind=kind, prior=prior, rng=rng)
            row = self.encoder.training_row(look, kind=kind, turns=turns, index=index, rng=rng)
        except UserError as error:
            row = self.encoder.sentinel(kind, index, str(error))
        if row["trouble"]:
            row["trouble"] = f"{self.name(example)}: {row['trouble']}"
        return row

    def evaluation(self, index: int, *, shown: Shown) -> tuple[Row, Mapping[str, Any]]:
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
        row = self.encoder.prompt_row(look, kind=kind, question=question, index=index)
        return row | {"trouble": trouble}, example

    def name(self, example: Mapping[str, Any]) -> str:
        """For log lines."""
        return f"{self.split.name}, split {self.split.split}, example {example['id']}"

    def _choose(
        self, example: Mapping[str, Any], rng: np.random.Generator
    ) -> Sequence[prompts.Turn]:
        category, *conversations = json.loads(example["items"])
        items = {
            "category": [category],
            "conversation": conversations,
            "both": [category, *conversations],
        }[self.items]
        if not items:
            raise UserError(
                f"{self.name(example)} has no conversation: set items: category for this source"
            )
        try:
            return prompts.read_turns(items[rng.integers(len(items))])
        except UserError as error:
            raise UserError(f"{self.name(example)}: {error}") from None


def stack(rows: Sequence[Row]) -> tuple[Batch, list[str]]:
    """Rows of one shape as a batch of NumPy arrays, and what is wrong with them."""
    names = [field.name for field in dataclasses.fields(Batch)]
    batch = Batch(**{name: np.stack([row[name] for row in rows]) for name in names})
    return batch, [row["trouble"] for row in rows if row["trouble"]]


def _empty_look(frames: int, size: int, face_size: int) -> Look:
    return Look(
        frames=np.zeros((frames, size, size, 3), np.uint8),
        faces=np.zeros((frames, face_size, face_size, 3), np.uint8),
        found=np.zeros(frames, bool),
        landmarks=np.zeros((frames, LANDMARKS, 2), np.float32),
        agr="",
    )
