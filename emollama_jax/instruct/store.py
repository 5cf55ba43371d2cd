"""Writes instruction data: the field's JSON list, and ArrayRecord for this package's training."""

import io
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from emollama_jax.data.items import CONVERSES, DONE, ITEMS

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


def write(
    folder: pathlib.Path,
    data: Sequence[Mapping[str, Any]],
    *,
    split: str,
    conversations: Mapping[int, Sequence[Mapping[str, str]]],
    made_by: str,
    aside: Mapping[int, str],
    settings: Mapping[str, Any],
    media: bool,
    progress: Callable[[int], None],
) -> None:
    """Writes everything that training or other projects read; the journal is not touched.

    Args:
        folder: of the split's instruction data.
        data: the split as it was prepared, its category items first.
        split: of the set, for the paths in the JSON file.
        conversations: position → LLaVA's list of {"from", "value"}.
        made_by: "gemini:MODEL" or "template".
        aside: position → why it has no conversation.
        settings: kept in DONE with the counts.
        media: also write the pictures and clips, so that the JSON file can be used elsewhere.
        progress: called with the number of examples done.
    """
    from array_record.python.array_record_module import (  # ty: ignore[import-not-found]
        ArrayRecordWriter,
    )

    folder.mkdir(parents=True, exist_ok=True)
    (folder / DONE).unlink(missing_ok=True)
    has = np.zeros(len(data), bool)
    # Groups of one record: training reads single ones, in any order.
    records = ArrayRecordWriter(str(folder / (ITEMS + ".part")), "group_size:1")
    with (
        (folder / (JSON + ".part")).open("w", encoding="utf-8") as listing,
        (folder / (ASIDE + ".part")).open("w", encoding="utf-8") as left_out,
    ):
        separator = "[\n"
        for index in range(len(data)):
            example = data[index]
            items, makers = [json.loads(example["items"])[0]], ["category"]
            if index in conversations:
                items.append(conversations[index])
                makers.append(made_by)
                has[index] = True
            record = {"id": example["id"], "items": items, "made_by": makers}
            records.write(json.dumps(record, ensure_ascii=False).encode())
            path = media_path(example, split)
            key = {"image": "image", "clip": "video"}[example["kind"]]
            for maker, item in zip(makers, items, strict=True):
                what = "category" if maker == "category" else "conversation"
                entry = {
                    "id": f"{example['id']}_{what}",
                    key: path,
                    "conversations": item,
                    "made_by": maker,
                }
                listing.write(separator + json.dumps(entry, ensure_ascii=False))
                separator = ",\n"
            if index in aside:
                line = {"id": example["id"], "why": aside[index]}
                left_out.write(json.dumps(line, ensure_ascii=False) + "\n")
            if media:
                _write_media(folder / MEDIA / path, example["media"])
            progress(index + 1)
        listing.write("\n]\n")
    records.close()
    with (folder / (CONVERSES + ".part")).open("wb") as file:
        np.save(file, has)
    for name in (ITEMS, JSON, ASIDE, CONVERSES):
        os.replace(folder / (name + ".part"), folder / name)
    counts = {"examples": len(data), "conversations": int(has.sum()), "set_aside": len(aside)}
    done = folder / (DONE + ".part")
    done.write_text(json.dumps({**settings, "made_by": made_by, **counts}, indent=1) + "\n")
    os.replace(done, folder / DONE)


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
