"""`emollama pretrain tiny`: makes the small towers that the package carries.

The real EMO-LLaMA starts from pretrained EVA-ViT, FaceXFormer and Vicuna; the tiny one starts from
towers trained here on drawn faces (`actionfaces`, training identities) and, where sets are named,
on real ones:

- the vision tower learns emotion and action-unit intensities from its mean patch,
- FaceXFormer learns landmarks, head pose, age-gender-race and the determined CelebA attributes
  through its own heads, and the emotion through one more,
- the LLaMA learns to answer the instruction items, told the action units instead of pictures.

Transformers this small learn slowly from one label a picture, so both picture networks also learn
*where* each landmark is, from a heat map over their tokens (soft-argmax, Sun et al. 2018), and a
real face's emotion from a convolutional teacher too (`teacher.py`). What the networks do not
have is dropped afterwards. A label that a set lacks is masked.

Each finished tower is a file; a stopped command resumes with the first that is missing.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from emollama_jax.base import tower_file
from emollama_jax.config import Config
from emollama_jax.config_weights import TOWERS
from emollama_jax.data.action_units import ACTION_UNITS
from emollama_jax.data.split import prepared
from emollama_jax.models import parameters
from emollama_jax.tiny.towers.augment import CORE, Strength, augment, light, mix
from emollama_jax.tiny.towers.fit import Course, fit, predict, progress_lines, save_leaves
from emollama_jax.tiny.towers.learners import FaceLearner, VisionLearner
from emollama_jax.tiny.towers.pictures import Pictures
from emollama_jax.tiny.towers.recipe import Recipe
from emollama_jax.tiny.towers.teacher import Teacher, TeacherSize
from emollama_jax.tiny.towers.text import text_tower
from emollama_jax.tiny.towers.views import drawn_pictures, picture_batch, real_sets


def pretrain(
    config: Config,
    recipe: Recipe,
    out: pathlib.Path,
    console: Any,
    towers: Sequence[str] = TOWERS,
) -> dict[str, Any]:
    """Draws the pictures and trains every tower whose file `out` lacks.

    Args:
        config: config whose `model` gives the sizes.
        recipe: amounts of data and training.
        out: folder for `tiny_*.safetensors` with a `.json` of metrics beside each,
            `tiny_bpe.json`, and the drawn pictures.
        console: a rich console for the progress lines.
        towers: which; two processes may share the work on two cores.

    Returns:
        Held-out metrics, seconds and settings of every tower trained.
    """
    out.mkdir(parents=True, exist_ok=True)
    settings = dataclasses.asdict(recipe) | {"start": str(recipe.start or "")}
    record: dict[str, Any] = {"plan": settings}
    stages = {"llama": text_tower, "vision": _vision, "face": _face}
    for tower in towers:
        path = out / tower_file(tower).name
        if path.exists():
            console.print(f"{tower}: {path} already exists")
            continue
        start = time.monotonic()
        module, metrics = stages[tower](config, recipe, out, console)
        parameters.save(module, path)
        record[tower] = metrics | {"seconds": round(time.monotonic() - start)}
        path.with_suffix(".json").write_text(json.dumps(record[tower] | settings, indent=1))
        console.print(f"{tower}: {record[tower]}")
    return record


def _taught(config: Config, recipe: Recipe, out: pathlib.Path, console: Any, real: list[Pictures]):
    """The teacher of the real faces' emotion, trained where neither folder has its file."""
    teacher = Teacher(TeacherSize(), rngs=nnx.Rngs(recipe.seed + 7))
    path = out / "teacher.npz"
    if recipe.start and not path.exists() and (recipe.start / path.name).exists():
        path = recipe.start / path.name
    strength = Strength(small=0.0)

    def view(batch: dict[str, jax.Array], key: jax.Array, frozen: Any) -> dict[str, jax.Array]:
        placed, lit, chosen, blended = jax.random.split(key, 4)
        batch = augment(batch, placed, size=CORE, strength=strength)
        batch = batch | {"picture": light(batch["core"], lit, strength)}
        mixed = jax.random.bernoulli(chosen, recipe.mixed, batch["real"].shape)
        return mix(batch, blended, mixed, ("picture", "votes"))

    if not path.exists():
        only = dataclasses.replace(recipe, real_share=1.0)
        fit(
            teacher,
            picture_batch(None, real, "faces", only, size=recipe.teacher_batch, seed=recipe.seed),
            augment=view,
            course=Course(
                recipe.teacher_steps, recipe.learning_rate, recipe.seed + 7, save_every=2_000
            ),
            saved=out / "teacher.saved.npz",
            report=progress_lines("teacher", recipe.teacher_steps, console),
        )
        save_leaves(path, nnx.state(teacher))
    else:
        state = nnx.state(teacher)
        with np.load(path) as file:
            leaves = [file[f"arr_{i}"] for i in range(len(file.files))]
        nnx.update(teacher, jax.tree.unflatten(jax.tree.structure(state), leaves))
    teacher.eval()
    for held in real_sets(config, recipe, out, console, "validation"):
        logits = predict(teacher, held.faces)
        console.print(f"teacher, held out: {_scores(logits, held)}", highlight=False)
    return teacher


