"""Who is drawn: the fixed look of one person, a pure function of the person's number.

The five race classes, two gender classes and eight age classes are FaceXFormer's
(`faces/labels.py`, race in the measured order). Every trait is drawn from a distribution that
depends on these classes with wide overlap, so that the classes can be learned but not looked up.
Old faces rest with lower mouth corners, lower brows and heavier lids, young ones with slightly
raised corners: a picture alone leaves weak sadness and a resting old face close together, and
knowing the age separates them.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

HAIR_COLOURS = ("black", "brown", "blond", "red", "gray")
HAIR_STYLES = ("bald", "buzz", "short", "side_part", "fringe", "long", "wavy", "curly", "bun")

FIRST_IDENTITY = {"train": 0, "validation": 100_000, "test": 200_000}
IDENTITIES = {"train": 4_000, "validation": 500, "test": 900}

_STREAM = 0x1DE17
_AGE_WEIGHTS = np.array([0.07, 0.11, 0.18, 0.17, 0.15, 0.13, 0.11, 0.08])
_RACE_WEIGHTS = np.array([0.34, 0.19, 0.21, 0.16, 0.10])
_MELANIN = {0: (0.16, 0.08), 1: (0.80, 0.10), 2: (0.30, 0.08), 3: (0.57, 0.11), 4: (0.42, 0.13)}
_SKIN = np.array(
    [
        [252, 226, 209],
        [240, 200, 172],
        [219, 170, 130],
        [182, 128, 92],
        [134, 90, 63],
        [92, 60, 44],
    ],
    np.float32,
)
_HAIR = {
    "black": (32, 27, 26),
    "brown": (92, 60, 38),
    "blond": (214, 178, 112),
    "red": (160, 78, 40),
    "gray": (186, 184, 182),
}
# Probability of each natural hair colour (HAIR_COLOURS without gray) per race class.
_HAIR_WEIGHTS = {
    0: (0.17, 0.45, 0.29, 0.09),
    1: (0.93, 0.07, 0.00, 0.00),
    2: (0.90, 0.10, 0.00, 0.00),
    3: (0.93, 0.07, 0.00, 0.00),
    4: (0.62, 0.33, 0.04, 0.01),
}


@dataclass(frozen=True)
class Identity:
    """One person. Lengths are in face units (see `geometry.py`), colours are RGB 0..255."""

    number: int
    gender: int
    race: int
    age: int
    years: float

    face_length: float
    face_width: float
    jaw_width: float
    chin_length: float
    cheek_fullness: float
    eye_size: float
    eye_spacing: float
    eye_tilt: float
    eye_height: float
    brow_height: float
    brow_thickness: float
    brow_arch: float
    nose_length: float
    nose_width: float
    mouth_width: float
    lip_fullness: float
    mouth_height: float

    skin: tuple[float, float, float]
    hair: tuple[float, float, float]
    brow: tuple[float, float, float]
    iris: tuple[float, float, float]
    lip: tuple[float, float, float]
    hair_colour: str
    hair_style: str
    hair_volume: float
    hairline: float
    moustache: float
    beard: float
    stubble: float
    makeup: float
    lipstick: bool
    earrings: bool
    glasses: str
    wrinkles: float

    rest_corner: float
    rest_brow: float
    rest_lid: float
    gain_seed: int


def identities_of(split: str) -> range:
    """Returns the person numbers of a split; the splits share none."""
    first = FIRST_IDENTITY[split]
    return range(first, first + IDENTITIES[split])


def _skin(melanin: float, race: int, rng: np.random.Generator) -> np.ndarray:
    colour = np.array(
        [
            np.interp(melanin, np.linspace(0, 1, len(_SKIN)), _SKIN[:, channel])
            for channel in range(3)
        ]
    )
    undertone = rng.normal(0, 3.0, 3)
    if race == 2:
        undertone += (1.0, 1.0, -6.0)
    return np.clip(colour + undertone, 30, 255)


@lru_cache(maxsize=4096)
def make_identity(number: int) -> Identity:
    """Draws the look of person `number`; the same number always gives the same person."""
    rng = np.random.Generator(np.random.PCG64([_STREAM, number]))
    normal = rng.normal
    gender = int(rng.integers(2))
    race = int(rng.choice(5, p=_RACE_WEIGHTS))
    age = int(rng.choice(8, p=_AGE_WEIGHTS))
    years = min(age * 10 + rng.uniform(0, 10), 84.0) if age else rng.uniform(4, 10)
    female, male = gender == 1, gender == 0
    child = float(np.clip((16 - years) / 10, 0, 1))
    old = float(np.clip((years - 40) / 35, 0, 1))
    mean, spread = _MELANIN[race]
    skin = _skin(float(np.clip(normal(mean, spread), 0, 1)), race, rng)

    natural = HAIR_COLOURS[int(rng.choice(4, p=_HAIR_WEIGHTS[race]))]
    if female and years > 16 and rng.random() < 0.06:
        natural = ("blond", "red", "brown")[int(rng.integers(3))]
    grey = float(np.clip((years - 44 + normal(0, 7)) / 18, 0, 1))
    if female and rng.random() < 0.30:
        grey *= 0.2
    base = np.array(_HAIR[natural]) * rng.uniform(0.85, 1.15)
    hair = base * (1 - grey) + np.array(_HAIR["gray"]) * rng.uniform(0.85, 1.1) * grey
    brow = np.minimum(0.72 * (0.55 * hair + 0.45 * base), skin * 0.62)

    if male:
        style_weights = [0.02, 0.17, 0.34, 0.19, 0.11, 0.03, 0.03, 0.11, 0.0]
        style_weights[0] += 0.22 * old + (0.04 if years > 25 else 0.0)
    else:
        style_weights = [0.002, 0.01, 0.09, 0.11, 0.09, 0.29, 0.20, 0.11, 0.10]
    weights = np.array(style_weights)
    if race == 1:
        weights[7] *= 2.2
        weights[1] *= 1.6
    style = HAIR_STYLES[int(rng.choice(len(HAIR_STYLES), p=weights / weights.sum()))]

    adult_man = male and years > 20
    beard = moustache = stubble = 0.0
    if adult_man:
        kind = rng.random()
        if kind < 0.16:
            beard, moustache = rng.uniform(0.75, 1.0), rng.uniform(0.75, 1.0)
        elif kind < 0.26:
            moustache = rng.uniform(0.75, 1.0)
        elif kind < 0.40:
            stubble = rng.uniform(0.35, 0.8)
    adult_woman = female and years > 16
    makeup = rng.uniform(0.45, 1.0) if adult_woman and rng.random() < 0.55 else 0.0
    lipstick = makeup > 0 and bool(rng.random() < 0.75)
    lip = skin * (0.86, 0.66, 0.66) + np.array((22, 4, 6))
    if lipstick:
        lip = np.array(
            ((188, 40, 60), (205, 82, 96), (158, 36, 62))[int(rng.integers(3))]
        ) * rng.uniform(0.85, 1.08)

    iris = np.array((74, 47, 30)) * rng.uniform(0.6, 1.15)
    if (race == 0 and rng.random() < 0.55) or (race == 4 and rng.random() < 0.12):
        iris = np.array(
            ((88, 128, 165), (96, 122, 84), (118, 104, 70))[int(rng.integers(3))]
        ) * rng.uniform(0.85, 1.1)
    glasses_kind = "none"
    if rng.random() < 0.07 + 0.16 * old:
        glasses_kind = "round" if rng.random() < 0.4 else "square"

    asian = race == 2
    turn = float(np.clip((years - 38) / 38, -1, 1))
    heavy = normal(0, 1)
    return Identity(
        number=number,
        gender=gender,
        race=race,
        age=age,
        years=float(years),
        face_length=1.0 + normal(0, 0.045) + (0.02 if male else -0.02) - 0.06 * child,
        face_width=1.0 + normal(0, 0.03) + 0.02 * heavy + 0.02 * child,
        jaw_width=1.0 + normal(0, 0.05) + (0.06 if male else -0.05) + 0.025 * heavy - 0.03 * child,
        chin_length=1.0 + normal(0, 0.09) + (0.08 if male else -0.05) - 0.22 * child,
        cheek_fullness=float(np.clip(0.5 + 0.22 * heavy + 0.25 * child + normal(0, 0.1), 0, 1.3)),
        eye_size=1.06
        + normal(0, 0.055)
        + (0.06 if female else -0.02)
        + 0.13 * child
        - (0.02 if asian else 0),
        eye_spacing=1.0 + normal(0, 0.04) + (0.02 if asian else 0),
        eye_tilt=normal(0, 0.018)
        + (0.030 if asian else 0)
        + (0.008 if female else 0)
        - 0.015 * old,
        eye_height=1.0 + normal(0, 0.09) - (0.16 if asian else 0) + 0.10 * child,
        brow_height=normal(0, 0.022) + (0.022 if female else -0.022) + 0.02 * child,
        brow_thickness=max(
            0.4, 1.0 + normal(0, 0.17) + (0.24 if male else -0.24) - 0.15 * child - 0.1 * old
        ),
        brow_arch=normal(0, 0.012) + (0.020 if female else -0.006),
        nose_length=1.0 + normal(0, 0.05) - 0.10 * child + 0.05 * old,
        nose_width=1.0
        + normal(0, 0.09)
        + (0.22 if race == 1 else 0.04 if asian else 0)
        + (0.04 if male else -0.04),
        mouth_width=1.0 + normal(0, 0.07) - 0.08 * child,
        lip_fullness=max(
            0.5,
            1.0
            + normal(0, 0.14)
            + (0.38 if race == 1 else 0)
            + (0.12 if female else -0.06)
            - 0.24 * old,
        ),
        mouth_height=normal(0, 0.02),
        skin=tuple(skin.tolist()),
        hair=tuple(np.clip(hair, 12, 250).tolist()),
        brow=tuple(np.clip(brow, 10, 235).tolist()),
        iris=tuple(np.clip(iris, 10, 235).tolist()),
        lip=tuple(np.clip(lip, 20, 245).tolist()),
        hair_colour="gray" if grey > 0.5 else natural,
        hair_style=style,
        hair_volume=float(rng.uniform(0.05, 0.16)),
        hairline=float(
            rng.uniform(-0.04, 0.06) + (0.22 * old * rng.random() if male else 0.04 * old)
        ),
        moustache=float(moustache),
        beard=float(beard),
        stubble=float(stubble),
        makeup=float(makeup),
        lipstick=lipstick,
        earrings=bool(female and years > 10 and rng.random() < 0.35),
        glasses=glasses_kind,
        wrinkles=float(np.clip((years - 36 + normal(0, 4)) / 36, 0, 1)),
        rest_corner=0.046 * turn + normal(0, 0.011),
        rest_brow=0.040 * turn + normal(0, 0.012),
        rest_lid=float(np.clip(0.06 + 0.17 * turn + normal(0, 0.04), -0.12, 0.35)),
        gain_seed=int(rng.integers(2**31)),
    )
