"""Writes a listed set as a TFDS data set of ArrayRecord shards, with its views and its index.

    DATA/dfew/1.0.0.parts/    shards of a preparation that is under way

A shard is written by one process under a name of its own and renamed when it is whole, so that a
preparation that was stopped resumes with the shards that it lacks. Clips of sets with folds are
stored once: a fold is a view, two lists of positions.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Sequence
from concurrent.futures import as_completed
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from emollama_jax.data.builders import schema
from emollama_jax.data.builders.listing import Entry, Listing, brief
from emollama_jax.data.builders.stored import VERSION, StoredSet, digest
from emollama_jax.data.items import category_item
from emollama_jax.data.media import pack_frames
from emollama_jax.data.sets import Preparation, Report, parse
from emollama_jax.disk import sweep, whole_file
from emollama_jax.errors import UserError
from emollama_jax.paths import parts_folder, write_whole
from emollama_jax.terms import LANDMARKS, Kind
from emollama_jax.workers import pool as worker_pool

SHARD = {"image": 2048, "clip": 128}  # examples of one


class Builder(schema.Builder, skip_registration=True):
    """A TFDS builder of any listed set, whose shards are written side by side.

    Args:
        place: folder of the stored set, e.g. "dfew" or "own/office".
        listing: examples to write.
        data_dir: folder of prepared sets.
        processes: number of worker processes.
        progress: called with (done, all) examples.
    """

    def __init__(
        self,
        place: str,
        listing: Listing,
        *,
        data_dir: epath.PathLike,
        processes: int,
        progress: Report,
    ):
        self._listing, self._processes, self._progress = listing, processes, progress
        self.name, config = parse(place)
        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)  # TFDS warns of configs that no class lists
        try:
            super().__init__(
                config=tfds.core.BuilderConfig(name=config) if config else None,
                data_dir=os.fspath(data_dir),
                file_format="array_record",
            )
        finally:
            logging.set_verbosity(verbosity)

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
        for number, entry in enumerate(self._listing.splits[split]):
            yield number, make_example(entry, self._listing.kind, self._listing.classes)

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        """Writes the shards that are not there yet, then moves all into TFDS's folder."""
        del dl_manager, download_config
        target = pathlib.Path(self.data_dir)
        parts = parts_folder(target.with_name(f"{VERSION}.parts"), fingerprint(self._listing))
        sweep(parts)
        plan = {split: _shards(self._listing, split, parts) for split in self._listing.splits}
        _write([s for shards in plan.values() for s in shards], self._processes, self._progress)
        infos = []
        for split, shards in plan.items():
            written = [json.loads(shard.done.read_text()) for shard in shards]
            template = self._get_filename_template(split_name=split)
            info = tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(shard.entries) for shard in shards],
                num_bytes=sum(part["bytes"] for part in written),
                filename_template=template,
            )
            for shard, name in zip(shards, info.filenames, strict=True):
                shutil.move(shard.path, target / name)
            infos.append(info)
            entries = self._listing.splits[split]
            np.savez(
                target / f"index_{split}.npz",
                id=np.array([entry.id for entry in entries], str),
                label=np.array([entry.label for entry in entries], np.int64),
                digest=np.array([d for part in written for d in part["digests"]], str),
            )
        self.info.set_splits(tfds.core.SplitDict(infos))
        write_views(target, self._listing)
        shutil.rmtree(parts)


@dataclasses.dataclass(frozen=True)
class _Shard:
    path: pathlib.Path
    entries: tuple[Entry, ...]
    kind: Kind
    classes: tuple[str, ...]
    votes: int = 0

    @property
    def done(self) -> pathlib.Path:
        """Written last: its presence says that the shard is whole."""
        return self.path.with_suffix(".json")


def _shards(found: Listing, split: str, parts: pathlib.Path) -> list[_Shard]:
    entries, size = found.splits[split], SHARD[found.kind]
    return [
        _Shard(
            parts / f"{split}-{start:08d}.array_record",
            tuple(entries[start : start + size]),
            found.kind,
            found.classes,
            _votes(found),
        )
        for start in range(0, len(entries), size)
    ]


