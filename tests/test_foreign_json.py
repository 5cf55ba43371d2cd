"""JSON of others: every fault a ValueError, every value one that can be walked and written."""

import json

import pytest

from emollama_jax.foreign_json import DEPTH, DIGITS, parse, plain


def test_plain_json_is_what_python_reads():
    tree = {"a": [1, 2.5, None, True, "é\U0001f600"], "b": {"c": -7}, "d": 10**40}
    assert parse(json.dumps(tree)) == tree
    assert parse(json.dumps(tree, ensure_ascii=False).encode()) == tree
    assert parse(json.dumps(tree).encode("utf-16")) == tree
    assert parse('{"a": 1, "a": 2}', pairs=tuple) == (("a", 1), ("a", 2))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[" * (DEPTH + 1) + "]" * (DEPTH + 1), f"nested deeper than {DEPTH}"),
        ('{"a":' * (DEPTH + 1) + "1" + "}" * (DEPTH + 1), f"nested deeper than {DEPTH}"),
        ("9" * 5000, "a number of 5000 digits, wanted at most 300"),
        ('{"a": -' + "9" * (DIGITS + 1) + "}", "a number of 302 digits"),
        ("", "Expecting value"),
        (b"\xff\xfe\xfa", "codec can't decode"),
        ("{'a': 1}", "property name"),
    ],
)
def test_faults_are_value_errors(text, why):
    with pytest.raises(ValueError, match=why):
        parse(text)


def test_what_is_within_the_bounds_is_read():
    tree = parse("[" * DEPTH + "]" * DEPTH)
    for _ in range(DEPTH - 1):
        (tree,) = tree
    assert tree == []
    assert float(parse("9" * DIGITS)) > 1e299
    assert parse('"' + "9" * 5000 + '"') == "9" * 5000
    assert len(parse(json.dumps([[n] for n in range(1000)]))) == 1000


def test_lone_surrogates_become_the_replacement_character():
    found = parse(json.dumps({"a\ud800": ["b\udfff", {"c": "\ud83d"}], "d": "\U0001f600"}))
    assert found == {"a\ufffd": ["b\ufffd", {"c": "\ufffd"}], "d": "\U0001f600"}
    json.dumps(found, ensure_ascii=False).encode()
    assert parse(r'"\\ud800"') == r"\ud800"  # a backslash, and letters
    assert plain("a\ud800") == "a\ufffd"
