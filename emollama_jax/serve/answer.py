"""Questions about one picture or clip: media → face → what the model sees → streamed answers.

The towers run once for a picture, FaceXFormer included: what it says of the face (landmarks, age,
gender, race) and what Face Info Mining reads come from one pass. A question then costs the Q-Former
and the decoder.
"""

import dataclasses
import itertools
from collections.abc import Generator, Mapping, Sequence

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from emollama_jax.config import Config, GenerateConfig
from emollama_jax.data import prompts
from emollama_jax.data.elements import Encoder
from emollama_jax.data.face_crop import Faces, Track, track
from emollama_jax.data.items import MEDIUM, category_question
from emollama_jax.data.media import Clip, Source, is_video, read_frames, read_image
from emollama_jax.data.priors import Prior
from emollama_jax.errors import UserError
from emollama_jax.faces.reader import Detect, age_gender_race
from emollama_jax.generate.decode import Stop, stream
from emollama_jax.generate.label_scores import pad_labels, score
from emollama_jax.generate.prompt import Prompt, ask, lay, look
from emollama_jax.generate.sampling import sampling
from emollama_jax.models.emollama import EmoLlama, Mined, Sight
from emollama_jax.models.mtcnn import Detector
from emollama_jax.sharding.mesh import flags_for
from emollama_jax.terms import LANDMARKS, Kind

NO_FACE = "No face was found in the {medium}."
QUICKLY = {"xla_backend_optimization_level": "0"}  # XLA's flag for less optimising


@dataclasses.dataclass(frozen=True)
class Media:
    """A picture or clip as the model sees it, with the face that is asked about."""

    kind: Kind
    boxes: np.ndarray  # float32 [N, 4], of all faces of the picture, or of the clip's fullest frame
    probabilities: np.ndarray  # float32 [N]
    face: int | None  # number of the face that is asked about; None for clips, and without a face
    prior: Prior
    # Of age [8], gender [2] and race [5], the mean over the frames with a face; () without one.
    shares: tuple[np.ndarray, ...]
    agr: str  # the sentence about age, gender and race; "" for none
    mined: Mined  # on the device

    @property
    def found(self) -> bool:
        """Whether there is a face to ask about."""
        return bool(self.prior.found.any())


