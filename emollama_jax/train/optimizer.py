"""AdamW with warm-up and cosine, two peak learning rates, clipping, and decay on matrices only.

LLaMA-VID's recipe (LLaVA's trainer): the projector group has its own learning rate; biases, norm
scales and gates are not decayed. What differs: the first step already moves (the warm-up starts at
1/W of the peak, not at 0), and the gradient's global norm is always clipped.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from emollama_jax.config import TrainConfig

ADAM_EPS = 1e-8  # torch's default, which LLaVA keeps

Schedule = Callable[[Int[Array, ""] | int], Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Turns gradients into updates, and gives the learning rate to report."""

    tx: optax.GradientTransformation
    learning_rate: Schedule  # of the main group, by the number of updates done before


def warmup_cosine(cfg: TrainConfig) -> Schedule:
    """The share of the peak learning rate, by the number t of updates done before.

    With W warm-up steps: (t + 1) / W for t < W, then a half cosine that reaches 0 at t = steps.
    """
    warmup = round(cfg.warmup * cfg.steps)

    def share(t: Int[Array, ""] | int) -> Float[Array, ""]:
        t = jnp.asarray(t, jnp.float32)
        rise = (t + 1) / max(warmup, 1)
        course = jnp.clip((t - warmup) / max(cfg.steps - warmup, 1), 0, 1)
        return jnp.where(t < warmup, rise, 0.5 * (1 + jnp.cos(jnp.pi * course)))

    return share


def make_optimizer(
    cfg: TrainConfig,
    params: Mapping[str, nnx.Param],
    *,
    trainable: Collection[str],
    projector: Collection[str],
) -> Optimizer:
    """The optimizer of the trainable parameters, which it takes as a dict by path.

    Args:
        cfg: learning rates, schedule, decay, betas, clipping.
        params: all parameters of the model by path, real or abstract.
        trainable: paths of those that train.
        projector: paths of those that train at the projector group's learning rate.
    """
    peak = {
        path: cfg.projector_learning_rate if path in projector else cfg.learning_rate
        for path in sorted(trainable)
    }
    decayed = {path: _is_matrix(params[path]) for path in sorted(trainable)}
    share = warmup_cosine(cfg)

    def to_peak(updates: dict[str, jax.Array], params: dict[str, jax.Array] | None):
        return {path: -peak[path] * update for path, update in updates.items()}

    tx = optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=ADAM_EPS),
        optax.add_decayed_weights(cfg.weight_decay, mask=decayed),
        optax.scale_by_schedule(share),
        optax.stateless(to_peak),
    )
    return Optimizer(tx=tx, learning_rate=lambda t: cfg.learning_rate * share(t))


def _is_matrix(param: nnx.Param) -> bool:
    """Two dimensions or more in one layer: the axes that `stack` put in front do not count."""
    return sum(axis != "layers" for axis in param.axes) > 1
