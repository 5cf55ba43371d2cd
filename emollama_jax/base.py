"""A run's model from its config: abstract, or filled with what the run starts from, its *base*.

The base is the package's tiny towers, folders of imported weights (`imported.py`), and for all that
neither holds, random numbers from the seed. Nothing is drawn at random that is filled later, and
every leaf is born on its devices, in its dtype: float32 if it trains, else `train.frozen_dtype`, or
8 bits with float32 scales where the model says so (`models/eight_bits.py`).

Whoever has another model gives `build`: `(cfg.model, rngs=…)` → a module (`testing/toy_model.py`).
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from emollama_jax import config_weights, imported
from emollama_jax.config import Config, EmoLlamaConfig
from emollama_jax.errors import UserError
from emollama_jax.models import eight_bits, parameters
from emollama_jax.models.eight_bits import SCALE
from emollama_jax.models.emollama import EmoLlama
from emollama_jax.models.facexformer import FaceXFormer
from emollama_jax.models.parameters import is_adapter, matching, named_parameters
from emollama_jax.models.rngs import Keys, abstract
from emollama_jax.sharding.distributed import put
from emollama_jax.sharding.rules import param_shardings

# (EmoLlamaConfig, *, rngs) → `EmoLlama`, or what has its `hidden` and `llama`
Build = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class AbstractModel:
    """A run's model without numbers: shapes, dtypes and shardings as the run has them."""

    cfg: Config
    mesh: Mesh
    build: Build
    module: Any
    leaves: dict[str, nnx.Param]  # by path, as at birth; with the names of their axes
    params: dict[str, jax.ShapeDtypeStruct]  # by path
    trainable: frozenset[str]  # paths of what trains
    replicated: tuple[str, ...]  # dimensions whose sharding rule was not followed

    @property
    def places(self) -> dict[str, NamedSharding]:
        """Sharding of each parameter, by path."""
        return {path: leaf.sharding for path, leaf in self.params.items()}

    def with_values(self, values: Mapping[str, jax.Array]) -> Any:
        """The module itself, filled as far as there are values."""
        for path, leaf in self.leaves.items():
            leaf.set_value(values.get(path, self.params[path]))
        return self.module

    @property
    def narrow(self) -> frozenset[str]:
        """Paths of the kernels in 8 bits; a scale stands beside each."""
        return frozenset(path for path, leaf in self.params.items() if leaf.dtype == jnp.int8)

    def only(self, paths: Collection[str]) -> dict[str, jax.ShapeDtypeStruct]:
        """A part of `params`, sorted."""
        return {path: self.params[path] for path in sorted(paths)}


def abstract_model(cfg: Config, mesh: Mesh, *, build: Build = EmoLlama) -> AbstractModel:
    """A run's model without numbers.

    Raises:
        UserError: a pattern of `train.trainable` that no model could match.
    """
    module = abstract(lambda rngs: build(cfg.model, rngs=rngs))
    leaves = named_parameters(module)
    trainable = chosen(cfg, "trainable", leaves, build=build)
    where = param_shardings(leaves, mesh, preset=cfg.mesh.preset)
    narrow = {path for path, leaf in leaves.items() if leaf.dtype == jnp.int8}
    scales = {path + SCALE for path in narrow}
    for path in sorted(trainable & (narrow | scales)):
        section = path.split("/")[0]
        raise UserError(
            f"train.trainable: {path} would train, but model.{section}.frozen is "
            f"{getattr(cfg.model, section).frozen}: set it to float, or choose other patterns"
        )

    def dtype(path: str) -> Any:
        if path in narrow:
            return jnp.int8
        return jnp.float32 if path in trainable | scales else jnp.dtype(cfg.train.frozen_dtype)

    params = {
        path: jax.ShapeDtypeStruct(leaf.shape, dtype(path), sharding=where.params[path])
        for path, leaf in leaves.items()
    }
    return AbstractModel(cfg, mesh, build, module, leaves, params, trainable, where.replicated)


