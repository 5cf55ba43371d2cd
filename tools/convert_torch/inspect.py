"""A checkpoint's tensors beside our leaves, or the content of a folder of our weights."""

import collections
import pathlib
import re
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from emollama_jax import imported
from emollama_jax.config import EmoLlamaConfig
from emollama_jax.errors import UserError
from tools.convert_torch.bert import open_bert
from tools.convert_torch.dinov2 import open_dinov2
from tools.convert_torch.engine import Row, matches_any
from tools.convert_torch.files import ADAPTER, ONNX, Opened, Tensor, open_paths
from tools.convert_torch.sources import SOURCES, guess


def inspect(
    paths: Sequence[pathlib.Path],
    *,
    source: str | None,
    model: EmoLlamaConfig,
    console: Console,
) -> None:
    """Prints both sides of the table, and what matches nothing.

    Args:
        paths: weight files or folders of them, or one folder that this tool wrote.
        source: name in `SOURCES`; None: the one whose table reads most.
        model: config for the table; a `config.json` beside the weights overrides LLaMA's.
        console: terminal to print to.

    Raises:
        UserError: nothing that can be read.
    """
    if len(paths) == 1 and _is_ours(paths[0]):
        _ours(paths[0], console)
        return
    opened = _open(paths, source)
    if not opened.tensors:
        raise UserError("; ".join(opened.problems))
    source = source or _guessed(opened, model)
    if source is not None and SOURCES[source].open in (open_dinov2, open_bert):
        opened = SOURCES[source].open(paths)  # with what is joined and folded
    rows: list[Row] = []
    if source is not None:
        model, rows = SOURCES[source].fit(opened, model)
    console.print(
        f"{len(opened.tensors)} tensors, {sum(t.nbytes for t in opened.tensors.values()) / 1e9:.2f}"
        f" GB in {len(opened.files)} file{'s' if len(opened.files) > 1 else ''}"
    )
    for line in opened.problems:
        console.print(f"[red]problem[/red] {escape(line)}", highlight=False)
    for line in opened.notes:
        console.print(f"note: {escape(line)}", highlight=False)
    _theirs(opened.tensors, source, model, rows, console)


def _is_ours(path: pathlib.Path) -> bool:
    return path.is_dir() and (path / "_CHECKPOINT_METADATA").exists()


def _open(paths: Sequence[pathlib.Path], source: str | None) -> Opened:
    if source is not None:
        return SOURCES[source].open(paths)
    if any(path.suffix == ONNX for path in paths):
        return SOURCES["dinov2"].open(paths)
    if len(paths) == 1 and (paths[0] / "pnet.pt").is_file():
        return SOURCES["mtcnn"].open(paths)
    folders = [path if path.is_dir() else path.parent for path in paths]
    if any((folder / ADAPTER).is_file() for folder in folders):
        return SOURCES["peft"].open(paths)
    return open_paths(paths)


def _guessed(opened: Opened, model: EmoLlamaConfig) -> str | None:
    found = guess(opened.tensors, model)
    return found.source if found else None


def _theirs(
    tensors: dict[str, Tensor],
    source: str | None,
    model: EmoLlamaConfig,
    more: Sequence[Row],
    console: Console,
) -> None:
    """The table of the source, row by row, then what no row reads."""
    known = SOURCES[source].naming(tensors) if source else None
    if source is None or known is None:
        console.print("no table knows these names" + (f" as {source}" if source else ""))
        _list("matches nothing", tensors, tensors, console)
        return
    naming, prefix = known
    console.print(f"source [bold]{source}[/bold], named as in {escape(naming.name)}")
    ignore = naming.ignore(model)
    table = Table(box=box.SIMPLE)
    for title in ("torch", "layers", "shape", "dtype", "ours", "by"):
        table.add_column(title, overflow="fold")
    used: set[str] = set()
    absent = []
    for row in [*naming.rows(model, prefix), *more]:
        keys = [key for key in tensors if key not in used and row.matches(key)]
        ours = "\n".join(row.paths)
        if not keys:
            absent.append(f"{row.torch} (for {', '.join(row.paths)})")
            continue
        used |= set(keys)
        table.add_row(
            escape(row.torch),
            str(len(keys)) if row.stacked else "",
            _distinct(_shape(tensors[key]) for key in keys),
            _distinct(str(tensors[key].dtype) for key in keys),
            escape(ours),
            escape(row.transform.name),
        )
    console.print(table)
    for line in absent:
        console.print(f"[red]missing[/red] {escape(line)}", highlight=False)
    rest = [key for key in tensors if key not in used]
    left = [key for key in rest if matches_any(key, ignore)]
    for key, count in _collapsed(left).items():
        example = _example(key, left)
        reason = next(why for pattern, why in ignore.items() if re.fullmatch(pattern, example))
        console.print(f"left out: {_times(key, count)}: {escape(reason)}", highlight=False)
    _list("matches nothing", [key for key in rest if key not in left], tensors, console)


def _ours(folder: pathlib.Path, console: Console) -> None:
    """A folder that this tool wrote."""
    manifest = imported.read_manifest(folder)
    files = ", ".join(f"{name} ({size / 1e9:.2f} GB)" for name, size in manifest.files.items())
    source = escape(manifest.source)
    console.print(f"source [bold]{source}[/bold], from {escape(files)}", highlight=False)
    console.print(f"fingerprint {escape(manifest.fingerprint)}", highlight=False)
    for note in manifest.notes:
        console.print(f"note: {escape(note)}", highlight=False)
    table = Table("ours", "shape", "dtype", box=box.SIMPLE)
    for path, leaf in imported.leaves_of(folder).items():
        table.add_row(escape(path), str(tuple(leaf.shape)), str(leaf.dtype))
    console.print(table)


def _list(title: str, keys: Iterable[str], tensors: dict[str, Tensor], console: Console) -> None:
    keys = list(keys)
    for key, count in _collapsed(keys).items():
        tensor = tensors[_example(key, keys)]
        console.print(
            f"[red]{title}[/red]: {_times(key, count)} {_shape(tensor)} {tensor.dtype}",
            highlight=False,
        )


def _collapsed(keys: Iterable[str]) -> dict[str, int]:
    """Keys with their numbers replaced by {i}, and how many each stands for."""
    return dict(collections.Counter(re.sub(r"(?<=\.)\d+(?=\.)", "{i}", key) for key in keys))


def _example(collapsed: str, keys: Iterable[str]) -> str:
    return next(key for key in keys if re.sub(r"(?<=\.)\d+(?=\.)", "{i}", key) == collapsed)


def _times(key: str, count: int) -> str:
    return escape(f"{key} ({count} tensors)" if count > 1 else key)


def _shape(tensor: Tensor) -> str:
    return " × ".join(map(str, tensor.shape)) or "one number"


def _distinct(values: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(values))
