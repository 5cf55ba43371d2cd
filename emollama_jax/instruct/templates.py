"""Stand-ins for Gemini's conversations, where there is no key or no network.

An example that brings a conversation (`actionfaces`, whose action units are known) keeps it. For
the others the text says what a face with this emotion typically looks like, not what the picture
shows: good for trying the pipeline, not for a model that anybody should believe. They are marked
"template" in the output.
"""

import hashlib
import json

import numpy as np

from emollama_jax.data.action_units import ACTION_UNITS, AU, EMOTIONS, MIXES
from emollama_jax.data.builders.stored import Example
from emollama_jax.data.describe import conversation
from emollama_jax.data.emotions import LabelSpace

# Emotions that have no mix of action units here borrow one.
_NEAR = {
    "contempt": "disgust",
    "anxiety": "fear",
    "helplessness": "sadness",
    "disappointment": "sadness",
}
_FRAMES = 12  # of the course that stands for a clip


def template(example: Example, space: LabelSpace) -> list[dict[str, str]]:
    """The conversation that stands in for an example; always the same for the same example."""
    own = json.loads(example["items"])[1:]
    if own:
        return own[0]
    emotion = space.canonical[int(example["label"])]
    near = _NEAR.get(emotion, emotion)
    digest = hashlib.sha256(example["id"].encode()).digest()
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "big")))
    units = np.zeros(len(ACTION_UNITS), np.float32)
    for number in MIXES[near]:
        units[AU[number]] = rng.uniform(0.4, 0.9)
    kind = example["kind"]
    if kind == "clip":
        strength = np.sin(np.linspace(0.1, np.pi, _FRAMES)).astype(np.float32)
        units = strength[:, None] * units
    turns = conversation(units, EMOTIONS.index(near), kind, rng)
    return [{**turn, "value": turn["value"].replace(near, emotion)} for turn in turns]