def chosen(
    cfg: Config,
    key: Literal["trainable", "projector"],
    paths: Collection[str],
    *,
    build: Build = EmoLlama,
) -> frozenset[str]:
    """The parameter paths that patterns of `train` choose.

    A pattern may match nothing but a part that this model was told to do without, such as
    `fim/.*` under `model.fim.branches=none`.

    Args:
        cfg: the run.
        key: name of the `train` field that holds the patterns.
        paths: all parameter paths of its model.
        build: makes the model.

    Raises:
        UserError: a pattern that matches nothing even in a model of all parts, or nothing to train.
    """

    def of_all_parts() -> Collection[str]:
        model = _with_all_parts(cfg.model)
        return named_parameters(abstract(lambda rngs: build(model, rngs=rngs)))

    patterns = getattr(cfg.train, key)
    found = matching(patterns, paths, key=f"train.{key}", elsewhere=of_all_parts)
    if key == "trainable" and not found:
        raise UserError(
            f"train.trainable: {', '.join(patterns) or 'no pattern'}: this model has no such part, "
            "so nothing would train: choose others"
        )
    return found


def _with_all_parts(cfg: EmoLlamaConfig) -> EmoLlamaConfig:
    """A model like this one, with what its config may leave out: FIM, adapters, an untied head."""
    lora = dataclasses.replace(cfg.llama.lora, rank=max(1, cfg.llama.lora.rank))
    llama = dataclasses.replace(cfg.llama, lora=lora, tied=False)
    return dataclasses.replace(cfg, llama=llama, fim=dataclasses.replace(cfg.fim, branches="both"))


def init_model(
    cfg: Config, mesh: Mesh, *, given: Collection[str] = (), build: Build = EmoLlama
) -> Any:
    """The model that a run starts from.

    Args:
        cfg: the run.
        mesh: mesh of `make_mesh`.
        given: paths of what the caller fills. It stays abstract: shape, dtype and sharding.
        build: makes the model.
    """
    whole = abstract_model(cfg, mesh, build=build)
    return whole.with_values(base_values(whole, given=given))


def base_values(whole: AbstractModel, *, given: Collection[str] = ()) -> dict[str, jax.Array]:
    """The parameters that a run starts from, by path, each on its devices.

    Args:
        whole: abstract model to fill.
        given: paths that are left out: the caller has them.

    Raises:
        UserError: towers or imported weights that are missing or do not fit.
    """
    cfg, made = whole.cfg, {path + SCALE for path in whole.narrow}  # beside their kernels
    shapes = {path: leaf.shape for path, leaf in whole.params.items() if path not in made}
    folders = _folders(cfg, shapes)
    tiny = _tiny_paths(cfg, shapes)
    random = {path for path in shapes if path not in {*given, *folders, *tiny}}
    random |= {path + SCALE for path in random & whole.narrow}

    def start() -> dict[str, jax.Array]:
        drawn = named_parameters(whole.build(cfg.model, rngs=Keys(cfg.train.seed)))
        return {path: drawn[path].astype(whole.params[path].dtype) for path in sorted(random)}

    values: dict[str, jax.Array] = {}
    if random:
        # Random numbers are made once: on a CPU, optimising their program takes most of the time.
        places = {path: whole.params[path].sharding for path in random}
        on_cpu = whole.mesh.devices.flat[0].platform == "cpu"
        options = {"xla_backend_optimization_level": 0} if on_cpu else None
        values |= jax.jit(start, out_shardings=places, compiler_options=options)()
    wanted = {path: whole.params[path] for path in shapes if path not in given}
    # Wide ones first become narrow, one by one, while there is room.
    for path in sorted(whole.narrow & wanted.keys() & folders.keys()):
        stored = imported.leaves_of(folders[path])[path].dtype
        leaf = wanted.pop(path).update(dtype=stored)
        values |= _narrowed(whole, path, imported.load(folders[path], {path: leaf})[path])
    values |= _load_folders(folders, {p: leaf for p, leaf in wanted.items() if p in folders})
    for path, tensor in _load_tiny(cfg, shapes).items():
        if path in whole.narrow and path in wanted:
            values |= _narrowed(whole, path, tensor)
        elif path in wanted:
            leaf = wanted[path]
            values[path] = put(tensor.astype(leaf.dtype), leaf.sharding)
    return values


def _narrowed(whole: AbstractModel, path: str, kernel: Any) -> dict[str, jax.Array]:
    """A kernel in 8 bits and its scale, by path, each on its devices; the wide one may go."""
    axis = int(whole.leaves[path].axes[0] == "layers")
    places = whole.params[path].sharding, whole.params[path + SCALE].sharding
    kernel = kernel if isinstance(kernel, jax.Array) else put(kernel, places[0])
    narrow = jax.jit(functools.partial(eight_bits.narrow, axis=axis), out_shardings=places)
    values, scale = narrow(kernel)
    kernel.delete()
    return {path: values, path + SCALE: scale}


