"""A prepared set on a disk or in a bucket, whoever prepared it.

    DATA/dfew/1.0.0/          what TFDS writes: shards, dataset_info.json, features.json
        views.json            name → split → stored split and positions in it
        index_<split>.npz     id, label and digest of the media of every example

A set without `views.json` has its own name and splits; one without an index is small and is read.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from emollama_jax.data.sets import not_prepared
from emollama_jax.paths import as_path

VERSION = "1.0.0"  # of every builder
TEXTS = ("id", "kind", "items")
_DIGEST = 8  # bytes

Example = Mapping[str, Any]  # with the fields of `schema.features`
Views = dict[str, dict[str, tuple[str, list[int] | None]]]  # see `StoredSet.views`


@dataclasses.dataclass(frozen=True)
class Index:
    """Metadata of examples, without their media: one entry for each, in order."""

    ids: Sequence[str]
    labels: Sequence[int]  # in the set's native order
    digests: Sequence[str]  # of the media

    def at(self, positions: Sequence[int]) -> "Index":
        """The entries at positions."""
        return Index(
            ids=[self.ids[i] for i in positions],
            labels=[self.labels[i] for i in positions],
            digests=[self.digests[i] for i in positions],
        )


@dataclasses.dataclass(frozen=True)
class StoredSet:
    """A set in its folder, which may not be there yet."""

    data_dir: epath.PathLike
    name: str  # e.g. "dfew", "own/office", "actionfaces/images"

    @property
    def folder(self) -> epath.Path:
        return as_path(self.data_dir) / self.name / VERSION

    @property
    def info(self) -> tfds.core.DatasetInfo | None:
        """TFDS's record of it; None if it is not prepared."""
        builder = self._builder()
        return None if builder is None else builder.info

    @property
    def metadata(self) -> Mapping[str, Any] | None:
        """Notes of its preparation; None if it is not prepared."""
        info = self.info
        return None if info is None else dict(info.metadata)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of its examples; results for another one are void. "" if not prepared."""
        metadata = self.metadata
        return str(metadata.get("fingerprint", metadata)) if metadata else ""

    def views(self) -> Views:
        """Name → its split → (stored split, positions in it; None for all in order)."""
        path = self.folder / "views.json"
        if path.exists():
            return json.loads(path.read_text())
        info = self.info
        return {} if info is None else {self.name: {split: (split, None) for split in info.splits}}

    def examples(self, split: str) -> Sequence[Example]:
        """Opens a stored split: lazy, random access, picklable.

        Raises:
            UserError: the set is not prepared, or has no such split.
        """
        builder = self._builder()
        if builder is None:
            other = "prepared by another version" if self.folder.parent.exists() else "not prepared"
            raise not_prepared(self.data_dir, self.name, other)
        return StoredExamples(builder.as_data_source(split))

    def index(self, split: str) -> Index:
        """Ids, labels and digests of a stored split's examples."""
        path = self.folder / f"index_{split}.npz"
        if not path.exists():
            return index_of(self.examples(split))
        with path.open("rb") as opened, np.load(opened) as file:
            return Index(*(file[column].tolist() for column in ("id", "label", "digest")))

    def _builder(self) -> tfds.core.DatasetBuilder | None:
        ready = (self.folder / "dataset_info.json").exists()
        return tfds.builder_from_directory(self.folder) if ready else None


class StoredExamples(Sequence):
    """The examples of a stored split; TFDS gives text as bytes, this gives it as text."""

    def __init__(self, source: Sequence[Example]):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):  # TFDS raises ValueError, at which a for loop does not end
            raise IndexError(f"example {index} of a split of {len(self)}")
        example = self._source[index]
        return {**example, **{name: example[name].decode() for name in TEXTS}}


def index_of(examples: Sequence[Example]) -> Index:
    """The index of examples, all of which are read."""
    rows = [(e["id"], int(e["label"]), digest(e["media"])) for e in examples]
    return Index(*zip(*rows, strict=True)) if rows else Index((), (), ())


def digest(media: bytes) -> str:
    """Hash of a medium's content, as hexadecimal digits."""
    return hashlib.blake2b(media, digest_size=_DIGEST).hexdigest()