def _write(shards: Sequence[_Shard], processes: int, progress: Report) -> None:
    total = sum(len(shard.entries) for shard in shards)
    left = [shard for shard in shards if not (shard.done.exists() and shard.path.exists())]
    done = total - sum(len(shard.entries) for shard in left)
    progress(done, total)
    if min(processes, len(left)) <= 1:
        for shard in left:
            done += write_shard(shard)
            progress(done, total)
        return
    pool = worker_pool(processes)
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
    wanted = sum(map(_bytes, shard.entries))
    with whole_file(shard.path, wanted=wanted) as half:
        # Groups of one record, as TFDS writes them: each example is read alone.
        writer = ArrayRecordWriter(os.fspath(half), "group_size:1")
        for entry in shard.entries:
            example = make_example(entry, shard.kind, shard.classes)
            record = features.serialize_example(example)
            writer.write(record)
            size += len(record)
            digests.append(digest(example["media"]))
        writer.close()
    write_whole(epath.Path(shard.done), json.dumps({"bytes": size, "digests": digests}))
    return len(shard.entries)


def _bytes(entry: Entry) -> int:
    """Bytes of an example's media; 0 of what is missing, which is told when it is read."""
    if entry.content is not None:
        return len(entry.content)
    try:
        if entry.media.is_dir():
            return sum(file.stat().st_size for file in os.scandir(entry.media))
        return entry.media.stat().st_size
    except OSError:
        return 0


def make_example(entry: Entry, kind: Kind, classes: Sequence[str]) -> dict[str, Any]:
    """An example of `schema.features`; frame folders are packed, files stay as they are.

    Raises:
        UserError: the file cannot be read at all; what is in it is not looked at.
    """
    try:
        if entry.content is not None:
            media = entry.content
        else:
            folder = entry.media.is_dir()
            media = pack_frames(entry.media) if folder else entry.media.read_bytes()
    except OSError as error:
        raise UserError(f"{entry.media}: cannot be read ({error.strerror})") from None
    boxes = np.array([entry.box] if entry.box else [], np.float32).reshape(-1, 4)
    return {
        "id": entry.id,
        "kind": kind,
        "media": media,
        "label": entry.label,
        "subject": entry.subject,
        "boxes": boxes,
        "landmarks": np.zeros((0, LANDMARKS, 2), np.float32),
        "pose": np.zeros((0, 3), np.float32),
        "agr": np.full(3, -1, np.int64),
        "attributes": np.full(40, np.nan, np.float32),
        "items": json.dumps([category_item(classes, entry.label, kind)]),
        **({"votes": np.array(entry.votes, np.float32)} if entry.votes else {}),
    }


def fingerprint(found: Listing) -> str:
    """A digest of what a listing says: ids, labels, boxes, and how large the media are."""
    head = [VERSION, found.kind, found.classes, found.layout]
    sha = hashlib.sha256(json.dumps(head).encode())
    for split, entries in found.splits.items():
        sha.update(split.encode())
        for entry in entries:
            sha.update(repr((entry.id, entry.label, entry.box, _size(entry))).encode())
            if entry.subject >= 0:
                sha.update(repr(entry.subject).encode())
            if entry.votes:
                sha.update(repr(entry.votes).encode())
    return sha.hexdigest()


def _votes(found: Listing) -> int:
    """How many classes raters voted for; 0 where the set has labels alone."""
    return len(next((entry.votes for entries in found.splits.values() for entry in entries), ()))


def _size(entry: Entry) -> int | str:
    """Of an example's media; what is in no file is known by its content."""
    if entry.content is not None:
        return digest(entry.content)
    # Of a folder, the number of its frames: a look at each would take minutes.
    return len(os.listdir(entry.media)) if entry.media.is_dir() else entry.media.stat().st_size


def prepare(
    data_dir: epath.PathLike,
    place: str,
    found: Listing,
    how: Preparation,
    title: str,
    progress: Report,
) -> pathlib.Path:
    """Stores a listing; what is already there is kept, what was stopped resumes.

    Args:
        data_dir: folder of prepared sets.
        place: folder of the stored set in it, e.g. "dfew".
        found: examples to store.
        how: with what limits.
        title: title of the set, for messages.
        progress: called with (done, all) examples.

    Returns:
        The folder of the prepared set.

    Raises:
        UserError: too many files are missing, or nothing is left.
    """
    stored = StoredSet(data_dir, place)
    folder = pathlib.Path(stored.folder)
    _check_missing(found, folder, title=title, share=how.missing_share)
    if stored.fingerprint != fingerprint(found):
        shutil.rmtree(folder, ignore_errors=True)
        for unfinished in folder.parent.glob("incomplete.*"):
            shutil.rmtree(unfinished)
        Builder(place, found, data_dir=data_dir, processes=how.processes, progress=progress).write()
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
    for split, entries in found.splits.items():
        if not entries:
            raise UserError(f"{title}: no examples in {split}")


def write_views(folder: pathlib.Path, found: Listing) -> None:
    """Writes which names and splits a stored set can be opened by."""
    write_whole(epath.Path(folder / "views.json"), json.dumps(found.views))
