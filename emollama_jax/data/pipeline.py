"""Data sets → mixture → batches, on Grain's Dataset API.

    source → seed → shuffle → repeat → draw ┐
    source → seed → shuffle → repeat → draw ┴ mix → a step's examples → encode text → pack rows
        → slice by host → decode media → lay out → prefetch

With `data.packed` every step has the same number of examples, images and clips mixed, in rows of
one static shape (`rows.py`). Without, every step is wholly of images or wholly of clips, an example
a row: two static shapes. Which examples, and each one's random choices, are a function of the seed
and the step alone. So neither the number of hosts nor of worker processes changes them, and the
state of an iterator is one number.

What differs from LLaMA-VID: it groups examples by length and replaces a broken one by a random
other. Here a broken one becomes a sentinel without weight, is named in the log, and too many stop
the run.
"""

import dataclasses
import functools
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from emollama_jax.batch import Batch
from emollama_jax.config import Config
from emollama_jax.data.elements import Element, Encoder, Examples, Shown
from emollama_jax.data.rows import RowShape, lay_out, pack, packed_shape, real, shape_of_kind, stack
from emollama_jax.data.split import Split
from emollama_jax.errors import UserError
from emollama_jax.terms import Kind
from emollama_jax.workers import end_with_parent

THREADS = 2  # that make batches, in the main process or in each worker
AHEAD = 2  # batches made before they are asked for
FEW = 1000  # the share of broken media is not judged on fewer examples

_log = logging.getLogger(__name__)


def open_sources(cfg: Config) -> list[Split]:
    """The splits of a config's sources, with the conversations that were made for them.

    Raises:
        UserError: no such set, or not prepared.
    """
    splits = (Split(cfg.data.dir, source.name, source.split) for source in cfg.data.sources)
    return [split.instructed() for split in splits]


def make_train_iterator(
    cfg: Config,
    splits: Sequence[Split] | None = None,
    *,
    host_index: int = 0,
    host_count: int = 1,
) -> "TrainIterator":
    """This host's training batches, without end.

    With `data.workers` above 0 a script needs the usual `if __name__ == "__main__":`, since worker
    processes import it anew.

    Args:
        cfg: the sources' weights are shares of the examples, in packed rows; else of the steps
            between the two kinds, and of the examples between the sources of a kind.
        splits: splits of the sources, in their order; None: `open_sources`.
        host_index: index of this process's part of every batch.
        host_count: number of parts; they are consecutive rows, so that all hosts together get the
            batch that one host would.

    Raises:
        UserError: a source, its priors or a size does not fit.
    """
    if not cfg.data.sources:
        raise UserError("data.sources is empty: name at least one data set")
    encoder = Encoder(cfg)
    splits = open_sources(cfg) if splits is None else splits
    sources = [
        Examples(encoder, split, kind=source.kind, items=source.items)
        for source, split in zip(cfg.data.sources, splits, strict=True)
    ]
    host = {"index": host_index, "count": host_count}
    if cfg.data.packed is not None:
        rows = _local_rows(cfg, host_count)
        steps = _Packed(draw_mixture(sources, cfg), encoder, sources, rows=rows, **host)
    else:
        kinds, weights = _kinds(sources, cfg)
        steps = _mix([_alike(each, kind, encoder, sources, host) for kind, each in kinds], weights)
    return TrainIterator(
        steps, workers=cfg.data.workers, watch=_Watch(cfg, examples=_distinct(sources))
    )


def draw_mixture(sources: Sequence[Examples], cfg: Config) -> grain.MapDataset:
    """Endless (number of the source, position, seed of its choices), in the sources' shares.

    The two kinds are mixed first, so that steps hold as equal numbers of each as can be.
    """
    kinds, weights = _kinds(sources, cfg)
    return _mix([drawn for _, drawn in kinds], weights)


def _kinds(
    sources: Sequence[Examples], cfg: Config
) -> tuple[list[tuple[Kind, grain.MapDataset]], list[float]]:
    """What is drawn of each kind that there is, and the kinds' weights."""
    found, weights = [], []
    for kind in ("image", "clip"):
        numbers = [i for i, examples in enumerate(sources) if examples.kind == kind]
        if numbers:
            found.append((kind, _drawn(sources, numbers, cfg)))
            weights.append(sum(cfg.data.sources[i].weight for i in numbers))
    return found, weights


