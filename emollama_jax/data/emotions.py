"""The emotion classes of the six facial expression sets. Pure data.

Several numberings of the classes circulate for the same set, so nothing here is keyed on a number
but `written`: how the label stands in the set's own files. Predictions, items and reports use class
names. Counts are those of the official splits, for `emollama data inspect` to compare with.
"""

import dataclasses
from collections.abc import Mapping

from emollama_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class LabelSpace:
    """The classes of one data set."""

    title: str  # as the field writes the set's name
    classes: tuple[str, ...]  # native order; the words of the category question and its answer
    written: tuple[str, ...]  # of each class in the set's files
    splits: Mapping[str, int]  # examples of each official split
    support: Mapping[str, tuple[int, ...]]  # of each class, where published

    def index(self, written: str) -> int:
        """The class of a label as the set's files write it.

        Raises:
            UserError: no class is written so.
        """
        if written not in self.written:
            known = ", ".join(map("=".join, zip(self.written, self.classes, strict=True)))
            raise UserError(f"{self.title}: label {written!r} is not one of {known}")
        return self.written.index(written)

    @property
    def canonical(self) -> tuple[str, ...]:
        """The classes in the words that all sets share: "happy" is happiness."""
        return tuple(SYNONYMS.get(name, name) for name in self.classes)


def _numbers(first: int, count: int) -> tuple[str, ...]:
    return tuple(str(first + i) for i in range(count))


def _folds(*sizes: tuple[int, int]) -> dict[str, int]:
    """Splits "fold1/train", "fold1/test", …"""
    named = {}
    for fold, (train, test) in enumerate(sizes, 1):
        named[f"fold{fold}/train"] = train
        named[f"fold{fold}/test"] = test
    return named


_AFFECTNET = ("neutral", "happy", "sad", "surprise", "fear", "disgust", "anger", "contempt")
_FERV39K = ("Angry", "Disgust", "Fear", "Happy", "Neutral", "Sad", "Surprise")
_MAFW = (
    "anger",
    "disgust",
    "fear",
    "happiness",
    "neutral",
    "sadness",
    "surprise",
    "contempt",
    "anxiety",
    "helplessness",
    "disappointment",
)
_RAF_DB = ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")

LABEL_SPACES: Mapping[str, LabelSpace] = {
    "raf_db": LabelSpace(
        title="RAF-DB",
        classes=_RAF_DB,
        written=_numbers(1, 7),
        splits={"train": 12_271, "test": 3_068},
        support={
            "train": (1290, 281, 717, 4772, 1982, 705, 2524),
            "test": (329, 74, 160, 1185, 478, 162, 680),
        },
    ),
    # The votes' argmax over these eight columns; the columns unknown and NF are left out.
    "ferplus": LabelSpace(
        title="FERPlus",
        classes=(
            "neutral",
            "happiness",
            "surprise",
            "sadness",
            "anger",
            "disgust",
            "fear",
            "contempt",
        ),
        written=_numbers(0, 8),
        splits={"train": 28_558, "validation": 3_579, "test": 3_573},
        support={"test": (1274, 929, 450, 449, 322, 21, 98, 30)},
    ),
    # The training set with contempt is published as "about 287,600" only.
    "affectnet8": LabelSpace(
        title="AffectNet-8",
        classes=_AFFECTNET,
        written=_numbers(0, 8),
        splits={"test": 4_000},
        support={"test": (500,) * 8},
    ),
    "affectnet7": LabelSpace(
        title="AffectNet-7",
        classes=_AFFECTNET[:7],
        written=_numbers(0, 7),
        splits={"train": 283_901, "test": 3_500},
        support={"test": (500,) * 7},
    ),
    "dfew": LabelSpace(
        title="DFEW",
        classes=("happy", "sad", "neutral", "angry", "surprise", "disgust", "fear"),
        written=_numbers(1, 7),
        splits=_folds((9356, 2341), (9356, 2341), (9357, 2340), (9358, 2339), (9361, 2336)),
        support={"fold1/test": (489, 379, 534, 435, 294, 29, 181)},
    ),
    "ferv39k": LabelSpace(
        title="FERV39k",
        classes=tuple(name.lower() for name in _FERV39K),
        written=_FERV39K,
        splits={"train": 31_088, "test": 7_847},
        support={},
    ),
    "mafw": LabelSpace(
        title="MAFW",
        classes=_MAFW,
        written=_MAFW,
        splits=_folds((7333, 1839), (7335, 1837), (7339, 1833), (7340, 1832), (7341, 1831)),
        support={},
    ),
}

# Words that answers use → the word that all sets share. Each text lists the forms of one word; the
# first are those of the shared word itself. Words that fit two classes ("upset", "horrified") and
# words for what a face does ("smiling", "crying") are not here.
_WORDS = {
    "happiness": (
        "happy happily happier happiest",
        "joy joyful joyfully joyous",
        "cheerful cheerfully cheerfulness",
        "delight delighted delightedly",
        "glad gladly gladness",
        "pleased",
        "amused amusement",
        "contented contentment",
        "elated elation",
        "ecstatic ecstasy",
        "jubilant jubilation",
        "overjoyed",
        "gleeful gleefully glee",
    ),
    "sadness": (
        "sad sadly sadder saddest saddened",
        "unhappy unhappily unhappiness",
        "sorrow sorrowful sorrowfully",
        "grief grieving",
        "mournful mournfully mourning",
        "gloomy gloomily",
        "melancholy melancholic",
        "miserable miserably misery",
        "dejected dejection",
        "downcast",
        "despondent",
        "heartbroken",
        "depressed",
    ),
    "anger": (
        "angry angrily angrier angriest angered",
        "mad",
        "furious furiously fury",
        "rage raging enraged",
        "irate",
        "annoyed annoyance",
        "irritated irritation",
        "outraged outrage",
        "infuriated",
        "livid",
        "wrath wrathful",
    ),
    "fear": (
        "fearful fearfully",
        "afraid",
        "scared",
        "frightened fright",
        "terrified terror",
        "petrified",
        "panicked",
    ),
    "disgust": (
        "disgusted disgusting disgustedly",
        "revulsion revolted",
        "repulsed repulsion",
        "grossed",
    ),
    "surprise": (
        "surprised surprising",
        "astonished astonishment",
        "amazed amazement",
        "startled",
        "shock shocked",
        "astounded",
        "stunned",
    ),
    "neutral": (
        "neutrality neutrally",
        "expressionless",
        "emotionless",
        "impassive",
        "unemotional",
        "calm calmly calmness",
        "blank blankly",
        "deadpan",
    ),
    "contempt": (
        "contemptuous contemptuously",
        "scorn scornful scornfully",
        "disdain disdainful disdainfully",
    ),
    "anxiety": (
        "anxious anxiously",
        "nervous nervously nervousness",
        "worried worry",
        "apprehensive apprehension",
        "uneasy",
    ),
    "helplessness": ("helpless helplessly", "powerless", "hopeless hopelessness"),
    "disappointment": ("disappointed disappointing", "letdown"),
}
SYNONYMS: Mapping[str, str] = {
    word: emotion for emotion, forms in _WORDS.items() for word in " ".join(forms).split()
}
_STEMS = {
    word: emotion if number == 0 else forms.split()[0]
    for emotion, words in _WORDS.items()
    for number, forms in enumerate(words)
    for word in forms.split()
}


def stem(word: str) -> str:
    """One word for all forms of it: "happy" → "happiness", "joyous" → "joy"."""
    return _STEMS.get(word, word)
