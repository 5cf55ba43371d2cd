"""The train step: a pure function of frozen weights, state and batch.

Modules are split outside (`named_parameters`) and merged inside a plain `jax.jit`. Parameters
travel as dicts by path, so that checkpoints, patterns and shardings all speak of the same names.
The gradient is Σ gradients / Σ label tokens over all micro-batches, as tunix accumulates it: equal
to one large batch, however the tokens are spread.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from emollama_jax.batch import IGNORE, Batch
from emollama_jax.sharding.points import constrain
from emollama_jax.train.optimizer import Optimizer

Params = dict[str, jax.Array]  # by path, e.g. "llama/layers/q_proj/lora_A"


@flax.struct.dataclass
class TrainState:
    """All that a step changes."""

    step: jax.Array  # int32 [], updates done
    params: Params  # what trains
    opt_state: optax.OptState
    key: jax.Array  # of dropout; each step folds its number in


@flax.struct.dataclass
class Sums:
    """Sums over label tokens, each token times its example's weight; float32 []."""

    loss: jax.Array  # negative log-likelihood
    tokens: jax.Array
    correct: jax.Array  # tokens that had the largest logit


@flax.struct.dataclass
class Metrics:
    """Metrics of one step; float32 []."""

    loss: jax.Array  # mean negative log-likelihood of the label tokens
    tokens: jax.Array  # label tokens, weighted
    accuracy: jax.Array  # share of label tokens that had the largest logit
    grad_norm: jax.Array  # before clipping
    learning_rate: jax.Array  # of the main group


def init_state(optimizer: Optimizer, params: Params, *, seed: int) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.tx.init(params),
        key=jax.random.key(seed),
    )


def merge(graphdef: nnx.GraphDef, params: Params) -> Any:
    """The module of these parameters; list positions in a path are numbers again."""
    flat = [
        (tuple(int(part) if part.isdigit() else part for part in path.split("/")), leaf)
        for path, leaf in params.items()
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def next_token_sums(
    logits: Callable[[Float[Array, "b t d"]], Float[Array, "b t v"]],
    hidden: Float[Array, "b t d"],
    *,
    labels: Int[Array, "b t"],
    weight: Float[Array, "b t"],
    chunk: int,
) -> Sums:
    """Next-token cross-entropy in float32: the hidden state at t predicts the label at t + 1.

    Logits are computed chunk by chunk, and each chunk's gradient at once, while its logits are
    there: the backward pass computes none again (as Liger Kernel fuses it, arXiv 2410.10989). What
    bears a label comes first in its row, so that chunks without one (most of all prompts) are
    skipped.

    Args:
        logits: the LLM's head.
        hidden: final hidden states.
        labels: IGNORE where no loss is borne; not shifted.
        weight: weight of each token's example.
        chunk: positions whose logits exist together; with 32,000 words, float32 logits of a whole
            2048-token example would be 260 MB.
    """
    labels, weight = labels[:, 1:], weight[:, 1:]
    order = jnp.argsort(labels == IGNORE, axis=1, stable=True)
    hidden = _in_chunks(_reordered(hidden[:, :-1], order), chunk, fill=0)
    labels, weight = (
        _in_chunks(jnp.take_along_axis(x, order, axis=1), chunk, fill=fill)
        for x, fill in ((labels, IGNORE), (weight, 0))
    )
    # `head`: what the logits need that trains. The frozen rest stays in the function.
    logits, head = jax.closure_convert(logits, hidden[0])

    def of_chunk(
        head: Any,
        hidden: Float[Array, "b c d"],
        labels: Int[Array, "b c"],
        weight: Float[Array, "b c"],
    ):
        borne = (labels != IGNORE) * weight
        y = logits(hidden, *head).astype(jnp.float32)
        of_label = jnp.take_along_axis(y, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        loss = jnp.sum((jax.nn.logsumexp(y, axis=-1) - of_label) * borne)
        right = jnp.sum((of_label >= y.max(-1)) * borne)
        return loss, Sums(loss=loss, tokens=jnp.sum(borne), correct=right)

    @jax.custom_vjp
    def sums(head: Any, hidden: jax.Array, labels: jax.Array, weight: jax.Array) -> Sums:
        return _over_chunks(lambda *one: (of_chunk(*one)[1], None), head, hidden, labels, weight)[0]

    def forward(head: Any, hidden: jax.Array, labels: jax.Array, weight: jax.Array):
        def with_gradient(*one):
            (_, part), grads = jax.value_and_grad(of_chunk, argnums=(0, 1), has_aux=True)(*one)
            return (part, grads[0]), grads[1]

        (total, of_head), of_hidden = _over_chunks(with_gradient, head, hidden, labels, weight)
        return total, (of_head, of_hidden)

    def backward(grads: tuple[Any, jax.Array], of_sums: Sums):
        return *jax.tree.map(lambda g: (g * of_sums.loss).astype(g.dtype), grads), None, None

    sums.defvjp(forward, backward)
    return sums(head, hidden, labels, weight)


@jax.custom_vjp
def _reordered(x: Float[Array, "b t d"], order: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """Every row's tokens in another order; a gradient is put back by a gather too, no scatter."""
    return jnp.take_along_axis(x, order[..., None], axis=1)


def _reordered_back(order: jax.Array, grad: jax.Array) -> tuple[jax.Array, None]:
    return jnp.take_along_axis(grad, jnp.argsort(order, axis=1)[..., None], axis=1), None


_reordered.defvjp(lambda x, order: (_reordered(x, order), order), _reordered_back)


def _in_chunks(x: jax.Array, chunk: int, *, fill: int) -> jax.Array:
    """[B, T, …] → [chunks, B, chunk, …], the last one filled up."""
    examples, length = x.shape[:2]
    chunks = -(-length // chunk)
    rest = ((0, 0), (0, chunks * chunk - length), *[(0, 0)] * (x.ndim - 2))
    x = jnp.pad(x, rest, constant_values=fill)
    return jnp.swapaxes(x.reshape(examples, chunks, chunk, *x.shape[2:]), 0, 1)


def _over_chunks(
    of_chunk: Callable, head: Any, hidden: jax.Array, labels: jax.Array, weight: jax.Array
):
    """Sums of the first result of each chunk that has a label; the second one of each chunk."""
    empty = jax.eval_shape(of_chunk, head, hidden[0], labels[0], weight[0])
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), empty)

    def add(total: Any, one: tuple[jax.Array, jax.Array, jax.Array]):
        some = jnp.any(one[1] != IGNORE)
        part, rest = jax.lax.cond(some, of_chunk, lambda *_: empty, head, *one)
        return jax.tree.map(jnp.add, total, part), rest

    return jax.lax.scan(add, empty[0], (hidden, labels, weight))


def micro_batches(batch: Batch, accumulation: int) -> Batch:
    """[B, …] → [accumulation, B / accumulation, …].

    Micro-batch i takes every `accumulation`-th row from i on, so that a batch that is split
    over devices stays where it is.
    """

    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:])
        return jnp.swapaxes(x, 0, 1)

    return jax.tree.map(cut, batch)


