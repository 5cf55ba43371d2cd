"""Writes a listed set as a TFDS data set of ArrayRecord shards, and opens it.

    DATA/dfew/1.0.0/          what TFDS writes: shards, dataset_info.json, features.json
        views.json            name → split → stored split and positions in it
        index_<split>.npz     id, label and digest of the media of every example
    DATA/dfew/1.0.0.parts/    shards of a preparation that is under way

A shard is written by one process under another name and renamed when it is whole, so that a
preparation that was stopped goes on with the shards that it lacks. Clips of sets with folds are
stored once: a fold is a view, two lists of positions.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from emollama_jax.data.builders import schema
from emollama_jax.data.builders.listing import Item, Kind, Listing, brief
from emollama_jax.data.items import category_item
from emollama_jax.data.media import pack_frames
from emollama_jax.errors import UserError

VERSION = "1.0.0"
SHARD = {"image": 2048, "clip": 128}  # examples of one
MISSING_SHARE = 0.01  # of the files that lists name; above it preparation stops
_DIGEST = 8  # bytes

Examples = Sequence[Mapping[str, Any]]  # read lazily, by position


class Builder(schema.Builder, skip_registration=True):
    """A TFDS builder whose shards are written side by side; subclasses give `name` alone."""

    VERSION = tfds.core.Version(VERSION)

    def __init__(
        self,
        *,
        listing: Listing,
        processes: int,
        progress: Callable[[int, int], None],
        **kwargs: Any,
    ):
        """Makes a builder.

        Args:
            listing: what to write.
            processes: how many write side by side.
            progress: called with (done, all) examples.
            **kwargs: TFDS's: `data_dir`, `file_format`, `config`.
        """
        self._listing, self._processes, self._progress = listing, processes, progress
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        found = self._listing
        return tfds.core.DatasetInfo(
            builder=self,
            description="Encoded media and labels, from the official layout.",
            features=schema.features(votes=_votes(found)),
            metadata=tfds.core.MetadataDict(
                kind=found.kind,
                classes=list(found.classes),
                fingerprint=fingerprint(found),
                layout=found.layout,
                missing=len(found.missing),
                dropped=found.dropped,
                notes=found.notes,
                told=found.told,
            ),
            disable_shuffling=True,  # readers shuffle; the order on disk is the list's
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        """The splits' examples one after the other, as TFDS wants them; shards do not use it."""
        del dl_manager
        return {split: self._generate_examples(split) for split in self._listing.splits}

    def _generate_examples(self, split: str):
        for number, item in enumerate(self._listing.splits[split]):
            yield number, make_example(item, self._listing.kind, self._listing.classes)

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        """Writes the shards that are not there yet, then moves all into TFDS's folder."""
        del dl_manager, download_config
        target = pathlib.Path(self.data_dir)
        final = pathlib.Path(schema.split_folder(self.data_dir_root, self._place(), VERSION))
        parts = final.with_name(f"{final.name}.parts")
        mark = json.dumps(fingerprint(self._listing))
        if not (parts / "of.json").exists() or (parts / "of.json").read_text() != mark:
            shutil.rmtree(parts, ignore_errors=True)
            parts.mkdir(parents=True)
            (parts / "of.json").write_text(mark)
        plan = {split: _shards(self._listing, split, parts) for split in self._listing.splits}
        _write([s for shards in plan.values() for s in shards], self._processes, self._progress)
        infos = []
        for split, shards in plan.items():
            written = [json.loads(shard.done.read_text()) for shard in shards]
            template = self._get_filename_template(split_name=split)
            info = tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(shard.items) for shard in shards],
                num_bytes=sum(part["bytes"] for part in written),
                filename_template=template,
            )
            for shard, name in zip(shards, info.filenames, strict=True):
                shutil.move(shard.path, target / name)
            infos.append(info)
            items = self._listing.splits[split]
            np.savez(
                target / f"index_{split}.npz",
                id=np.array([item.id for item in items], str),
                label=np.array([item.label for item in items], np.int64),
                digest=np.array([d for part in written for d in part["digests"]], str),
            )
        self.info.set_splits(tfds.core.SplitDict(infos))
        write_views(target, self._listing)
        shutil.rmtree(parts)

    def _place(self) -> str:
        return f"{self.name}/{self.builder_config.name}" if self.builder_config else self.name


@dataclasses.dataclass(frozen=True)
class _Shard:
    path: pathlib.Path
    items: tuple[Item, ...]
    kind: Kind
    classes: tuple[str, ...]
    votes: int = 0

    @property
    def done(self) -> pathlib.Path:
        """Written last: its presence says that the shard is whole."""
        return self.path.with_suffix(".json")


def _shards(found: Listing, split: str, parts: pathlib.Path) -> list[_Shard]:
    items, size = found.splits[split], SHARD[found.kind]
    return [
        _Shard(
            parts / f"{split}-{start:08d}.array_record",
            tuple(items[start : start + size]),
            found.kind,
            found.classes,
            _votes(found),
        )
        for start in range(0, len(items), size)
    ]


