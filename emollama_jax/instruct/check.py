"""Whether a conversation may be learnt from: it names the emotion, shows evidence, invents nothing.

The rules are searches for words, stricter than a reader would be: a conversation too many that is
asked again costs a fraction of a cent, a wrong one is learnt.
"""

import re
from collections.abc import Sequence

from emollama_jax.data.emotions import SYNONYMS
from emollama_jax.data.prompts import PLACE

# Words of the synonym table that also describe a face: "a calm brow", "a blank stare".
_LOOSE = {"calm", "calmly", "calmness", "blank", "blankly"}
# Emotions that no set has as a class.
_OTHERS = (
    "boredom bored confusion confused curiosity curious embarrassment embarrassed envy envious "
    "excitement excited frustration frustrated gratitude guilt guilty hope hopeful jealousy "
    "jealous love loving pain painful pride proud relief relieved shame ashamed"
)
_EMOTIONS = {
    **{word: name for word, name in SYNONYMS.items() if word not in _LOOSE},
    **{name: name for name in SYNONYMS.values()},
    **{word: word for word in _OTHERS.split() if word not in SYNONYMS},
}
_EMOTION = re.compile(rf"\b({'|'.join(sorted(_EMOTIONS, key=len, reverse=True))})\b")

_REGIONS = {
    "brows": r"(?:eye)?brows?|forehead",
    "eyes": r"eyes?|eyelids?|lids?|gaze|stare|squint\w*",
    "nose": r"nose|nostrils?",
    "cheeks": r"cheeks?",
    "mouth": r"mouth|lips?|teeth|smil\w+|grin\w*|frown\w*|jaw|chin|tongue",
}
_REGION = re.compile(rf"\b(?:{'|'.join(_REGIONS.values())}|face|facial|expression|head)\b")
_ENOUGH = 2  # regions that the answers speak of

_CAUSE = re.compile(
    r"\b(?:because|due to|caused by|as a result of|in response to|react(?:s|ed|ing) to|thanks to"
    r"|(?:perhaps|maybe|probably|possibly|likely) (?:he|she|they|the person|someone|something|has"
    r"|had|having|just|after|from)|thinking (?:of|about)|remember(?:s|ing)|after (?:hearing|seeing"
    r"|losing|receiving|having|being|winning|learning|an?|the)|since (?:he|she|they)"
    r"|must have|might have|may have|could have)\b"
)
_ASKS_WHY = re.compile(r"\b(?:why|reasons?|cause[sd]?|happened|made)\b")
_HOW_SEEN = re.compile(r"\b(?:think|say|tell|know|conclude|suggests?|indicates?|clues?)\b")
_DECLINES = re.compile(
    r"\b(?:cannot|can't|can’t|not (?:show|visible|clear|possible|known|tell|say|reveal|given|seen)"
    r"|n['’]t (?:show|say|tell|reveal|know)|unknown|unclear|no (?:reason|cause|way|hint))\b"
)


def faults(turns: Sequence[tuple[str, str]], *, label: str, kind: str) -> list[str]:
    """What is wrong with a conversation, in words that its author can act on.

    Args:
        turns: (question, answer), one or two.
        label: the emotion in the words that all sets share.
        kind: "image" or "clip".

    Returns:
        Sentences without a full stop; none if nothing is wrong.
    """
    found = []
    answers = [answer.casefold() for _, answer in turns]
    questions = [question.casefold() for question, _ in turns]
    if emotions(questions[0]):
        found.append("the first question gives the emotion away")
    named = [emotions(answer) for answer in answers]
    if label not in named[0]:
        found.append(f"the first answer does not name the emotion {label}")
    others = set().union(*named, *map(emotions, questions[1:])) - {label}
    if others:
        found.append(f"another emotion is named: {', '.join(sorted(others))}")
    regions = {
        name
        for name, words in _REGIONS.items()
        if any(re.search(rf"\b(?:{words})\b", answer) for answer in answers)
    }
    if len(regions) < _ENOUGH:
        found.append("the answer must describe at least two of brows, eyes, nose, cheeks, mouth")
    for question, answer in zip(questions, answers, strict=True):
        if cause := invented(answer):
            found.append(f"a reason is invented: '… {cause} …'")
        if (
            _ASKS_WHY.search(question)
            and not _HOW_SEEN.search(question)
            and not _DECLINES.search(answer)
        ):
            found.append(f"asked for a reason, the answer must say that the {_shows(kind)} none")
    if any(PLACE in text for text in (*questions, *answers)):
        found.append(f"the place holder {PLACE} stands in the text")
    return found


def emotions(text: str) -> set[str]:
    """The emotions that a text names, in the words that all sets share."""
    return {_EMOTIONS[word] for word in _EMOTION.findall(text.casefold())}


def invented(answer: str) -> str:
    """The words that begin an invented reason, "" if there are none.

    "because the lip corners are raised" is evidence; "because she got good news" is not.
    """
    for sentence in re.split(r"[.!?;]\s*", answer.casefold()):
        if _DECLINES.search(sentence):
            continue
        for match in _CAUSE.finditer(sentence):
            if not _REGION.search(sentence[match.end() :]):
                return sentence[match.start() : match.end() + 30].strip()
    return ""


def _shows(kind: str) -> str:
    return {"image": "image shows", "clip": "video shows"}[kind]
