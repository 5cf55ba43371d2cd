"""`emollama data prepare`: a data set's examples, and the priors of every face in it, once."""

import pathlib
from collections.abc import Iterable, Sequence

import jax
from flax import nnx
from rich.console import Console

from emollama_jax import config_weights, imported
from emollama_jax.config import Config
from emollama_jax.data import sets
from emollama_jax.data.split import Split, prepared
from emollama_jax.errors import UserError
from emollama_jax.faces.priors import prepare_priors
from emollama_jax.faces.reader import Reader, local_mesh
from emollama_jax.locks import hold
from emollama_jax.models import parameters
from emollama_jax.models.emollama import EmoLlama
from emollama_jax.models.facexformer import FaceXFormer
from emollama_jax.models.mtcnn import Detector
from emollama_jax.models.parameters import named_parameters
from emollama_jax.models.rngs import Keys, Rngs, abstract
from emollama_jax.paths import on_disk
from emollama_jax.sharding.distributed import alone
from emollama_jax.status import Bars


def load_face(cfg: Config) -> FaceXFormer:
    """The FaceXFormer that a run of this config starts from, without the rest of the model.

    Raises:
        UserError: imported weights that do not fit, or that hold no FaceXFormer.
    """

    def make(rngs: Rngs) -> FaceXFormer:
        return FaceXFormer(cfg.model.face, rngs=rngs)

    if cfg.weights == "none":
        return nnx.jit(lambda: make(Keys(cfg.train.seed)))()
    face = abstract(make)
    leaves = named_parameters(face)
    if "face" in parameters.towers(cfg.weights):
        parameters.load(face, parameters.WEIGHTS / f"{parameters.TINY['face']}.safetensors")
        return face
    model = abstract(lambda rngs: EmoLlama(cfg.model, rngs=rngs))
    shapes = {name: leaf.shape for name, leaf in named_parameters(model).items()}
    folders = config_weights.folders(cfg.weights)
    where = imported.check_base(folders, cfg.model, shapes)
    if absent := [name for name in leaves if f"face/{name}" not in where]:
        raise UserError(
            f"weights: face/{absent[0]} is in none of {', '.join(folders)}: import "
            "FaceXFormer with python -m tools.convert_torch and name its folder too"
        )
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {
        f"face/{name}": jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one)
        for name, leaf in leaves.items()
    }
    for name, value in imported.load_base(where, wanted).items():
        leaves[name.removeprefix("face/")].set_value(value)
    return face


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
        cfg: whose `data` holds.
        face: reads the faces.
        name: the set, e.g. "dfew", "own/office" or "actionfaces/images".
        how: from what, and with what limits; its processes also decode for the faces.
        splits: that get face priors, as far as the set has them.
        console: where progress goes.

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
