"""Imported weights: the folder that `tools/convert_torch` writes and that a run starts from.

One Orbax checkpoint of a flat dict, parameter path → array, with a manifest as its metadata: where
the numbers come from, a fingerprint of them, and the sizes of the networks that they fit. A leaf
that stacks layers is stored layer by layer (`path@0`, `path@1`, …), so that writing it takes the
memory of a few layers, and is stacked when it is read. Orbax writes a folder of another name and
renames it at the end, so a folder that is there is whole.

    weights/llama_vid_7b/   llama/…, vision/…, qformer/…, visual_tokens/…
    weights/facexformer/    face/…

A folder with a language model carries its tokenizer's files too, and its conversation format.

A config names such folders under `weights`; together they are the base of a run.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from emollama_jax.config import EmoLlamaConfig, to_dict
from emollama_jax.errors import UserError, attempt, quiet_orbax, some
from emollama_jax.paths import as_path, from_root, is_remote, on_disk

VERSION = 2  # of the format
LAYER = "@"  # between a leaf's path and the number of a layer of it; "#" would end a gs:// URL
TOGETHER = 512 << 20  # bytes of leaves that are read at once
# What of a network's config weights do not depend on, as a rule.
FREE = (
    *("dtype", "remat", "remat_keep", "remat_offload", "attention", "frozen", "dropout", "lora"),
    *("image_mean", "image_std", "race_labels"),
)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder of imported weights says of itself."""

    source: str  # "llama-vid", …
    files: dict[str, int]  # name → bytes, of what was read
    fingerprint: str  # SHA-256 over the names, shapes, dtypes and first bytes of what was read
    dtype: str  # "bfloat16", "float32", or "source": each tensor's own
    model: dict[str, dict[str, Any]]  # section of the model's config → its fields
    notes: tuple[str, ...]  # what was left out and why


def sizes(
    cfg: EmoLlamaConfig, sections: Iterable[str], *, free: Collection[str]
) -> dict[str, dict[str, Any]]:
    """The fields of a model's sections that weights must fit, e.g. heads, eps, theta.

    Args:
        cfg: config of the model.
        sections: names of its fields; "lora" stands for LLaMA's adapters.
        free: fields that they need not fit.
    """
    found = {}
    for section in sections:
        part = cfg.llama.lora if section == "lora" else getattr(cfg, section)
        fields = {key: value for key, value in to_dict(part).items() if key not in free}
        found[section] = json.loads(json.dumps(fields))  # as a manifest gives it back
    return found