def load_face(cfg: Config) -> FaceXFormer:
    """The FaceXFormer that a run of this config starts from, without the rest of the model.

    Raises:
        UserError: imported weights that do not fit, or that hold no FaceXFormer.
    """

    cfg = dataclasses.replace(  # priors are kept: they get all digits
        cfg,
        model=dataclasses.replace(
            cfg.model, face=dataclasses.replace(cfg.model.face, frozen="float")
        ),
    )

    def make(rngs: Any) -> FaceXFormer:
        return FaceXFormer(cfg.model.face, rngs=rngs)

    if cfg.weights == "none":
        return nnx.jit(lambda: make(Keys(cfg.train.seed)))()
    face = abstract(make)
    if "face" in config_weights.towers(cfg.weights):
        parameters.fill(face, tower_file("face"))
        return face
    leaves = {f"face/{path}": leaf for path, leaf in named_parameters(face).items()}
    model = named_parameters(abstract(lambda rngs: EmoLlama(cfg.model, rngs=rngs)))
    where = _folders(cfg, {path: leaf.shape for path, leaf in model.items()})
    if absent := [path for path in leaves if path not in where]:
        raise UserError(
            f"weights: {absent[0]} is in none of {', '.join(config_weights.folders(cfg.weights))}: "
            "convert FaceXFormer with python -m tools.convert_torch and add its folder"
        )
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one)
        for path, leaf in leaves.items()
    }
    for path, value in _load_folders(where, wanted).items():
        leaves[path].set_value(value)
    return face


def base_reference(cfg: Config) -> dict[str, Any]:
    """Origin of the base, so that a checkpoint can check that it is on the same one."""
    if cfg.weights == "none":
        return {"weights": "none", "seed": cfg.train.seed}
    digests = {}
    for tower in _towers(cfg):
        path = tower_file(tower)
        if not path.is_file():
            raise UserError(f"{path}: the package's weights are missing: reinstall it")
        digests[path.stem] = hashlib.sha256(path.read_bytes()).hexdigest()
    if cfg.weights == "tiny":
        return {"weights": "tiny", "sha256": digests}
    manifests = map(imported.read_manifest, config_weights.folders(cfg.weights))
    prints = sorted([manifest.source, manifest.fingerprint] for manifest in manifests)
    found = {"weights": "imported", "fingerprints": prints, "seed": cfg.train.seed}
    return {**found, "sha256": digests} if digests else found


# ------------------------------------------------------------------ the package's towers


def tower_file(tower: str) -> pathlib.Path:
    """File of one of the package's towers."""
    return parameters.WEIGHTS / f"tiny_{tower}.safetensors"


def _towers(cfg: Config) -> list[str]:
    """The package's towers that a config names, in their order."""
    named = config_weights.towers(cfg.weights)
    return [tower for tower in config_weights.TOWERS if tower in named]


def _tiny_paths(cfg: Config, paths: Collection[str]) -> set[str]:
    """The parameters that the package's towers fill."""
    towers = _towers(cfg)
    return {path for path in paths if path.split("/")[0] in towers and not is_adapter(path)}


def _load_tiny(cfg: Config, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The package's towers for a model of these shapes."""
    found = {}
    for tower in _towers(cfg):
        inside = {
            path.removeprefix(f"{tower}/"): shapes[path]
            for path in sorted(_tiny_paths(cfg, shapes))
            if path.startswith(f"{tower}/")
        }
        tensors = parameters.load(tower_file(tower), inside)
        found |= {f"{tower}/{path}": tensor for path, tensor in tensors.items()}
    return found


# ------------------------------------------------------------------ imported weights


def _folders(cfg: Config, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, epath.Path]:
    """The parameters that imported weights fill, and the folder of each."""
    where = imported.check_base(config_weights.folders(cfg.weights), cfg.model, shapes)
    for path in _tiny_paths(cfg, where):
        tower = f"{config_weights.ONE}{path.split('/')[0]}"
        raise UserError(f"{path}: both in {where[path]} and in {tower}: keep one of them")
    return where


def _load_folders(
    where: Mapping[str, epath.PathLike], wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Loads leaves, each from its folder to its sharding.

    Args:
        where: path → folder.
        wanted: path → shape, dtype and sharding; a part of them.
    """
    values: dict[str, jax.Array] = {}
    for folder in dict.fromkeys(where.values()):
        inside = {path: leaf for path, leaf in wanted.items() if where[path] == folder}
        if inside:
            values |= imported.load(folder, inside)
    return values
