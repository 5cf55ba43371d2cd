"""What sentences say of emotions: which they assert, and which they only mention.

Every emotion word becomes one sign, `E`, and patterns of plain English are searched around these
signs. A pattern gives what it covers a weight:

  DENIED   "not happy", "rather than fear", "could be mistaken for anger", "is it disgust?",
           "at first glance sad", "the options were …", a list of three or more;
  MINOR    "a hint of fear", "perhaps sad", "raised brows can mean surprise";
  PLAIN    any other mention;
  STRONG   "mostly sad", "the dominant emotion is fear", "so I would say anger", a bold word.

The heaviest mentions are the answer, if they name one class. Where English leaves it open, the
patterns deny: an unparsed answer too many is better than a wrong one.
"""

import dataclasses
import enum
import functools
import re
from collections.abc import Mapping

from emollama_jax.evaluate.parse import phrases
from emollama_jax.evaluate.parse.phrases import SIGN

_BOLD = ("\ue001", "\ue002")
_REFUSED = "\ue003"  # an emotion that a refusal names
_LONGEST = 1000  # characters of a sentence that is read; what a longer one names is denied


class Weight(enum.IntEnum):
    DENIED = 0
    MINOR = 1
    PLAIN = 2
    STRONG = 3


@dataclasses.dataclass(frozen=True)
class Mention:
    """A mention of an emotion."""

    word: str
    label: str | None  # its class; None: of an emotion that the set lacks
    weight: Weight
    listed: bool  # one of three or more in a row


@dataclasses.dataclass(frozen=True)
class Sayings:
    """What a text says."""

    mentions: tuple[Mention, ...]
    contrasts: bool  # something is set against something else: what is slight is no answer then
    refuses: bool  # "I cannot identify emotions"


def read_sentences(text: str, words: Mapping[str, str | None]) -> Sayings:
    """What a text says of emotions.

    Args:
        text: any.
        words: emotion words, casefolded → the class; None for an emotion that the set lacks.

    Returns:
        The mentions in the order of the text.
    """
    found: list[str] = []

    def sign(match: re.Match) -> str:
        found.append(match[0])
        return SIGN

    plain = phrases.COURTESY.sub(" ", _plain(text))
    plain = _emotion(tuple(words)).sub(sign, plain)
    if "neutral" in words:
        plain, found = _add_neutral(plain, found)
    plain, bold = _take_bold(plain)
    plain = phrases.IDIOM.sub("", plain)
    refuses = phrases.REFUSAL.search(plain) is not None
    plain = _simpler(phrases.REFUSED.sub(lambda m: m[0].replace(SIGN, _REFUSED), plain))
    places = [n for n, letter in enumerate(plain) if letter in (SIGN, _REFUSED)]
    labels = [words[word] or word for word in found]
    weight = _weigh(plain)
    listed = _listed(plain, dict(zip(places, labels, strict=True)))
    for place in places:
        if plain[place] == _REFUSED or (place in listed and weight[place] < Weight.STRONG):
            weight[place] = Weight.DENIED
    _tie(plain, weight)
    heard = [n for n in bold if weight[places[n]] > Weight.MINOR]
    if len({labels[n] for n in heard}) == 1:
        weight |= {places[n]: Weight.STRONG for n in heard}
    if refuses:
        framed = {n for match in phrases.FRAMED.finditer(plain) for n in range(*match.span())}
        for place in places:
            if weight[place] <= (Weight.MINOR if place in framed else Weight.PLAIN):
                weight[place] = Weight.DENIED
    mentions = tuple(
        Mention(word, words[word], weight[place], place in listed)
        for word, place in zip(found, places, strict=True)
    )
    return Sayings(mentions, phrases.CONTRAST.search(plain) is not None, refuses)


@functools.cache
def _emotion(words: tuple[str, ...]) -> re.Pattern:
    """Any of the words, the longest first; letters that name options are no emotions."""
    names = sorted((word for word in words if len(word) > 1), key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?<!\w-)(?:{'|'.join(map(re.escape, names))})(?!\w)")