class Answerer:
    """A model with what it needs to look at media; made once, asked often.

    Args:
        cfg: config of the model's run.
        model: not changed.
        detect: finds the faces of pictures; MTCNN by default.
        towers: XLA's flags for the towers' program; on a CPU `QUICKLY` by default.
    """

    def __init__(
        self,
        cfg: Config,
        model: EmoLlama,
        *,
        detect: Detect | None = None,
        towers: Mapping[str, str] | None = None,
    ):
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self._model, self._llama = nnx.split(model), nnx.split(model.llama)
        self._detect = Detector().many if detect is None else detect
        self._flags = flags_for(jax.devices()[0], cfg.xla_flags)
        # The towers are compiled for one example. On a CPU optimising their program takes half of
        # the time to the first answer, and saves hundredths of a second on each picture.
        on_cpu = jax.default_backend() == "cpu"
        default = QUICKLY if on_cpu else self._flags
        self._look = look.under(default if towers is None else towers)

    def look(self, source: Source, *, face: int | None = None) -> Media:
        """Finds the face of a picture or clip, and runs the towers on it.

        Args:
            source: a path, or the file's content.
            face: the number of a picture's face, largest first from 0; None for the largest.

        Raises:
            UserError: unreadable media, or no such face.
        """
        if not is_video(source):
            clip = Clip([read_image(source)], np.zeros(1, int), count=1, fps=None)
            return self.see("image", clip, self.search([clip])[0], face=face)
        if face is not None:
            raise UserError(f"face {face}: faces are chosen in pictures only, not in clips")
        # Only the frames that the model will see are searched for faces.
        clip = read_frames(source, lambda count, fps: self.encoder.indices(count, fps, None))
        return self.see("clip", clip, self.search([clip])[0])

    def search(self, clips: Sequence[Clip]) -> list[list[Faces]]:
        """The faces in each different frame of pictures and clips, all searched together."""
        frames = [[clip.frames[i] for i in _different(clip)] for clip in clips]
        found = iter(self._detect([frame for some in frames for frame in some]))
        return [list(itertools.islice(found, len(some))) for some in frames]

    def see(
        self, kind: Kind, clip: Clip, faces: Sequence[Faces], *, face: int | None = None
    ) -> Media:
        """Runs the towers on the M frames that the model sees.

        Args:
            kind: kind of media.
            clip: the frames; of a picture, one.
            faces: those of each different frame, from `search`.
            face: as of `look`.

        Raises:
            UserError: no such face.
        """
        if kind == "image":
            followed, chosen = _chosen(faces[0], face)
        else:
            _, back = np.unique(clip.indices, return_inverse=True)
            whole, chosen = track(faces), None
            followed = Track(whole.boxes[back], whole.found[back])
        seen = self.encoder.cut(
            clip.frames,
            kind=kind,
            which=clip.indices,
            boxes=followed.boxes,
            found=followed.found,
        )
        sight = self._look(*self._model, seen.frames, seen.faces, seen.found)
        prior, shares = _prior(sight, clip, followed)
        fullest = max(faces, key=lambda found: len(found.boxes))
        return Media(
            kind=kind,
            boxes=np.asarray(fullest.boxes, np.float32),
            probabilities=np.asarray(fullest.probabilities, np.float32),
            face=chosen,
            prior=prior,
            shares=shares,
            agr=self.encoder.agr(kind, prior),
            mined=sight.mined,
        )

    def asked(self, media: Media, question: str) -> Float[np.ndarray, "v d"]:
        """The visual tokens that a question gets."""
        ids, mask = self.encoder.question_ids(question)
        return np.asarray(ask.under(self._flags)(*self._model, media.mined, ids, mask))

    def ask(
        self, media: Media, question: str, *, how: GenerateConfig | None = None
    ) -> Generator[str, None, Stop | None]:
        """Streams the answer to one question; see `Conversation.ask`."""
        return Conversation(self, media).ask(question, how=how)

    def scores(self, media: Media, classes: Sequence[str]) -> dict[str, float]:
        """The log-likelihood of each class word as the answer to the category question.

        Args:
            media: media from `look`.
            classes: label words, in the order in which the question lists them.
        """
        labels = [prompts.answer_ids(name, chat=self.encoder.chat) for name in classes]
        question = category_question(classes, media.kind)
        prompt, _ = self._prompt(media, question, earlier=(), seen=(), room=max(map(len, labels)))
        rated = score.under(self._flags)(*self._llama, prompt, pad_labels(labels))
        return dict(zip(classes, map(float, np.asarray(rated)[0]), strict=True))

    def _prompt(
        self,
        media: Media,
        question: str,
        *,
        earlier: Sequence[prompts.Turn],
        seen: Sequence[np.ndarray],
        room: int,
    ) -> tuple[Prompt, np.ndarray]:
        """A prompt as the decoder reads it, and the visual tokens of its question.

        Args:
            media: media that the question is about.
            question: to be answered.
            earlier: turns before it.
            seen: their visual tokens.
            room: tokens that will follow.
        """
        new = self.asked(media, question)
        encoded = self.encoder.prompt(
            question, kind=media.kind, agr=media.agr, earlier=earlier, room=room
        )
        # As many places as the text has: so a conversation's length alone decides the shapes.
        visual = np.zeros((len(encoded.ids), new.shape[1]), new.dtype)
        tokens = np.concatenate([*seen, new])
        visual[: len(tokens)] = tokens
        laid = lay.under(self._flags)
        return laid(*self._llama, encoded.ids, visual, np.int32(encoded.length)), new