def train_step(
    graphdef: nnx.GraphDef,
    optimizer: Optimizer,
    frozen: Params,
    state: TrainState,
    batch: Batch,
    *,
    accumulation: int,
    loss_chunk: int,
) -> tuple[TrainState, Metrics]:
    """One optimizer step.

    Args:
        graphdef: graph of the model, with `hidden(batch, *, dropout_key)` and `llama.logits`.
        optimizer: optimizer of `state.params`.
        frozen: the parameters that do not train, in any dtype.
        state: before the step; not changed.
        batch: B rows, a multiple of `accumulation`.
        accumulation: micro-batches, one after the other.
        loss_chunk: chunk size of `next_token_sums`.
    """
    key = jax.random.fold_in(state.key, state.step)

    def loss(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
        sums = _loss(merge(graphdef, frozen | params), batch, key, chunk=loss_chunk)
        return sums.loss, sums

    def add(total: tuple[Params, Sums], xs: tuple[Batch, jax.Array]):
        grads, sums = jax.grad(loss, has_aux=True)(state.params, *xs)
        return jax.tree.map(jnp.add, total, (grads, sums)), None

    zero = (
        jax.tree.map(jnp.zeros_like, state.params),
        Sums(*[jnp.zeros((), jnp.float32)] * 3),
    )
    xs = (micro_batches(batch, accumulation), jax.random.split(key, accumulation))
    (grads, sums), _ = jax.lax.scan(add, zero, xs)
    # A batch of sentinels alone bears no token: its gradient is 0, not 0 / 0.
    count = jnp.where(sums.tokens > 0, sums.tokens, 1)
    grads = jax.tree.map(lambda g: g / count, grads)
    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    metrics = Metrics(
        loss=sums.loss / count,
        tokens=sums.tokens,
        accuracy=sums.correct / count,
        grad_norm=optax.tree.norm(grads),
        learning_rate=optimizer.learning_rate(state.step),
    )
    state = state.replace(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
    )
    return state, metrics


def _loss(model: Any, batch: Batch, key: jax.Array, *, chunk: int) -> Sums:
    """`next_token_sums` of a model's answers."""
    hidden = constrain(model.hidden(batch, dropout_key=key), "batch")
    tied = model.llama.lm_head is None
    head = model.llama.embed_tokens if tied else model.llama.lm_head.kernel
    # Here, not in the loop over the loss's chunks.
    head.set_value(constrain(head[...], "table" if tied else "head"))
    with jax.named_scope("loss"):
        example = jnp.maximum(batch.segment - 1, 0)  # [B, T], of its row
        weight = jnp.take_along_axis(batch.weight, example, axis=1)
        return next_token_sums(
            model.llama.logits, hidden, labels=batch.labels, weight=weight, chunk=chunk
        )
