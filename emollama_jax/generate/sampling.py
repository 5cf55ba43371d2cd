"""Drawing the next token: greedy, or by temperature and top-p (nucleus, Holtzman et al. 2020).

Pure and keyed. Temperature first, then top-p, as `transformers` orders them. Each row draws with
its own key, folded from the row's number and the step, so a row's answer does not depend on the
size of its batch.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from emollama_jax.config import GenerateConfig


@flax.struct.dataclass
class Sampling:
    """How tokens are drawn. All are traced: other values need no other compilation."""

    temperature: jax.Array  # float32 [], above 0
    top_p: jax.Array  # float32 []; 1: all tokens
    seed: jax.Array  # int32 []


def sampling(cfg: GenerateConfig) -> Sampling | None:
    """The sampling that a config asks for; None for greedy decoding, whose programs are smaller."""
    if cfg.temperature == 0:
        return None
    return Sampling(
        temperature=np.float32(cfg.temperature),
        top_p=np.float32(cfg.top_p),
        seed=np.int64(cfg.seed).astype(np.int32),
    )


def greedy(logits: Float[Array, "b v"]) -> Int[Array, " b"]:
    """The likeliest token; the lowest id among equals."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def draw(
    logits: Float[Array, "b v"], how: Sampling | None, *, step: Int[Array, ""] | int
) -> Int[Array, " b"]:
    """The next token of each row.

    Args:
        logits: float32.
        how: None for the likeliest.
        step: number of the token, so that every step draws afresh.
    """
    if how is None:
        return greedy(logits)
    return _nucleus(logits, how, jax.random.fold_in(jax.random.key(how.seed), step))


def _nucleus(logits: Float[Array, "b v"], how: Sampling, key: jax.Array) -> Int[Array, " b"]:
    """Draws among the fewest likeliest tokens whose probabilities reach top_p."""
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1) / how.temperature
    probability = jax.nn.softmax(ranked, axis=-1)
    # A token stays if the likelier ones have not reached top_p: the first always does.
    before = jnp.cumsum(probability, axis=-1) - probability
    ranked = jnp.where(before < how.top_p, ranked, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(logits.shape[0]))
    rank = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)
