"""How hard a data set is: what a linear look at the pixels reaches.

A set on which logistic regression on raw pixels does well needs no network, let alone an LLM.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

SIDE = 48  # pixels
PENALTIES = (1e-3, 1e-2, 1e-1)  # of the squared weights; the best on the validation split counts
STEPS = 300


def grey(pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> Float[np.ndarray, "n p"]:
    """48 × 48 grey pixels of each picture, 0 … 1."""
    small = (
        Image.fromarray(picture).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
        for picture in pictures
    )
    return np.stack([np.asarray(image, np.float32).reshape(-1) / 255 for image in small])


def pixel_regression(
    train: tuple[Float[np.ndarray, "n p"], Int[np.ndarray, " n"]],
    validation: tuple[Float[np.ndarray, "m p"], Int[np.ndarray, " m"]],
    test: tuple[Float[np.ndarray, "k p"], Int[np.ndarray, " k"]],
    *,
    classes: int,
) -> float:
    """WAR on `test` of a softmax regression whose penalty is chosen on `validation`."""
    mean, std = train[0].mean(0), train[0].std(0) + 1e-3
    x, y = (train[0] - mean) / std, train[1]
    best = (-1.0, 0.0)
    for penalty in PENALTIES:
        weights = np.asarray(_regress(x, y, np.float32(penalty), classes=classes))
        right = [
            float(
                np.mean((((pixels - mean) / std) @ weights[:-1] + weights[-1]).argmax(1) == labels)
            )
            for pixels, labels in (validation, test)
        ]
        best = max(best, (right[0], right[1]))
    return best[1]


@functools.partial(jax.jit, static_argnames="classes")
def _regress(
    x: Float[Array, "n p"], y: Int[Array, " n"], penalty: Float[Array, ""], *, classes: int
) -> Float[Array, "p+1 c"]:
    """Weights, the bias last: full-batch L-BFGS."""

    def loss(weights: jax.Array) -> jax.Array:
        logits = x @ weights[:-1] + weights[-1]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return nll + penalty * jnp.sum(weights[:-1] ** 2)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry, _):
        weights, state = carry
        value, grad = value_and_grad(weights, state=state)
        updates, state = solver.update(grad, state, weights, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(weights, updates), state), None

    weights = jnp.zeros((x.shape[1] + 1, classes), jnp.float32)
    (weights, _), _ = jax.lax.scan(step, (weights, solver.init(weights)), length=STEPS)
    return weights
