"""Expressions: the action units that a drawn face shows, and how far each moves it.

`DISPLACEMENTS` holds, per action unit, the movement of the 68 iBUG points at intensity 1 in face
units (1 = half a face's width; x right, y down, z to the viewer). The eyelids' closing in AU43/45
depends on how far the eye is open and is applied in `geometry.py`.
"""

from types import MappingProxyType

import numpy as np

from emollama_jax.data.action_units import ACTION_UNITS, AU, EMOTIONS, MIXES
from emollama_jax.terms import LANDMARKS
from emollama_jax.tiny.actionfaces.identity import Identity

# Action units of which a partial expression may miss one; what is left is no other emotion's mix.
OPTIONAL = MappingProxyType(
    {
        "surprise": (1, 2, 5),
        "fear": (1, 2, 5, 26),
        "disgust": (15, 16),
        "happiness": (),
        "sadness": (1, 4),
        "anger": (5, 7, 23),
        "neutral": (),
    }
)
NOISE = 0.12

# Class shares in the order of EMOTIONS: RAF-DB's long tail for training, a milder one for the rest.
CLASS_SHARES = MappingProxyType(
    {
        "train": np.array([0.110, 0.045, 0.065, 0.340, 0.155, 0.085, 0.200]),
        "validation": np.array([0.120, 0.080, 0.085, 0.290, 0.150, 0.095, 0.180]),
        "test": np.array([0.120, 0.080, 0.085, 0.290, 0.150, 0.095, 0.180]),
    }
)


def _displacements() -> np.ndarray:
    """Builds float32 [K, 68, 3]; image-left points are given, image-right ones mirrored."""
    mirror = np.array(
        [
            *(*range(16, -1, -1), *range(26, 16, -1)),  # jaw, brows
            *(27, 28, 29, 30, *range(35, 30, -1)),  # nose
            *(45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40),  # eyes
            *(*range(54, 47, -1), *range(59, 54, -1), *range(64, 59, -1), 67, 66, 65),  # lips
        ]
    )
    table = np.zeros((len(ACTION_UNITS), LANDMARKS, 3), np.float32)

    def move(unit: int, points: dict[int, tuple[float, float]]) -> None:
        for point, (x, y) in points.items():
            table[AU[unit], point, :2] = x, y
            if mirror[point] != point:
                table[AU[unit], mirror[point], :2] = -x, y

    move(
        1, {21: (0.015, -0.185), 20: (0.01, -0.15), 19: (0, -0.07), 18: (0, -0.015), 39: (0, -0.01)}
    )
    move(2, {17: (0, -0.13), 18: (0, -0.17), 19: (0, -0.12), 20: (0, -0.04), 37: (0, -0.01)})
    move(
        4,
        {
            21: (0.055, 0.125),
            20: (0.05, 0.115),
            19: (0.035, 0.08),
            18: (0.015, 0.045),
            17: (0, 0.015),
        },
    )
    move(5, {37: (0, -0.085), 38: (0, -0.085), 40: (0, 0.01), 41: (0, 0.01)})
    move(
        6,
        {
            40: (0, -0.055),
            41: (0, -0.06),
            36: (0.01, 0.01),
            37: (0, 0.012),
            2: (-0.02, 0),
            3: (-0.02, -0.01),
        },
    )
    move(7, {37: (0, 0.045), 38: (0, 0.045), 40: (0, -0.05), 41: (0, -0.05)})
    nose = {30: (0, -0.035), 31: (-0.035, -0.075), 32: (-0.02, -0.055), 33: (0, -0.04)}
    lip = {
        50: (0, -0.08),
        51: (0, -0.065),
        49: (0, -0.07),
        61: (0, -0.06),
        62: (0, -0.055),
        60: (0, -0.02),
    }
    lids = {39: (0, 0.01), 40: (0, -0.045), 41: (0, -0.04), 38: (0, 0.025), 37: (0, 0.02)}
    brows = {21: (0.04, 0.085), 20: (0.03, 0.07), 19: (0.01, 0.03)}
    move(9, nose | lip | lids | brows | {48: (0, -0.015)})
    corners = {48: (-0.135, -0.165), 60: (-0.12, -0.155), 49: (-0.07, -0.065), 59: (-0.075, -0.065)}
    middle = {
        50: (-0.02, -0.005),
        58: (-0.02, 0.005),
        61: (-0.04, -0.045),
        67: (-0.04, -0.025),
        62: (0, 0.01),
    }
    move(
        12,
        corners
        | middle
        | {51: (0, 0.012), 57: (0, 0.012), 66: (0, 0.015), 31: (-0.02, -0.01), 4: (-0.03, -0.01)},
    )
    corners = {
        48: (-0.02, 0.155),
        60: (-0.02, 0.14),
        49: (-0.01, 0.06),
        59: (-0.01, 0.085),
        67: (0, 0.035),
    }
    move(
        15,
        corners
        | {61: (0, 0.02), 58: (0, 0.025), 57: (0, -0.012), 66: (0, -0.008), 62: (0, -0.005)},
    )
    lower = {
        57: (0, 0.10),
        58: (-0.01, 0.095),
        59: (-0.015, 0.055),
        66: (0, 0.09),
        67: (0, 0.085),
        60: (0, 0.01),
    }
    move(16, lower | {8: (0, 0.01)})
    corners = {48: (-0.165, 0.03), 60: (-0.155, 0.03), 49: (-0.085, 0.02), 59: (-0.095, 0.0)}
    flat = {
        50: (-0.03, 0.01),
        58: (-0.04, -0.01),
        61: (-0.05, 0),
        67: (-0.055, 0),
        5: (-0.02, 0),
        51: (0, 0.012),
    }
    move(20, corners | flat)
    thin = {
        50: (0.02, 0.05),
        51: (0, 0.045),
        49: (0.05, 0.035),
        58: (0.03, -0.06),
        57: (0, -0.06),
        59: (0.05, -0.035),
    }
    move(23, thin | {48: (0.085, 0), 60: (0.08, 0), 61: (0.03, 0.01), 67: (0.03, -0.005)})
    upper = {50: (0, -0.012), 51: (0, -0.012), 61: (0, -0.02), 62: (0, -0.02)}
    lower = {57: (0, 0.05), 58: (0, 0.045), 59: (0, 0.02), 66: (0, 0.065), 67: (0, 0.055)}
    move(25, upper | lower)
    jaw = {8: (0, 0.21), 7: (0, 0.205), 6: (0.01, 0.17), 5: (0.015, 0.11), 4: (0.015, 0.05)}
    upper = {
        50: (0.01, -0.012),
        51: (0, -0.012),
        61: (0.02, -0.01),
        62: (0, -0.01),
        49: (0.03, 0.015),
    }
    lower = {57: (0, 0.225), 58: (0.01, 0.21), 59: (0.03, 0.13), 66: (0, 0.225), 67: (0.01, 0.20)}
    move(26, jaw | upper | lower | {48: (0.06, 0.055), 60: (0.055, 0.06)})
    table.setflags(write=False)
    return table


