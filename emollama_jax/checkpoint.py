"""Orbax checkpoints of what trains: saved and restored.

A checkpoint holds only what training changes, the parameters that `train.trainable` names with the
optimizer's state, and what is needed to resume exactly: the step, the config, and the state of the
data iterator, which is the same on every host: so a run may resume on other hosts and devices.
All other weights are the *base*, which `base.py` makes again from the config. A fingerprint of the
base is kept, since adapters on another base would give wrong answers without any error.

    RUN/checkpoints/STEP/{params, training}; config, base and data as Orbax' custom metadata

Orbax' v1 API is used throughout. A packed run (`packed.py`) is read as a checkpoint is.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

import jax
import orbax.checkpoint.experimental.v1 as ocp  # where Orbax 0.12 keeps its v1 API
from etils import epath

from emollama_jax import config, packed
from emollama_jax.base import Build, abstract_model, base_reference, base_values
from emollama_jax.config import Config, MeshConfig
from emollama_jax.disk import is_full, lacking, room
from emollama_jax.errors import UserError, attempt
from emollama_jax.models.emollama import EmoLlama
from emollama_jax.paths import as_path, from_root, is_remote
from emollama_jax.runs import FOLDER, find, is_packed
from emollama_jax.sharding.distributed import put
from emollama_jax.sharding.mesh import make_mesh

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
        self._wanted = 0  # bytes of the last checkpoint
        self._full = False  # whether the disk was full
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
        try:
            with self._room():
                self._orbax.close()  # waits for a save that goes on beside
        finally:
            if self._full:  # no save goes on any more
                for half in self.directory.glob("*.orbax-checkpoint-tmp"):
                    half.rmtree(missing_ok=True)

    @property
    def latest(self) -> int | None:
        """The newest complete checkpoint's step."""
        newest = self._orbax.latest
        return None if newest is None else newest.step

    def save(self, state: State, *, data: "grain.DatasetIterator") -> None:
        """Starts writing a checkpoint; returns once the arrays may change again.

        Raises:
            UserError: no room for it, or there was none for the one before.
        """
        self._wanted = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        with self._room(self._wanted):
            self._orbax.save_checkpointables_async(
                int(state.step),
                {"params": state.params, "training": state.replace(params={})},
                custom_metadata=self._metadata | {"data": data.get_state()},
            )

    @contextlib.contextmanager
    def _room(self, wanted: int | None = None) -> Iterator[None]:
        """Work that may find the disk full, maybe by the last save, which goes on beside it.

        Args:
            wanted: bytes that it is about to write; None: what it waits for is under way.
        """
        try:
            if wanted is None or is_remote(self.directory):
                yield
            else:
                with room(self.directory, wanted):
                    yield
        except Exception as error:
            if is_full(error) and not is_remote(self.directory):
                self._full = True
                raise lacking(self.directory, self._wanted) from error
            raise

    def saved_config(self) -> dict[str, Any]:
        """The config, as a plain tree, that the newest checkpoint was made with."""
        return _read_metadata(self.directory / str(self.latest))["config"]

    def restore(self, state: State, *, data: "grain.DatasetIterator") -> State:
        """Reads the newest checkpoint.

        Args:
            state: wanted shapes, dtypes and shardings.
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
                f"{path}: checkpoint of another config: {difference}; use that config or "
                "choose another folder"
            )
        _check_base(path, saved["base"], self._metadata["base"])
        wanted = {"params": state.params, "training": state.replace(params={})}
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
    path: epath.PathLike,
    *,
    mesh: MeshConfig = ONE_DEVICE,
    build: Build = EmoLlama,
    changes: Sequence[str] = (),
) -> tuple[Config, EmoLlama]:
    """The model of a checkpoint, on its base, and the config that made it.

    Args:
        path: a run (its newest checkpoint is taken), one checkpoint of it, a packed run, or
            `package`.
        mesh: mesh to load onto; one device by default, whatever it was trained on.
        build: makes the model, as it did in training.
        changes: overrides of what training did not fix, e.g. "model.llama.frozen=int8".

    Raises:
        UserError: no checkpoint, one of another base, or one that cannot be read.
    """
    path = find(path)
    saved = _read_saved(path)
    cfg = config.override(config.from_dict(saved["config"], origin=str(path)), changes)
    _check_base(path, saved["base"], base_reference(cfg))
    whole = abstract_model(cfg, make_mesh(mesh), build=build)
    wanted = whole.only(whole.trainable)
    values = base_values(whole, given=wanted)
    if is_packed(path):
        shapes = {name: leaf.shape for name, leaf in wanted.items()}
        tensors = packed.load(path, shapes, sha256=saved["sha256"])
        values |= {
            name: put(tensor.astype(wanted[name].dtype), wanted[name].sharding)
            for name, tensor in tensors.items()
        }
    else:
        values |= _load(path, {"params": wanted})["params"]
    return cfg, whole.with_values(values)


def _load(path: epath.Path, wanted: dict[str, Any]) -> dict[str, Any]:
    found, failure = attempt(lambda: ocp.load_checkpointables(from_root(path), wanted))
    if failure:
        raise UserError(f"{path}: broken checkpoint: {_broken(path, failure)}: {_instead(path)}")
    return found


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
    told = [text for text in texts if "incompatible handler" not in text]
    return (told or ["no reason given"])[0][:200]


def _instead(path: epath.Path) -> str:
    """The next step of who has a broken checkpoint."""
    steps = sorted(int(p.name) for p in path.parent.iterdir() if p.name.isdigit())
    older = [step for step in steps if step < int(path.name)]
    if not older:
        return "delete this folder and train again; there is no earlier step"
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

    found, failure = attempt(read)
    if failure:
        raise UserError(
            f"{path}: not a checkpoint of this program, or a broken one: "
            f"{_broken(path, failure)}: {_instead(path)}"
        )
    return found


def _check_base(path: epath.Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    if saved != now:
        raise UserError(
            f"{path}: trained on other base weights ({_first_difference(saved, now)}): use the "
            "version that trained it, or train again"
        )


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