class Writer:
    """Writes a folder of weights, some arrays at a time; a context manager.

    Nothing is left behind when it is not finished. On several hosts, every one makes the same
    calls, each with its own shards.
    """

    def __init__(
        self, out: pathlib.Path, manifest: Manifest, *, files: Mapping[str, bytes] | None = None
    ):
        """Opens the folder to be.

        Args:
            out: its path.
            manifest: manifest to write.
            files: other files to write, by name.

        Raises:
            UserError: it is there already, cannot be made, or is a bucket's.
        """
        on_disk(out, instead="write here, then copy it: gcloud storage cp -r FOLDER gs://…")
        self.out = out.absolute()
        self._files = dict(files or {})
        if out.exists():
            raise UserError(f"{out}: already exists: delete it, or choose another folder")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{out}: cannot be made: {error.strerror}") from None
        self._metadata = {"emollama_weights": VERSION, **dataclasses.asdict(manifest)}
        self._finished = False
        self._pending: tuple[Any, dict[str, jax.Array]] | None = None
        self._context = ocp.Context()
        # Trained weights hardly shrink, and compressing them takes longer than writing them.
        self._context.array.saving.use_compression = False
        # One file for each array's shard: OCDBT, the default, packs them into larger ones, which
        # took longer on a disk.
        self._context.array.saving.use_ocdbt = False

    def __enter__(self) -> "Writer":
        self._clear()
        return self

    def __exit__(self, *_: Any) -> None:
        if not self._finished:
            with contextlib.suppress(Exception):  # what stopped the work is already on its way
                self._wait()
            self._clear()

    def _clear(self) -> None:
        """Removes what an unfinished write left."""
        if jax.process_index() == 0:
            for path in self.out.parent.glob(f"{self.out.name}.partial_save*"):
                shutil.rmtree(path, ignore_errors=True)

    def add(self, arrays: Mapping[str, jax.Array]) -> None:
        """Writes arrays in the background; the last ones are on the disk when it returns.

        Args:
            arrays: leaves by path, or their layers by `layer_key`. They are deleted once written.
        """
        self._wait()
        with self._context:
            response = ocp.partial.save_async(
                self.out, dict(arrays), custom_metadata=self._metadata
            )
        self._pending = response, dict(arrays)

    def _wait(self) -> None:
        if self._pending is not None:
            (response, arrays), self._pending = self._pending, None
            response.result()
            for array in arrays.values():
                array.delete()
            self._release(arrays)

    def _release(self, keys: Iterable[str]) -> None:
        """Gives back the memory in which the system keeps copies of files just written.

        They are on the disk and not read again soon. The next ones take this memory, which is
        several times quicker on a virtual machine than memory that its host must find first.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        saves = list(self.out.parent.glob(f"{self.out.name}.partial_save/*/state"))
        for folder in itertools.product(saves, keys):
            for inside, _, files in os.walk(os.path.join(*folder)):
                for name in files:
                    file = os.open(os.path.join(inside, name), os.O_RDONLY)
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                    os.close(file)

    def finish(self) -> None:
        """Makes the folder appear."""
        self._wait()
        if jax.process_index() == 0:
            for name, content in self._files.items():
                (self.out.parent / f"{self.out.name}.partial_save" / name).write_bytes(content)
        with self._context, quiet_orbax():
            ocp.partial.finalize(self.out)
        self._finished = True


def layer_key(path: str, layer: int) -> str:
    """Under what a layer of a leaf is stored."""
    return f"{path}{LAYER}{layer}"


def layer_place(place: Any) -> Any:
    """Where a layer lives before it is stacked, given where the whole leaf will: as that, but for
    the axis of layers."""
    if isinstance(place, NamedSharding):
        return NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
    return place


def read_manifest(folder: epath.PathLike) -> Manifest:
    """The manifest of a folder of weights, on a disk or in a bucket.

    Raises:
        UserError: no such folder, or one of something else.
    """
    return _open(folder).manifest


def leaves_of(folder: epath.PathLike) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every leaf in a folder of weights, by path.

    Raises:
        UserError: as of `read_manifest`.
    """
    return _open(folder).leaves


@dataclasses.dataclass(frozen=True)
class _Folder:
    """What a folder says of itself."""

    manifest: Manifest
    leaves: dict[str, jax.ShapeDtypeStruct]  # whole ones
    layers: dict[str, int]  # of the leaves that are stored layer by layer


def _open(folder: epath.PathLike) -> _Folder:
    folder = as_path(folder)
    file = folder / "_CHECKPOINT_METADATA"
    changed = 0 if is_remote(folder) or not file.exists() else os.stat(file).st_mtime_ns
    return _read(folder, changed)


@functools.lru_cache(maxsize=8)
def _read(folder: epath.Path, changed: int) -> _Folder:
    """Reads it; `changed` is when it was written, so that a folder made again is read again."""
    wanted = "wanted a folder that `python -m tools.convert_torch` wrote (docs/convert.md)"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; {wanted}")

    def read() -> dict[str, Any]:
        metadata = ocp.metadata(from_root(folder))
        fields = dict(metadata.custom_metadata)
        version = fields.pop("emollama_weights")
        return {"version": version, "fields": fields, "stored": dict(metadata.metadata)}

    found, failure = attempt(read)
    if failure:
        raise UserError(f"{folder}: holds no imported weights; {wanted}")
    version, fields, stored = found["version"], found["fields"], found["stored"]
    if version != VERSION:
        raise UserError(
            f"{folder}: written in format {version}, this version reads {VERSION}: convert it again"
        )
    layers = collections.Counter(key.split(LAYER)[0] for key in stored if LAYER in key)
    shapes = {key: leaf.shape for key, leaf in stored.items() if LAYER not in key} | {
        path: (count, *stored[layer_key(path, 0)].shape) for path, count in layers.items()
    }
    leaves = {
        path: jax.ShapeDtypeStruct(
            shape, stored[layer_key(path, 0) if path in layers else path].dtype
        )
        for path, shape in sorted(shapes.items())
    }
    manifest = Manifest(**{**fields, "notes": tuple(fields["notes"])})
    return _Folder(manifest, leaves, dict(layers))