def _write(shards: Sequence[_Shard], processes: int, progress: Callable[[int, int], None]) -> None:
    total = sum(len(shard.items) for shard in shards)
    left = [shard for shard in shards if not (shard.done.exists() and shard.path.exists())]
    done = total - sum(len(shard.items) for shard in left)
    progress(done, total)
    if min(processes, len(left)) <= 1:
        for shard in left:
            done += write_shard(shard)
            progress(done, total)
        return
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
    try:
        for future in as_completed([pool.submit(write_shard, shard) for shard in left]):
            done += future.result()
            progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)  # a stop does not write the rest first


def write_shard(shard: _Shard) -> int:
    """Writes one shard, in a worker process; returns its number of examples."""
    from array_record.python.array_record_module import (  # ty: ignore[import-not-found]
        ArrayRecordWriter,  # compiled, without types
    )

    features, size, digests = schema.features(votes=shard.votes), 0, []
    partial = shard.path.with_suffix(".partial")
    # Groups of one record, as TFDS writes them: each example is read alone.
    writer = ArrayRecordWriter(os.fspath(partial), "group_size:1")
    for item in shard.items:
        example = make_example(item, shard.kind, shard.classes)
        record = features.serialize_example(example)
        writer.write(record)
        size += len(record)
        digests.append(hashlib.blake2b(example["media"], digest_size=_DIGEST).hexdigest())
    writer.close()
    partial.replace(shard.path)
    half = shard.done.with_suffix(".half")
    half.write_text(json.dumps({"bytes": size, "digests": digests}))
    half.replace(shard.done)
    return len(shard.items)


def make_example(item: Item, kind: Kind, classes: Sequence[str]) -> dict[str, Any]:
    """An example of `schema.features`; frame folders are packed, files stay as they are.

    Raises:
        UserError: the file cannot be read at all; what is in it is not looked at.
    """
    try:
        if item.content is not None:
            media = item.content
        else:
            folder = item.media.is_dir()
            media = pack_frames(item.media) if folder else item.media.read_bytes()
    except OSError as error:
        raise UserError(f"{item.media}: cannot be read ({error.strerror})") from None
    boxes = np.array([item.box] if item.box else [], np.float32).reshape(-1, 4)
    return {
        "id": item.id,
        "kind": kind,
        "media": media,
        "label": item.label,
        "subject": item.subject,
        "boxes": boxes,
        "landmarks": np.zeros((0, 68, 2), np.float32),
        "pose": np.zeros((0, 3), np.float32),
        "agr": np.full(3, -1, np.int64),
        "attributes": np.full(40, np.nan, np.float32),
        "items": json.dumps([category_item(classes, item.label, kind)]),
        **({"votes": np.array(item.votes, np.float32)} if item.votes else {}),
    }


def fingerprint(found: Listing) -> str:
    """A digest of what a listing says: ids, labels, boxes, and how large the media are."""
    head = [VERSION, found.kind, found.classes, found.layout]
    digest = hashlib.sha256(json.dumps(head).encode())
    for split, items in found.splits.items():
        digest.update(split.encode())
        for item in items:
            digest.update(repr((item.id, item.label, item.box, _size(item))).encode())
            if item.subject >= 0:
                digest.update(repr(item.subject).encode())
            if item.votes:
                digest.update(repr(item.votes).encode())
    return digest.hexdigest()


def _votes(found: Listing) -> int:
    """How many classes raters voted for; 0 where the set has labels alone."""
    return len(next((item.votes for items in found.splits.values() for item in items), ()))


def _size(item: Item) -> int | str:
    """Of an example's media; what is in no file is known by its content."""
    if item.content is not None:
        return hashlib.blake2b(item.content, digest_size=_DIGEST).hexdigest()
    # Of a folder, the number of its frames: a look at each would take minutes.
    return len(os.listdir(item.media)) if item.media.is_dir() else item.media.stat().st_size


def prepare(
    data_dir: str | os.PathLike,
    place: str,
    make: Callable[..., Builder],
    found: Listing,
    *,
    title: str,
    missing_share: float = MISSING_SHARE,
    processes: int,
    progress: Callable[[int, int], None],
) -> pathlib.Path:
    """Stores a listing; what is already there is kept, what was stopped resumes.

    Args:
        data_dir: where sets are prepared.
        place: of the stored set in it, e.g. "dfew".
        make: a `Builder` from `listing`, `processes`, `progress`, `data_dir`, `file_format`.
        found: what to store.
        title: of the set, for messages.
        missing_share: of the files that lists name; more stop the preparation.
        processes: that write side by side.
        progress: called with (done, all) examples.

    Returns:
        The folder of the prepared set.

    Raises:
        UserError: too many files are missing, or nothing is left.
    """
    folder = pathlib.Path(schema.split_folder(data_dir, place, VERSION))
    _check_missing(found, folder, title=title, share=missing_share)
    metadata = read_metadata(data_dir, place)
    if metadata is None or metadata["fingerprint"] != fingerprint(found):
        shutil.rmtree(folder, ignore_errors=True)
        for unfinished in folder.parent.glob("incomplete.*"):
            shutil.rmtree(unfinished)
        builder = make(
            listing=found,
            processes=processes,
            progress=progress,
            data_dir=os.fspath(data_dir),
            file_format="array_record",
        )
        tfds.disable_progress_bar()  # TFDS's own bars would tear those of the command
        # TFDS wants a folder for downloads; there are none.
        with tempfile.TemporaryDirectory() as downloads:
            builder.download_and_prepare(download_dir=downloads)
    else:
        write_views(folder, found)  # e.g. a further fold of the same clips
        total = sum(map(len, found.splits.values()))
        progress(total, total)
    return folder


