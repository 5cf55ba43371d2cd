"""What a run writes down and reads back: Orbax checkpoints of what trains, and the base below it.

A checkpoint holds only what training changes, the parameters that `train.trainable` names with the
optimizer's state, and what is needed to go on exactly: the step, the config, and the state of the
data iterator, which is the same on every host: so a run may go on with other hosts and devices.
All other weights are the *base*, which `init_model` makes again from the config: the package's tiny
towers, imported weights (`weights.py`), or random numbers from the seed. A fingerprint of the base
is kept, since adapters on another base would give wrong answers without any error.

    RUN/checkpoints/STEP/{params, training}; config, base and data as Orbax' custom metadata

Orbax' v1 API is used throughout. A packed run (`packed.py`) is read as a checkpoint is.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp  # where Orbax 0.12 keeps its v1 API
from etils import epath
from jax.sharding import Mesh

from emollama_jax import config, config_weights, packed
from emollama_jax import imported as weights
from emollama_jax.config import Config, MeshConfig
from emollama_jax.errors import UserError
from emollama_jax.imported import attempt
from emollama_jax.models import parameters
from emollama_jax.models.emollama import EmoLlama
from emollama_jax.models.parameters import named_parameters
from emollama_jax.models.rngs import Keys, Rngs, abstract
from emollama_jax.paths import as_path, from_root
from emollama_jax.runs import FOLDER, find, is_packed
from emollama_jax.sharding.distributed import put
from emollama_jax.sharding.mesh import make_mesh
from emollama_jax.sharding.rules import param_shardings

if TYPE_CHECKING:  # asking a question needs no pipeline
    import grain

ONE_DEVICE = MeshConfig(data=1, fsdp=1, tensor=1)
# What may differ between a checkpoint and the run that continues it; all else would change what is
# computed, or what the saved iterator means.
FREE = (
    "name",
    "weights",  # imported ones may have moved; the base's fingerprint tells them apart
    "mesh",
    "distributed",
    "generate",
    "xla",
    "data.dir",
    "data.workers",
    "data.broken_share",
    "train.steps",
    "train.save_every",
    "train.keep",
    "train.log_every",
)


def matching(patterns: Iterable[str], paths: Collection[str], *, key: str) -> frozenset[str]:
    """The parameter paths that any of the regular expressions matches as a whole.

    Args:
        patterns: e.g. "llama/.*lora_[AB]".
        paths: of all parameters.
        key: the config key that holds the patterns, for the message.

    Raises:
        UserError: not a regular expression, or one that matches nothing.
    """
    found: set[str] = set()
    for pattern in patterns:
        try:
            matched = [path for path in paths if re.fullmatch(pattern, path)]
        except re.error as error:
            raise UserError(f"{key}: {pattern!r} is not a regular expression: {error}") from None
        if not matched:
            near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0) or sorted(paths)[:3]
            raise UserError(
                f"{key}: {pattern!r} matches no parameter (near: {', '.join(near)}): patterns "
                "match whole paths"
            )
        found.update(matched)
    return frozenset(found)


def init_model(cfg: Config, mesh: Mesh, *, given: Iterable[str] = ()) -> EmoLlama:
    """The model that a run starts from: the base towers, and random numbers from the seed.

    Every leaf is born on its devices, and what does not train in `train.frozen_dtype`. What a file
    holds is not drawn first.

    Args:
        cfg: of the run.
        mesh: of `make_mesh`.
        given: patterns of what the caller fills, e.g. from a checkpoint. It stays abstract: shape,
            dtype and sharding.
    """

    def make(rngs: Rngs) -> EmoLlama:
        return EmoLlama(cfg.model, rngs=rngs)

    model = abstract(make)
    leaves = named_parameters(model)
    trainable = matching(cfg.train.trainable, leaves, key="train.trainable")
    shardings = param_shardings(leaves, mesh, preset=cfg.mesh.preset).params
    elsewhere = matching(given, leaves, key="train.trainable")
    wanted = {
        name: jax.ShapeDtypeStruct(
            leaf.shape,
            jnp.float32 if name in trainable else cfg.train.frozen_dtype,
            sharding=shardings[name],
        )
        for name, leaf in leaves.items()
    }
    imported = _imported(cfg, leaves)
    tiny = _tiny_paths(cfg, leaves)
    random = [name for name in leaves if name not in {*elsewhere, *imported, *tiny}]

    def start() -> dict[str, jax.Array]:
        drawn = named_parameters(make(Keys(cfg.train.seed)))
        return {name: drawn[name].astype(wanted[name].dtype) for name in random}

    values: dict[str, Any] = {name: wanted[name] for name in elsewhere}
    if random:
        # Random numbers are made once: on a CPU, optimising their program takes most of the time.
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        options = {"xla_backend_optimization_level": 0} if on_cpu else None
        places = {name: shardings[name] for name in random}
        values |= jax.jit(start, out_shardings=places, compiler_options=options)()
    values |= weights.load_base(
        imported, {name: wanted[name] for name in imported if name not in elsewhere}
    )
    if tiny:
        shapes = {name: leaf.shape for name, leaf in leaves.items()}
        read = parameters.read_tiny(shapes, parameters.towers(cfg.weights))
        values |= {
            name: put(tensor.astype(wanted[name].dtype), shardings[name])
            for name, tensor in read.items()
            if name not in elsewhere
        }
    for name, leaf in leaves.items():
        leaf.set_value(values[name])
    return model


def base_reference(cfg: Config) -> dict[str, Any]:
    """What the frozen weights are made from, so that a checkpoint can tell them apart."""
    if cfg.weights == "none":
        return {"weights": "none", "seed": cfg.train.seed}
    names = [parameters.TINY[tower] for tower in parameters.towers(cfg.weights)]
    files = {name: parameters.WEIGHTS / f"{name}.safetensors" for name in names}
    for path in files.values():
        if not path.is_file():
            raise UserError(f"{path}: the package's weights are missing: install it again")
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    if cfg.weights == "tiny":
        return {"weights": "tiny", "sha256": digests}
    folders = config_weights.folders(cfg.weights)
    manifests = [weights.read_manifest(folder) for folder in folders]
    prints = sorted([manifest.source, manifest.fingerprint] for manifest in manifests)
    found = {"weights": "imported", "fingerprints": prints, "seed": cfg.train.seed}
    return {**found, "sha256": digests} if digests else found


class State(Protocol):
    """What a checkpoint needs of a train state: `TrainState` of `train/step.py`."""

    step: jax.Array
    params: dict[str, jax.Array]

    def replace(self, **fields: Any) -> Self: ...


class Checkpoints:
    """The checkpoints of one run, written in the background; a context manager."""

    def __init__(self, run: epath.PathLike, cfg: Config):
        """Opens `run`/checkpoints, or makes it.

        Raises:
            UserError: the folder cannot be made.
        """
        self.directory = as_path(run) / FOLDER
        self._metadata = {"config": _plain(config.to_dict(cfg)), "base": base_reference(cfg)}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{run}: cannot be a run's folder: {error.strerror}") from None
        self._orbax = ocp.training.Checkpointer(
            from_root(self.directory),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(cfg.train.keep),
            cleanup_tmp_directories=True,  # of a save that was cut short
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self._orbax.close()

    @property
    def latest(self) -> int | None:
        """The newest complete checkpoint's step."""
        newest = self._orbax.latest
        return None if newest is None else newest.step

    def save(self, state: State, *, data: "grain.DatasetIterator") -> None:
        """Starts writing a checkpoint; returns once the arrays may change again."""
        self._orbax.save_checkpointables_async(
            int(state.step),
            {"params": state.params, "training": state.replace(params={})},
            custom_metadata=self._metadata | {"data": data.get_state()},
        )

    def saved_config(self) -> dict[str, Any]:
        """The config, as a plain tree, that the newest checkpoint was made with."""
        return _read_metadata(self.directory / str(self.latest))["config"]

    def restore(self, state: State, *, data: "grain.DatasetIterator") -> State:
        """Reads the newest checkpoint.

        Args:
            state: what is wanted; leaves have shape, dtype and sharding.
            data: is moved to where the run stopped.

        Raises:
            UserError: a checkpoint of another config or base, or one that cannot be read.
        """
        path = self.directory / str(self.latest)
        saved = _read_metadata(path)
        before = config.completed(saved["config"])
        difference = _first_difference(before, self._metadata["config"])
        if difference is not None:
            raise UserError(
                f"{path}: checkpoint of another config: {difference}; go back to that config or "
                "choose another folder"
            )
        _check_base(path, saved["base"], self._metadata["base"])
        wanted = {
            "params": _abstract(state.params),
            "training": _abstract(state.replace(params={})),
        }
        found = _load(path, wanted)
        data.set_state(saved["data"])
        return found["training"].replace(params=found["params"])


