"""`emollama pretrain tiny`: makes the small towers that the package carries.

The real EMO-LLaMA starts from pretrained EVA-ViT, FaceXFormer and Vicuna; the tiny one starts from
towers trained here on `actionfaces` training identities alone:

- the vision tower learns emotion and action-unit intensities from its mean patch,
- FaceXFormer learns landmarks, head pose, age-gender-race and the determined CelebA attributes
  through its own heads,
- the LLaMA learns to answer the instruction items, told the action units instead of pictures.

Transformers this small learn slowly from one label a picture, so both picture networks also learn
*where* each landmark is, from a heat map over their tokens (soft-argmax, Sun et al. 2018). The
parts that the networks do not have are dropped afterwards.

Each finished tower is a file; a stopped command resumes with the first that is missing.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from emollama_jax.config import Config, TokenizerConfig
from emollama_jax.data.actionfaces.action_units import CLASS_SHARES, EMOTIONS
from emollama_jax.data.actionfaces.courses import sample_course
from emollama_jax.data.actionfaces.describe import conversation as describe
from emollama_jax.data.actionfaces.identity import identities_of, make_identity
from emollama_jax.data.chat import Chat
from emollama_jax.data.instruct import category_item
from emollama_jax.data.media import segment_indices
from emollama_jax.data.pictures import Pictures, draw_pictures
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
from emollama_jax.models import pretrained
from emollama_jax.train.learners import FaceLearner, TextLearner, VisionLearner, augment, blur


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much of everything."""

    pictures: int = 36_000
    clips: int = 1_200  # whose frames join the pictures, without an emotion
    held_out: int = 1_000  # pictures of validation identities
    vision_steps: int = 2_500
    face_steps: int = 2_500
    batch: int = 128
    texts: int = 24_000
    llama_steps: int = 800
    text_batch: int = 32
    learning_rate: float = 1.0e-3
    seed: int = 0


def fit(
    learner: nnx.Module,
    batch_of: Callable[[int], dict[str, np.ndarray]],
    *,
    augment: Callable[[dict[str, jax.Array], jax.Array], dict[str, jax.Array]],
    steps: int,
    learning_rate: float,
    seed: int,
    saved: pathlib.Path,
    report: Callable[[int, dict[str, float]], None],
) -> None:
    """Trains a learner in place: AdamW, 5 % warm-up, cosine; resumes from `saved`.

    Args:
        learner: has `loss(batch) -> (loss, parts)`.
        batch_of: the batch of a step; the same for the same step.
        augment: (batch, key) → batch, inside the compiled step.
        steps: in all.
        learning_rate: at the peak.
        seed: of the augmentation.
        saved: an `.npz` file, written every 250 steps and read where it exists.
        report: called every 50 steps with the step and the loss's parts.
    """
    graphdef, state = nnx.split(learner)
    schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, steps // 20 + 1, steps)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule,
            b2=0.98,
            weight_decay=0.02,
            mask=jax.tree_util.tree_map_with_path(_decays, state),
        ),
    )

    @jax.jit
    def step(both, batch, key):
        state, opt_state = both
        batch = augment(batch, key)
        (_, parts), grads = jax.value_and_grad(
            lambda s: nnx.merge(graphdef, s).loss(batch), has_aux=True
        )(state)
        updates, opt_state = tx.update(grads, opt_state, state)
        return (optax.apply_updates(state, updates), opt_state), parts

    both, first = (state, tx.init(state)), 1
    if saved.exists():
        with np.load(saved) as file:
            leaves = [file[f"arr_{i}"] for i in range(len(file.files) - 1)]
            first = int(file["step"]) + 1
        both = jax.tree.unflatten(jax.tree.structure(both), leaves)
    key = jax.random.key(seed)
    for number in range(first, steps + 1):
        both, parts = step(both, batch_of(number), jax.random.fold_in(key, number))
        if number % 50 == 0 or number == steps:
            report(number, {name: float(value) for name, value in parts.items()})
        if number % 250 == 0:
            partial = saved.with_suffix(".partial.npz")
            np.savez(partial, *map(np.asarray, jax.tree.leaves(both)), step=number)
            partial.replace(saved)  # whole or not at all
    nnx.update(learner, both[0])


