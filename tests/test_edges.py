"""Structured fuzzing of every reader at the edge: whatever comes is read, or refused in one line.

Readers and bases are those of `benchmarks/campaign.py`, which goes further with mutations of its
own. Hypothesis draws trees and bytes; it is derandomised, so that a run can be repeated.
"""

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.hazards.mutations import paths_of, put
from benchmarks.hazards.readers import kinds
from emollama_jax import foreign_json
from emollama_jax.dispatch import disk_error
from emollama_jax.errors import UserError

KINDS = kinds()
FEW = settings(
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=2**63, max_value=10**400)
    | st.floats()
    | st.text(st.characters(exclude_categories=[]), max_size=8)  # surrogates and controls, too
    | st.sampled_from(["[red]", "[/]", "../x", "a\nb", "\0", "1e999", "nan", "x" * 300])
)
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def changed_trees(draw, name):
    """A base with one or two of its values replaced."""
    bases = {key: base for key, base in KINDS[name].bases().items() if not isinstance(base, bytes)}
    tree = bases[draw(st.sampled_from(sorted(bases)))]
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(list(paths_of(tree))))
        value = draw(TREES)
        tree = put(tree, path, lambda old, value=value: value)
    return tree


@st.composite
def changed_bytes(draw, name):
    """A base with a piece of it replaced by other bytes."""
    kind = KINDS[name]
    base = kind.bases()[draw(st.sampled_from(sorted(kind.bases())))]
    data = base if isinstance(base, bytes) else kind.dump(base)
    start = draw(st.integers(0, len(data)))
    stop = min(start + draw(st.integers(0, 64)), len(data))
    return data[:start] + draw(st.binary(max_size=16)) + data[stop:]


def is_read_or_refused(name, data, tmp_path_factory):
    try:
        KINDS[name].read(data, tmp_path_factory.mktemp("edge"))
    except UserError as error:
        assert str(error) and len(str(error)) < 5000
    except OSError as error:  # of a file whose name the input gives
        assert disk_error(error)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "media"])
def test_trees_of_any_values(name, tmp_path_factory):
    @FEW
    @given(tree=changed_trees(name))
    def check(tree):
        try:
            data = KINDS[name].dump(tree)
        except (ValueError, UnicodeError):  # what the format itself cannot hold
            return
        is_read_or_refused(name, data, tmp_path_factory)

    check()


@pytest.mark.parametrize("name", KINDS)
def test_bytes_of_any_kind(name, tmp_path_factory):
    @FEW
    @given(data=changed_bytes(name))
    def check(data):
        is_read_or_refused(name, data, tmp_path_factory)

    check()


@FEW
@given(tree=TREES)
def test_foreign_json_gives_back_what_can_be_walked_and_written(tree):
    try:
        found = foreign_json.parse(json.dumps(tree))
    except ValueError:
        return
    json.dumps(found, ensure_ascii=False).encode()
    assert _same(found, tree)


def _same(found, wanted):
    """Equal, but for lone surrogates."""
    if isinstance(wanted, str):
        return found == foreign_json.plain(wanted)
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(_same, found, wanted))
    if isinstance(wanted, dict):
        plain = {foreign_json.plain(key): value for key, value in wanted.items()}
        return found.keys() == plain.keys() and all(_same(found[k], plain[k]) for k in plain)
    if isinstance(wanted, float) and math.isnan(wanted):
        return math.isnan(found)
    return found == wanted and type(found) is type(wanted)
