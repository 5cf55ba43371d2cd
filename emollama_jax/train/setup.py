"""A train step with all that it works on, set up once for whoever runs, plans or measures one.

    abstract model → shardings → optimizer → state → step

Nothing is allocated and nothing compiled before `start` and the first `step`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from emollama_jax.base import AbstractModel, Build, abstract_model, chosen
from emollama_jax.config import Config
from emollama_jax.models.emollama import EmoLlama
from emollama_jax.sharding.mesh import batch_sharding, flags_for, replicated
from emollama_jax.train.optimizer import Optimizer, make_optimizer
from emollama_jax.train.step import Params, TrainState, init_state, train_step


@dataclasses.dataclass(frozen=True)
class Setup:
    """A train step, and the shapes, dtypes and shardings of what it takes."""

    model: AbstractModel
    optimizer: Optimizer
    frozen: dict[str, jax.ShapeDtypeStruct]  # by path
    state: TrainState  # abstract
    step: Any  # jitted: (frozen, state, batch) → (state, `Metrics`)

    def start(self, params: Params) -> TrainState:
        """The state before the first step.

        Args:
            params: trained parameters, by path, on the mesh, which must be entered.
        """
        places = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        initial = functools.partial(init_state, self.optimizer, seed=self.model.cfg.train.seed)
        return jax.jit(initial, out_shardings=places)(params)


def set_up(cfg: Config, mesh: Mesh, *, build: Build = EmoLlama) -> Setup:
    """Sets up the train step of a run.

    The step gives the old state's buffers away, and compiles when it first meets a batch's shape.

    Args:
        cfg: the run.
        mesh: to be entered by the caller with `jax.set_mesh`.
        build: makes the model.

    Raises:
        UserError: a pattern that matches nothing.
    """
    model = abstract_model(cfg, mesh, build=build)
    projector = chosen(cfg, "projector", model.leaves, build=build)
    optimizer = make_optimizer(
        cfg.train, model.leaves, trainable=model.trainable, projector=projector
    )
    frozen = model.only(model.leaves.keys() - model.trainable)
    initial = functools.partial(init_state, optimizer, seed=cfg.train.seed)
    state = jax.eval_shape(initial, model.only(model.trainable))
    state = _placed(state, model.places, replicated(mesh))
    of_state = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jax.jit(
        functools.partial(
            train_step,
            nnx.graphdef(model.module),
            optimizer,
            accumulation=cfg.train.accumulation,
            loss_chunk=cfg.train.loss_chunk,
        ),
        in_shardings=(
            {path: leaf.sharding for path, leaf in frozen.items()},
            of_state,
            batch_sharding(mesh),
        ),
        out_shardings=(of_state, replicated(mesh)),
        donate_argnums=1,
        compiler_options=flags_for(mesh.devices.flat[0], cfg.xla_flags) or None,
    )
    return Setup(model, optimizer, frozen, state, step)


def _placed(
    state: TrainState, params: Mapping[str, NamedSharding], elsewhere: NamedSharding
) -> TrainState:
    """The state with shardings: moments with their parameters, counters and the key `elsewhere`."""

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = params.get(getattr(path[-1], "key", None), elsewhere)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, state)