def _plain(text: str) -> str:
    """Lower case, plain punctuation, without markup; bold words stay marked."""
    text = re.sub(r"~~[^~\n]*~~|[\ue000-\ue003]", " ", text.casefold())
    text = re.sub(r"\b(\w+)(?:[\s,.;!]+\1\b){2,}", r"\1", text)  # "happy happy happy …"
    text = re.sub(r"\*\*([^*\n]{1,40})\*\*", rf"{_BOLD[0]}\1{_BOLD[1]}", text)
    for found, plain in (
        (r"</?(?:b|i|u|em|strong|br|p|span|div|code|li|ul|ol|mark|h\d|td|tr)(?: [^<>]*)?/?>", " "),
        ("[’‘ʼ`´]", "'"),
        (r"[—–]|--+| - |->|→|⇒|\|", " ; "),
        (r"[<>]", " "),
        (r"[“”„\"«»*_#]|(?<!\w)'|'(?!\w)", ""),
        (r"\be\.g\.,?", "such as"),
        (r"\bi\.e\.,?", "that is"),
        (r"\betc\.", "etc"),
        (r"\bvs\.", "vs"),
        (r"(\d)\.(\d)", r"\1·\2"),
        (r"[^\S\n]+", " "),
        (r"(?: ?\n)+ ?", "\n"),
    ):
        text = re.sub(found, plain, text)
    return text.strip()


def _add_neutral(plain: str, found: list[str]) -> tuple[str, list[str]]:
    """ "Shows no emotion" is a mention of neutral, if a slight one."""
    pieces, words, start = [], [], 0
    left = list(found)
    for match in phrases.NO_EMOTION.finditer(plain):
        before = plain[start : match.start()]
        words += [left.pop(0) for _ in range(before.count(SIGN))]
        pieces += [before, f" perhaps {SIGN} "]
        words.append("neutral")
        start = match.end()
    return "".join([*pieces, plain[start:]]), [*words, *left]


def _take_bold(plain: str) -> tuple[str, set[int]]:
    """The text without marks, and the numbers of the mentions that were bold."""
    bold, count, inside, kept = set(), 0, False, []
    for letter in plain:
        if letter in _BOLD:
            inside = letter == _BOLD[0]
            continue
        if letter == SIGN:
            if inside:
                bold.add(count)
            count += 1
        kept.append(letter)
    return "".join(kept), bold


def _simpler(plain: str) -> str:
    """Comparisons that promote what follows "than", and the letters of options, made plain."""
    for found, instead in (
        (rf"\b(less\b(?: +[\w']+){{0,3}}? +{SIGN} *,? +)than\b", r"\1but"),
        (r"\bless( \w+) than\b", r"less\1 but"),
        (rf"{SIGN}(?:\W\([a-h]\)|(?<!\w)\(?[a-h][).:]) *(?={SIGN})", f"{SIGN}, "),
        (rf"(?:\W\([a-h]\)|(?<!\w)\(?[a-h][).:]) *(?={SIGN})", " "),
        (r" +", " "),
    ):
        plain = re.sub(found, instead, plain)
    return plain


def _weigh(plain: str) -> dict[int, Weight]:
    """Place → weight of each mention: a denial beats all, then what is strong."""
    weight = {n: Weight.PLAIN for n, letter in enumerate(plain) if letter in (SIGN, _REFUSED)}

    def give(value: Weight, start: int, end: int) -> None:
        weight.update({n: value for n in range(start, end) if n in weight})

    for sentence in re.finditer(r"[^.!?\n]+[.!?]*", plain):
        start, text = sentence.start(), sentence[0].rstrip()
        if SIGN in text and len(text) > _LONGEST:
            give(Weight.DENIED, *sentence.span())
        elif SIGN in text:
            start += len(text) - len(text.lstrip())
            text = text.lstrip()
            for value, patterns in (
                (Weight.MINOR, phrases.minor()),
                (Weight.STRONG, phrases.strong()),
                (Weight.DENIED, phrases.denied()),
            ):
                for pattern in patterns:
                    for match in pattern.finditer(text):
                        give(value, start + match.start(), start + match.end())
    for match in phrases.ALONE.finditer(plain):
        for place in range(*match.span()):
            if weight.get(place, Weight.DENIED) > Weight.DENIED:
                weight[place] = Weight.STRONG
    for match in phrases.AFFIRMED.finditer(plain):
        give(Weight.STRONG, *match.span())
    for match in phrases.WITHDRAWN.finditer(plain):
        give(Weight.DENIED, *match.span())
    return weight


def _tie(plain: str, weight: dict[int, Weight]) -> None:
    """What "or" ties is alike, unless it is denied."""
    for match in phrases.TIED.finditer(plain):
        pair = match.start(1), match.end(1) - 1
        if Weight.DENIED not in (weight[n] for n in pair):
            weight |= dict.fromkeys(pair, max(weight[n] for n in pair))


def _listed(plain: str, labels: Mapping[int, str]) -> set[int]:
    """Places of mentions that are among three or more different ones in a row."""
    listed = set()
    for match in phrases.ROW.finditer(plain):
        inside = [place for place in range(*match.span()) if place in labels]
        if len({labels[place] for place in inside}) > 2:
            listed.update(inside)
    return listed
