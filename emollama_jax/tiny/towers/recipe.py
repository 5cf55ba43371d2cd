"""Amounts of data and training of the small towers: the options of `emollama pretrain`."""

import dataclasses
import pathlib
from typing import Annotated

from tyro.conf import Suppress, arg

from emollama_jax.errors import UserError
from emollama_jax.preflight import at_least


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Amounts of data and training; what a command line does not set has no text."""

    real: tuple[str, ...] = ()
    """prepared sets of real faces to learn from beside the drawn ones, e.g. ferplus."""
    data: Annotated[str, arg(metavar="PATH")] = "data"
    """folder of the prepared sets."""
    pictures: int = 36_000
    """drawn pictures of training identities."""
    clips: int = 1_200
    """drawn clips, whose frames are added to the pictures."""
    teacher_steps: int = 6_000
    """training steps of the teacher for real faces; 0 for none."""
    vision_steps: int = 2_500
    """training steps of the vision tower."""
    face_steps: int = 2_500
    """training steps of FaceXFormer."""
    llama_steps: int = 800
    """training steps of the language model."""
    batch: int = 128
    """pictures per training step."""
    learning_rate: float = 1.0e-3
    """peak learning rate; the language model's is twice that."""
    start: pathlib.Path | None = None
    """earlier `--out` folder, to train its picture towers further."""
    seed: int = 0
    """random seed."""
    held_out: Suppress[int] = 1_000  # pictures of validation identities
    real_share: Suppress[float] = 0.75  # of a batch, where there are real faces
    balance: Suppress[float] = 0.4  # a real picture is drawn by its class's count ^ −balance
    mixed: Suppress[float] = 0.5  # share of the real pictures that are blends of two
    teacher_batch: Suppress[int] = 256
    texts: Suppress[int] = 24_000
    text_batch: Suppress[int] = 32
    processes: Suppress[int] = 2  # number of processes that draw
    save_every: Suppress[int] = 250  # steps after which a stopped tower resumes

    def check(self) -> None:
        """Refuses amounts that cannot be.

        Raises:
            UserError: with the option and its bounds.
        """
        at_least(1, pictures=self.pictures, vision_steps=self.vision_steps)
        at_least(1, face_steps=self.face_steps, llama_steps=self.llama_steps, batch=self.batch)
        at_least(0, clips=self.clips, seed=self.seed, teacher_steps=self.teacher_steps)
        if not 0 < self.learning_rate < 1:
            wanted = "more than 0 and less than 1"
            raise UserError(f"--learning-rate is {self.learning_rate}, wanted {wanted}")