def _learn(
    tower: str,
    learner: VisionLearner | FaceLearner,
    config: Config,
    recipe: Recipe,
    out: pathlib.Path,
    console: Any,
    *,
    which: str,
    size: int,
) -> None:
    """Trains a picture tower with its heads on drawn faces and, where sets are named, real ones.

    Args:
        tower: its name, "vision" or "face".
        learner: to be trained; with `recipe.start`, the tower is filled first, its heads start
            anew.
        config: config of the sizes.
        recipe: amounts of data and training.
        out: the command's folder.
        console: for progress.
        which: the picture, "frames" or "faces".
        size: side of the picture in pixels.
    """
    drawn = drawn_pictures(config, recipe, out, console, "train")
    real = real_sets(config, recipe, out, console, "train")
    teaches = bool(real and recipe.teacher_steps)
    graphdef, frozen = None, None
    if teaches:
        graphdef, frozen = nnx.split(_taught(config, recipe, out, console, real))
    strength = Strength() if which == "frames" else Strength(smallest=0.6, small=0.7)

    def view(batch: dict[str, jax.Array], key: jax.Array, frozen: Any) -> dict[str, jax.Array]:
        placed, chosen, blended = jax.random.split(key, 3)
        batch = augment(batch, placed, size=size, strength=strength)
        if not teaches:
            return batch
        mixed = jax.random.bernoulli(chosen, recipe.mixed, batch["real"].shape)
        mixed = (mixed & batch["real"]).at[0].set(False)  # before the first stands a drawn one
        batch = mix(batch, blended, mixed, ("picture", "core"))
        taught = jax.nn.softmax(nnx.merge(graphdef, frozen)(batch["core"]))
        return batch | {"taught": jax.lax.stop_gradient(taught)}

    if recipe.start:
        parameters.fill(learner.tower, recipe.start / tower_file(tower).name)
    seed = recipe.seed + (which == "faces")
    steps = {"vision": recipe.vision_steps, "face": recipe.face_steps}[tower]
    fit(
        learner,
        picture_batch(drawn, real, which, recipe, size=recipe.batch, seed=seed),
        augment=view,
        course=Course(steps, recipe.learning_rate, seed, save_every=recipe.save_every),
        saved=out / f"{tower}.npz",
        report=progress_lines(tower, steps, console),
        frozen=frozen,
    )


def _scores(logits: np.ndarray, held: Pictures) -> dict[str, float]:
    """WAR and UAR of a held-out set, of the pictures whose class is known."""
    known = held.emotion >= 0
    wanted = held.votes[known].argmax(1)
    right = logits[known].argmax(1) == wanted
    recalls = [right[wanted == c].mean() for c in np.unique(wanted)]
    return {"WAR": float(right.mean()), "UAR": float(np.mean(recalls)), "n": int(known.sum())}


def _vision(config: Config, recipe: Recipe, out: pathlib.Path, console: Any):
    learner = VisionLearner(config, len(ACTION_UNITS), rngs=nnx.Rngs(recipe.seed))
    size = config.model.vision.image_size
    _learn("vision", learner, config, recipe, out, console, which="frames", size=size)
    held = drawn_pictures(config, recipe, out, console, "validation")
    y = predict(learner, held.frames)
    metrics = _scores(y["emotion"], held) | {
        "action_unit_mae": float(np.abs(y["action_units"] - held.action_units).mean()),
    }
    for name, real in _held_out(config, recipe, out, console):
        metrics[name] = _scores(predict(learner, real.frames)["emotion"], real)
    return learner.tower, metrics


def _face(config: Config, recipe: Recipe, out: pathlib.Path, console: Any):
    learner = FaceLearner(config, rngs=nnx.Rngs(recipe.seed + 1))
    size = config.model.face.swin.image_size
    _learn("face", learner, config, recipe, out, console, which="faces", size=size)
    held = drawn_pictures(config, recipe, out, console, "validation")
    metrics = _face_scores(predict(learner, held.faces), held)
    for name, real in _held_out(config, recipe, out, console):
        metrics[name] = _face_scores(predict(learner, real.faces), real)
    return learner.tower, metrics


def _held_out(config: Config, recipe: Recipe, out: pathlib.Path, console: Any):
    """(name, faces) of the real sets that have a validation split."""
    names = [
        name for name in recipe.real if "validation" in prepared(recipe.data, name).get(name, ())
    ]
    return zip(names, real_sets(config, recipe, out, console, "validation"), strict=True)


def _face_scores(predicted: tuple[Any, Any, np.ndarray], held: Pictures) -> dict[str, float]:
    """Held-out metrics of FaceXFormer's heads; of what is nowhere known, none."""
    y, _, emotion = predicted
    eyes = held.landmarks[:, 36:42].mean(1) - held.landmarks[:, 42:48].mean(1)
    error = np.linalg.norm(y.landmarks - held.landmarks, axis=-1).mean(1)
    attributes = np.where(np.isnan(held.attributes), np.nan, (y.attributes > 0) == held.attributes)
    each = {
        "landmark_nme": error / np.linalg.norm(eyes, axis=-1),  # inter-pupil
        "pose_mae_degrees": np.degrees(np.abs(y.headpose - held.pose)),
        "attribute_accuracy": attributes,
    }
    for column, name in enumerate(("age", "gender", "race")):
        label = held.agr[:, column]
        right = getattr(y, name).argmax(1) == label
        each[f"{name}_accuracy"] = np.where(label >= 0, right, np.nan)
    known = {name: values[~np.isnan(values)] for name, values in each.items()}
    found = {name: float(values.mean()) for name, values in known.items() if len(values)}
    return _scores(emotion, held) | found
