"""Reading an answer: which class a text names, or which label scored best.

Reading a free-text answer goes in stages, and the first that names a class decides:
  exact    the answer is a class name and nothing else;
  word     class names are searched as whole words;
  synonym  the synonym table is searched ("joyful" → happiness).
If a stage names two classes, the answer is ambiguous; if none names one, it says nothing. Both are
unparsed: they count as wrong, and their rate is reported. A mention under a negation ("not happy",
"no sign of fear or anger") names nothing; its reach ends with the clause.

A ranked list ("sadness, neutral, fear") is no free text: its first label is the answer.
"""

import dataclasses
import math
import re
from typing import Literal

from emollama_jax.data.emotions import SYNONYMS, LabelSpace
from emollama_jax.errors import UserError

How = Literal["exact", "word", "synonym", "score", "ambiguous", "none", "foreign"]


@dataclasses.dataclass(frozen=True)
class Parsed:
    """What an answer names."""

    label: str | None  # a class of the space, or None: unparsed
    how: How


def parse_answer(text: str, space: LabelSpace) -> Parsed:
    """Reads the class that an answer names."""
    bare = re.sub(r"^\W+|\W+$", "", text).casefold()
    names = {name.casefold(): name for name in space.classes}
    if bare in names:
        return Parsed(names[bare], "exact")
    mentions = _mentions(text, names, vocabulary(space))
    for how in ("word", "synonym"):
        found = {mention.label for mention in mentions if mention.how == how}
        if found:
            return Parsed(found.pop(), how) if len(found) == 1 else Parsed(None, "ambiguous")
    return Parsed(None, "none")


def best_label(scores: dict[str, float]) -> Parsed:
    """The class of the highest log-likelihood.

    Raises:
        UserError: a score that is no number; a diverged model would get a class by chance.
    """
    if not all(map(math.isfinite, scores.values())):
        raise UserError(f"label scores {scores}: wanted finite numbers; are the weights whole?")
    return Parsed(max(scores, key=scores.__getitem__), "score")


def parse_ranked(text: str, space: LabelSpace) -> Parsed:
    """Reads an answer that may be a ranked, comma-separated list of labels.

    A list is what has only single words between its commas ("pain, fear, sadness"), or only short
    phrases of which each names a class ("mild fear, slight surprise"). Its first entry is the
    answer, also where that names no class of the set. All else is read as free text.
    """
    pieces = [piece for piece in text.split(",") if piece.strip()]
    if len(pieces) > 1:
        words = [re.findall(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", piece) for piece in pieces]
        first = parse_answer(" ".join(words[0]), space)
        if all(len(found) == 1 for found in words):
            return first
        if all(
            len(found) <= 3
            and found[:1] not in (["and"], ["or"])
            and parse_answer(piece, space).label
            for piece, found in zip(pieces, words, strict=True)
        ):
            return first
    return parse_answer(text, space)


# ---- mentions and negations


@dataclasses.dataclass(frozen=True)
class _Mention:
    label: str
    how: How


_EMPHASIS = (  # "not only sad", "no doubt fear": they deny nothing
    r"not (?:only|just|merely|simply|sure|certain)|nothing but"
    r"|(?:no|without(?: a)?|beyond) (?:doubt|question)"
)
_DENIAL = (
    r"rather than|instead of|lack(?:s|ing)? of|absence of|free of|devoid of|far from|opposed to"
    r"|not|no|never|none|nor|neither|nothing|without|cannot|hardly|barely|unlike|lacks?|lacking"
    r"|\w+n['’]t"
)
_CLAUSE_END = r"but|and|rather|instead|however|although|though|while|whereas|because|since|then"
# What a denial covers: the next emotion, those that "or" ties to it, and a list that ends in "or".
_DENIED = re.compile(r"N[WON]{0,6}E(?:W{0,3}OW{0,3}E)*(?:(?:CE)*C?OE)?")


def _mentions(text: str, names: dict[str, str], synonyms: dict[str, str]) -> list[_Mention]:
    """Every mention of a class that no negation covers.

    The text is spelled with one letter a word (the groups' names: E emotion, N negation, O "or",
    C comma, B end of a clause, W and P any other word), and `_DENIED` is searched in that spelling.
    """
    emotions = "|".join(map(re.escape, sorted({*names, *synonyms}, key=len, reverse=True)))
    pattern = (
        rf"\b(?:(?P<P>{_EMPHASIS})|(?P<E>{emotions})|(?P<N>{_DENIAL})|(?P<O>or)"
        rf"|(?P<B>{_CLAUSE_END}))\b|(?P<C>,)|(?P<D>[.;:!?()\n—–])|(?P<W>\w+)"
    )
    tokens = list(re.finditer(pattern, text.casefold()))
    spelling = "".join(token.lastgroup or "" for token in tokens).replace("P", "W")
    for i, token in enumerate(tokens):  # "no fear and anger": "and" ties two emotions
        if token[0] == "and" and spelling[i - 1 : i + 2] == "EBE":
            spelling = f"{spelling[:i]}O{spelling[i + 1 :]}"
    denied = {i for scope in _DENIED.finditer(spelling) for i in range(*scope.span())}
    return [
        _Mention(names[token[0]], "word")
        if token[0] in names
        else _Mention(synonyms[token[0]], "synonym")
        for i, token in enumerate(tokens)
        if spelling[i] == "E" and i not in denied
    ]


def vocabulary(space: LabelSpace) -> dict[str, str]:
    """Words → the classes of a space, whatever name the space gives them ("happy", "happiness")."""
    classes = dict(zip(space.canonical, space.classes, strict=True))
    table = {word: classes[common] for word, common in SYNONYMS.items() if common in classes}
    return table | classes
