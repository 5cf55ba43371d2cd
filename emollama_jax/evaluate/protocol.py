"""The evaluation protocol: from an answer to a class, a record per item, and the numbers.

Reading a free-text answer goes in stages, and the first that names a class decides:
  exact    the answer is a class name and nothing else;
  word     class names are searched as whole words;
  synonym  the synonym table is searched ("joyful" → happiness).
If a stage names two classes, the answer is ambiguous; if none names one, it says nothing. Both are
unparsed: they count as wrong, and their rate is reported. A mention under a negation ("not happy",
"no sign of fear or anger") names nothing; its reach ends with the clause.

Classes go by name everywhere, never by number: several number orders circulate for the same set.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import numpy as np

from emollama_jax.data.emotions import SYNONYMS, LabelSpace
from emollama_jax.errors import UserError
from emollama_jax.evaluate import metrics

How = Literal["exact", "word", "synonym", "score", "ambiguous", "none"]


@dataclasses.dataclass(frozen=True)
class Parsed:
    """What an answer names."""

    label: str | None  # a class of the space, or None: unparsed
    how: How


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """One item of a predictions file, one JSON object a line, with these keys."""

    id: str  # of the item in its source
    source: str  # data set and split, e.g. "actionfaces/images:test"
    label: str  # the true class
    predicted: str | None  # the answered class; None: unparsed
    text: str | None  # what the model wrote; None if labels were scored
    scores: dict[str, float] | None  # class → log-likelihood; None if text was generated
    parsed: How
    subject: str | None = None  # whose face, where the set says so: for clustered intervals


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The numbers of one run over one set; shares are 0 … 1."""

    classes: tuple[str, ...]
    n: int
    war: float
    uar: float
    war_interval: metrics.Interval
    uar_interval: metrics.Interval
    level: float  # of the intervals
    clustered: bool  # intervals by subject
    confusion: np.ndarray  # int64 [C, C + 1], the last column unparsed
    per_class: metrics.PerClass
    unparsed: float  # share of answers that named no class
    parsed: dict[str, int]  # how answers were read → how many

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what has no value (nan) becomes None."""
        tree = dataclasses.asdict(self)
        tree["classes"] = list(self.classes)
        tree["confusion"] = self.confusion.tolist()
        tree["per_class"] = {
            name: dict(zip(self.classes, map(_plain, values.tolist()), strict=True))
            for name, values in vars(self.per_class).items()
        }
        return tree


def parse_answer(text: str, space: LabelSpace) -> Parsed:
    """Reads the class that an answer names."""
    bare = re.sub(r"^\W+|\W+$", "", text).casefold()
    names = {name.casefold(): name for name in space.classes}
    if bare in names:
        return Parsed(names[bare], "exact")
    mentions = _mentions(text, names, _synonyms(space))
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


def evaluate(
    predictions: Sequence[Prediction],
    space: LabelSpace,
    *,
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Evaluation:
    """WAR, UAR and the rest of one run.

    Args:
        predictions: every item of the test set once.
        space: the classes that count.
        samples: of the bootstrap; drawn by subject if every item names one.
        seed: of the bootstrap.
        level: of the intervals.

    Raises:
        UserError: no predictions, an item twice, or a class that the space does not have.
    """
    if not predictions:
        raise UserError("no predictions: nothing to evaluate")
    number = {name: n for n, name in enumerate(space.classes)}
    seen = Counter((item.source, item.id) for item in predictions)
    (source, item_id), times = seen.most_common(1)[0]
    if times > 1:
        raise UserError(f"{source}: item {item_id} is predicted {times} times, wanted once")
    for item in predictions:
        for role, name in (("label", item.label), ("predicted", item.predicted)):
            if name is not None and name not in number:
                raise UserError(
                    f"item {item.id}: {role} {name!r} is no class of {space.title} "
                    f"(wanted one of {', '.join(space.classes)})"
                )
    labels = np.array([number[item.label] for item in predictions])
    predicted = np.array([number.get(item.predicted, metrics.UNPARSED) for item in predictions])
    confusion = metrics.confusion_matrix(labels, predicted, classes=len(number))
    subjects = [item.subject for item in predictions]
    clustered = None not in subjects
    intervals = metrics.bootstrap(
        labels,
        predicted,
        classes=len(number),
        samples=samples,
        seed=seed,
        level=level,
        clusters=subjects if clustered else None,
    )
    return Evaluation(
        classes=tuple(space.classes),
        n=len(predictions),
        war=metrics.war(confusion),
        uar=metrics.uar(confusion),
        war_interval=intervals["war"],
        uar_interval=intervals["uar"],
        level=level,
        clustered=clustered,
        confusion=confusion,
        per_class=metrics.per_class(confusion),
        unparsed=float(np.mean(predicted == metrics.UNPARSED)),
        parsed=dict(Counter(item.parsed for item in predictions)),
    )


# ---- predictions files


def write_predictions(path: pathlib.Path, predictions: Iterable[Prediction]) -> None:
    """Writes one JSON object a line; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(path.name + ".part")
    with half.open("w", encoding="utf-8") as file:
        for item in predictions:
            json.dump(dataclasses.asdict(item), file, ensure_ascii=False, allow_nan=False)
            file.write("\n")
    os.replace(half, path)


def read_predictions(path: pathlib.Path) -> list[Prediction]:
    """Reads a predictions file.

    Raises:
        UserError: no such file, or a line that is no prediction; the line is named.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such predictions file (`emollama eval` writes one)")
    items = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                items.append(_read(json.loads(line.rstrip())))
            except json.JSONDecodeError as error:
                why = f"not JSON ({error.msg}, column {error.colno})"
                raise UserError(f"{path}, line {number}: {why}") from None
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {error}") from None
    return items


_FIELDS = {field.name: field for field in dataclasses.fields(Prediction)}


def _read(tree: Any) -> Prediction:
    """One line; every fault is a ValueError that says what was wanted."""
    if not isinstance(tree, dict):
        raise ValueError(f"found a {type(tree).__name__}, wanted an object with an id")
    required = {name for name, f in _FIELDS.items() if f.default is dataclasses.MISSING}
    if missing := sorted(required - tree.keys()):
        raise ValueError(f"{', '.join(missing)} missing")
    if unknown := sorted(tree.keys() - _FIELDS.keys()):
        raise ValueError(f"unknown key {unknown[0]} (known: {', '.join(_FIELDS)})")
    for name in ("id", "source", "label"):
        _demand(isinstance(tree[name], str), name, tree[name], "a text")
    for name in ("predicted", "text", "subject"):
        value = tree.get(name)
        _demand(value is None or isinstance(value, str), name, value, "a text or null")
    _demand(tree["parsed"] in get_args(How), "parsed", tree["parsed"], f"one of {get_args(How)}")
    scores = tree["scores"]
    good = scores is None or (
        isinstance(scores, dict)
        and all(isinstance(v, float | int) and math.isfinite(v) for v in scores.values())
    )
    _demand(good, "scores", scores, "class → finite number, or null")
    return Prediction(**tree)


def _demand(good: bool, name: str, found: object, wanted: str) -> None:
    if not good:
        raise ValueError(f"{name}: found {found!r}, wanted {wanted}")


def _plain(value: float) -> float | None:
    return None if value != value else value


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


def _synonyms(space: LabelSpace) -> dict[str, str]:
    """Words → the classes of a space, whatever name the space gives them ("happy", "happiness")."""
    classes = dict(zip(space.canonical, space.classes, strict=True))
    table = {word: classes[common] for word, common in SYNONYMS.items() if common in classes}
    return table | classes
