"""Label spaces: the sets' own orders and counts, and a synonym table without double meanings."""

import pickle

import pytest

from emollama_jax.data import emotions
from emollama_jax.data.emotions import LABEL_SPACES, SYNONYMS
from emollama_jax.data.sets import label_space
from emollama_jax.errors import UserError


@pytest.mark.parametrize("name", LABEL_SPACES)
def test_spaces_are_consistent(name):
    space = LABEL_SPACES[name]
    assert len(set(space.classes)) == len(space.classes) == len(space.written)
    assert all(word == word.lower() for word in space.classes)
    assert len(set(space.canonical)) == len(space.classes)
    for split, counts in space.support.items():
        assert sum(counts) == space.splits[split], split
        assert len(counts) == len(space.classes)
    assert [space.index(word) for word in space.written] == list(range(len(space.classes)))


@pytest.mark.parametrize(("name", "total", "folds"), [("dfew", 11_697, 5), ("mafw", 9_172, 5)])
def test_every_fold_holds_every_clip(name, total, folds):
    splits = label_space(name).splits
    assert len(splits) == 2 * folds
    for fold in range(1, folds + 1):
        assert splits[f"fold{fold}/train"] + splits[f"fold{fold}/test"] == total


def test_native_numbers_differ_between_sets():
    """The trap that keys by number fall into."""
    assert label_space("raf_db").classes[label_space("raf_db").index("4")] == "happiness"
    assert label_space("affectnet8").classes[label_space("affectnet8").index("4")] == "fear"
    assert label_space("dfew").classes[label_space("dfew").index("4")] == "angry"
    assert label_space("dfew").canonical[3] == "anger"
    assert label_space("ferv39k").classes[label_space("ferv39k").index("Sad")] == "sad"


def test_synonyms_lead_to_emotions_that_some_set_has():
    every = {name for space in LABEL_SPACES.values() for name in space.canonical}
    assert set(SYNONYMS.values()) == every
    # A canonical word is no synonym of another, and no word is listed twice.
    assert not every & set(SYNONYMS)
    listed = " ".join(forms for words in emotions._WORDS.values() for forms in words).split()
    assert len(listed) == len(set(listed))
    assert SYNONYMS["happy"] == "happiness" and SYNONYMS["scared"] == "fear"
    assert SYNONYMS["anxious"] == "anxiety"


def test_lookup():
    assert label_space("actionfaces/images") is label_space("actionfaces/clips")
    assert label_space("actionfaces/images").classes == label_space("raf_db").classes
    assert pickle.loads(pickle.dumps(label_space("mafw"))) == label_space("mafw")
    with pytest.raises(UserError, match=r"imagenet/x: no such data set; known: .*raf_db"):
        label_space("imagenet/x")
    with pytest.raises(UserError, match=r"DFEW: label '0' is not one of 1=happy"):
        label_space("dfew").index("0")


def test_embedded_classes_are_the_drawings():
    from emollama_jax.data.action_units import EMOTIONS

    assert label_space("actionfaces/clips").classes == EMOTIONS
