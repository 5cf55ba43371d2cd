"""Elements laid out as the rows of a `Batch`, and packed: several examples in one row.

Nine tenths of a row are padding where each is as long as the longest example may be, and padding is
computed like anything else. So examples share rows: attention keeps them apart by `segment`, and
positions count from each one's first token (Krell et al. 2021, "Efficient Sequence Packing without
Cross-contamination"). Here a row also holds its examples' frames, and pairs of a frame and a
question, each to a static size.

Why not Grain's packing (`FirstFitPackIterDataset`, `BestFitPackIterDataset`): they bound several
arrays at once, as is needed here. But they fill rows from a stream, in turn: what a step holds
follows from all before it, so that it depends on the number of worker processes and hosts, and the
state to resume from is that of open rows. Here a step is a function of the seed and its number, and
has a fixed number of examples, which are only to be distributed over its rows.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from emollama_jax.batch import IGNORE, TEXT, Batch, visual_places
from emollama_jax.config import Config
from emollama_jax.data.elements import Element, Encoder, Text
from emollama_jax.terms import LANDMARKS, Kind

STEPS = 8  # a dimension that is too small grows by one of so many parts of it: few shapes


@dataclasses.dataclass(frozen=True)
class RowShape:
    """The static shape of a row; letters as in `Batch`."""

    tokens: int  # T
    frames: int  # F
    again: int  # X
    questions: int  # Q
    question_length: int  # L
    examples: int  # E


def shape_of_kind(cfg: Config, kind: Kind, *, rounds: int) -> RowShape:
    """A row of one example of a kind."""
    image, data = kind == "image", cfg.data
    frames = 1 if image else data.clip_frames
    return RowShape(
        tokens=data.text_length if image else data.clip_text_length,
        frames=frames,
        again=(rounds - 1) * frames,
        questions=rounds,
        question_length=data.question_length,
        examples=1,
    )


def packed_shape(cfg: Config) -> RowShape:
    """A row of several examples: twice their mean number, since their arrays cost nothing."""
    packed = cfg.data.packed
    assert packed is not None
    examples = 2 * packed.examples
    return RowShape(
        tokens=packed.tokens,
        frames=packed.frames,
        again=packed.again,
        questions=examples * cfg.data.rounds,
        question_length=min(packed.question_length, cfg.data.question_length),
        examples=examples,
    )


@dataclasses.dataclass(frozen=True)
class Packing:
    """What shares a row, and the shape of the rows."""

    rows: list[list[int]]  # items of each row, in their order
    needed: RowShape  # what the fullest rows hold
    shape: RowShape  # at least that


def pack(
    items: Sequence[tuple[Kind, Text]], *, encoder: Encoder, rows: int, shape: RowShape
) -> Packing:
    """Distributes examples evenly over rows: the largest first, each to the emptiest row.

    Args:
        items: kind and text of each example.
        encoder: encoder of the config.
        rows: number of rows.
        shape: the rows'; where examples do not fit, one that is larger in what is too small.
    """
    sizes = np.array([_size(text, encoder.frames(kind)) for kind, text in items])  # [N, 5]
    room = np.array([shape.tokens, shape.frames, shape.again, shape.questions, shape.examples])
    steps = np.maximum(room // STEPS, [1, 1, encoder.cfg.data.clip_frames, 1, 1])
    shares = sizes / np.maximum(room, steps)
    filled = np.zeros((rows, len(room)))
    placed: list[list[int]] = [[] for _ in range(rows)]
    for item in np.argsort(-shares.max(axis=1), kind="stable"):
        after = filled + shares[item]
        row = int(np.argmin(after.max(axis=1) + 1e-4 * after.sum(axis=1)))
        filled[row] = after[row]
        placed[row].append(int(item))
    placed = [sorted(row) for row in placed]
    needed = np.array([sizes[row].sum(axis=0) for row in placed]).max(axis=0)
    grown = room + steps * np.maximum(-(-(needed - room) // steps), 0)
    longest = max((len(ids) for _, text in items for ids in text.questions), default=0)
    fits = longest <= shape.question_length
    length = shape.question_length if fits else encoder.cfg.data.question_length
    return Packing(placed, _shape(needed, longest), _shape(grown, length))


def _shape(sizes: Int[np.ndarray, "5"], question_length: int) -> RowShape:
    tokens, frames, again, questions, examples = map(int, sizes)
    return RowShape(tokens, frames, again, questions, question_length, examples)


def _size(text: Text, frames: int) -> tuple[int, int, int, int, int]:
    """Tokens, frames, frames in later rounds, questions and examples of one example."""
    rounds = len(text.questions)
    return len(text.ids), frames, max(rounds - 1, 0) * frames, rounds, 1


def lay_out(rows: Sequence[Sequence[Element]], *, shape: RowShape, encoder: Encoder) -> Batch:
    """Elements as rows of NumPy arrays, in their order; they must fit."""
    filled = [_Row(shape, encoder) for _ in rows]
    for row, elements in zip(filled, rows, strict=True):
        for element in elements:
            row.add(element)
    names = [field.name for field in dataclasses.fields(Batch)]
    return Batch(**{name: np.stack([getattr(row, name) for row in filled]) for name in names})


def stack(elements: Sequence[Element], *, shape: RowShape, encoder: Encoder) -> Batch:
    """Elements as rows of one each."""
    return lay_out([[element] for element in elements], shape=shape, encoder=encoder)


class _Row:
    """One row, filled element by element; its arrays are named as the fields of `Batch`."""

    def __init__(self, shape: RowShape, encoder: Encoder):
        self._shape, self._tokens_per_frame = shape, encoder.cfg.model.tokens_per_frame
        size = encoder.cfg.model.vision.image_size
        face_size = encoder.cfg.model.face.swin.image_size
        frames, tokens = shape.frames, shape.tokens
        self.frames = np.zeros((frames, size, size, 3), np.uint8)
        self.faces = np.zeros((frames, face_size, face_size, 3), np.uint8)
        self.face_found = np.zeros(frames, bool)
        self.landmarks = np.zeros((frames, LANDMARKS, 2), np.float32)
        self.ids = np.full(tokens, encoder.chat.pad, np.int32)
        self.labels = np.full(tokens, IGNORE, np.int32)
        self.segment = np.zeros(tokens, np.int32)
        self.position = np.zeros(tokens, np.int32)
        self.visual = np.full(tokens, TEXT, np.int32)
        self.question = np.full(frames + shape.again, -1, np.int32)
        self.again = np.zeros(shape.again, np.int32)
        asked = (shape.questions, shape.question_length)
        self.questions = np.full(asked, encoder.question.pad, np.int32)
        self.question_mask = np.zeros(asked, bool)
        self.weight = np.zeros(shape.examples, np.float32)
        self.index = np.full(shape.examples, -1, np.int32)
        self._used = RowShape(0, 0, 0, 0, 0, 0)

    def add(self, element: Element) -> None:
        """Appends an element."""
        used, text, look = self._used, element.text, element.look
        count, rounds = len(look.frames), len(text.questions)
        again = max(rounds - 1, 0) * count
        frames = slice(used.frames, used.frames + count)
        self.frames[frames], self.faces[frames] = look.frames, look.faces
        self.face_found[frames], self.landmarks[frames] = look.found, look.landmarks
        self._add_text(text)
        self._number_visual(text, count)
        for number, ids in enumerate(text.questions, start=used.questions):
            self.questions[number, : len(ids)] = ids
            self.question_mask[number, : len(ids)] = True
        self.question[frames] = used.questions if rounds else -1
        later = slice(used.again, used.again + again)
        self.again[later] = used.frames + np.tile(np.arange(count), max(rounds - 1, 0))
        rest = np.arange(1, max(rounds, 1)).repeat(count)
        self.question[self._shape.frames :][later] = used.questions + rest
        self.weight[used.examples], self.index[used.examples] = element.weight, element.index
        self._used = RowShape(
            tokens=used.tokens + len(text.ids),
            frames=used.frames + count,
            again=used.again + again,
            questions=used.questions + rounds,
            question_length=0,
            examples=used.examples + 1,
        )

    def _add_text(self, text: Text) -> None:
        start, length = self._used.tokens, len(text.ids)
        where = slice(start, start + length)
        self.ids[where], self.labels[where] = text.ids, text.labels
        self.segment[where] = self._used.examples + 1
        self.position[where] = np.arange(length)

    def _number_visual(self, text: Text, count: int) -> None:
        """Visual places take the tokens of the first round's pairs, then those of later rounds."""
        start, each = self._used.tokens, self._tokens_per_frame
        places = visual_places(text.ids)
        first = count * each
        offset = np.where(
            places < first,
            self._used.frames * each,
            (self._shape.frames + self._used.again) * each - first,
        )
        numbered = np.where(places == TEXT, TEXT, places + offset)
        self.visual[start : start + len(places)] = numbered


