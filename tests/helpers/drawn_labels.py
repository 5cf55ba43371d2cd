"""What the tests of the drawn faces share: action units, labels without pictures, a classifier."""

import numpy as np

from emollama_jax.data.action_units import ACTION_UNITS, EMOTIONS
from emollama_jax.tiny.actionfaces import courses
from emollama_jax.tiny.actionfaces.expressions import (
    CLASS_SHARES,
    sample_mix,
    sample_noise,
    sample_strength,
)
from emollama_jax.tiny.actionfaces.identity import identities_of, make_identity
from emollama_jax.tiny.actionfaces.sample import SPLITS

STILL = np.zeros(len(ACTION_UNITS), np.float32)


def stream(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def units_of(**values: float) -> np.ndarray:
    units = STILL.copy()
    for name, value in values.items():
        units[ACTION_UNITS.index(name)] = value
    return units


def softmax_regression(x, y, x_test, y_test, steps=300):
    mean, spread = x.mean(0), x.std(0) + 1e-6
    x, x_test = (
        np.concatenate([(a - mean) / spread, np.ones((len(a), 1))], 1) for a in (x, x_test)
    )
    weights, speed = np.zeros((x.shape[1], len(EMOTIONS))), 0.0
    target = np.eye(len(EMOTIONS))[y]
    for _ in range(steps):
        logits = x @ weights
        share = np.exp(logits - logits.max(1, keepdims=True))
        gradient = x.T @ (share / share.sum(1, keepdims=True) - target) / len(x)
        speed = 0.9 * speed - 0.3 * gradient
        weights = weights + speed
    return float(((x_test @ weights).argmax(1) == y_test).mean())


def draw_intensities(count: int, split: str):
    rng = stream(11, SPLITS.index(split))
    people = identities_of(split)
    units, labels = [], []
    for _ in range(count):
        person = make_identity(people[int(rng.integers(len(people)))])
        emotion = int(rng.choice(len(EMOTIONS), p=CLASS_SHARES[split]))
        mix = sample_mix(emotion, person, sample_strength(rng), rng)
        units.append(np.maximum(mix, sample_noise(rng)))
        labels.append(emotion)
    return np.stack(units), np.array(labels)


def draw_courses(count: int, split: str):
    rng = stream(12, SPLITS.index(split))
    people = identities_of(split)
    made, labels = [], []
    for _ in range(count):
        person = make_identity(people[int(rng.integers(len(people)))])
        labels.append(int(rng.choice(len(EMOTIONS), p=CLASS_SHARES[split])))
        made.append(courses.sample_course(labels[-1], person, rng))
    return made, np.array(labels)
