"""Writes instruction data: the field's JSON list, and ArrayRecord for this package's training."""

import dataclasses
import io
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from emollama_jax.data.items import CONVERSES, DONE, ITEMS
from emollama_jax.paths import as_path, write_whole

JSON = "conversations.json"
ASIDE = "set_aside.jsonl"
MEDIA = "media"

_ZIP = b"PK\x03\x04"  # a packed folder of frames
# How files begin → their ending.
_ENDINGS = (
    (b"\xff\xd8\xff", ".jpg"),
    (b"\x89PNG", ".png"),
    (b"GIF8", ".gif"),
    (b"BM", ".bmp"),
    (b"\x1aE\xdf\xa3", ".mkv"),
)


@dataclasses.dataclass(frozen=True)
class Conversations:
    """What was made for a split.

    Attributes:
        found: position → LLaVA's list of {"from", "value"}.
        aside: position → why it has no conversation.
        made_by: "gemini:MODEL", "template" or "category".
    """

    found: Mapping[int, Sequence[Mapping[str, str]]]
    aside: Mapping[int, str]
    made_by: str


def write(
    folder: pathlib.Path,
    data: Sequence[Mapping[str, Any]],
    made: Conversations,
    *,
    name: str,
    split: str,
    media: bool,
    progress: Callable[[int], None],
) -> None:
    """Writes everything that training or other projects read; the journal is not touched.

    Args:
        folder: instruction data of the split.
        data: the split as it was prepared, its category items first.
        made: conversations, and why some examples have none.
        name: name of the set.
        split: split of it, also for the paths in the JSON file.
        media: whether to write pictures and clips too, for use of the JSON file elsewhere.
        progress: called with the number of examples done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DONE).unlink(missing_ok=True)
    records = _open_records(folder / (ITEMS + ".part"))
    with (
        (folder / (JSON + ".part")).open("w", encoding="utf-8") as listing,
        (folder / (ASIDE + ".part")).open("w", encoding="utf-8") as left_out,
    ):
        separator = "[\n"
        for index, example in enumerate(data):
            items, makers = [json.loads(example["items"])[0]], ["category"]
            if index in made.found:
                items.append(made.found[index])
                makers.append(made.made_by)
            record = {"id": example["id"], "items": items, "made_by": makers}
            records.write(json.dumps(record, ensure_ascii=False).encode())
            path = media_path(example, split)
            for entry in _entries(example, path, items, makers):
                listing.write(separator + json.dumps(entry, ensure_ascii=False))
                separator = ",\n"
            if index in made.aside:
                line = {"id": example["id"], "why": made.aside[index]}
                left_out.write(json.dumps(line, ensure_ascii=False) + "\n")
            if media:
                _write_media(folder / MEDIA / path, example["media"])
            progress(index + 1)
        listing.write("\n]\n")
    records.close()
    has = np.isin(np.arange(len(data)), list(made.found))
    with (folder / (CONVERSES + ".part")).open("wb") as file:
        np.save(file, has)
    for file_name in (ITEMS, JSON, ASIDE, CONVERSES):
        os.replace(folder / (file_name + ".part"), folder / file_name)
    counts = {"examples": len(data), "conversations": int(has.sum()), "set_aside": len(made.aside)}
    about = {"set": name, "split": split, "made_by": made.made_by, **counts}
    write_whole(as_path(folder / DONE), json.dumps(about, indent=1) + "\n")


def _open_records(path: pathlib.Path) -> Any:
    from array_record.python.array_record_module import (  # ty: ignore[import-not-found]
        ArrayRecordWriter,
    )

    # Groups of one record: training reads single ones, in any order.
    return ArrayRecordWriter(str(path), "group_size:1")


def _entries(
    example: Mapping[str, Any], path: str, items: Sequence[Any], makers: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The lines of the field's JSON list about an example."""
    medium = {"image": "image", "clip": "video"}[example["kind"]]
    for maker, item in zip(makers, items, strict=True):
        what = "category" if maker == "category" else "conversation"
        yield {
            "id": f"{example['id']}_{what}",
            medium: path,
            "conversations": item,
            "made_by": maker,
        }


def _write_media(path: pathlib.Path, media: bytes) -> None:
    """A file; a packed folder of frames becomes that folder again."""
    if not media.startswith(_ZIP):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(media)
        return
    path.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(io.BytesIO(media)) as archive:
        for name in archive.namelist():
            (path / pathlib.PurePath(name).name).write_bytes(archive.read(name))


def made_by(folder: pathlib.Path) -> str | None:
    """Who made the conversations that lie in a folder; None if there are none."""
    path = folder / DONE
    return json.loads(path.read_text())["made_by"] if path.exists() else None


def media_path(example: Mapping[str, Any], split: str) -> str:
    """Where an example's picture or clip lies, relative to the folder of media."""
    parts = re.sub(r"[^\w./-]", "_", example["id"]).split("/")
    stem = "/".join(part for part in parts if part.strip("."))
    media = example["media"]
    ending = next((end for start, end in _ENDINGS if media.startswith(start)), "")
    if media[4:8] == b"ftyp":
        ending = ".mp4"
    elif media[:4] == b"RIFF":
        ending = ".avi" if media[8:11] == b"AVI" else ".webp"
    return f"{split}/{stem}" if stem.endswith(ending) else f"{split}/{stem}{ending}"
