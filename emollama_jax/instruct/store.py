"""Writes instruction data: the field's JSON list, and ArrayRecord for this package's training."""

import contextlib
import io
import json
import pathlib
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from emollama_jax.data.builders.stored import Example
from emollama_jax.data.items import CONVERSES, DONE, ITEMS, MEDIUM
from emollama_jax.data.split import Split
from emollama_jax.disk import whole_file

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
    split: Split,
    *,
    conversations: Mapping[int, Sequence[Mapping[str, str]]],
    made_by: str,
    aside: Mapping[int, str],
    media: bool,
    progress: Callable[[int], None],
) -> None:
    """Writes everything that training or other projects read; the journal is not touched.

    Args:
        split: as it was prepared, its category items first; its `instruct_folder` is written.
        conversations: position → LLaVA's list of {"from", "value"}.
        made_by: "gemini:MODEL" or "template".
        aside: position → why it has no conversation.
        media: also write the pictures and clips, so that the JSON file can be used elsewhere.
        progress: called with the number of examples done.
    """
    from array_record.python.array_record_module import (  # ty: ignore[import-not-found]
        ArrayRecordWriter,
    )

    folder, data = pathlib.Path(split.instruct_folder), split.examples
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DONE).unlink(missing_ok=True)
    has = np.isin(np.arange(len(data)), list(conversations))
    with contextlib.ExitStack() as stack:
        # Files get their names in the reverse of this order: the mark that all is there, last.
        halves = {
            name: stack.enter_context(whole_file(folder / name))
            for name in (DONE, CONVERSES, ASIDE, JSON, ITEMS)
        }
        # Groups of one record: training reads single ones, in any order.
        records = ArrayRecordWriter(str(halves[ITEMS]), "group_size:1")
        entries = stack.enter_context(halves[JSON].open("w", encoding="utf-8"))
        left_out = stack.enter_context(halves[ASIDE].open("w", encoding="utf-8"))
        separator = "[\n"
        for index in range(len(data)):
            example = data[index]
            items = {"category": json.loads(example["items"])[0]}
            if index in conversations:
                items[made_by] = conversations[index]
            record = {"id": example["id"], "items": [*items.values()], "made_by": [*items]}
            records.write(_json(record).encode())
            path = media_path(example, split.split)
            for maker, item in items.items():
                entries.write(separator + _json(_entry(example, path, maker, item)))
                separator = ",\n"
            if index in aside:
                left_out.write(_json({"id": example["id"], "why": aside[index]}) + "\n")
            if media:
                _write_media(folder / MEDIA / path, example["media"])
            progress(index + 1)
        entries.write("\n]\n")
        records.close()
        with halves[CONVERSES].open("wb") as file:
            np.save(file, has)
        counts = {"examples": len(data), "conversations": int(has.sum()), "set_aside": len(aside)}
        done = {"set": split.name, "split": split.split, "made_by": made_by, **counts}
        halves[DONE].write_text(json.dumps(done, indent=1) + "\n")


def _json(tree: Any) -> str:
    return json.dumps(tree, ensure_ascii=False)


def _entry(example: Example, path: str, maker: str, item: Any) -> dict[str, Any]:
    """An item as the field writes it."""
    what = "category" if maker == "category" else "conversation"
    return {
        "id": f"{example['id']}_{what}",
        MEDIUM[example["kind"]]: path,
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


def media_path(example: Example, split: str) -> str:
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
