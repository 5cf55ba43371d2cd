"""Puts action units into words: templated conversations in the manner of FERID's.

An answer describes brows, eyes and mouth as the action units say, then names the emotion; for
clips it mentions the course. A second turn may ask why, and the answer declines to invent
reasons. The vocabulary is small (under 150 words) with a few phrasings of everything, so that a
tiny language model can learn it.
"""

import numpy as np

from emollama_jax.data.action_units import AU, EMOTIONS, MIXES, NEUTRAL
from emollama_jax.data.items import MEDIUM
from emollama_jax.terms import Kind

Conversation = list[dict[str, str]]

# From here on an action unit is mentioned; unrelated activity stays below.
SEEN = 0.18
_STRONG = 0.62

_QUESTIONS = (
    "What emotion does the person in the {medium} show?",
    "How does the person in the {medium} feel, and how can you tell?",
    "Describe the face in the {medium} and name the emotion.",
    "What do the eyebrows, eyes and mouth say about the emotion?",
)
_REASON_QUESTIONS = (
    "Why does the person feel this way?",
    "What is the reason for this expression?",
    "What has happened to the person?",
)
_REASON_ANSWERS = (
    "The {medium} does not show the reason, so I can only describe the face.",
    "I cannot tell from the {medium}; only the face can be seen.",
    "The reason is not visible in the {medium}.",
)
_CONCLUSIONS = (
    "This looks like {emotion}.",
    "The expression is {emotion}.",
    "The face shows {emotion}.",
    "Together these signs suggest {emotion}.",
)

_NEUTRAL_CONCLUSIONS = (
    "This looks neutral.",
    "The expression is neutral.",
    "The face is neutral.",
    "Together these signs suggest a neutral face.",
)


def _pick(rng: np.random.Generator, phrases: tuple[str, ...]) -> str:
    return phrases[int(rng.integers(len(phrases)))]


def _degree(value: float) -> str:
    return "strongly" if value > _STRONG else "clearly" if value > 0.4 else "slightly"


def _brows(level: dict[int, float], rng: np.random.Generator) -> str:
    subject = _pick(rng, ("the eyebrows are", "the brows are"))
    inner, outer, low = level[1] > SEEN, level[2] > SEEN, level[4] > SEEN
    if (inner or outer) and low:
        part = "" if outer else _pick(rng, ("the inner corners of ", "the inner ends of "))
        return f"{part}{subject} {_degree(max(level[1], level[2]))} raised and drawn together"
    if inner or outer:
        part = "" if inner and outer else "the inner ends of " if inner else "the outer ends of "
        return f"{part}{subject} {_degree(max(level[1], level[2]))} raised"
    if low:
        return f"{subject} {_degree(level[4])} lowered and drawn together"
    if level[9] > SEEN:
        return f"{subject} pulled down a little"
    return f"{subject} {_pick(rng, ('relaxed', 'at rest', 'calm'))}"


def _eyes(level: dict[int, float], rng: np.random.Generator) -> str:
    if level[5] > SEEN and level[7] > SEEN:
        return _pick(
            rng, ("the eyes glare with tense lids", "the eyes stare and the lids are tense")
        )
    if level[5] > SEEN:
        wide = _pick(rng, ("wide open", "opened wide")) if level[5] > 0.4 else "a little wide"
        return f"the eyes are {wide}"
    if level[6] > SEEN:
        return _pick(
            rng, ("raised cheeks narrow the eyes", "the cheeks are raised and wrinkle the eyes")
        )
    if level[7] > SEEN:
        return _pick(rng, ("the lids are tense", "the eyes are narrow and tense"))
    if level[9] > SEEN:
        return f"the nose is {_degree(level[9])} wrinkled"
    return _pick(rng, ("the eyes are calm", "the eyes look relaxed"))


