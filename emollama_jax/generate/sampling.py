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


def greedy(logits: Float[Array, "*b v"]) -> Int[Array, "*b"]:
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
    rows = jnp.arange(logits.shape[0])
    return jax.vmap(lambda logits, row: _nucleus(logits, how, step=step, row=row))(logits, rows)


def draw_each(
    logits: Float[Array, "b v"], how: Sampling, *, steps: Int[Array, " b"]
) -> Int[Array, " b"]:
    """The next token of each of several answers that have nothing to do with one another.

    Each row gets what `draw` gives it alone. Where no row samples nothing is sorted; on a CPU,
    only the rows that sample are.

    Args:
        logits: float32.
        how: its arrays are of [B]; a temperature of 0 means greedy.
        steps: number of the token in each row's answer.
    """

    def one(row: tuple[jax.Array, Sampling, jax.Array]) -> jax.Array:
        logits, how, step = row
        # Greedy rows must not divide by 0; what they draw is not taken.
        warm = how.replace(temperature=jnp.where(how.temperature > 0, how.temperature, 1))
        return _nucleus(logits, warm, step=step, row=0)

    def alone(row: tuple[jax.Array, Sampling, jax.Array]) -> jax.Array:
        return jax.lax.cond(row[1].temperature > 0, one, lambda row: greedy(row[0]), row)

    def sampled() -> jax.Array:
        rows = (logits, how, steps)
        if jax.default_backend() == "cpu":
            return jax.lax.map(alone, rows)
        return jnp.where(how.temperature > 0, jax.vmap(one)(rows), greedy(logits))

    return jax.lax.cond((how.temperature > 0).any(), sampled, lambda: greedy(logits))


def _nucleus(
    logits: Float[Array, " v"],
    how: Sampling,
    *,
    step: Int[Array, ""] | int,
    row: Int[Array, ""] | int,
) -> Int[Array, ""]:
    """Draws among the fewest likeliest tokens whose probabilities reach top_p."""
    order = jnp.argsort(logits, descending=True, stable=True)
    ranked = logits[order] / how.temperature
    probability = jax.nn.softmax(ranked)
    # A token stays if the likelier ones have not reached top_p: the first always does.
    before = jnp.cumsum(probability) - probability
    ranked = jnp.where(before < how.top_p, ranked, -jnp.inf)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(how.seed), step), row)
    return order[jax.random.categorical(key, ranked)].astype(jnp.int32)
