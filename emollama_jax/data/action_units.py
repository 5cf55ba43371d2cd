"""Facial action units (FACS), and which of them an emotion mixes. Pure data.

Intensities are 0 … 1 and are deviations from the person's resting face. The mixes follow EMFACS
with two exceptions that the drawn faces need: surprise and fear use 26 (jaw drop) as the published
sets show it, and 25 (lips part) accompanies a mix without defining it.
"""

from types import MappingProxyType

EMOTIONS = ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")
NEUTRAL = EMOTIONS.index("neutral")

ACTION_UNITS = (
    "AU1",  # inner brow raiser
    "AU2",  # outer brow raiser
    "AU4",  # brow lowerer
    "AU5",  # upper lid raiser
    "AU6",  # cheek raiser
    "AU7",  # lid tightener
    "AU9",  # nose wrinkler
    "AU12",  # lip corner puller
    "AU15",  # lip corner depressor
    "AU16",  # lower lip depressor
    "AU20",  # lip stretcher
    "AU23",  # lip tightener
    "AU25",  # lips part
    "AU26",  # jaw drop
    "AU45",  # blink
)
AU = MappingProxyType({int(name[2:]): position for position, name in enumerate(ACTION_UNITS)})

# Number of each action unit in an emotion's full mix.
MIXES = MappingProxyType(
    {
        "surprise": (1, 2, 5, 26),
        "fear": (1, 2, 4, 5, 20, 26),
        "disgust": (9, 15, 16),
        "happiness": (6, 12),
        "sadness": (1, 4, 15),
        "anger": (4, 5, 7, 23),
        "neutral": (),
    }
)
