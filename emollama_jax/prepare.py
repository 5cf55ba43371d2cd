"""`emollama data prepare`: a data set's examples, and the priors of every face in it, once."""

import pathlib
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from emollama_jax.config import Config
from emollama_jax.data.builders import registry, store
from emollama_jax.data.builders.listing import Listing, brief
from emollama_jax.data.names import PREPARE_HERE, check_source
from emollama_jax.faces.priors import Summary, prepare_priors, priors_folder
from emollama_jax.faces.reader import Reader, local_mesh
from emollama_jax.locks import hold
from emollama_jax.models.facexformer import FaceXFormer
from emollama_jax.models.mtcnn import Detector
from emollama_jax.paths import on_disk
from emollama_jax.sharding.distributed import alone
from emollama_jax.tiny import builder

Report = Callable[[int, int], None]  # (done, all)


def prepare_source(
    cfg: Config,
    face: FaceXFormer,
    name: str,
    *,
    sizes: Mapping[str, int] | None = None,
    source: pathlib.Path | None = None,
    fold: int | None = None,
    missing_share: float = store.MISSING_SHARE,
    splits: Sequence[str],
    processes: int,
    console: Console,
) -> pathlib.Path:
    """Prepares a data set under `data.dir`; what is complete is kept.

    Args:
        cfg: whose `data` holds.
        face: reads the faces.
        name: the set, e.g. "dfew", "own/office" or "actionfaces/images".
        sizes: examples of each split that is drawn; None for the builder's own.
        source: the official tree, or a user's data; None for what is drawn.
        fold: of a set with folds; None for all.
        missing_share: of the files that lists name; more stop the preparation.
        splits: that get face priors, as far as the set has them.
        processes: that draw or read side by side.
        console: where progress goes.

    Returns:
        The folder of the examples.

    Raises:
        UserError: an unknown data set, a tree that is not the set's, or another process that
            prepares the same one.
    """
    check_source(name, source, fold)
    alone("emollama data prepare")
    on_disk(cfg.data.dir, instead=PREPARE_HERE)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    lock = hold(pathlib.Path(cfg.data.dir, registry.place_of(name)), instead="choose another --dir")
    with lock, Progress(*columns, TimeRemainingColumn(), console=console) as bars:

        def bar(what: str) -> Report:
            task = bars.add_task(f"{name}: {what}", total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        def tell(line: str) -> None:
            console.print(f"{name}: {line}", highlight=False, markup=False, soft_wrap=True)

        if source is None:
            folder = builder.prepare(
                cfg.data.dir,
                config_name=name.partition("/")[2],
                sizes=sizes,
                processes=processes,
                progress=bar("drawing"),
            )
        else:
            folder, found = registry.prepare_set(
                name,
                source,
                cfg.data.dir,
                fold=fold,
                missing_share=missing_share,
                processes=processes,
                progress=bar("reading"),
            )
            for line in _told(found):
                tell(line)
        mesh = local_mesh()
        reader, detector = Reader(face, margin=cfg.data.face_margin, mesh=mesh), Detector(mesh=mesh)
        for stored, split in _places(cfg.data.dir, name, splits):
            progress = bar(f"faces of {split}")
            summary = prepare_priors(
                registry.open_stored(cfg.data.dir, stored, split),
                pathlib.Path(priors_folder(cfg.data.dir, stored, split)),
                reader=reader,
                detect=detector.many,
                progress=progress,
                fingerprint=registry.fingerprint(cfg.data.dir, stored),
                threads=processes,
            )
            progress(summary.examples, summary.examples)  # also of what was there before
            tell(f"faces of {split}: {_counted(summary)}")
    return folder


def _places(data_dir: str, name: str, splits: Sequence[str]) -> list[tuple[str, str]]:
    """The stored (set, split)s behind the splits of all views of a name, each once."""
    found = [
        registry.find(data_dir, view, split)
        for view, given in registry.prepared(data_dir, name).items()
        for split in given
        if split in splits
    ]
    return list(dict.fromkeys((where.name, where.split) for where in found))


def _told(found: Listing) -> list[str]:
    """What the user should know of a tree, a line each."""
    dropped = [f"dropped {rows} rows: {reason}" for reason, rows in found.dropped.items()]
    missing = [f"{len(found.missing)} files are missing and left out: {brief(found.missing)}"]
    layout = [f"media: {found.layout}"] if found.layout != "*" else []
    return [*layout, *found.told, *dropped, *(missing if found.missing else []), *found.notes]


def _counted(summary: Summary) -> str:
    speed = f", {summary.rate:,.1f} frames/s" if summary.frames_done else ""
    return (
        f"{summary.frames:,} frames of {summary.examples:,} examples{speed}; "
        f"{summary.without_face} without a face, {summary.unreadable} unreadable"
    )
