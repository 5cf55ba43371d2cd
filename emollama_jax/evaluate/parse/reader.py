"""Reads an answer without its reasoning, in the words of one set; see `parse`."""

import dataclasses
import math
import re
from typing import Any, Literal

from emollama_jax.data.emotions import SYNONYMS, LabelSpace
from emollama_jax.evaluate.parse import structured
from emollama_jax.evaluate.parse.reasoning import final_answer
from emollama_jax.evaluate.parse.sentences import Sayings, Weight, read_sentences
from emollama_jax.evaluate.parse.vocabulary import vocabulary

Reading = Literal[
    "exact", "word", "synonym", "score", "ambiguous", "none", "foreign", "refusal", "unfinished"
]


@dataclasses.dataclass(frozen=True)
class Parsed:
    """What an answer names."""

    label: str | None  # a class of the space, or None: unparsed
    how: Reading


_SHORT = 200  # characters of an answer that may be a name and nothing else
_DEGREES = re.compile(  # words that may stand before an emotion in a ranked list
    r"(?:(?:an?|the|of|mild(?:ly)?|slight(?:ly)?|strong(?:ly)?|moderate|some|very|high|low|intense"
    r"|faint|subtle|extreme(?:ly)?|little|bit|likely|most(?:ly)?|probably|primary) )*"
)
_NO_LIST = re.compile(
    r"\b(?:no|not|wait|actually|sorry|rather|never|none|neither|nor|but|yes)\b", re.IGNORECASE
)

# "Answer: …" on a line of its own or in a sentence; the surer keys first.
_KEYS = (
    r"final|final (?:answer|label|emotion|prediction|classification|choice|verdict|decision)",
    r"(?:correct |best )?(?:answer|conclusion|verdict|prediction|label|classification)"
    r"|predicted (?:emotion|label|class|expression)",
    r"(?:(?:primary|dominant|main|overall|detected|most likely|basic|facial) )?"
    r"(?:emotion|class|category)(?: label| category| class)?",
    r"(?:facial )?expression|mood|feeling|sentiment|response|output|result",
)
_MARKS = [
    re.compile(
        rf"(?:^|(?<=[\n.;!?*#(\[{{\"'>|,-]))[\s*#_\"'>|-]{{0,9}}(?:(?:the|my|so|thus|therefore|person's)"
        rf",? )*(?:{keys})[\s\"'*_]*(?:is\s*)?(?::|=(?!=))[\s*_:]*",
        re.IGNORECASE,
    )
    for keys in _KEYS
]
_OTHER = re.compile(r"\W*(?!(?:yes|sure|well|okay)\b)[^\W\d_]{3,}\W*", re.IGNORECASE)
_OPTION = re.compile(r"\W*(?:option\s+)?[a-z0-9]\W*", re.IGNORECASE)


_ARROW = re.compile(r"-+>|=+>|[→⟶➜➝]")


def _bare(text: str) -> str:
    return re.sub(r"^\W+|\W+$", "", text).casefold()


