"""TFDS builder of the embedded data set `actionfaces` (`data/actionfaces`): drawn faces.

Two configs, `images` and `clips`, of the schema in `schema.py`, as ArrayRecord. Nothing is
downloaded: every example is a pure function of (seed, split, index), drawn by several processes.
"""

import contextlib
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from emollama_jax.data.builders import schema
from emollama_jax.errors import UserError
from emollama_jax.tiny.actionfaces.action_units import ACTION_UNITS, EMOTIONS
from emollama_jax.tiny.actionfaces.examples import Task, make_examples
from emollama_jax.tiny.actionfaces.sample import SPLITS

NAME = "actionfaces"
VERSION = "1.0.0"
SIZES: Mapping[str, Mapping[str, int]] = {
    "images": {"train": 4000, "validation": 400, "test": 1000},
    "clips": {"train": 1000, "validation": 100, "test": 300},
}
_CHUNK = {"images": 50, "clips": 5}


def _ignore_progress(done: int, total: int) -> None:
    pass


class ActionFaces(schema.Builder):
    """Faces drawn from facial action units."""

    name = NAME
    VERSION = tfds.core.Version(VERSION)
    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS reads a class attribute of this type)
        tfds.core.BuilderConfig(name=name, description=f"drawn {name}") for name in SIZES
    ]

    def __init__(
        self,
        *,
        sizes: Mapping[str, int],
        seed: int,
        size: int,
        draw: Callable[[Iterable[Task]], Iterable[list[dict[str, Any]]]],
        progress: Callable[[int, int], None],
        **kwargs: Any,
    ):
        """Makes a builder.

        Args:
            sizes: Examples of each split.
            seed: Of the data set.
            size: Width and height of the pictures in pixels.
            draw: Runs `make_examples` on tasks, in order; perhaps in a pool of processes.
            progress: Called with (done, all) examples.
            **kwargs: TFDS's: `config` ("images" or "clips"), `data_dir`, `file_format`.
        """
        self._sizes, self._seed, self._size = sizes, seed, size
        self._draw, self._progress = draw, progress
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Faces drawn from facial action units, seven emotions, splits by person.",
            features=schema.features(len(ACTION_UNITS)),
            metadata=tfds.core.MetadataDict(
                seed=self._seed,
                size=self._size,
                emotions=list(EMOTIONS),
                action_units=list(ACTION_UNITS),
            ),
            disable_shuffling=True,  # readers shuffle; the order on disk is the index
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        before, generators = 0, {}
        for split in SPLITS:
            generators[split] = self._generate_examples(split, before)
            before += self._sizes[split]
        return generators

    def _generate_examples(self, split: str, before: int) -> Iterator[tuple[int, dict[str, Any]]]:
        config, count = self.builder_config.name, self._sizes[split]
        step, total = _CHUNK[config], sum(self._sizes.values())
        chunks = [range(start, min(start + step, count)) for start in range(0, count, step)]
        tasks = [(config, split, indices, self._seed, self._size) for indices in chunks]
        number = 0
        for chunk in self._draw(tasks):
            for example in chunk:
                yield number, example
                number += 1
            self._progress(before + number, total)


def prepare(
    data_dir: str | Path,
    *,
    config_name: str,
    sizes: Mapping[str, int] | None = None,
    seed: int = 0,
    size: int = 96,
    processes: int = 2,
    progress: Callable[[int, int], None] = _ignore_progress,
) -> Path:
    """Draws and stores a config; what is already there with the same settings is kept.

    A preparation that was stopped leaves only an unfinished folder, which the next one removes.

    Args:
        data_dir: Where sets are prepared.
        config_name: "images" or "clips".
        sizes: Examples per split; those not named keep their default. None: all defaults.
        seed: Another seed gives other pictures of the same people.
        size: Width and height in pixels, even.
        processes: How many draw side by side.
        progress: Called with (done, all) examples.

    Returns:
        The folder of the prepared config.
    """
    check(config_name)
    sizes = {**SIZES[config_name], **(sizes or {})}
    for split, count in sizes.items():
        if split not in SPLITS:
            known = ", ".join(SPLITS)
            raise UserError(f"{NAME}: unknown split {split!r}; choose one of {known}")
        if count < 1:
            raise UserError(f"{NAME}: split {split} has {count} examples; it needs at least 1")
    if size < 32 or size % 2:
        raise UserError(f"{NAME}: size is {size} pixels; it must be even and at least 32")

    folder = Path(schema.split_folder(data_dir, f"{NAME}/{config_name}", VERSION))
    for unfinished in folder.parent.glob("incomplete.*"):
        shutil.rmtree(unfinished)
    wanted = {**sizes, "seed": seed, "size": size}
    if _settings(folder) == wanted:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
        stack.callback(pool.shutdown, cancel_futures=True)  # a stop does not draw the rest first
        builder = ActionFaces(
            config=config_name,
            data_dir=str(data_dir),
            file_format="array_record",
            sizes=sizes,
            seed=seed,
            size=size,
            draw=functools.partial(pool.map, make_examples),
            progress=progress,
        )
        tfds.disable_progress_bar()  # TFDS's own bars would tear those of the command
        # TFDS wants a folder for downloads; there are none.
        downloads = stack.enter_context(tempfile.TemporaryDirectory())
        builder.download_and_prepare(download_dir=downloads)
    return folder


def check(config_name: str) -> None:
    """Refuses a config that is not one of the two.

    Raises:
        UserError: with the two.
    """
    if config_name not in SIZES:
        known = ", ".join(SIZES)
        raise UserError(f"{NAME}: unknown config {config_name!r}; choose one of {known}")


def _settings(folder: Path) -> dict[str, int] | None:
    """Returns sizes, seed and picture size of a prepared folder, None if there is none."""
    if not (folder / "dataset_info.json").exists():
        return None
    info = tfds.builder_from_directory(folder).info
    counts = {split: info.splits[split].num_examples for split in info.splits}
    return {**counts, "seed": info.metadata["seed"], "size": info.metadata["size"]}


def open_split(data_dir: str | Path, config_name: str, split: str) -> Sequence[Mapping[str, Any]]:
    """Opens a prepared split of "images" or "clips": lazy, random access, picklable."""
    check(config_name)
    return schema.open_prepared(data_dir, f"{NAME}/{config_name}", VERSION, split)