def _decays(path: Sequence[Any], leaf: Any) -> bool:
    """Kernels alone: not norms, biases, embeddings or FaceXFormer's constant frequencies."""
    names = [part.key for part in path if hasattr(part, "key")]
    return names[-1] in ("kernel", "qkv")  # the latter is EVA-ViT's fused kernel


def picture_batch(
    pictures: Pictures, which: str, *, batch: int, seed: int
) -> Callable[[int], dict[str, np.ndarray]]:
    """The random batch of a step; `which` names the picture: "frames" or "faces"."""
    landmarks = pictures.frame_landmarks if which == "frames" else pictures.landmarks

    def batch_of(step: int) -> dict[str, np.ndarray]:
        rng = np.random.Generator(np.random.PCG64([seed, step]))
        at = np.sort(rng.choice(len(pictures.emotion), batch, replace=False))
        return {
            "picture": getattr(pictures, which)[at],
            "landmarks": landmarks[at],
            "pose": pictures.pose[at],
            "agr": pictures.agr[at],
            "attributes": pictures.attributes[at],
            "action_units": pictures.action_units[at],
            "emotion": pictures.emotion[at],
        }

    return batch_of


def pretrain(
    config: Config,
    plan: Plan,
    out: pathlib.Path,
    console: Any,
    towers: Sequence[str] = tuple(pretrained.TINY),
) -> dict[str, Any]:
    """Draws the pictures and trains every tower whose file `out` lacks.

    Args:
        config: whose `model` gives the sizes.
        plan: how much.
        out: gets `tiny_*.safetensors` with a `.json` of metrics beside each, `tiny_bpe.json`, and
            the drawn pictures.
        console: a rich console for the progress lines.
        towers: which; two processes may share the work on two cores.

    Returns:
        Held-out metrics, seconds and settings of every tower trained.
    """
    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"plan": dataclasses.asdict(plan)}
    stages = {
        "llama": lambda: _llama(config, plan, out, console),
        "vision": lambda: _vision(config, plan, out, console),
        "face": lambda: _face(config, plan, out, console),
    }
    for tower in towers:
        path = out / f"{pretrained.TINY[tower]}.safetensors"
        if path.exists():
            console.print(f"{tower}: {path} is there already")
            continue
        start = time.monotonic()
        module, metrics = stages[tower]()
        pretrained.save(module, path)
        record[tower] = metrics | {"seconds": round(time.monotonic() - start)}
        path.with_suffix(".json").write_text(json.dumps(record[tower] | record["plan"], indent=1))
        console.print(f"{tower}: {record[tower]}")
    return record


def _pictures(config: Config, plan: Plan, out: pathlib.Path, console: Any, split: str) -> Pictures:
    held = split != "train"
    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > 10:
            last = time.monotonic()
            console.print(f"drawing {split}: {done}/{total} chunks")

    return draw_pictures(
        out / "pictures" / split,
        split=split,
        pictures=plan.held_out if held else plan.pictures,
        clips=0 if held else plan.clips,
        frame_size=config.model.vision.image_size,
        face_size=config.model.face.swin.image_size,
        margin=config.data.face_margin,
        seed=plan.seed,
        processes=2,
        progress=progress,
    )


def _reporter(name: str, steps: int, console: Any) -> Callable[[int, dict[str, float]], None]:
    start = time.monotonic()

    def report(number: int, parts: dict[str, float]) -> None:
        values = "  ".join(f"{key} {value:.4f}" for key, value in parts.items())
        console.print(
            f"{name} {number}/{steps}  {time.monotonic() - start:.0f} s  {values}", highlight=False
        )

    return report


def _predict(learner: nnx.Module, pictures: np.ndarray, batch: int = 200) -> Any:
    """The learner's outputs on all pictures, as NumPy."""
    graphdef, state = nnx.split(learner)
    run = jax.jit(lambda s, x: nnx.merge(graphdef, s)(x))
    chunks = [run(state, pictures[i : i + batch]) for i in range(0, len(pictures), batch)]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *chunks)


