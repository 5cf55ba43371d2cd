"""The embedded data set `actionfaces`, drawn faces: its family and its TFDS builder.

Two configs, `images` and `clips`, of the schema in `data/builders/schema.py`, as ArrayRecord.
Nothing is downloaded: every example is a pure function of (seed, split, index), drawn by several
processes.
"""

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from etils import epath

from emollama_jax.data.action_units import ACTION_UNITS, EMOTIONS
from emollama_jax.data.builders import schema
from emollama_jax.data.builders.stored import StoredSet
from emollama_jax.data.emotions import LabelSpace
from emollama_jax.data.sets import CENTRES, PICTURE, Preparation, Report, Testing, parse
from emollama_jax.errors import UserError, did_you_mean
from emollama_jax.tiny.actionfaces.examples import Task, make_examples
from emollama_jax.tiny.actionfaces.sample import SPLITS
from emollama_jax.workers import pool as worker_pool

NAME = "actionfaces"
SIZES: Mapping[str, Mapping[str, int]] = {
    "images": {"train": 4000, "validation": 400, "test": 1000},
    "clips": {"train": 1000, "validation": 100, "test": 300},
}
_CHUNK = {"images": 50, "clips": 5}
SPACE = LabelSpace(title=NAME, classes=EMOTIONS, written=EMOTIONS, splits={}, support={})


def _ignore_progress(done: int, total: int) -> None:
    pass


class ActionFaces(schema.Builder):
    """Faces drawn from facial action units."""

    name = NAME
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
        progress: Report,
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
    data_dir: epath.PathLike,
    *,
    config_name: str,
    sizes: Mapping[str, int] | None = None,
    seed: int = 0,
    size: int = 96,
    processes: int = 2,
    progress: Report = _ignore_progress,
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

    stored = StoredSet(data_dir, f"{NAME}/{config_name}")
    folder = Path(stored.folder)
    for unfinished in folder.parent.glob("incomplete.*"):
        shutil.rmtree(unfinished)
    wanted = {**sizes, "seed": seed, "size": size}
    if _settings(stored) == wanted:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        pool = worker_pool(processes)
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
        builder.write()
    return folder


def check(config_name: str) -> None:
    """Refuses a config that is not one of the two.

    Raises:
        UserError: with the two.
    """
    if config_name not in SIZES:
        raise UserError(
            f"{NAME}: unknown config {config_name!r}{did_you_mean(config_name, SIZES)}; choose one "
            f"of {', '.join(SIZES)}"
        )


def _settings(stored: StoredSet) -> dict[str, int] | None:
    """Returns sizes, seed and picture size of a prepared config, None if there is none."""
    info = stored.info
    if info is None:
        return None
    counts = {split: info.splits[split].num_examples for split in info.splits}
    return {**counts, "seed": info.metadata["seed"], "size": info.metadata["size"]}


class DrawnSets:
    """The two configs as data sets that are drawn where they are prepared."""

    names: ClassVar[tuple[str, ...]] = tuple(f"{NAME}/{config}" for config in SIZES)
    testing: ClassVar[Testing] = Testing(
        f"{PICTURE}, or {CENTRES}",
        "the drawn picture; the face crop is FaceXFormer's, of the drawn box",
        open=True,
    )
    folds: ClassVar[int] = 0
    drawn: ClassVar[bool] = True

    def accepts(self, config: str) -> bool:
        if config:
            check(config)
        return bool(config)

    def stored(self, name: str) -> str:
        return name

    def label_space(self, name: str, metadata: Mapping[str, Any] | None) -> LabelSpace:
        return SPACE

    def prepare(
        self, name: str, data_dir: epath.PathLike, how: Preparation, progress: Report
    ) -> tuple[Path, list[str]]:
        folder = prepare(
            data_dir,
            config_name=parse(name).config,
            sizes=how.sizes,
            processes=how.processes,
            progress=progress,
        )
        return folder, []


FAMILY = DrawnSets()