def _check_missing(found: Listing, folder: pathlib.Path, *, title: str, share: float) -> None:
    """Lists missing files in `missing.txt` beside the prepared set, and stops at too many."""
    stored = sum(map(len, found.splits.values()))
    path = folder.parent / "missing.txt"
    path.unlink(missing_ok=True)
    if found.missing:
        folder.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(found.missing) + "\n", encoding="utf-8")
    total = stored + len(found.missing)
    if total and len(found.missing) > share * total:
        raise UserError(
            f"{title}: {len(found.missing)} of {total} files are missing "
            f"({len(found.missing) / total:.1%}, at most {share:.1%} may be): "
            f"{brief(found.missing)}; all in {path}. Complete the copy, or raise --missing-share"
        )
    for split, items in found.splits.items():
        if not items:
            raise UserError(f"{title}: no examples in {split}")


def write_views(folder: pathlib.Path, found: Listing) -> None:
    """Writes which names and splits a stored set can be opened by."""
    half = folder / "views.json.half"
    half.write_text(json.dumps(found.views))
    half.replace(folder / "views.json")


# ---- opening


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a split's examples lie."""

    name: str  # of the stored set
    split: str  # of the stored set
    positions: list[int] | None  # in it; None for all, in order


def read_metadata(data_dir: str | os.PathLike, place: str) -> Mapping[str, Any] | None:
    """What the builder noted about a stored set; None if it is not prepared."""
    folder = schema.split_folder(data_dir, place, VERSION)
    if not (folder / "dataset_info.json").exists():
        return None
    return tfds.builder_from_directory(folder).info.metadata


def read_views(data_dir: str | os.PathLike, place: str) -> dict[str, dict[str, list]]:
    """Name → split → [stored split, positions] of a stored set; empty if it is not prepared."""
    path = schema.split_folder(data_dir, place, VERSION) / "views.json"
    return json.loads(path.read_text()) if path.exists() else {}


def read_index(data_dir: str | os.PathLike, where: Place) -> dict[str, np.ndarray]:
    """Ids, labels and digests of a split's examples, without reading their media."""
    folder = schema.split_folder(data_dir, where.name, VERSION)
    with (folder / f"index_{where.split}.npz").open("rb") as opened, np.load(opened) as file:
        columns = {name: file[name] for name in file.files}
    if where.positions is None:
        return columns
    return {name: column[where.positions] for name, column in columns.items()}


def find(data_dir: str | os.PathLike, stored: str, name: str, split: str) -> Place:
    """Where the split of a view lies.

    Args:
        data_dir: where sets are prepared.
        stored: the stored set.
        name: the view's, e.g. "dfew/fold1".
        split: of it.

    Raises:
        UserError: not prepared, or no such split.
    """
    views = read_views(data_dir, stored)
    if name not in views:
        known = f" (prepared are {', '.join(views)})" if views else ""
        raise UserError(
            f"{data_dir}: {name} is not prepared{known}; run `emollama data prepare {name} "
            "--source DIR` first"
        )
    if split not in views[name]:
        raise UserError(f"{name}: there is no split {split!r}; choose one of "
                        f"{', '.join(views[name])}")  # fmt: skip
    stored_split, positions = views[name][split]
    return Place(stored, stored_split, positions)


def open_place(data_dir: str | os.PathLike, where: Place, classes: Sequence[str]) -> Examples:
    """Opens the examples at a place: lazy, random access, picklable.

    Args:
        data_dir: where sets are prepared.
        where: of `find`.
        classes: of the category question; a view may have fewer than are stored.
    """
    whole = schema.open_prepared(data_dir, where.name, VERSION, where.split)
    metadata = read_metadata(data_dir, where.name)
    assert metadata is not None
    fewer = tuple(classes) != tuple(metadata["classes"])
    if where.positions is None and not fewer:
        return whole
    positions = range(len(whole)) if where.positions is None else where.positions
    return View(whole, positions, tuple(classes) if fewer else None)


class View(Sequence):
    """Some examples of a stored split, in an order of their own."""

    def __init__(
        self,
        whole: Examples,
        positions: Sequence[int],
        classes: tuple[str, ...] | None,
    ):
        self._whole, self._positions, self._classes = whole, positions, classes

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of a split of {len(self)}")
        example = self._whole[self._positions[index]]
        if self._classes is None:
            return example
        _, *others = json.loads(example["items"])
        first = category_item(self._classes, int(example["label"]), example["kind"])
        return {**example, "items": json.dumps([first, *others])}
