"""`emollama data prepare`: a data set's examples, and the priors of every face in it, once."""

import pathlib
from collections.abc import Iterable, Sequence

from rich.console import Console

from emollama_jax.config import Config
from emollama_jax.data import sets
from emollama_jax.data.split import Split, prepared
from emollama_jax.faces.priors import prepare_priors
from emollama_jax.faces.reader import Reader, local_mesh
from emollama_jax.locks import hold
from emollama_jax.models.facexformer import FaceXFormer
from emollama_jax.models.mtcnn import Detector
from emollama_jax.paths import on_disk
from emollama_jax.sharding.distributed import alone
from emollama_jax.status import Bars


def prepare_source(
    cfg: Config,
    face: FaceXFormer,
    name: str,
    how: sets.Preparation,
    *,
    splits: Sequence[str],
    console: Console,
) -> pathlib.Path:
    """Prepares a data set under `data.dir`; what is complete is kept.

    Args:
        cfg: config with the `data` section to use.
        face: reads the faces.
        name: the set, e.g. "dfew", "own/office" or "actionfaces/images".
        how: from what, and with what limits; its processes also decode for the faces.
        splits: splits to compute face priors for, as far as the set has them.
        console: terminal for progress.

    Returns:
        The folder of the examples.

    Raises:
        UserError: an unknown data set, a tree that is not the set's, or another process that
            prepares the same one.
    """
    family, data_dir = sets.check_source(name, how), cfg.data.dir
    alone("emollama data prepare")
    on_disk(data_dir, instead=sets.PREPARE_HERE)
    lock = hold(pathlib.Path(data_dir, family.stored(name)), instead="choose another --dir")
    with lock, Bars(console) as bars:

        def tell(line: str) -> None:
            console.print(f"{name}: {line}", highlight=False, markup=False, soft_wrap=True)

        verb = "drawing" if family.drawn else "reading"
        folder, told = family.prepare(name, data_dir, how, bars.bar(f"{name}: {verb}"))
        for line in told:
            tell(line)
        mesh = local_mesh()
        reader, detector = Reader(face, margin=cfg.data.face_margin, mesh=mesh), Detector(mesh=mesh)
        for split in _stored(data_dir, name, splits):
            progress = bars.bar(f"{name}: faces of {split.stored_split}")
            summary = prepare_priors(
                split.stored.examples(split.stored_split),
                pathlib.Path(split.priors_folder),
                reader=reader,
                detect=detector.many,
                progress=progress,
                fingerprint=split.stored.fingerprint,
                threads=how.processes,
            )
            progress(summary.examples, summary.examples)  # also of what was there before
            tell(f"faces of {split.stored_split}: {summary}")
    return folder


def _stored(data_dir: str, name: str, splits: Sequence[str]) -> Iterable[Split]:
    """One split for each stored one behind the splits of all views of a name."""
    every = (
        Split(data_dir, view, split)
        for view, given in prepared(data_dir, name).items()
        for split in given
        if split in splits
    )
    return {split.place: split for split in every}.values()
