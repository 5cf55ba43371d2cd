"""From a question to a prompt: faces, towers and the Q-Former, each run once for what comes again.

Kept by the media's digest: the faces of all frames; for each face, what the towers see; for each
question about it, its visual tokens. The second question about a picture pays no tower, and a
conversation's earlier questions no Q-Former.
"""

import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from emollama_jax.config import Config
from emollama_jax.data import prompts
from emollama_jax.data.face_crop import Faces
from emollama_jax.data.face_labels import AGE_LABELS, GENDER_LABELS, RACE_LABELS
from emollama_jax.data.items import MEDIUM
from emollama_jax.data.media import Clip
from emollama_jax.errors import UserError
from emollama_jax.serve.answer import NO_FACE, Answerer, Media
from emollama_jax.serve.kept import Kept
from emollama_jax.serve.requests import Decoded, FacesFound, Question
from emollama_jax.serve.slots import LABEL_TOKENS, Entry

MOST_LABELS = 1000


class Preparer:
    """Makes prompts. For one thread.

    Attributes:
        sights: what the towers saw, by (digest, face).
    """

    def __init__(self, answerer: Answerer, *, places: int, mebibytes: int):
        """Keeps nothing yet.

        Args:
            answerer: looks and asks.
            places: tokens that a prompt and its answer share.
            mebibytes: bound of what is kept of the towers; an eighth of it bounds visual tokens.
        """
        self._answerer, self._places = answerer, places
        self._faces: Kept[list[Faces]] = Kept(8 << 20, size=_size_of_faces)
        self.sights: Kept[Media] = Kept(mebibytes << 20, size=_size_of_media)
        self._tokens: Kept[np.ndarray] = Kept(mebibytes << 17, size=lambda tokens: tokens.nbytes)

    @property
    def cfg(self) -> Config:
        return self._answerer.cfg

    def search(self, several: Sequence[Decoded]) -> None:
        """Finds the faces of media that are not known yet, all together."""
        new = {one.digest: one for one in several if self._faces.get(one.digest) is None}
        if new:
            found = self._answerer.search([_clip(one) for one in new.values()])
            for digest, faces in zip(new, found, strict=True):
                self._faces.put(digest, faces)

    def see(self, decoded: Decoded, face: int | None) -> Media:
        """What the towers see of one face.

        Raises:
            UserError: no such face.
        """
        if decoded.kind == "clip" and face is not None:
            raise UserError(f"face {face}: faces are chosen in pictures only, not in clips")
        key = decoded.digest, None if decoded.kind == "clip" else face or 0
        media = self.sights.get(key)
        if media is None:
            self.search([decoded])
            faces = self._faces.get(decoded.digest)
            if faces is None:  # more faces than are kept at all
                (faces,) = self._answerer.search([_clip(decoded)])
            media = self._answerer.see(decoded.kind, _clip(decoded), faces, face=face)
            jax.block_until_ready(media.mined)
            self.sights.put(key, media)
        return media

    def entry(self, question: Question, media: Media | None, *, labels: bool) -> Entry:
        """The prompt of a question.

        Args:
            question: question.
            media: what is seen; None for text alone.
            labels: whether labels will be rated, not an answer written.

        Raises:
            UserError: it is too long.
        """
        text = prompts.question_text(question.text)
        room = LABEL_TOKENS[-1] if labels else question.how.max_new_tokens
        earlier = question.earlier
        encoded = self._encoded(question, text, media, earlier, room)
        while encoded is None and earlier:
            earlier = earlier[1:]  # as `Conversation` forgets
            encoded = self._encoded(question, text, media, earlier, room)
        if encoded is None:
            raise UserError(
                f"the question leaves no room for {room} new tokens: prompt and answer share "
                f"{self._places}; ask a shorter question or for a shorter answer"
            )
        ids = encoded.ids[: encoded.length]
        visual, signature = self._shown(question, media, [turn.question for turn in earlier], ids)
        return Entry(
            ids=ids,
            visual=visual,
            signature=signature,
            how=question.how,
            told=question.top_logprobs is not None,
            follows=bool(earlier),
            alone=labels,
        )

    def labels(self, labels: Sequence[str]) -> list[list[int]]:
        """Tokens of labels.

        Raises:
            UserError: too many, too long, equal or empty ones.
        """
        if not 0 < len(labels) <= MOST_LABELS:
            raise UserError(f"{len(labels)} labels, wanted 1 … {MOST_LABELS}")
        if len(set(labels)) < len(labels) or not all(label.strip() for label in labels):
            raise UserError("labels must differ, and each have a character that is no space")
        found = [prompts.answer_ids(label, chat=self._answerer.encoder.chat) for label in labels]
        longest = max(range(len(labels)), key=lambda i: len(found[i]))
        if len(found[longest]) > LABEL_TOKENS[-1]:
            raise UserError(
                f"the label {labels[longest][:40]!r} has {len(found[longest])} tokens, wanted at "
                f"most {LABEL_TOKENS[-1]}"
            )
        return found

    def _encoded(
        self,
        question: Question,
        text: str,
        media: Media | None,
        earlier: Sequence[prompts.Turn],
        room: int,
    ) -> prompts.Encoded | None:
        """The prompt's ids; None where the prompt and `room` do not fit."""
        encoder = self._answerer.encoder
        try:
            encoded = prompts.build_prompt(
                text,
                n_visual=0 if media is None else encoder.visual(media.kind),
                agr=media.agr if media is not None and question.agr else "",
                chat=encoder.chat,
                text_length=self._places,
                earlier=earlier,
            )
        except UserError:
            return None
        return encoded if encoded.length + room <= self._places else None

    def _shown(
        self, question: Question, media: Media | None, before: Sequence[str], ids: np.ndarray
    ) -> tuple[Float[np.ndarray, "v d"], np.ndarray]:
        """Visual tokens of all turns, and the prompt's signature."""
        signature = ids.astype(np.int64)
        if media is None or question.media is None:
            llama = self.cfg.model.llama
            return np.zeros((0, llama.width), jnp.dtype(llama.dtype)), signature
        key = question.media.digest, media.face or 0
        turns, marks = [], []
        for text in (*before, prompts.question_text(question.text)):
            tokens = self._tokens.get((*key, text))
            if tokens is None:
                tokens = self._tokens.put((*key, text), self._answerer.asked(media, text))
            turns.append(tokens)
            mark = hashlib.sha256(repr((*key, text)).encode()).digest()[:7]
            marks.append(-int.from_bytes(mark) - 1 - np.arange(len(tokens)))
        signature[ids < 0] = np.concatenate(marks)
        return np.concatenate(turns), signature


def no_face(media: Media) -> str:
    """What is said where there is no face to ask about."""
    return NO_FACE.format(medium=MEDIUM[media.kind])


def faces_found(media: Media, cfg: Config) -> FacesFound:
    """What a client is told of the faces."""
    names = AGE_LABELS, GENDER_LABELS, RACE_LABELS[cfg.model.face.race_labels]
    shares = [
        dict(zip(labels, map(float, share), strict=True))
        for labels, share in zip(names, media.shares, strict=False)
    ]
    age, gender, race = shares or (None, None, None)
    if cfg.model.face.race_labels == "untaught":
        race = None
    return FacesFound(
        media.boxes, media.probabilities, media.face, media.agr, age=age, gender=gender, race=race
    )


def _clip(decoded: Decoded) -> Clip:
    return Clip(decoded.frames, decoded.indices, decoded.count, fps=None)


def _size_of_faces(faces: list[Faces]) -> int:
    return sum(256 + 64 * len(found.boxes) for found in faces)


def _size_of_media(media: Media) -> int:
    prior = media.prior
    held = media.mined, media.boxes, prior.boxes, prior.found, prior.landmarks
    return sum(array.nbytes for array in jax.tree.leaves(held))
