"""`emollama data prepare`: a data set's examples, and the priors of every face in it, once."""

import pathlib
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from emollama_jax.config import Config
from emollama_jax.data.builders import actionfaces
from emollama_jax.data.pipeline import open_source
from emollama_jax.errors import UserError
from emollama_jax.faces.priors import Reader, prepare_priors, priors_folder
from emollama_jax.models.emollama import EmoLlama
from emollama_jax.models.mtcnn import Detector

Report = Callable[[int, int], None]  # (done, all)


def prepare_source(
    cfg: Config,
    model: EmoLlama,
    name: str,
    *,
    sizes: Mapping[str, int] | None,
    splits: Sequence[str],
    processes: int,
    console: Console,
) -> pathlib.Path:
    """Prepares a data set under `data.dir`; what is complete is kept.

    Args:
        cfg: whose `data` and `model.face` hold.
        model: whose FaceXFormer reads the faces.
        name: a builder and its config, e.g. "actionfaces/images".
        sizes: examples of each split that is drawn; None for the builder's own.
        splits: that get face priors.
        processes: that draw side by side.
        console: where progress goes.

    Returns:
        The folder of the examples.

    Raises:
        UserError: an unknown data set.
    """
    check(name)
    config = name.partition("/")[2]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bars:

        def bar(what: str) -> Report:
            task = bars.add_task(f"{name}: {what}", total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        folder = actionfaces.prepare(
            cfg.data.dir,
            config_name=config,
            sizes=sizes,
            processes=processes,
            progress=bar("drawing"),
        )
        reader, detect = Reader(model.face, margin=cfg.data.face_margin), Detector()
        for split in splits:
            prepare_priors(
                open_source(cfg.data.dir, name, split),
                priors_folder(cfg.data.dir, name, split),
                reader=reader,
                detect=detect,
                progress=bar(f"faces of {split}"),
            )
    return folder


def check(name: str) -> None:
    """Refuses a name that `prepare_source` does not take.

    Raises:
        UserError: with the names that it takes.
    """
    known = [f"{actionfaces.NAME}/{config}" for config in actionfaces.SIZES]
    if name not in known:
        raise UserError(f"{name}: no such data set to prepare (known: {', '.join(known)})")