def real(batch: Batch) -> dict[str, int]:
    """Numbers of what a batch holds beside its padding: tokens, frames, examples."""
    frames: Int[np.ndarray, "b f"] = np.asarray(batch.question)[:, : batch.frames.shape[1]]
    return {
        "tokens": int((np.asarray(batch.segment) > 0).sum()),
        "frames": int((frames >= 0).sum()),
        "examples": int((np.asarray(batch.index) >= 0).sum()),
    }


@dataclasses.dataclass(frozen=True)
class Longest:
    """Of a batch's rows: the most tokens, and the most tokens of a question."""

    tokens: int
    question: int


def longest(batch: Batch) -> Longest:
    """What a batch of NumPy arrays needs at least."""
    return Longest(int(batch.length.max()), int(batch.question_mask.sum(axis=-1).max()))


def shortened(batch: Batch, needed: Sequence[Longest]) -> Batch:
    """A batch without padding that no row needs: widths are halved while they hold what is there.

    So a few shapes serve prompts of any length, and short ones do not pay for the longest.

    Args:
        batch: NumPy arrays of this host.
        needed: by the batches of all hosts, which get one shape.
    """
    tokens = _halved(batch.ids.shape[1], max(each.tokens for each in needed))
    question = _halved(batch.questions.shape[2], max(each.question for each in needed))
    of_tokens = ("ids", "labels", "segment", "position", "visual")
    return dataclasses.replace(
        batch,
        **{name: getattr(batch, name)[:, :tokens] for name in of_tokens},
        questions=batch.questions[:, :, :question],
        question_mask=batch.question_mask[:, :, :question],
    )


def _halved(width: int, needed: int) -> int:
    while width % 2 == 0 and width // 2 >= needed:
        width //= 2
    return width
