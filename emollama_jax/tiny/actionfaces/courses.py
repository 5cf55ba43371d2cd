"""How action units run through a clip: onset, apex, offset, and what distracts.

Talking, blinking and social signals lie on top. Half of the expressive clips have their apex
early or late, so that the middle frame is near neutral. In some clips two emotions share the same
apex and differ only in their course: surprise comes within three frames, fades at once and leaves
a small smile, fear rises slowly and stays; likewise disgust (sudden, short) and anger (slow,
held). Neutral clips may hold a short social smile (12 without 6) or brow flash.
"""

from dataclasses import dataclass

import numpy as np

from emollama_jax.data.action_units import ACTION_UNITS, AU, EMOTIONS, NEUTRAL
from emollama_jax.tiny.actionfaces.expressions import person_gains, sample_mix, sample_noise
from emollama_jax.tiny.actionfaces.identity import Identity

FPS = 12.0
SHORTEST, LONGEST = 8, 24
# Emotions told apart only by their course in some clips: (sudden, slow) → the apex that both show.
SHARED_APEX = {
    ("surprise", "fear"): {1: 0.95, 2: 0.85, 4: 0.45, 5: 0.9, 20: 0.35, 25: 0.6, 26: 0.8},
    ("disgust", "anger"): {4: 0.9, 7: 0.75, 9: 0.7, 15: 0.45, 16: 0.3, 23: 0.45},
}
_SHARED_SHARE = 0.25
_OFF_CENTRE_SHARE = 0.55


@dataclass(frozen=True)
class Course:
    """What a clip's face does.

    Attributes:
        units: float32 [F, K] action units per frame.
        timing: "centre", "early", "late", "sudden", "slow" or "none" (neutral).
    """

    units: np.ndarray
    timing: str


def _ramp(frames: int, start: float, rise: float, hold: float, fall: float) -> np.ndarray:
    """Returns a smooth envelope 0..1, float64 [F]; `start` and lengths are in frames."""
    time = np.arange(frames, dtype=np.float64)
    up = np.clip((time - start) / rise, 0, 1)
    down = np.clip((start + rise + hold + fall - time) / fall, 0, 1)
    level = np.minimum(up, down)
    return level * level * (3 - 2 * level)


def _pulse(frames: int, centre: float, width: float) -> np.ndarray:
    """Returns a bump of height 1 that is above a half for `width` frames, float64 [F]."""
    return np.exp(-np.log(2) * (2 * (np.arange(frames) - centre) / width) ** 2)


def _shared_course(
    emotion: str, frames: int, strength: float, gains: np.ndarray, rng: np.random.Generator
):
    """Returns a course of an emotion of SHARED_APEX, or None for other emotions."""
    for (sudden, slow), apex in SHARED_APEX.items():
        if emotion not in (sudden, slow):
            continue
        target = np.zeros(len(ACTION_UNITS))
        for unit, value in apex.items():
            target[AU[unit]] = strength * value * gains[AU[unit]] * rng.uniform(0.9, 1.1)
        middle = frames // 2
        if emotion == slow:
            rise = rng.uniform(0.32, 0.42) * frames
            envelope = _ramp(
                frames, middle - rise - rng.uniform(0, 0.06) * frames, rise, frames, 1.0
            )
            return envelope[:, None] * target, "slow"
        rise = rng.uniform(1.2, 2.2)
        start = middle - rise - rng.uniform(0.2, 1.2)
        hold, fall = rng.uniform(1.6, 3.0), rng.uniform(2.0, 3.0)
        values = _ramp(frames, start, rise, hold, fall)[:, None] * target
        after = _ramp(frames, start + rise + hold + 0.4 * fall, fall, frames, 1.0)
        residue = np.zeros(len(ACTION_UNITS))
        if sudden == "surprise":
            residue[AU[12]] = rng.uniform(0.28, 0.4)
        else:
            residue[AU[15]] = rng.uniform(0.28, 0.4)
        return np.maximum(values, after[:, None] * residue), "sudden"
    return None


