"""How a user's examples are divided where nothing says which are for training and which for tests.

Of each class, a tenth is "test" and a tenth "validation", at least one of each; which ones, a hash
of their names says. So the same data are always divided alike, and other examples change little.
Where a column names the people, nobody is in two splits: whole people, in the order of a hash, make
up a tenth of the examples.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

SHARE = 10  # one of so many is tested, and another one validates
LEAST = 3  # examples of a class, or people, that can be divided


def divide(
    ids: Sequence[str], labels: Sequence[str], subjects: Sequence[str]
) -> tuple[list[str], str]:
    """The split of every example.

    Args:
        ids: unique names; an id that comes twice gets one split.
        labels: their classes.
        subjects: subject of each example; "" where unknown.

    Returns:
        "train", "validation" or "test" for each, and the rule with its counts, in a line.
    """
    if any(subjects):
        # An example without a name is a person of its own.
        groups = [subject or f"\0{name}" for subject, name in zip(subjects, ids, strict=True)]
        split, rule = _by_subject(groups)
        found = [split[group] for group in groups]
    else:
        split, rule = _by_class(ids, labels)
        found = [split[name] for name in ids]
    counts = Counter(found)
    told = ", ".join(f"{s} {counts[s]}" for s in ("train", "validation", "test") if counts[s])
    return found, f"the data have no splits; {rule}: {told}"


def _by_class(ids: Sequence[str], labels: Sequence[str]) -> tuple[dict[str, str], str]:
    members: dict[str, set[str]] = defaultdict(set)
    for name, label in zip(ids, labels, strict=True):
        members[label].add(name)
    split, few = {}, []
    for label, names in sorted(members.items()):
        order = sorted(names, key=_hash)
        each = max(1, len(order) // SHARE) if len(order) >= LEAST else 0
        if not each:
            few.append(label)
        for n, name in enumerate(order):
            split[name] = "test" if n < each else "validation" if n < 2 * each else "train"
    rule = "in each class a tenth is test and a tenth validation, by a hash of the names"
    return split, rule + (f" (too few, train only: {', '.join(few)})" if few else "")


def _by_subject(groups: Sequence[str]) -> tuple[dict[str, str], str]:
    sizes = Counter(groups)
    if len(sizes) < LEAST:
        return dict.fromkeys(sizes, "train"), f"{len(sizes)} people are too few to divide"
    wanted = max(1, len(groups) // SHARE)
    # Who has many examples comes last, and so into training.
    order = sorted(sizes, key=lambda group: (sizes[group] > 2 * wanted, _hash(group)))
    split, taken = {}, dict.fromkeys(("test", "validation"), 0)
    for n, group in enumerate(order):
        left = len(order) - n
        for name, needed in (("test", 2), ("validation", 1)):
            # At least one person for each split that comes after.
            if taken[name] < wanted and (left > needed or not taken[name]):
                split[group] = name
                taken[name] += sizes[group]
                break
        else:
            split[group] = "train"
    rule = "whole people, in the order of a hash: a tenth is test and a tenth validation"
    return split, rule


def _hash(name: str) -> str:
    return hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
