"""A question about one picture or clip: media → face priors → prompt → streamed answer."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from emollama_jax.config import Config, GenerateConfig
from emollama_jax.data.elements import Encoder, Kind, stack
from emollama_jax.data.media import Source, is_video, read_frames, read_image
from emollama_jax.errors import UserError
from emollama_jax.faces.priors import Detect, Prior, Reader, find_face, read_faces
from emollama_jax.generate.decode import Stop, stream
from emollama_jax.generate.flagged import of_backend
from emollama_jax.generate.sampling import sampling
from emollama_jax.models.emollama import EmoLlama
from emollama_jax.models.mtcnn import Detector


@dataclasses.dataclass(frozen=True)
class Media:
    """A picture or clip with the face that is asked about."""

    source: Source
    kind: Kind
    prior: Prior
    faces: int  # found in the picture, or in the clip's fullest frame


class Answerer:
    """A model with what it needs to look at media; made once, asked often."""

    def __init__(self, cfg: Config, model: EmoLlama, *, detect: Detect | None = None):
        self.cfg, self.model = cfg, model
        self.encoder = Encoder(cfg)
        self.reader = Reader(model.face, margin=cfg.data.face_margin, batch=cfg.data.clip_frames)
        self.detect = Detector() if detect is None else detect

    def look(self, source: Source, *, face: int | None = None) -> Media:
        """Finds the face of a picture or clip.

        Args:
            source: a path, or the file's content.
            face: the number of a picture's face, largest first from 0; None for the largest.

        Raises:
            UserError: unreadable media, or no such face.
        """
        if is_video(source):
            if face is not None:
                raise UserError(f"--face {face}: faces are chosen in pictures only, not in clips")
            return self._clip(source)
        picture = read_image(source)
        found = self.detect(picture)
        boxes = np.zeros((0, 4), np.float32)
        if face is not None:
            if not 0 <= face < len(found.boxes):
                raise UserError(
                    f"--face {face}: the picture has {len(found.boxes)} faces, counted from 0"
                )
            boxes = found.boxes[face : face + 1]
        seen = find_face(
            [picture],
            boxes=boxes if len(boxes) else None,
            detect=lambda _: found,
            reader=self.reader,
        )
        return Media(source, "image", read_faces([seen], self.reader)[0], len(found.boxes))

    def _clip(self, source: Source) -> Media:
        """Only the frames that the model will see are searched for faces."""
        clip = read_frames(source, lambda count, fps: self.encoder.indices(count, fps, None))
        counts = []

        def detect(frame: np.ndarray):
            found = self.detect(frame)
            counts.append(len(found.boxes))
            return found

        chosen, where = np.unique(clip.indices, return_index=True)
        seen = find_face(
            [clip.frames[i] for i in where], boxes=None, detect=detect, reader=self.reader
        )
        sampled = read_faces([seen], self.reader)[0]
        return Media(source, "clip", _spread(sampled, chosen, clip.count), max(counts))

    def ask(
        self, media: Media, question: str, *, how: GenerateConfig | None = None
    ) -> Iterator[str]:
        """Streams the answer to a question, piece by piece.

        Yields:
            Text; joined, the pieces are the answer.

        Returns:
            Why it ended, a `Stop`.
        """
        how = self.cfg.generate if how is None else how
        look = self.encoder.look(media.source, kind=media.kind, prior=media.prior)
        row = self.encoder.prompt_row(look, kind=media.kind, question=question, index=0)
        batch, _ = stack([row])
        tokenizer = self.encoder.llm
        ended: Stop = yield from stream(
            self.model,
            batch,
            tokenizer.decode,
            how=sampling(how),
            max_new_tokens=how.max_new_tokens,
            stop=(tokenizer.eos,),
            pad=tokenizer.pad,
            flags=of_backend(self.cfg.xla_flags),
        )
        return ended


def _spread(prior: Prior, indices: Sequence[int] | np.ndarray, count: int) -> Prior:
    """The priors of chosen frames as those of a whole clip; the other frames have no face."""
    whole = {
        "boxes": np.zeros((count, 4), np.float32),
        "found": np.zeros(count, bool),
        "landmarks": np.zeros((count, 68, 2), np.float32),
    }
    for name, values in whole.items():
        values[indices] = getattr(prior, name)
    return dataclasses.replace(prior, **whole)