def read_config(path: epath.PathLike) -> Config:
    """The config of a run, of one checkpoint of it, or of a packed run.

    Raises:
        UserError: as of `load_for_inference`.
    """
    path = find(path)
    return config.from_dict(_read_saved(path)["config"], origin=str(path))


def load_for_inference(
    path: epath.PathLike, *, mesh: MeshConfig = ONE_DEVICE
) -> tuple[Config, EmoLlama]:
    """The model of a checkpoint, on its base, and the config that made it.

    Args:
        path: a run (its newest checkpoint is taken), one checkpoint of it, a packed run, or
            `package`.
        mesh: where to put it; one device by default, whatever it was trained on.

    Raises:
        UserError: no checkpoint, one of another base, or one that cannot be read.
    """
    path = find(path)
    saved = _read_saved(path)
    cfg = config.from_dict(saved["config"], origin=str(path))
    _check_base(path, saved["base"], base_reference(cfg))
    model = init_model(cfg, make_mesh(mesh), given=cfg.train.trainable)
    leaves = named_parameters(model)
    trained = matching(cfg.train.trainable, leaves, key="train.trainable")
    wanted = {name: leaves[name].get_value() for name in trained}  # abstract
    if is_packed(path):
        shapes = {name: leaf.shape for name, leaf in wanted.items()}
        read = packed.read(path, shapes, sha256=saved["sha256"])
        values = {
            name: put(tensor.astype(wanted[name].dtype), wanted[name].sharding)
            for name, tensor in read.items()
        }
    else:
        values = _load(path, {"params": wanted})["params"]
    for name, value in values.items():
        leaves[name].set_value(value)
    return cfg, model


