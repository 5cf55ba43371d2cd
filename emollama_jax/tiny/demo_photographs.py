"""The real photographs of `emollama demo`: those that installed packages carry.

They are read from those packages; only the demo's page shows them. The run in this package answers,
as in `emollama ask PHOTO`.
"""

import dataclasses
import importlib.util
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console

from emollama_jax import packed, runs
from emollama_jax.checkpoint import load_for_inference
from emollama_jax.data.items import standard_question
from emollama_jax.data.media import read_image
from emollama_jax.data.split import space_of
from emollama_jax.evaluate.parse import parse_answer
from emollama_jax.runs import PACKAGE
from emollama_jax.serve.answer import Answerer

# Distribution, module, file.
FILES = (
    ("scikit-image", "skimage", "data/astronaut.png"),
    ("matplotlib", "matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    ("scikit-image", "skimage", "data/coffee.png"),  # no face
)


@dataclasses.dataclass(frozen=True)
class Photograph:
    """A photograph, its faces and what was answered."""

    name: str
    picture: np.ndarray  # uint8 [H, W, 3]
    boxes: Sequence[Sequence[float]]  # left, top, right, bottom, pixels
    question: str
    answer: str
    emotion: str | None  # that the answer names

    def summary(self) -> dict[str, Any]:
        """What `report.json` says of it."""
        return {"faces": self.boxes, "answer": self.answer, "emotion": self.emotion}


def find(console: Console) -> list[pathlib.Path]:
    """The photographs that are installed; a line says which packages are missing."""
    found, missing = [], []
    for distribution, module, file in FILES:
        spec = importlib.util.find_spec(module)
        path = pathlib.Path(spec.origin).parent / file if spec and spec.origin else None
        if path is not None and path.is_file():
            found.append(path)
        elif distribution not in missing:
            missing.append(distribution)
    for name in missing:
        console.print(f"no photographs of {name}: pip install {name}, then re-run the command")
    return found


def ask(console: Console) -> list[Photograph]:
    """Asks the package's run about each photograph.

    Args:
        console: terminal for boxes and answers.

    Raises:
        UserError: no such run.
    """
    cfg, model = load_for_inference(PACKAGE)
    answerer = Answerer(cfg, model)
    question = standard_question("image")
    space = space_of(cfg.data.dir, cfg.data.sources[0].name)
    found = []
    for path in find(console):
        start = time.monotonic()
        media = answerer.look(path)
        seconds = time.monotonic() - start
        picture = read_image(path)
        boxes = [[round(float(x), 1) for x in box] for box in media.boxes]
        answer = "".join(answerer.ask(media, question))
        named = parse_answer(answer, space).label if media.found else None
        console.print(
            f"{path.name} ({picture.shape[1]}×{picture.shape[0]}): {len(boxes)} faces {boxes}, "
            f"{seconds:.1f} s: {answer}",
            highlight=False,
            markup=False,
        )
        found.append(Photograph(path.name, picture, boxes, question, answer, named))
    return found


def note() -> str:
    """Who answers, and what it has seen."""
    learned = packed.read_origin(runs.SHIPPED)["learned_from"]
    drawn = all(source.startswith("actionfaces/") for source in learned)
    seen = (
        "It has seen only drawn faces: do not trust what it says about a person."
        if drawn
        else f"It learned from {', '.join(learned)}; its answers are guesses about what a face "
        "shows."
    )
    return (
        "They come with installed packages. They are answered by the run that ships with this "
        f"package, as in emollama ask, not by the one trained here. {seen} Boxes by MTCNN."
    )
