"""Pretraining of the small LLaMA: it answers about faces that it is told in action units."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from emollama_jax.config import Config, TokenizerConfig
from emollama_jax.data.action_units import EMOTIONS
from emollama_jax.data.chat import Chat
from emollama_jax.data.describe import conversation
from emollama_jax.data.items import category_item
from emollama_jax.data.media import segment_indices
from emollama_jax.data.prompts import (
    Turn,
    agr_sentence,
    build_training,
    read_turns,
    render,
    split_rounds,
)
from emollama_jax.data.templates import TEMPLATES
from emollama_jax.data.tokenizers import load_tokenizer, train_bpe
from emollama_jax.tiny.actionfaces.courses import sample_course
from emollama_jax.tiny.actionfaces.expressions import CLASS_SHARES
from emollama_jax.tiny.actionfaces.identity import identities_of, make_identity
from emollama_jax.tiny.towers.fit import Course, fit, progress_lines
from emollama_jax.tiny.towers.learners import TextLearner, blur
from emollama_jax.tiny.towers.pictures import Pictures
from emollama_jax.tiny.towers.recipe import Recipe
from emollama_jax.tiny.towers.views import drawn_pictures


@dataclasses.dataclass(frozen=True)
class _Told:
    """An instruction item and the action units that it is about."""

    turns: Sequence[Turn]  # one
    agr: str
    units: np.ndarray  # float32 [M, K]; M = 1 for an image


def _tell(config: Config, recipe: Recipe, pictures: Pictures) -> Iterator[_Told]:
    """Instruction items of training identities, without pictures: half images, half clips."""
    rng = np.random.Generator(np.random.PCG64([recipe.seed, 3]))
    labelled = np.flatnonzero(pictures.emotion >= 0)
    people = identities_of("train")
    for i in rng.choice(labelled, recipe.texts):
        if rng.random() < 0.5:
            kind, emotion = "image", int(pictures.emotion[i])
            units = pictures.action_units[i][None]
            agr = tuple(map(int, pictures.agr[i]))
        else:
            kind, emotion = "clip", int(rng.choice(len(EMOTIONS), p=CLASS_SHARES["train"]))
            person = make_identity(people[int(rng.integers(len(people)))])
            units = sample_course(emotion, person, rng).units
            agr = (person.age, person.gender, person.race)
        item = (
            conversation(units[0] if kind == "image" else units, emotion, kind, rng)
            if rng.random() < 0.5
            else category_item(EMOTIONS, emotion, kind)
        )
        if kind == "clip":
            units = units[segment_indices(len(units), segments=config.data.clip_frames, rng=rng)]
        age, gender, race = agr
        sentence = agr_sentence(
            kind=kind,
            age=age,
            gender=gender,
            race=race,
            probability=rng.random(3),
            threshold=0.3,
            race_labels=config.model.face.race_labels,
        )
        pieces = split_rounds(read_turns(item), 1)
        yield _Told(turns=pieces[rng.integers(len(pieces))], agr=sentence, units=units)


def text_tower(config: Config, recipe: Recipe, out: pathlib.Path, console: Any):
    told = list(_tell(config, recipe, drawn_pictures(config, recipe, out, console, "train")))
    template = TEMPLATES["vicuna"]
    vocabulary = train_bpe(
        (piece for item in told for piece in render(item.turns, agr=item.agr, template=template)),
        config.model.llama.vocab_size,
    )
    (out / "tiny_bpe.json").write_text(vocabulary)
    tokenizer = load_tokenizer(TokenizerConfig(kind="bpe", path=str(out / "tiny_bpe.json")))
    chat = Chat(template, tokenizer)
    per_frame, frames = config.model.tokens_per_frame, config.data.clip_frames
    encoded = [
        build_training(
            item.turns,
            n_visual=len(item.units) * per_frame,
            agr=item.agr,
            chat=chat,
            text_length=config.data.clip_text_length,
        )
        for item in told
    ]
    everything = {
        "ids": np.stack([e.ids for e in encoded]),
        "labels": np.stack([e.labels for e in encoded]),
        # An image's text asks for the first frame alone.
        "action_units": np.stack([np.resize(x.units, (frames, x.units.shape[1])) for x in told]),
        "shown": np.ones((len(told), per_frame), np.float32),
    }
    cut = int(len(told) * 0.97)

    def batch_of(step: int) -> dict[str, np.ndarray]:
        rng = np.random.Generator(np.random.PCG64([recipe.seed, step]))
        at = rng.choice(cut, recipe.text_batch, replace=False)
        return {name: rows[at] for name, rows in everything.items()}

    learner = TextLearner(config, told[0].units.shape[1], rngs=nnx.Rngs(recipe.seed + 2))
    fit(
        learner,
        batch_of,
        augment=blur,
        course=Course(recipe.llama_steps, 2 * recipe.learning_rate, recipe.seed),
        saved=out / "llama.npz",
        report=progress_lines("llama", recipe.llama_steps, console),
    )
    graphdef, state = nnx.split(learner)
    held = {name: rows[cut:] for name, rows in everything.items()}
    _, parts = jax.jit(lambda s, b: nnx.merge(graphdef, s).loss(b))(state, held)
    metrics = {f"held_out_{name}": float(value) for name, value in parts.items()}
    return learner.tower, metrics | {"n": len(told) - cut}
