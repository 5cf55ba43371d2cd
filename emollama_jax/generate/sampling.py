"""Drawing the next token: greedy, or by temperature and top-p (nucleus, Holtzman et al. 2020).

Pure and keyed. Temperature first, then top-p, as `transformers` orders them. Each row draws with
its own key, folded from the row's number and the step, so a row's answer does not depend on the
size of its batch.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from emollama_jax.config import GenerateConfig


@flax.struct.dataclass
class Sampling:
    """How tokens are drawn. All are traced: other values need no other compilation."""

    temperature: jax.Array  # float32 []; 0: greedy
    top_p: jax.Array  # float32 []; 1: all tokens
    key: jax.Array  # a PRNG key


def sampling(cfg: GenerateConfig) -> Sampling:
    """The sampling that a config asks for."""
    return Sampling(
        temperature=jnp.float32(cfg.temperature),
        top_p=jnp.float32(cfg.top_p),
        key=jax.random.key(cfg.seed),
    )


def greedy(logits: Float[Array, "b v"]) -> Int[Array, " b"]:
    """The likeliest token; the lowest id among equals."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def draw(
    logits: Float[Array, "b v"], how: Sampling, *, step: Int[Array, ""] | int
) -> Int[Array, " b"]:
    """The next token of each row.

    Args:
        logits: float32.
        how: greedy where its temperature is 0.
        step: number of the token, so that every step draws anew.
    """
    return jax.lax.cond(
        how.temperature == 0,
        lambda: greedy(logits),
        lambda: _nucleus(logits, how, jax.random.fold_in(how.key, step)),
    )


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
