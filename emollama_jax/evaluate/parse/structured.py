"""Answers that are data: scores of labels, records with a label, lists of labels.

They come as JSON, as what Python prints ("{'happy': np.float32(0.9)}"), or as pairs in a text
("happiness: 10%, sadness: 85%"; "happiness: no, sadness: yes"). `read_data` and `read_pairs` say
what such an answer holds; which class that is, `answers.py` decides.
"""

import ast
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from emollama_jax import foreign_json

_AFFIRMED = dict.fromkeys(("yes", "true", "present", "y", "✓", "✔", "✅", "x"), 1.0)
_DENIED = dict.fromkeys(("no", "false", "absent", "n", "not present", "✗", "✘", "❌"), 0.0)
_WORDS = _AFFIRMED | _DENIED
# Keys of numbers that are no label's score.
_META = {
    *("confidence", "score", "probability", "prob", "likelihood", "certainty", "valence"),
    *("arousal", "dominance", "intensity", "age", "id", "idx", "index", "face", "frame", "time"),
    *("timestamp", "total", "sum", "rank", "doc", "count", "n"),
}
# Keys of a record's label, the surest line first; the last ones name several.
_LABEL_KEYS = [
    [key.strip() for key in line.split(",")]
    for line in (
        "final answer, final",
        "dominant emotion, primary emotion, main emotion, top emotion, predicted emotion, "
        "predicted label, predicted class, top label, emotion label, dominant, primary",
        "answer, prediction, label, predicted, pred, class, category, classification",
        "emotion, expression, facial expression, result, response, output, text, name, type, "
        "content, sentiment, feeling, value",
        "emotions, labels, predictions, results, scores, probabilities, probs, top emotions, "
        "emotion scores, emotion probabilities, expressions, all",
    )
]
_NAMES = ("labels", "emotions", "classes")  # of a record of two lists
_SHARES = ("scores", "probabilities", "probs", "confidences")
_NAME_KEYS = ("label", "emotion", "name", "type", "class", "category", "expression")
_SCORE_KEYS = ("score", "confidence", "probability", "prob", "value", "percentage", "likelihood")


@dataclasses.dataclass(frozen=True)
class Scores:
    """Pairs of a label and its score, in no order."""

    pairs: tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True)
class Ranked:
    """Labels, the likeliest first."""

    labels: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Texts:
    """Several answers that have to agree; none: data without an answer."""

    texts: tuple[str, ...]


Data = Scores | Ranked | Texts
NOTHING = Texts(())


def read_data(text: str) -> Data | None:
    """What a text holds that is, or encloses, JSON or a Python literal; None for other texts."""
    tree = _literal(text)
    if tree is None:
        fenced = re.findall(r"```[a-z]*\s*(.*?)```", text, re.DOTALL)
        trees = [_literal(piece) for piece in [*fenced, *_bracketed(text)]]
        trees = [found for found in trees if isinstance(found, dict | list | tuple) and found]
        trees = [found for found in trees if holds(found) != NOTHING]
        tree = trees[-1] if trees else None
    return None if tree is None else holds(tree)


def holds(tree: Any, *, samples: bool = False) -> Data:
    """What a tree of JSON or of a Python literal says.

    Args:
        tree: dicts, lists, texts and numbers.
        samples: lists of texts are answers to the same question, not ranked labels.
    """
    if isinstance(tree, str):
        return Texts((tree,))
    if isinstance(tree, Mapping):
        return _record({_key(key): value for key, value in tree.items()})
    if not isinstance(tree, Sequence):
        return NOTHING
    if tree and all(isinstance(entry, str) for entry in tree):
        short = all(len(entry.split()) <= _SHORT for entry in tree)
        ranked = short and len(tree) > 1 and not samples
        return Ranked(tuple(tree)) if ranked else Texts(tuple(tree))
    pairs = _pairs_of(tree)
    if pairs is not None:
        return Scores(pairs)
    if len(tree) == 1:
        return holds(tree[0], samples=True)
    found = [holds(entry, samples=True) for entry in tree]
    texts = [text for entry in found if isinstance(entry, Texts) for text in entry.texts]
    return Texts(tuple(texts)) if all(isinstance(entry, Texts) for entry in found) else NOTHING


_SHORT = 3  # words of a label in a ranked list


def _record(tree: Mapping[str, Any]) -> Data:
    pairs = [
        (name, score)
        for name, value in tree.items()
        if name and (score := _score(value)) is not None
    ]
    scored = [(name, score) for name, score in pairs if name not in _META]
    names = next((tree[key] for key in _NAMES if key in tree), None)
    scores = next((tree[key] for key in _SHARES if key in tree), None)
    if isinstance(names, list) and isinstance(scores, list) and len(names) == len(scores):
        return holds(list(zip(names, scores, strict=True)))
    for keys in _LABEL_KEYS:
        found = [tree[key] for key in keys if key in tree and _score(tree[key]) is None]
        told = [data for value in found if (data := holds(value)) != NOTHING]
        texts = [data for data in told if isinstance(data, Texts | Ranked)]
        if told and not texts:
            return told[0]
        if texts:
            plural = keys is _LABEL_KEYS[-1]
            words = [data.texts if isinstance(data, Texts) else data.labels for data in texts]
            return told[0] if len(told) == 1 and not plural else Texts(tuple(sum(words, ())))
    return Scores(tuple(scored)) if len(scored) > 1 else NOTHING