def _alike(
    drawn: grain.MapDataset,
    kind: Kind,
    encoder: Encoder,
    sources: Sequence[Examples],
    host: Mapping[str, int],
) -> grain.MapDataset:
    """Steps of one kind, an example a row."""
    size = _local_batch(encoder.cfg, kind, host["count"])
    shape = shape_of_kind(encoder.cfg, kind, rounds=encoder.cfg.data.rounds)
    rows = _Share(drawn, rows=size, **host).map(_Decode(sources))
    laid = functools.partial(_lay, shape=shape, encoder=encoder)
    return rows.batch(size, drop_remainder=True, batch_fn=laid)


def _lay(
    elements: Sequence[Element], *, shape: RowShape, encoder: Encoder
) -> tuple[Batch, list[str]]:
    """A batch, and what is wrong with some of its examples."""
    batch = stack(elements, shape=shape, encoder=encoder)
    return batch, [element.trouble for element in elements if element.trouble]


class TrainIterator(grain.DatasetIterator):
    """Batches by step. Its state is the number of the next step, so it resumes exactly.

    Orbax saves it as it saves any Grain iterator. `close` ends its threads and processes.
    """

    def __init__(self, steps: grain.MapDataset, *, workers: int, watch: "_Watch"):
        super().__init__()
        self._steps, self._workers, self._watch = steps, workers, watch
        self._step = 0
        self._running: grain.DatasetIterator | None = None

    def __next__(self) -> Batch:
        self._assert_not_closed()
        if self._running is None:
            self._running = self._start()
        batch, trouble = next(self._running)
        self._step += 1
        self._watch(batch, trouble)
        return batch

    def get_state(self) -> dict[str, int]:
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        self._stop()
        self._step = int(state["step"])

    def start_prefetch(self) -> None:
        if self._running is None:
            self._running = self._start()
        self._running.start_prefetch()

    def close(self) -> None:
        self._stop()
        super().close()

    def _start(self) -> grain.DatasetIterator:
        options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
        rest = self._steps.slice(slice(self._step, None))
        dataset = rest.to_iter_dataset(options)
        if self._workers:
            if not flags.FLAGS.is_parsed():  # Grain hands absl's flags on to its workers
                flags.FLAGS.mark_as_parsed()
            processes = grain.MultiprocessingOptions(
                num_workers=self._workers, per_worker_buffer_size=AHEAD
            )
            begin = functools.partial(_begin_worker, os.getpid())
            dataset = dataset.mp_prefetch(processes, worker_init_fn=begin)
        return iter(dataset)

    def _stop(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None


def _begin_worker(parent: int, index: int, count: int) -> None:
    """The first thing that each of Grain's processes does."""
    del index, count
    end_with_parent(parent)


@dataclasses.dataclass(frozen=True)
class EvalBatch:
    """A batch of prompts, and what they are of; the lists leave the padding out."""

    batch: Batch  # rows after the last example have weight 0
    examples: list[Mapping[str, Any]]  # as stored: id, label, subject, media, …
    trouble: list[str]  # why an example's frames are black, "" if they are not


def make_eval_batches(
    cfg: Config,
    split: Split,
    *,
    batch: int,
    shown: Shown = "all",
    host_index: int = 0,
    host_count: int = 1,
) -> Iterator[EvalBatch]:
    """Every example of a split once, in order, with the category question as the prompt.

    Args:
        cfg: the run's.
        split: split to evaluate.
        batch: rows of a batch, all hosts together; the last ones are padded, so that every host
            gets the same number of batches.
        shown: "all" frames, a clip's "middle" frame alone, or a "blank".
        host_index: as in `make_train_iterator`, as is `host_count`.
    """
    encoder = Encoder(cfg)
    examples = Examples(encoder, split, kind=split.kind)
    shape = shape_of_kind(cfg, split.kind, rounds=1)
    count = len(examples)
    padded = grain.MapDataset.range(-(-count // batch) * batch)
    size = batch // host_count
    local = _Share(padded, rows=size, index=host_index, count=host_count)
    rows = local.map(lambda index: _evaluate(examples, index, shown))
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
    laid = functools.partial(_stack_evaluation, shape=shape, encoder=encoder)
    batches = iter(rows.batch(size, batch_fn=laid).to_iter_dataset(options))
    try:
        yield from batches
    finally:
        batches.close()


def _drawn(sources: Sequence[Examples], numbers: Sequence[int], cfg: Config) -> grain.MapDataset:
    """Endless (number of the source, position, seed of its choices), mixed by weight."""
    each = []
    for number in numbers:
        source = sources[number]
        usable = source.split.drawable(source.items)
        if not usable:
            what = "no examples with a conversation" if len(source) else "no examples"
            raise UserError(f"{source.split.name}, split {source.split.split}: {what}")
        if balance := cfg.data.sources[number].balance:
            usable = balanced(usable, source.split.index.labels, balance=balance)
        own = int(np.random.SeedSequence([cfg.train.seed, number]).generate_state(1)[0])
        positions = grain.MapDataset.source(usable).seed(own).shuffle().repeat()
        each.append(positions.random_map(functools.partial(_draw, number)))
    return _mix(each, [cfg.data.sources[number].weight for number in numbers])


def balanced(positions: Sequence[int], labels: Sequence[int], *, balance: float) -> Sequence[int]:
    """Positions of one epoch in which those of rarer classes stand several times.

    A class of n examples stands n^(1 − balance) · m^balance times, m being the largest class's
    number. What no whole repetition makes up are examples at even distances, the same ones in
    every epoch.

    Args:
        positions: positions of a split.
        labels: class of every example of the split.
        balance: 0 … 1.
    """
    chosen = np.asarray(positions)
    _, classes, counts = np.unique(
        np.asarray(labels)[chosen], return_inverse=True, return_counts=True
    )
    wanted = np.rint(counts * (counts.max() / counts) ** balance).astype(int)
    repeated = [
        chosen[classes == number][np.arange(times) * counts[number] // times]
        for number, times in enumerate(wanted)
    ]
    return np.sort(np.concatenate(repeated)).tolist()


def _draw(number: int, position: int, rng: np.random.Generator) -> tuple[int, int, int]:
    return number, int(position), int(rng.integers(2**63))


def _mix(datasets: Sequence[grain.MapDataset], weights: Sequence[float]) -> grain.MapDataset:
    return datasets[0] if len(datasets) == 1 else grain.MapDataset.mix(datasets, weights)


def _local_batch(cfg: Config, kind: Kind, hosts: int) -> int:
    field = f"{kind}_batch"
    total = getattr(cfg.train, field)
    if total % hosts or total < hosts:
        raise UserError(f"train.{field} is {total}, wanted a multiple of the {hosts} hosts")
    return total // hosts


def _local_rows(cfg: Config, hosts: int) -> int:
    packed = cfg.data.packed
    assert packed is not None
    if packed.rows % hosts or packed.rows < hosts:
        raise UserError(f"data.packed.rows is {packed.rows}, wanted a multiple of {hosts} hosts")
    return packed.rows // hosts


def _distinct(sources: Sequence[Examples]) -> int:
    """How many examples there are; two sources may read the same split."""
    return sum({(x.split.name, x.split.split): len(x) for x in sources}.values())


class _Share(grain.MapDataset):
    """A host's rows of every batch: `rows` consecutive ones of each `rows` × `count`."""

    def __init__(self, parent: grain.MapDataset, *, rows: int, index: int, count: int):
        super().__init__(parent)
        self._rows, self._index, self._count = rows, index, count

    def __len__(self) -> int:
        return len(self._parent) // (self._rows * self._count) * self._rows

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, self._rows)
        return self._parent[(batch * self._count + self._index) * self._rows + row]


class _Decode:
    """Drawn → element."""

    def __init__(self, sources: Sequence[Examples]):
        self._sources = sources

    def __call__(self, drawn: tuple[int, int, int]) -> Element:
        number, position, seed = drawn
        return self._sources[number].training(position, seed=seed)


class _Packed(grain.MapDataset):
    """This host's rows of every step: drawn examples, packed by their text, then decoded.

    Each host encodes the text of all, which is little beside the media of its own.
    """

    def __init__(
        self,
        parent: grain.MapDataset,
        encoder: Encoder,
        sources: Sequence[Examples],
        *,
        rows: int,
        index: int,
        count: int,
    ):
        super().__init__(parent)
        self._encoder, self._sources = encoder, sources
        self._rows, self._first, self._all = rows, index * rows, rows * count
        assert encoder.cfg.data.packed is not None
        self._examples = encoder.cfg.data.packed.examples * self._all
        self._shape = packed_shape(encoder.cfg)

    def __len__(self) -> int:
        return len(self._parent) // self._examples

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        first = index * self._examples
        drawn: list[Any] = [self._parent[first + i] for i in range(self._examples)]
        told = [self._sources[number].told(position, seed=seed) for number, position, seed in drawn]
        items = [(self._sources[d[0]].kind, t.text) for d, t in zip(drawn, told, strict=True)]
        packing = pack(items, encoder=self._encoder, rows=self._all, shape=self._shape)

        def decoded(item: int) -> Element:
            number, position, seed = drawn[item]
            return self._sources[number].training(position, seed=seed, told=told[item])

        mine = packing.rows[self._first : self._first + self._rows]
        rows = [[decoded(item) for item in row] for row in mine]
        batch = lay_out(rows, shape=packing.shape, encoder=self._encoder)
        return batch, [element.trouble for row in rows for element in row if element.trouble]


class _Watch:
    """Names every broken example once and stops the run when there are too many."""

    def __init__(self, cfg: Config, *, examples: int):
        self._cfg, self._examples, self._share = cfg, examples, cfg.data.broken_share
        self._seen = 0
        self._broken: set[str] = set()  # by the example's name
        self._grown: set[tuple[str, ...]] = set()  # what was said of shapes

    def __call__(self, batch: Batch, trouble: Sequence[str]) -> None:
        self._seen += real(batch)["examples"]
        self._tell_growth(batch)
        for line in trouble:
            name = line.partition(": ")[0]
            if name not in self._broken:
                self._broken.add(name)
                _log.warning("%s (%d broken so far)", line, len(self._broken))
        judged = min(self._examples, max(self._seen, FEW))
        allowed = self._share * judged
        if judged < self._examples:  # a part may by chance hold more than its share
            allowed += 3 * math.sqrt(allowed)
        if len(self._broken) > allowed:
            raise UserError(
                f"{len(self._broken)} broken examples among the first {judged}, more than "
                f"data.broken_share = {self._share}; the last one is {trouble[-1]}"
            )

    def _tell_growth(self, batch: Batch) -> None:
        """Says once of each larger shape what it cost, since each is compiled anew."""
        packed = self._cfg.data.packed
        if packed is None:
            return
        found = {
            "tokens": batch.ids.shape[1],
            "frames": batch.frames.shape[1],
            "again": batch.again.shape[1],
            "question_length": batch.questions.shape[2],
        }
        larger = tuple(
            f"{name} {size} (data.packed.{name} is {getattr(packed, name)})"
            for name, size in found.items()
            if size > getattr(packed, name)
        )
        if larger and larger not in self._grown:
            self._grown.add(larger)
            _log.warning(
                "a step does not fit into its rows and gets larger ones, compiled apart: %s; if "
                "this comes often, raise the setting or lower data.packed.examples",
                ", ".join(larger),
            )


def _evaluate(
    examples: Examples, index: int, shown: Shown
) -> tuple[Element, Mapping[str, Any] | None]:
    """A row; rows of the padding repeat the last example, without weight."""
    element, example = examples.evaluation(min(index, len(examples) - 1), shown=shown)
    if index < len(examples):
        return element, example
    return dataclasses.replace(element, weight=0.0), None


def _stack_evaluation(
    rows: Sequence[tuple[Element, Mapping[str, Any] | None]], *, shape: RowShape, encoder: Encoder
) -> EvalBatch:
    kept = [(element, example) for element, example in rows if example is not None]
    return EvalBatch(
        batch=stack([element for element, _ in rows], shape=shape, encoder=encoder),
        examples=[example for _, example in kept],
        trouble=[element.trouble for element, _ in kept],
    )
