"""A small training loop for small towers: one program, one file to resume from."""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from emollama_jax.ahead import ahead
from emollama_jax.disk import whole_file

Augment = Callable[[dict[str, jax.Array], jax.Array, Any], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Course:
    """How long and how fast a learner trains."""

    steps: int
    learning_rate: float  # at the peak
    seed: int  # of the augmentation
    save_every: int = 250  # steps


def fit(
    learner: nnx.Module,
    batch_of: Callable[[int], dict[str, np.ndarray]],
    *,
    augment: Augment,
    course: Course,
    saved: pathlib.Path,
    report: Callable[[int, dict[str, float]], None],
    frozen: Any = None,
) -> None:
    """Trains a learner in place: AdamW, 5 % warm-up, cosine; resumes from `saved`.

    Args:
        learner: has `loss(batch) -> (loss, parts)`; what is not `nnx.Param` in it, such as running
            means, follows along.
        batch_of: the batch of a step; the same for the same step.
        augment: (batch, key, frozen) → batch, inside the compiled step.
        course: length and learning rate.
        saved: an `.npz` file, written now and then and resumed from where it exists.
        report: called every 50 steps with the step and the loss's parts.
        frozen: arrays that `augment` is given.
    """
    graphdef, state, others = nnx.split(learner, nnx.Param, ...)
    tx = _optimizer(course, state)
    step = _jitted_step(graphdef, tx, augment)
    all_state, first = (state, others, tx.init(state)), 1
    if saved.exists():
        with np.load(saved) as file:
            leaves = [file[f"arr_{i}"] for i in range(len(file.files) - 1)]
            first = int(file["step"]) + 1
        all_state = jax.tree.unflatten(jax.tree.structure(all_state), leaves)
    all_state = jax.tree.map(jnp.array, all_state)  # a copy: the step donates it
    key = jax.random.key(course.seed)
    numbers = range(first, course.steps + 1)
    batches = ahead(batch_of, numbers, threads=2, waiting=4)
    for number, batch in zip(numbers, batches, strict=True):
        all_state, parts = step(all_state, batch, jax.random.fold_in(key, number), frozen)
        if number % 50 == 0 or number == course.steps:
            report(number, {name: float(value) for name, value in parts.items()})
        if number % course.save_every == 0:
            save_leaves(saved, all_state, step=number)
    nnx.update(learner, *all_state[:2])


def _optimizer(course: Course, state: nnx.State) -> optax.GradientTransformation:
    steps = course.steps
    schedule = optax.warmup_cosine_decay_schedule(0, course.learning_rate, steps // 20 + 1, steps)
    mask = jax.tree_util.tree_map_with_path(_decays, state)
    adam = optax.adamw(schedule, b2=0.98, weight_decay=0.02, mask=mask)
    return optax.chain(optax.clip_by_global_norm(1.0), adam)


def _jitted_step(
    graphdef: nnx.GraphDef, tx: optax.GradientTransformation, augment: Augment
) -> Callable:
    """(all_state, batch, key, frozen) → (all_state, parts of the loss)."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(all_state, batch, key, frozen):
        state, others, opt_state = all_state
        batch = augment(batch, key, frozen)

        def loss(state):
            module = nnx.merge(graphdef, state, others, copy=True)  # running means are written
            value, parts = module.loss(batch)
            return value, (parts, nnx.state(module, nnx.Not(nnx.Param)))

        (_, (parts, others)), grads = jax.value_and_grad(loss, has_aux=True)(state)
        updates, opt_state = tx.update(grads, opt_state, state)
        return (optax.apply_updates(state, updates), others, opt_state), parts

    return step


def _decays(path: Sequence[Any], leaf: Any) -> bool:
    """Kernels alone: not norms, biases, embeddings or FaceXFormer's constant frequencies."""
    names = [part.key for part in path if hasattr(part, "key")]
    return names[-1] in ("kernel", "qkv")  # the latter is EVA-ViT's fused kernel


def save_leaves(path: pathlib.Path, tree: Any, **more: Any) -> None:
    """Writes a tree's arrays in their order, and more by name; the file appears whole or not."""
    with whole_file(path) as half, half.open("wb") as file:
        np.savez(file, *map(np.asarray, jax.tree.leaves(tree)), **more)


def progress_lines(name: str, steps: int, console: Any) -> Callable[[int, dict[str, float]], None]:
    """What `fit` reports to: a line for every report."""
    start = time.monotonic()

    def report(number: int, parts: dict[str, float]) -> None:
        values = "  ".join(f"{key} {value:.4f}" for key, value in parts.items())
        console.print(
            f"{name} {number}/{steps}  {time.monotonic() - start:.0f} s  {values}", highlight=False
        )

    return report


def predict(learner: nnx.Module, pictures: np.ndarray, batch: int = 200) -> Any:
    """The learner's outputs on all pictures, as NumPy."""
    graphdef, state = nnx.split(learner)
    run = jax.jit(lambda s, x: nnx.merge(graphdef, s)(x))
    chunks = [run(state, pictures[i : i + batch]) for i in range(0, len(pictures), batch)]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *chunks)
