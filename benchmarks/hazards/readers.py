"""Every reader at the edge: for each kind of input some bases, and what reads it."""

import asyncio
import dataclasses
import functools
import io
import json
import pathlib
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.hazards.mutations import (
    Recipe,
    change_bytes,
    change_tree,
    random_bytes,
    random_tree,
)

CLASSES = ("anger", "happiness", "sadness")


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of input.

    Attributes:
        bases: name → bytes, or a tree of plain values.
        dump: makes bytes of a tree.
        read: reads the bytes; gets an empty folder to put them in. It may raise `UserError`.
        text: whether bytes are text, to which numbers and brackets are done.
    """

    bases: Callable[[], Mapping[str, Any]]
    dump: Callable[[Any], bytes]
    read: Callable[[bytes, pathlib.Path], object]
    text: bool = True

    def make(self, recipe: Recipe) -> bytes:
        """The bytes of a recipe."""
        base = self.bases()[recipe.base]
        tree = not isinstance(base, bytes)
        for change in recipe.changes:
            if tree and change[0] in ("value", "wrap", "less", "more"):
                base = change_tree(base, change)
            else:
                base, tree = (self.dump(base) if tree else base), False
                base = change_bytes(base, change)
        return self.dump(base) if tree else base

    def draw(self, rng: Any, name: str) -> Recipe:
        """A recipe: one to four changes of a base."""
        base = rng.choice(sorted(self.bases()))
        tree = not isinstance(self.bases()[base], bytes)
        changes = []
        for _ in range(rng.choice([1, 1, 1, 2, 3, 4])):
            # What changes bytes comes last, if at all: a tree that was written is no tree.
            tree = tree and rng.random() < 0.8
            changes.append(random_tree(rng) if tree else random_bytes(rng, text=self.text))
        return Recipe(name, base, tuple(changes))


def dump_json(tree: Any) -> bytes:
    """As others write it: NaN, lone surrogates and all."""
    return json.dumps(tree).encode()


def dump_lines(rows: Any) -> bytes:
    """JSON lines of a list; of anything else, one line."""
    rows = rows if isinstance(rows, list) else [rows]
    return b"".join(dump_json(row) + b"\n" for row in rows)


# ---- configs


@functools.cache
def _configs() -> dict[str, Any]:
    import yaml

    from emollama_jax.config import config_dir

    return {
        name: yaml.safe_load((config_dir() / f"{name}.yaml").read_text())
        for name in ("tiny", "emollama_7b")
    }


def _dump_yaml(tree: Any) -> bytes:
    import yaml

    return yaml.safe_dump(tree, sort_keys=False).encode("utf-8", "surrogatepass")


def _read_config(data: bytes, folder: pathlib.Path) -> object:
    from emollama_jax.config import load

    path = folder / "config.yaml"
    path.write_bytes(data)
    return load(str(path))


# ---- predictions


def _predictions() -> dict[str, Any]:
    rows = [
        {"id": f"i{n}", "truth": CLASSES[n % 3], "prediction": answer}
        for n, answer in enumerate(["It is anger.", "happiness", '{"anger": 0.9, "fear": 0.1}'])
    ]
    own = [
        {"id": f"i{n}", "source": "raf_db:test", "label": label, "predicted": label}
        | {"text": "x", "scores": {"anger": -1.0, "fear": -2.5}, "parsed": "exact"}
        for n, label in enumerate(("anger", "fear"))
    ]
    csv = b"id,truth,prediction\r\n" + b"".join(
        f"{row['id']},{row['truth']},it is {row['truth']}\r\n".encode() for row in rows
    )
    return {"others": rows, "ours": own, "csv": csv, "list": json.dumps(rows).encode()}


def _read_predictions(data: bytes, folder: pathlib.Path) -> object:
    from etils import epath

    from emollama_jax.evaluate.of_file import evaluate_files, lines
    from emollama_jax.evaluate.options import PredictionFiles
    from emollama_jax.evaluate.publish import publish

    path = folder / "predictions"
    path.write_bytes(data)
    own = b'"predicted"' in data[:2000]
    columns = {} if own else {"truth_column": "truth", "prediction_column": "prediction"}
    files = PredictionFiles(predictions=(path,), id_column=None if own else "id", **columns)
    result = evaluate_files(files)
    publish(result, epath.Path(folder / "out"))
    return lines(result)


# ---- answers and journals


def _answers() -> dict[str, Any]:
    message = {"role": "assistant", "content": "anger"}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 700, "completion_tokens": 5, "total_tokens": 705}
    parts = message | {"content": [{"type": "text", "text": "an"}, {"type": "text", "text": "ger"}]}
    return {
        "answer": {"id": "1", "choices": [choice], "usage": usage},
        "parts": {"choices": [choice | {"message": parts}], "usage": usage},
    }


def _read_answer(data: bytes, folder: pathlib.Path) -> object:
    """A whole question: the client, the session, the journal, and the journal read again."""
    import httpx2

    from emollama_jax.remote import run
    from emollama_jax.remote.journal import Journal
    from emollama_jax.remote.openai import OpenAI
    from emollama_jax.remote.options import Limits
    from emollama_jax.remote.prices import Price
    from emollama_jax.remote.request import Request

    client = OpenAI("http://nowhere/v1", "m", timeout=5)
    asyncio.run(client.close())

    def answer(request: Any) -> httpx2.Response:
        del request
        return httpx2.Response(200, content=data)

    client._http = httpx2.AsyncClient(transport=httpx2.MockTransport(answer))
    request = Request(parts=("q",), max_tokens=5, temperature=0)
    task = run.Task("k", lambda why: request, lambda reply: run.Verdict(reply.text))
    limits = Limits(tries=1, attempts=1, budget=1.0, first_wait=0.0)
    price = Price(1.0, 1.0, "given")
    with Journal(folder / "journal", {"of": 1}) as journal:
        run.ask_all([task], client, journal, limits, price)
        before = journal.spent
    with Journal(folder / "journal", {"of": 1}) as journal:
        if not 0 <= journal.spent <= 1000 or abs(journal.spent - before) > 1e-9:
            raise AssertionError(f"spent {before}, then {journal.spent}")
        return journal.entry("k")


def _journals() -> dict[str, Any]:
    answer = {"answer": "k", "text": "anger", "value": "anger", "why": "", "aside": False}
    return {
        "journal": [
            {"journal": 1, "of": {"of": 1}},
            {"sent": "k", "cost": 0.5},
            answer | {"cost": 0.25, "tokens": [700, 5]},
            {"sent": "l", "cost": 0.5},
            {"failed": "l", "why": "503", "cost": 0.0},
            {"aside": "m", "why": "no picture"},
        ]
    }


def _read_journal(data: bytes, folder: pathlib.Path) -> object:
    from emollama_jax.remote.journal import Journal

    (folder / "journal").write_bytes(data)
    with Journal(folder / "journal", {"of": 1}) as journal:
        journal.sent("z", 0.1)
        if not 0 <= journal.spent < 1e300:
            raise AssertionError(f"spent {journal.spent}")
        return journal.entries


# ---- checkpoints of others


def _checkpoints() -> dict[str, Any]:
    from tools.convert_torch.peft import to_settings
    from tools.convert_torch.settings import to_transformers

    model = _toy()
    index = {f"model.layers.{n}.input_layernorm.weight": "a.safetensors" for n in range(3)}
    return {
        "config.json": to_transformers(model, dtype="float32"),
        "adapter_config.json": to_settings(model.llama),
        "model.safetensors.index.json": {"metadata": {"total_size": 1}, "weight_map": index},
        "header": {
            "model.norm.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            "lm_head.weight": {"dtype": "BF16", "shape": [2, 4], "data_offsets": [16, 32]},
            "__metadata__": {"format": "pt"},
        },
    }


@functools.cache
def _toy() -> Any:
    from emollama_jax.testing.toy_model import TINY

    return TINY.model


def _read_checkpoint(data: bytes, folder: pathlib.Path, *, base: str) -> object:
    """Both what inspects and what plans a conversion."""
    from rich.console import Console
    from safetensors.numpy import save

    from emollama_jax.errors import UserError
    from tools.convert_torch.convert import make_plan
    from tools.convert_torch.inspect import inspect

    plain = save({"model.norm.weight": np.ones(4, np.float32)})
    if base == "header":
        data = struct.pack("<Q", len(data)) + data + bytes(32)
        (folder / "model.safetensors").write_bytes(data)
    else:
        shard = "a.safetensors" if "index" in base else "model.safetensors"
        (folder / shard).write_bytes(plain)
        (folder / base).write_bytes(data)
    said = None
    for read in (
        lambda: inspect(
            [folder], source=None, model=_toy(), console=Console(file=io.StringIO(), width=180)
        ),
        lambda: make_plan("peft" if "adapter" in base else "llama", [folder], _toy()),
    ):
        try:
            read()
        except UserError as error:
            said = error
    if said is not None:
        raise said
    return None


# ---- media


@functools.cache
def _media() -> dict[str, bytes]:
    from PIL import Image

    from emollama_jax.testing.toy_sets import clip, picture

    image = Image.fromarray(picture(90))
    image.putpixel((3, 4), (255, 0, 0))
    found = {}
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000", "AVIF"):
        file = io.BytesIO()
        image.save(file, kind)
        found[kind] = file.getvalue()
    for kind in ("GIF", "WEBP", "PNG"):
        file = io.BytesIO()
        frames = [Image.fromarray(picture(level)) for level in (30, 90, 150)]
        frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=80)
        found[f"animated {kind}"] = file.getvalue()
    found["MP4"] = clip([20, 60, 100, 140])
    return found


def _read_media(data: bytes, folder: pathlib.Path) -> object:
    from emollama_jax.data import media
    from emollama_jax.errors import UserError

    path = folder / "media"
    path.write_bytes(data)
    said = None
    for read in (
        lambda: media.read_image(path),
        lambda: (
            media.is_video(path)
            and media.read_frames(path, lambda count, fps: np.linspace(0, count - 1, 4).astype(int))
        ),
    ):
        try:
            read()
        except UserError as error:
            said = error
    if said is not None:
        raise said
    return None


# ---- own data


def _tables() -> dict[str, Any]:
    rows = [{"path": f"{n}.png", "label": label} for n, label in enumerate(CLASSES * 4)]
    text = "path,label,split\n" + "".join(
        f"{row['path']},{row['label']},{'test' if n % 4 == 0 else 'train'}\n"
        for n, row in enumerate(rows)
    )
    return {"csv": text.encode(), "json": rows}


def _read_table(data: bytes, folder: pathlib.Path) -> object:
    from emollama_jax.data.builders.own import list_own

    for n in range(12):
        (folder / f"{n}.png").write_bytes(_media()["PNG"])
    path = folder / ("list.json" if data.lstrip()[:1] in (b"[", b"{") else "list.csv")
    path.write_bytes(data)
    return list_own(path, "x")


# ---- all


def kinds() -> dict[str, Kind]:
    """Every kind by its name."""
    found = {
        "config": Kind(_configs, _dump_yaml, _read_config),
        "predictions": Kind(_predictions, dump_lines, _read_predictions),
        "answer": Kind(_answers, dump_json, _read_answer),
        "journal": Kind(_journals, dump_lines, _read_journal),
        "media": Kind(_media, bytes, _read_media, text=False),
        "table": Kind(_tables, dump_json, _read_table),
    }
    for base in _checkpoints():
        read = functools.partial(_read_checkpoint, base=base)
        found[f"checkpoint {base}"] = Kind(lambda b=base: {b: _checkpoints()[b]}, dump_json, read)
    return found