def _imported(cfg: Config, leaves: dict[str, Any]) -> dict[str, epath.Path]:
    """The parameters that imported weights fill, and the folder of each."""
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    where = weights.check_base(config_weights.folders(cfg.weights), cfg.model, shapes)
    for path in _tiny_paths(cfg, where):
        tower = f"{config_weights.ONE}{path.split('/')[0]}"
        raise UserError(f"{path}: both in {where[path]} and in {tower}: name one of them")
    return where


def _tiny_paths(cfg: Config, paths: Collection[str]) -> set[str]:
    """The parameters that the package's towers fill."""
    towers = parameters.towers(cfg.weights)
    return {
        path
        for path in paths
        if path.split("/")[0] in towers and not path.endswith(("lora_A", "lora_B"))
    }


def _load(path: epath.Path, wanted: dict[str, Any]) -> dict[str, Any]:
    texts: list[str] = []
    found, failure = attempt(
        lambda: _telling(texts, lambda: ocp.load_checkpointables(from_root(path), wanted))
    )
    if failure is None:
        return found
    raise UserError(f"{path}: broken checkpoint: {_broken(path, texts)}: {_instead(path)}")


def _telling(texts: list[str], read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Reads; an error and those that it came from leave their texts."""
    try:
        return read()
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            texts.append(" ".join(str(cause).split()))
            cause = cause.__cause__ or cause.__context__
        raise


def _broken(path: epath.Path, texts: Sequence[str]) -> str:
    """Which file of a checkpoint is at fault, or else what Orbax says.

    Orbax reports a damaged file as one that none of its handlers can read.
    """
    parts = [part for part in ("params", "training") if (path / part).is_dir()]
    arrays = [
        f"{part}/array_metadatas/{p.name}"
        for part in parts
        for p in (path / part / "array_metadatas").glob("*")
    ]
    for name in ("_CHECKPOINT_METADATA", *(f"{part}/_METADATA" for part in parts), *arrays):
        try:
            json.loads((path / name).read_text())
        except FileNotFoundError:
            return f"{name} is missing"
        except ValueError:
            return f"{name} is damaged"
    for part in parts:
        if not (path / part / "manifest.ocdbt").exists():
            return f"{part}/manifest.ocdbt is missing"
    for text in texts:
        files = re.findall(r'file "([^"]+)"', text.partition("[tensorstore_spec")[0])
        if files:
            name = files[-1].rpartition(f"/{path.name}/")[2].rstrip("/")
            return f"{name} is damaged" if (path / name).exists() else f"{name} is missing"
    told = [text for text in texts if text and "incompatible handler" not in text]
    return (told or ["no reason given"])[0][:200]


def _instead(path: epath.Path) -> str:
    """The next step of who has a broken checkpoint."""
    steps = sorted(int(p.name) for p in path.parent.iterdir() if p.name.isdigit())
    older = [step for step in steps if step < int(path.name)]
    if not older:
        return "delete this folder and train anew; there is no earlier step"
    there = ", ".join(map(str, older))
    return f"delete this folder to go back to step {older[-1]} (earlier steps there: {there})"


def _read_saved(path: epath.Path) -> dict[str, Any]:
    """The config and the base of a checkpoint or a packed run."""
    return packed.read_about(path) if is_packed(path) else _read_metadata(path)


def _read_metadata(path: epath.Path) -> dict[str, Any]:
    """The config and the base that a checkpoint was made with, and where its data stood."""

    def read() -> dict[str, Any]:
        saved = ocp.metadata(from_root(path), "params").custom_metadata
        return {key: saved[key] for key in ("config", "base", "data")}

    texts: list[str] = []
    found, failure = attempt(lambda: _telling(texts, read))
    if failure is None:
        return found
    raise UserError(
        f"{path}: not a checkpoint of this program, or a broken one: {_broken(path, texts)}: "
        f"{_instead(path)}"
    )


def _check_base(path: epath.Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    if saved != now:
        raise UserError(
            f"{path}: trained on other base weights ({_first_difference(saved, now)}): use the "
            "version that trained it, or train again"
        )


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _plain(tree: Any) -> Any:
    """As JSON gives it back: tuples become lists."""
    return json.loads(json.dumps(tree))


def _first_difference(saved: Any, now: Any, key: Sequence[str] = ()) -> str | None:
    """`key: checkpoint …, now …` of the first leaf that differs and is not free to."""
    name = ".".join(key)
    if name in FREE:
        return None
    if isinstance(saved, dict) and isinstance(now, dict):
        for part in [*now, *(part for part in saved if part not in now)]:
            difference = _first_difference(saved.get(part), now.get(part), (*key, part))
            if difference is not None:
                return difference
        return None
    return None if saved == now else f"{name}: checkpoint {saved!r}, now {now!r}"