def _vision(config: Config, plan: Plan, out: pathlib.Path, console: Any):
    train = _pictures(config, plan, out, console, "train")
    held = _pictures(config, plan, out, console, "validation")
    learner = VisionLearner(
        config, train.action_units.shape[1], int(train.emotion.max()) + 1, rngs=nnx.Rngs(plan.seed)
    )
    fit(
        learner,
        picture_batch(train, "frames", batch=plan.batch, seed=plan.seed),
        augment=augment,
        steps=plan.vision_steps,
        learning_rate=plan.learning_rate,
        seed=plan.seed,
        saved=out / "vision.npz",
        report=_reporter("vision", plan.vision_steps, console),
    )
    y = _predict(learner, held.frames)
    right = y["emotion"].argmax(1) == held.emotion
    recalls = [right[held.emotion == c].mean() for c in np.unique(held.emotion)]
    return learner.tower, {
        "WAR": float(right.mean()),
        "UAR": float(np.mean(recalls)),
        "action_unit_mae": float(np.abs(y["action_units"] - held.action_units).mean()),
        "n": len(held.emotion),
    }


def _face(config: Config, plan: Plan, out: pathlib.Path, console: Any):
    train = _pictures(config, plan, out, console, "train")
    held = _pictures(config, plan, out, console, "validation")
    learner = FaceLearner(config, rngs=nnx.Rngs(plan.seed + 1))
    fit(
        learner,
        picture_batch(train, "faces", batch=plan.batch, seed=plan.seed + 1),
        augment=augment,
        steps=plan.face_steps,
        learning_rate=plan.learning_rate,
        seed=plan.seed + 1,
        saved=out / "face.npz",
        report=_reporter("face", plan.face_steps, console),
    )
    y, _ = _predict(learner, held.faces)
    known = ~np.isnan(held.attributes)
    eyes = held.landmarks[:, 36:42].mean(1) - held.landmarks[:, 42:48].mean(1)
    error = np.linalg.norm(y.landmarks - held.landmarks, axis=-1).mean(1)
    return learner.tower, {
        "landmark_nme": float((error / np.linalg.norm(eyes, axis=-1)).mean()),  # inter-pupil
        "pose_mae_degrees": float(np.degrees(np.abs(y.headpose - held.pose)).mean()),
        "attribute_accuracy": float(((y.attributes > 0) == held.attributes)[known].mean()),
        "age_accuracy": float((y.age.argmax(1) == held.agr[:, 0]).mean()),
        "gender_accuracy": float((y.gender.argmax(1) == held.agr[:, 1]).mean()),
        "race_accuracy": float((y.race.argmax(1) == held.agr[:, 2]).mean()),
        "n": len(held.emotion),
    }


@dataclasses.dataclass(frozen=True)
class _Told:
    """An instruction item and the action units that it is about."""

    turns: Sequence[Turn]  # one
    agr: str
    units: np.ndarray  # float32 [M, K]; M = 1 for an image


def _tell(config: Config, plan: Plan, pictures: Pictures) -> Iterator[_Told]:
    """Instruction items of training identities, without pictures: half images, half clips."""
    rng = np.random.Generator(np.random.PCG64([plan.seed, 3]))
    labelled = np.flatnonzero(pictures.emotion >= 0)
    people = identities_of("train")
    for i in rng.choice(labelled, plan.texts):
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
            describe(units[0] if kind == "image" else units, emotion, kind, rng)
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


def _llama(config: Config, plan: Plan, out: pathlib.Path, console: Any):
    told = list(_tell(config, plan, _pictures(config, plan, out, console, "train")))
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
        rng = np.random.Generator(np.random.PCG64([plan.seed, step]))
        at = rng.choice(cut, plan.text_batch, replace=False)
        return {name: rows[at] for name, rows in everything.items()}

    learner = TextLearner(config, told[0].units.shape[1], rngs=nnx.Rngs(plan.seed + 2))
    fit(
        learner,
        batch_of,
        augment=blur,
        steps=plan.llama_steps,
        learning_rate=2 * plan.learning_rate,
        seed=plan.seed,
        saved=out / "llama.npz",
        report=_reporter("llama", plan.llama_steps, console),
    )
    graphdef, state = nnx.split(learner)
    held = {name: rows[cut:] for name, rows in everything.items()}
    _, parts = jax.jit(lambda s, b: nnx.merge(graphdef, s).loss(b))(state, held)
    metrics = {f"held_out_{name}": float(value) for name, value in parts.items()}
    return learner.tower, metrics | {"n": len(told) - cut}