class Conversation:
    """Questions about one picture or clip, each with those before it in its prompt.

    Attributes:
        turns: questions and answers so far.
        forgotten: number of them that no longer fit in the model's positions.
    """

    def __init__(self, answerer: Answerer, media: Media, *, without_face: bool = False):
        """Begins one.

        Args:
            answerer: answerer that looked at the media.
            media: media that the questions are about.
            without_face: ask the model also where no face was found. It was trained on faces and
                may tell of one that is not there.
        """
        self._answerer, self.media, self._without_face = answerer, media, without_face
        self.turns: list[prompts.Turn] = []
        self.forgotten = 0
        self._seen: list[np.ndarray] = []  # the visual tokens of each turn

    def ask(
        self, question: str, *, how: GenerateConfig | None = None
    ) -> Generator[str, None, Stop | None]:
        """Streams the answer to the next question, piece by piece.

        Args:
            question: in plain words.
            how: temperature and length; the run's by default.

        Yields:
            Text; joined, the pieces are the answer. Where there is no face, the answer is that.

        Returns:
            Why it ended, a `Stop`; None where the model was not asked, for want of a face.

        Raises:
            UserError: a question that is too long.
        """
        if not (self.media.found or self._without_face):
            yield NO_FACE.format(medium=MEDIUM[self.media.kind])
            return None
        answerer = self._answerer
        how = answerer.cfg.generate if how is None else how
        question = prompts.question_text(question)
        while self.forgotten < len(self.turns) and not answerer.encoder.fits(
            question,
            kind=self.media.kind,
            agr=self.media.agr,
            earlier=self.turns[self.forgotten :],
            room=how.max_new_tokens,
        ):
            self.forgotten += 1
        prompt, seen = answerer._prompt(
            self.media,
            question,
            earlier=self.turns[self.forgotten :],
            seen=self._seen[self.forgotten :],
            room=how.max_new_tokens,
        )
        chat = answerer.encoder.chat
        pieces = stream(
            answerer._llama,
            prompt,
            chat.tokenizer.decode,
            how=sampling(how),
            max_new_tokens=how.max_new_tokens,
            stop=chat.stop,
            pad=chat.pad,
            flags=answerer._flags,
        )
        answer = ""
        try:
            while True:
                piece = next(pieces)
                answer += piece
                yield piece
        except StopIteration as end:
            self.turns.append(prompts.Turn(question, answer))
            self._seen.append(seen)
            return end.value


def probabilities(scores: Mapping[str, float]) -> dict[str, float]:
    """Log-likelihoods of classes as shares that sum to 1."""
    values = np.array(list(scores.values()))
    shares = np.exp(values - values.max())
    return dict(zip(scores, (shares / shares.sum()).tolist(), strict=True))


def _different(clip: Clip) -> np.ndarray:
    """The places of frames that are not repeated, in the order of the clip."""
    return np.unique(clip.indices, return_index=True)[1]


def _chosen(faces: Faces, face: int | None) -> tuple[Track, int | None]:
    """A picture's face, and its number if there is one."""
    if face is not None and not 0 <= face < len(faces.boxes):
        found = {0: "no face", 1: "one face"}.get(len(faces.boxes), f"{len(faces.boxes)} faces")
        raise UserError(f"face {face}: the picture has {found}, counted from 0")
    if not len(faces.boxes):
        return Track(np.zeros((1, 4), np.float32), np.zeros(1, bool)), None
    chosen = face or 0
    return Track(np.asarray(faces.boxes[chosen : chosen + 1], np.float32), np.ones(1, bool)), chosen


def _prior(sight: Sight, clip: Clip, followed: Track) -> tuple[Prior, tuple[np.ndarray, ...]]:
    """What is known of the face of a whole clip, and the shares of its age, gender and race.

    Frames that were not looked at have no face.
    """
    said = jax.device_get((sight.landmarks, sight.age, sight.gender, sight.race))
    first = _different(clip)
    here = first[followed.found[first]]
    stored = clip.indices[here]
    boxes, found = np.zeros((clip.count, 4), np.float32), np.zeros(clip.count, bool)
    landmarks = np.zeros((clip.count, LANDMARKS, 2), np.float32)
    boxes[stored], found[stored], landmarks[stored] = followed.boxes[here], True, said[0][here]
    heads = [head[here] for head in said[1:]]
    shares = tuple(head.mean(0) for head in heads) if len(here) else ()
    return Prior(boxes, found, landmarks, *age_gender_race(heads)), shares