def _pairs_of(tree: Sequence[Any]) -> tuple[tuple[str, float], ...] | None:
    """(label, score) of a list of pairs or of records that have both; also one such pair."""
    if len(tree) == 2 and isinstance(tree[0], str) and _score(tree[1]) is not None:
        tree = [tree]
    found = []
    for entry in tree:
        if isinstance(entry, Mapping):
            keys = {_key(key): value for key, value in entry.items()}
            name = next((keys[key] for key in _NAME_KEYS if key in keys), None)
            score = next((keys[key] for key in _SCORE_KEYS if key in keys), None)
            if len(keys) == 1 and name is None:  # [{"happy": 0.9}, {"sad": 0.1}]
                ((name, score),) = entry.items()
        elif isinstance(entry, list | tuple) and len(entry) == 2:
            name, score = entry if isinstance(entry[0], str) else entry[::-1]
        else:
            return None
        number = _score(score)
        if not isinstance(name, str) or number is None:
            return None
        found.append((name, number))
    return tuple(found) or None


def _key(name: Any) -> str:
    return re.sub(r"[\s_-]+", " ", str(name)).strip().casefold()


def _score(value: Any) -> float | None:
    """A number, "97 %", yes or no; None for anything else."""
    if isinstance(value, bool | int | float):
        try:
            return float(value)
        except OverflowError:  # a literal of Python's
            return None
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 1:
        return _score(value[0])
    if not isinstance(value, str):
        return None
    word = value.strip().casefold().rstrip(".")
    if word in _WORDS:
        return _WORDS[word]
    number = re.fullmatch(rf"({_NUMBER})\s*(?:%|percent|per cent)?", word)
    return float(number[1]) if number else None


# ---- literals

_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?|nan|[-+]?inf"
_CALLS = (  # what Python prints around plain values
    (r"\b(?:np\.|numpy\.|torch\.)?(?:float|int|uint|str|bool)\d*_?\(([^()]*)\)", r"\1"),
    (r"\b(?:tensor|array|Array|DeviceArray)\(\s*([^()]*?)\s*(?:,\s*\w+=[^()\[\]]*)?\)", r"\1"),
    (r"\b(?:Counter|OrderedDict|dict)\((.*)\)\s*$", r"\1"),
    (r"\bdefaultdict\(<[^<>]*>,\s*(.*)\)\s*$", r"\1"),
)


def _literal(text: str) -> Any:
    """The dict, list or tuple that a text is; None if it is no such thing."""
    text = text.strip().strip("`").strip()
    for pattern, plain in _CALLS:
        text = re.sub(pattern, plain, text, flags=re.DOTALL)
    if text[:1] not in ("{", "[", "("):
        return None
    tree = None
    try:
        tree = foreign_json.parse(text)
    except ValueError:
        numbers = re.sub(r"(?<![\w'\"])([-+]?)(?:nan|inf)\b", r"\g<1>1e999", text)
        names = {"true": "True", "false": "False", "null": "None"}
        plain = re.sub(
            r"(?<=[:\[,\s])(true|false|null)(?=\s*[,}\]])", lambda n: names[n[0]], numbers
        )
        try:
            tree = ast.literal_eval(plain)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None
    return tree if isinstance(tree, dict | list | tuple) else None


def _bracketed(text: str) -> list[str]:
    """The outermost {…} and [{…}] of a text."""
    found, depth, start = [], 0, 0
    for n, letter in enumerate(text):
        if letter in "{[":
            start = n if not depth else start
            depth += 1
        elif letter in "}]" and depth:
            depth -= 1
            if not depth:
                found.append(text[start : n + 1])
    return [piece for piece in found if re.match(r"\{|\[\s*[\[({]", piece)]


# ---- pairs in a text

_VALUE = (
    rf"(?P<number>{_NUMBER})\s*(?P<percent>%|percent\b|per cent\b|/\s*\d+)?"
    rf"|(?P<word>{'|'.join(map(re.escape, sorted(_WORDS, key=len, reverse=True)))})"
)
_PIECE = re.compile(
    rf"\W*(?:\d+[.)]\s+)?(?P<name>[^\W\d][\w' /-]*?)[\"'*_`]*\s*"
    rf"(?:[:=(\[]|[-–—=]>?|→|\bis\b|\bat\b|\s)[\s\"'*_`~(]*(?:{_VALUE})[\s\"'*_`)\]}}.]*",
    re.IGNORECASE,
)
_REVERSED = re.compile(
    r"[^\w.%]*(?P<number>\d+(?:\.\d+)?|\.\d+)\s*(?P<percent>%|percent\b|per cent\b)?\s*"
    r"(?:(?:chance|probability|likelihood|confidence)\s+)?(?:(?:of|for)\s+)?[\"'*_`]*"
    r"(?P<name>[^\W\d][\w' /-]*?)[\s\"'*_`)\]}.]*",
    re.IGNORECASE,
)
_SPLIT = re.compile(
    r"[,;\n|•]|\band\b|(?<=[%✓✔✅✗✘❌])\s+(?=[^\W\d])|(?:(?<=\bno)|(?<=yes)|(?<=\d))\s+(?=[^\W\d]+\s*[:=])"
)