DISPLACEMENTS = _displacements()


def person_gains(person: Identity) -> np.ndarray:
    """Returns how strongly this person shows each action unit, float32 [K] around 1."""
    rng = np.random.Generator(np.random.PCG64([0x6A1, person.gain_seed]))
    return np.clip(rng.normal(1.0, 0.09, len(ACTION_UNITS)), 0.8, 1.2).astype(np.float32)


def sample_strength(rng: np.random.Generator) -> float:
    """Draws the overall strength of an expression, 0.35..1 and mostly above 0.5."""
    return 0.35 + 0.65 * float(rng.beta(2.4, 1.2))


def sample_mix(
    emotion: int, person: Identity, strength: float, rng: np.random.Generator
) -> np.ndarray:
    """Draws the action units of one expression at its apex, without unrelated activity.

    Args:
        emotion: Index into EMOTIONS.
        person: Whose gains apply.
        strength: Overall strength, 0..1.
        rng: Source of the variation.

    Returns:
        float32 [K] in 0..1.
    """
    name = EMOTIONS[emotion]
    units = list(MIXES[name])
    if OPTIONAL[name] and rng.random() < 0.25:
        units.remove(OPTIONAL[name][int(rng.integers(len(OPTIONAL[name])))])
    values = np.zeros(len(ACTION_UNITS), np.float32)
    gains = person_gains(person)
    for unit in units:
        values[AU[unit]] = strength * gains[AU[unit]] * rng.uniform(0.82, 1.12)
    if name == "happiness" and rng.random() < 0.65:
        values[AU[25]] = strength * rng.uniform(0.3, 1.0)
    if name in ("surprise", "fear"):
        values[AU[25]] = values[AU[26]] * rng.uniform(0.6, 1.0)
    if name == "fear":
        # Against pulling brows up: the lowerer is the weaker of the two in fear and in sadness.
        values[AU[4]] *= 0.8
    return np.clip(values, 0.0, 1.0)


def sample_noise(rng: np.random.Generator) -> np.ndarray:
    """Draws small activity of any action units, float32 [K] in 0..NOISE."""
    active = rng.random(len(ACTION_UNITS)) < 0.3
    return (active * rng.uniform(0, NOISE, len(ACTION_UNITS))).astype(np.float32)
