"""What is known of a prepared split without reading its media."""

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from emollama_jax.data.builders import registry, store
from emollama_jax.tiny import builder


@dataclasses.dataclass(frozen=True)
class Index:
    """One entry for every example of a split, in its order."""

    ids: Sequence[str]
    labels: Sequence[int]  # in the set's native order
    digests: Sequence[str]  # of the media
    stored: str  # where the examples lie, e.g. "dfew/clips": the folds of a set share them


def read_index(
    data_dir: str | os.PathLike, name: str, split: str, data: Sequence[Mapping[str, Any]]
) -> Index:
    """Reads the index of a split; drawn sets have none, are small, and are read themselves.

    Args:
        data_dir: where sets are prepared.
        name: of the set.
        split: of it.
        data: the opened split.

    Raises:
        UserError: not prepared.
    """
    where = registry.find(data_dir, name, split)
    stored = f"{where.name}/{where.split}"
    if name.startswith(f"{builder.NAME}/"):
        examples = [data[i] for i in range(len(data))]
        return Index(
            ids=[example["id"] for example in examples],
            labels=[int(example["label"]) for example in examples],
            digests=[_digest(example["media"]) for example in examples],
            stored=stored,
        )
    index = store.read_index(data_dir, where)
    ids, labels, digests = (index[key].tolist() for key in ("id", "label", "digest"))
    return Index(ids=ids, labels=labels, digests=digests, stored=stored)


def _digest(media: bytes) -> str:
    return hashlib.blake2b(media, digest_size=8).hexdigest()