def read_pairs(text: str, is_label: Callable[[str], bool]) -> Scores | None:
    """The scores of a text that is a list of labels with numbers, or with yes or no.

    Args:
        text: text of the answer.
        is_label: whether a word names an emotion.

    Returns:
        The scores; None for any other text.
    """
    if len(text) > _LONGEST:
        return None
    text = re.sub(r"\bp\(([^()]*)\)", r"\1", text, flags=re.IGNORECASE)
    inner = re.sub(r"^[\s`{\[(]+|[\s`}\])]+$", "", re.sub(r"\*\*|`", "", _unruled(text)))
    pieces = [piece for piece in _SPLIT.split(inner) if piece.strip(" \t.:-|*`#")]
    pieces = [piece for piece in pieces if not re.fullmatch(r"[^:]*:\s*", piece)]  # headings
    return _all(pieces, _PIECE, is_label) or _all(pieces, _REVERSED, is_label)


def _unruled(text: str) -> str:
    """A Markdown table of two columns as "name: value" lines."""
    text = re.sub(r"^[^\n]*\n[ \t]*\|?(?: *:?-{2,}:? *\|?)+[ \t]*$", "", text, flags=re.MULTILINE)
    return re.sub(r"^[ \t]*\|([^|\n]+)\|([^|\n]+)\|[ \t]*$", r"\1: \2", text, flags=re.MULTILINE)


def _all(pieces: list[str], pattern: re.Pattern, is_label: Callable) -> Scores | None:
    found = []
    for n, piece in enumerate(pieces):
        # A heading may lead the first: "Scores: happiness 10%".
        match = pattern.fullmatch(piece) or (
            pattern.fullmatch(piece.rpartition(":")[2]) if n == 0 else None
        )
        if match is None:
            return None
        groups = match.groupdict()
        name = re.sub(
            r"^(?:the )?(?:prob\w*|likelihood|chance|score) (?:of|for) ", "", _key(groups["name"])
        )
        share = groups["percent"] or "." in (groups["number"] or "")
        if pattern is _REVERSED and not share:
            return None  # "1 fear, 2 anger" numbers its entries
        if name in _META:
            continue
        word = (groups.get("word") or "").casefold()
        found.append((name, _WORDS[word] if word else float(groups["number"])))
    labels = [name for name, _ in found if is_label(name)]
    return Scores(tuple(found)) if len(labels) > 1 else None


_LONGEST = 5000  # characters of a list of scores
_INLINE = re.compile(
    r"(?<![^\W\d])(?P<name>[^\W\d]+)[\"'*_]*\s*(?::|=|\(|->|→|–|-|\bis\b|\bat\b|\babout\b|\bwith\b|,)?\s*"
    r"(?:(?:a |an )?(?:probability|likelihood|confidence|score)(?: of)?\s*|(?:at|about|around)\s+)?"
    r"[~(]?\s*(?P<number>\d+(?:\.\d+)?)\s*(?:%|percent\b|per cent\b)",
    re.IGNORECASE,
)
_INLINE_REVERSED = re.compile(
    r"(?<!\d)(?P<number>\d+(?:\.\d+)?)\s*(?:%|percent\b|per cent\b)\s*"
    r"(?:(?:chance|probability|likelihood|confidence)\s+)?(?:(?:of|for|in)\s+)?[\"'*_]*"
    r"(?P<name>[^\W\d]+)",
    re.IGNORECASE,
)


def read_shares(text: str, is_label: Callable[[str], bool]) -> Scores | None:
    """The per cents of at least two labels in a sentence; None for any other text."""
    numbers = len(re.findall(r"\d\s*(?:%|percent\b|per cent\b)", text))
    if numbers < 2:
        return None
    for pattern in (_INLINE, _INLINE_REVERSED):
        found = [(n["name"].casefold(), float(n["number"])) for n in pattern.finditer(text)]
        if len(found) == numbers and sum(is_label(name) for name, _ in found) > 1:
            return Scores(tuple(pair for pair in found if pair[0] not in _META))
    return None


def best(scores: Scores) -> str | None:
    """The label of the largest score; None where two share it, or one is no number."""
    values = [value for _, value in scores.pairs]
    if not all(map(math.isfinite, values)) or _is_order(values):
        return None
    top = [name for name, value in scores.pairs if value == max(values)]
    return top[0] if len(top) == 1 and max(values) != 0 else None


def _is_order(values: list[float]) -> bool:
    """Whether numbers are 1, 2, 3, … in any order: places or scores, nobody knows."""
    return len(values) > 1 and sorted(values) == list(range(1, len(values) + 1))