class AnswerReader:
    """Reads answers in the words of one space."""

    def __init__(self, space: LabelSpace):
        self.names = {name.casefold(): name for name in space.classes}
        self.words = vocabulary(space)
        known = {**SYNONYMS, **dict.fromkeys(SYNONYMS.values(), "")}
        self.known: dict[str, str | None] = {**dict.fromkeys(known), **self.words}

    def parse(self, answer: Any, form: str) -> Parsed:
        """See `parse` of the package."""
        if not isinstance(answer, str):
            return self.decide(structured.holds(answer, samples=form == "samples"))
        final = final_answer(answer)
        if final is None:
            return Parsed(None, "unfinished")
        ranked = None
        if form != "text":
            ranked = self.read_data(final) or self.read_ranked(final)
        return ranked or self.read(final)

    def read(self, text: str) -> Parsed:
        """A text without reasoning."""
        if len(text) < _SHORT and (bare := _bare(text)) in self.names:
            return Parsed(self.names[bare], "exact")
        if self._turns(text):
            return Parsed(None, "ambiguous")
        return self.read_data(text) or self._marked(text) or self._said(text)

    def _turns(self, text: str) -> bool:
        """Whether an arrow leads from one class to another ("happy -> sad")."""
        for arrow in _ARROW.finditer(text):
            before = re.search(r"([^\W\d_]+)\W{0,4}\Z", text[: arrow.start()])
            after = re.match(r"\W{0,4}([^\W\d_]+)", text[arrow.end() :])
            if before and after:
                first, then = (self.known.get(found[1].casefold()) for found in (before, after))
                if first and then and first != then:
                    return True
        return False

    def read_data(self, text: str) -> Parsed | None:
        """A text that is data or a list of scores; None for other texts."""
        data = structured.read_data(text) or structured.read_pairs(text, self._is_label)
        return None if data is None else self.decide(data)

    def read_ranked(self, text: str) -> Parsed | None:
        """A ranked list of labels; None for other texts."""
        pieces = [piece for piece in text.split(",") if piece.strip()]
        graded = any(re.match(r"[\W\d_]*[^\W\d_]\D*\d", piece) for piece in pieces)
        if len(pieces) < 2 or graded or _NO_LIST.search(text):
            return None
        if structured.read_shares(text, self._is_label) is not None:
            return None
        words = [re.findall(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", piece) for piece in pieces]
        degrees = all(
            found
            and found[-1].casefold() in self.known
            and _DEGREES.fullmatch("".join(f"{word} " for word in found[:-1]).casefold())
            for found in words
        )
        single = all(len(found) == 1 for found in words)
        return self.read(" ".join(words[0])) if single or degrees else None

    def decide(self, data: structured.Data) -> Parsed:
        """The class of data."""
        if isinstance(data, structured.Ranked):
            return self.read(data.labels[0])
        if isinstance(data, structured.Texts):
            return self._agreed([self.parse(text, "text") for text in data.texts])
        if len(data.pairs) == 1:
            return self.read(data.pairs[0][0])
        if not all(math.isfinite(value) for _, value in data.pairs):
            return Parsed(None, "none")
        name = structured.best(data)
        if name is None:
            return Parsed(None, "ambiguous")
        label = self._label(name)
        return Parsed(label, "score" if label else "foreign")

    def _agreed(self, found: list[Parsed]) -> Parsed:
        labels = {parsed.label for parsed in found}
        if len(labels) == 1:
            return found[0]
        return Parsed(None, "ambiguous" if labels else "none")

    def _label(self, name: str) -> str | None:
        """The class of a key such as "happy", "prob_happy" or "Happiness score"."""
        words = [
            word
            for word in re.split(r"[\s_-]+", name.casefold())
            if word not in ("score", "prob", "probability", "emotion", "face", "confidence")
        ]
        return self.words.get(" ".join(words).strip(" \"'"))

    def _is_label(self, name: str) -> bool:
        return name.strip().casefold() in self.known

    def _marked(self, text: str) -> Parsed | None:
        """What follows "Answer:" or "Emotion:"; None where nothing is marked."""
        for number, mark in enumerate(_MARKS):
            ends = [match.end() for match in mark.finditer(text)]
            if number == 0:
                ends = ends[-1:]
            found = [self._after(text[end:]) for end in ends]
            told = [parsed for parsed in found if parsed is not None]
            sure = number < 2 and told
            if sure or any(parsed.label or parsed.how != "none" for parsed in told):
                named = [parsed for parsed in told if parsed.how != "none"]
                return self._agreed(named or told)
        return None

    def _after(self, rest: str) -> Parsed | None:
        """The answer after a mark: the rest of its line, or what comes next."""
        quoted = re.match(r"\s*([\"'])(.*?)\1", rest)
        line, _, more = rest.lstrip().partition("\n")
        if quoted:
            return self.read(quoted[2])
        if not line.strip():
            return None
        first = re.split(r"[.;\n(–—]|\s-\s|,\s*(?=[\"']?\w+[\"']?\s*:)", line, maxsplit=1)[0]
        bare = _bare(first[:_SHORT])
        shares = structured.read_shares(rest, self._is_label)
        if bare in self.known and shares is None and len(self._strong(rest)) < 2:
            label = self.known[bare]
            exact = "exact" if bare in self.names else "synonym"
            return Parsed(label, exact if label else "foreign")
        if _OPTION.fullmatch(line) or (len(first) < len(line) and _OTHER.fullmatch(first)):
            return Parsed(None, "none")
        parsed = self.read_data(line) or self._said(line)
        if parsed.how == "none" and len(line.split()) > 2 and more.strip():
            return self._said(rest)
        return parsed

    def _strong(self, text: str) -> set[str | None]:
        said = read_sentences(text, self.known)
        return {m.label for m in said.mentions if m.weight == Weight.STRONG}

    def _said(self, text: str) -> Parsed:
        """What sentences assert."""
        said = read_sentences(text, self.known)
        shares = structured.read_shares(text, self._is_label)
        if shares is not None and (name := structured.best(shares)) is not None:
            label = self._label(name)
            if label is None:
                return Parsed(None, "foreign")
            other = any(m.weight == Weight.STRONG and m.label != label for m in said.mentions)
            return Parsed(None, "ambiguous") if other else Parsed(label, "score")
        return self._heaviest(said)

    def _heaviest(self, said: Sayings) -> Parsed:
        for weight in (Weight.STRONG, Weight.PLAIN, Weight.MINOR):
            found = [m for m in said.mentions if m.weight == weight]
            if weight == Weight.MINOR and said.contrasts:
                break
            named = [m for m in found if m.label is not None]
            labels = {m.label for m in named}
            if len(labels) > 1:
                return Parsed(None, "ambiguous")
            if labels:
                how = "word" if any(m.word in self.names for m in named) else "synonym"
                return Parsed(labels.pop(), how)
            if found:  # another emotion, and nothing as strong that the set has
                return Parsed(None, "none")
        if said.refuses:
            return Parsed(None, "refusal")
        listed = any(m.listed for m in said.mentions)
        return Parsed(None, "ambiguous" if listed else "none")
