"""The page at `/`: one file of HTML, CSS and JavaScript, without a build and without a request to
anyone else.

Its content security policy allows the script and the style in it by their digests, and connections
to this server alone. What it must know of the run, it asks at `/about`.
"""

import base64
import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Sequence

from emollama_jax.data.emotions import LABEL_SPACES
from emollama_jax.data.items import category_question, standard_question
from emollama_jax.serve.limits import Limits

FILE = pathlib.Path(__file__).with_name("index.html")


@dataclasses.dataclass(frozen=True)
class Example:
    """A picture to try."""

    title: str
    jpeg: bytes


@dataclasses.dataclass(frozen=True)
class About:
    """What the page says of the server."""

    name: str  # of the model
    classes: tuple[str, ...]
    examples: tuple[Example, ...]
    trained_on: tuple[str, ...]  # names of the run's data sets
    limits: Limits
    measured: bool  # whether it is the package's run, whose results are known


# Of the package's run, docs/results.md.
KNOWN_FIRST = "On FERPlus' 3,573 test pictures this model names the label in 79 of 100. It is worse"
KNOWN = (
    "for fear (38 of 100), disgust (29) and contempt (13);",
    "for men (77) than for women (82);",
    "for children up to nine (81) than for people in their twenties (85). Of people from 30 to 39 "
    "there were 12 pictures (67 of 100), of those over 70 only 7: too few to tell.",
)
KNOWN_LAST = (
    "By skin colour or origin it was not measured. Expect it to be worse for people whom the "
    "pictures show rarely, and on photographs unlike these."
)
UNKNOWN = (
    "Nobody has told this page how often this model is right, or for whom it is worse. Models of "
    "this kind are worse for rare expressions and for people whom their training pictures show "
    "rarely."
)
SETS = {
    "ferplus": "FERPlus (28,558 small grey photographs from the web, whose expressions people named"
    " by vote)",
    "actionfaces": "faces drawn by a program",
}


@dataclasses.dataclass(frozen=True)
class Page:
    """The page as it is served."""

    html: bytes
    headers: dict[str, str]
    about: bytes  # JSON


def load(about: About) -> Page:
    """Reads the page and computes its policy."""
    html = FILE.read_bytes()
    headers = {"Content-Security-Policy": policy(html), "Cache-Control": "no-cache"}
    return Page(html, headers, _about(about))


def policy(html: bytes) -> str:
    """The content security policy of a page: its own script and style, nothing from elsewhere."""
    rules = {
        "default-src": "'none'",
        "script-src": _digests(html, "script"),
        "style-src": _digests(html, "style"),
        "img-src": "'self' data: blob:",
        "media-src": "blob:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _digests(html: bytes, tag: str) -> str:
    found = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), html, re.S)
    digests = (base64.b64encode(hashlib.sha256(text).digest()).decode() for text in found)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def _about(about: About) -> bytes:
    fields = {
        "model": about.name,
        "classes": about.classes,
        "trained": trained_words(about.trained_on),
        "known_first": KNOWN_FIRST if about.measured else UNKNOWN,
        "known": KNOWN if about.measured else (),
        "known_last": KNOWN_LAST if about.measured else "",
        "questions": {
            kind: [standard_question(kind), category_question(about.classes, kind)]
            for kind in ("image", "clip")
        },
        "examples": [
            {"title": example.title, "url": _data_uri(example.jpeg)} for example in about.examples
        ],
        "limits": {"bytes": about.limits.body, "seconds": about.limits.duration},
    }
    return json.dumps(fields, ensure_ascii=False).encode()


def trained_words(names: Sequence[str]) -> str:
    """A sentence about the run's data sets; sets of one family are named once."""
    families = dict.fromkeys(name.partition("/")[0] for name in names)
    titles = [
        SETS.get(name) or (LABEL_SPACES[name].title if name in LABEL_SPACES else f"“{name}”")
        for name in families
    ]
    return f"This model learned from {', and '.join(titles)}." if titles else "It does not say."


def _data_uri(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