def _mouth(level: dict[int, float], rng: np.random.Generator) -> str:
    if level[12] > SEEN:
        opened = " and the lips are parted" if level[25] > 0.25 else ""
        pulled = _pick(
            rng,
            (
                "the lip corners are {} pulled up",
                "the corners of the mouth are {} raised in a smile",
            ),
        )
        return pulled.format(_degree(level[12])) + opened
    if level[20] > SEEN:
        jaw = " and the jaw drops" if level[26] > SEEN else ""
        return f"the lips are {_degree(level[20])} stretched to the sides{jaw}"
    if level[15] > SEEN or level[16] > SEEN:
        down = f"the lip corners are {_degree(level[15])} pulled down" if level[15] > SEEN else ""
        lip = "the lower lip is pulled down" if level[16] > SEEN else ""
        return " and ".join(part for part in (down, lip) if part)
    if level[23] > SEEN:
        return _pick(rng, ("the lips are pressed tight", "the lips are thin and tight"))
    if level[26] > SEEN:
        wide = "wide open" if level[26] > _STRONG else "open"
        return _pick(
            rng, ("the jaw drops and the mouth is {}", "the mouth is {} with a dropped jaw")
        ).format(wide)
    return _pick(rng, ("the mouth is relaxed", "the mouth is at rest"))


def _features(units: np.ndarray, rng: np.random.Generator) -> str:
    """Returns one sentence about the face, for float32 [K] action units."""
    level = {number: float(units[position]) for number, position in AU.items()}
    sentence = f"{_brows(level, rng)}, {_eyes(level, rng)}, and {_mouth(level, rng)}."
    return sentence[0].upper() + sentence[1:]


def _course(strength: np.ndarray, rng: np.random.Generator) -> str:
    """Returns one sentence about the course of an expression, for its strength float [F]."""
    half = np.flatnonzero(strength > 0.5 * strength.max())
    first, last, count = int(half[0]), int(half[-1]), len(strength)
    if last < 0.5 * count:
        return _pick(rng, ("It appears early and fades.", "It comes at the start and then fades."))
    if first > 0.5 * count:
        return _pick(rng, ("It appears late.", "It comes only at the end."))
    if last - first <= 5 and last < count - 3:
        return _pick(rng, ("It comes suddenly and is short.", "It comes and goes quickly."))
    if first > 0.15 * count and last >= count - 2:
        return _pick(rng, ("It rises slowly and stays.", "It grows slowly and is held."))
    return _pick(rng, ("It grows and then fades.", "It rises and falls."))


def describe(units: np.ndarray, emotion: int, kind: Kind, rng: np.random.Generator) -> str:
    """Describes a face or a clip and names its emotion.

    Args:
        units: float32 [K] for an image, [F, K] for a clip.
        emotion: Index into EMOTIONS.
        kind: "image" or "clip".
        rng: Chooses among phrasings.

    Returns:
        Two short sentences, three for an expressive clip.
    """
    parts = []
    if kind == "image":
        parts.append(_features(units, rng))
    elif emotion == NEUTRAL:
        # A passing signal is no expression: the median frame is what lasts.
        parts.append(_features(np.median(units, axis=0), rng))
        if units[:, AU[12]].max() > SEEN:
            parts.append("A short smile passes.")
    else:
        strength = units[:, [AU[number] for number in MIXES[EMOTIONS[emotion]]]].mean(1)
        parts += [_features(units[int(strength.argmax())], rng), _course(strength, rng)]
    conclusions = _NEUTRAL_CONCLUSIONS if emotion == NEUTRAL else _CONCLUSIONS
    parts.append(_pick(rng, conclusions).format(emotion=EMOTIONS[emotion]))
    return " ".join(parts)


def conversation(
    action_units: np.ndarray, emotion: int, kind: Kind, rng: np.random.Generator
) -> Conversation:
    """Makes a conversation of one or two turns about a picture or a clip.

    Args:
        action_units: float32 [K] for an image, [F, K] for a clip.
        emotion: Index into EMOTIONS.
        kind: "image" or "clip".
        rng: Chooses among phrasings.

    Returns:
        LLaVA's list of {"from", "value"}; the first value starts with `<image>` and a line break.
    """
    medium = MEDIUM[kind]
    turns = [
        {"from": "human", "value": "<image>\n" + _pick(rng, _QUESTIONS).format(medium=medium)},
        {"from": "gpt", "value": describe(action_units, emotion, kind, rng)},
    ]
    if rng.random() < 0.3:
        question, answer = _pick(rng, _REASON_QUESTIONS), _pick(rng, _REASON_ANSWERS)
        turns.append({"from": "human", "value": question})
        turns.append({"from": "gpt", "value": answer.format(medium=medium)})
    return turns