def load(
    folder: epath.PathLike,
    wanted: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
    """Reads leaves to their places, cast to the dtypes wanted.

    Args:
        folder: folder of weights.
        wanted: by path; shape, dtype and, where it matters, sharding. Others are not read.

    Raises:
        UserError: a leaf that is absent or of another shape, or a folder that cannot be read.
    """
    opened = _open(folder)
    held = opened.leaves
    problems = [
        f"{path} is {held[path].shape}, wanted {leaf.shape}"
        if path in held
        else f"{path} is absent"
        for path, leaf in wanted.items()
        if path not in held or held[path].shape != leaf.shape
    ]
    if problems:
        raise UserError(f"{folder}: weights of another config: {some(problems)}")
    values: dict[str, jax.Array] = {}
    for group in _groups(wanted):
        values |= _load(as_path(folder), {path: wanted[path] for path in group}, opened.layers)
    return values


def _groups(wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[list[str]]:
    """Paths that are read at once: for a moment their layers are there twice."""
    group: list[str] = []
    size = 0
    for path, leaf in wanted.items():
        nbytes = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        if group and size + nbytes > TOGETHER:
            yield group
            group, size = [], 0
        group.append(path)
        size += nbytes
    if group:
        yield group


def _load(
    folder: epath.Path,
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    layers: Mapping[str, int],
) -> dict[str, jax.Array]:
    stored = {}
    for path, leaf in wanted.items():
        if path in layers:
            place = layer_place(leaf.sharding)
            layer = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=place)
            stored |= {layer_key(path, i): layer for i in range(layers[path])}
        else:
            stored[path] = leaf
    context = ocp.Context()
    context.pytree.loading.partial_load = True

    def read() -> dict[str, Any]:
        with context:
            return ocp.load(from_root(folder), stored)

    found, failure = attempt(read)
    if failure:
        why = failure[0].split(". See full")[0][:200]
        raise UserError(f"{folder}: a file in it is missing or broken: convert it again ({why})")
    return {
        path: _stack([found[layer_key(path, i)] for i in range(layers[path])], place=leaf.sharding)
        if path in layers
        else found[path]
        for path, leaf in wanted.items()
    }


def _stack(layers: Sequence[jax.Array], *, place: Any) -> jax.Array:
    return jax.jit(jnp.stack, out_shardings=place)(list(layers))


def load_numpy(folder: epath.PathLike, paths: Sequence[str]) -> dict[str, np.ndarray]:
    """Leaves on this host, as they were written.

    Raises:
        UserError: as of `load`.
    """
    held = leaves_of(folder)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    absent = [path for path in paths if path not in held]
    if absent:
        raise UserError(f"{folder}: {', '.join(absent)} is not in it")
    wanted = {
        path: jax.ShapeDtypeStruct(held[path].shape, held[path].dtype, sharding=here)
        for path in paths
    }
    return {path: np.asarray(leaf) for path, leaf in load(folder, wanted).items()}


def check_base(
    folders: Iterable[epath.PathLike],
    cfg: EmoLlamaConfig,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, epath.Path]:
    """Which leaf comes from which folder of a base.

    Args:
        folders: folders of weights.
        cfg: config of the model to fill.
        shapes: shapes of the model's leaves, by path.

    Raises:
        UserError: a folder for another config, or leaves that two folders hold.
    """
    where: dict[str, epath.Path] = {}
    for folder in map(as_path, folders):
        manifest, leaves = read_manifest(folder), leaves_of(folder)
        now = sizes(cfg, manifest.model, free=())
        for section, fields in manifest.model.items():
            for key, value in fields.items():
                if now.get(section, {}).get(key) != value:
                    raise UserError(
                        f"{folder}: made for model.{section}.{key} {value!r}, the config has "
                        f"{now.get(section, {}).get(key)!r}: set both to the same value"
                    )
        for path, leaf in leaves.items():
            if path in where:
                raise UserError(f"{path}: both in {where[path]} and in {folder}: keep one of them")
            if path not in shapes:
                raise UserError(f"{folder}: {path} has no place in this model")
            if tuple(leaf.shape) != tuple(shapes[path]):
                raise UserError(
                    f"{folder}: {path} is {leaf.shape}, the config's model has {shapes[path]}"
                )
            where[path] = folder
    return where