def _expressive_course(emotion: int, frames: int, person: Identity, rng: np.random.Generator):
    strength = 0.5 + 0.5 * float(rng.beta(2.2, 1.2))
    if frames >= 12 and rng.random() < _SHARED_SHARE:
        shared = _shared_course(
            EMOTIONS[emotion], frames, max(strength, 0.7), person_gains(person), rng
        )
        if shared is not None:
            return shared
    apex = sample_mix(emotion, person, strength, rng)
    if frames >= 10 and rng.random() < _OFF_CENTRE_SHARE:
        rise, fall = rng.uniform(1.5, 0.14 * frames + 1), rng.uniform(1.5, 0.14 * frames + 1)
        if rng.random() < 0.5:
            end = rng.uniform(0.40, 0.46) * frames
            return _ramp(frames, -rise, rise, end - fall, fall)[:, None] * apex, "early"
        start = rng.uniform(0.54, 0.60) * frames
        return _ramp(frames, start, rise, frames, fall)[:, None] * apex, "late"
    middle = frames // 2
    rise, fall = rng.uniform(2, 0.3 * frames), rng.uniform(2, 0.3 * frames)
    before, after = rng.uniform(0, 0.2 * frames), rng.uniform(0, 0.3 * frames)
    return _ramp(frames, middle - before - rise, rise, before + after, fall)[
        :, None
    ] * apex, "centre"


def sample_course(emotion: int, person: Identity, rng: np.random.Generator) -> Course:
    """Draws length and course of a clip.

    Args:
        emotion: Index into EMOTIONS.
        person: Whose gains apply.
        rng: Source of the variation.
    """
    frames = int(rng.integers(SHORTEST, LONGEST + 1))
    values, timing = np.zeros((frames, len(ACTION_UNITS))), "none"
    if emotion == NEUTRAL:
        kind = rng.random()
        bump = _pulse(frames, rng.uniform(0, frames - 1), rng.uniform(2.5, 4.5))
        if kind < 0.35:
            values[:, AU[12]] = rng.uniform(0.2, 0.4) * bump
        elif kind < 0.6:
            values[:, AU[1]] = values[:, AU[2]] = rng.uniform(0.15, 0.35) * bump
    else:
        values, timing = _expressive_course(emotion, frames, person, rng)
    drift = 0.5 + 0.5 * np.sin(
        np.arange(frames)[:, None] * rng.uniform(0.1, 0.5) + rng.uniform(0, 6, len(ACTION_UNITS))
    )
    values = np.maximum(values, drift * sample_noise(rng))
    if rng.random() < 0.35:
        talk = _talking(frames, rng)
        for unit, share in ((25, rng.uniform(0.3, 0.6)), (26, rng.uniform(0.1, 0.28))):
            values[:, AU[unit]] = np.maximum(values[:, AU[unit]], share * talk)
    values[:, AU[45]] = np.maximum(values[:, AU[45]], _blinking(frames, rng))
    return Course(np.clip(values, 0, 1).astype(np.float32), timing)


def _talking(frames: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the mouth's opening in speech, float64 [F] in 0..1; syllables take 2-4 frames."""
    phase = np.cumsum(2 * np.pi / rng.uniform(2.2, 4.5, frames))
    return (0.5 + 0.5 * np.sin(phase + rng.uniform(0, 6))) * rng.uniform(0.6, 1.0, frames)


def _blinking(frames: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the lids' closing, float64 [F]; a blink in about two seconds."""
    closed = np.zeros(frames)
    for _ in range(int(rng.poisson(frames / (2.0 * FPS)))):
        closed = np.maximum(
            closed, rng.uniform(0.85, 1.0) * _pulse(frames, rng.uniform(0, frames - 1), 1.6)
        )
    return closed
