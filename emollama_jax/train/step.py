"""The train step: a pure function of frozen weights, state and batch.

Modules are split outside (`named_parameters`) and merged inside a plain `jax.jit`. Parameters
travel as dicts by path, so that checkpoints, patterns and shardings all speak of the same names.
The gradient is Σ gradients / Σ label tokens over all micro-batches, as tunix accumulates it: equal
to one large batch, however the tokens are spread.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from emollama_jax.batch import IGNORE, Batch
from emollama_jax.sharding.mesh import BATCH_AXES, batch_sharding, replicated
from emollama_jax.train.optimizer import Optimizer

# Text positions whose logits exist together: with 32,000 words, float32 logits of a whole
# 2048-token example would be 260 MB.
LOSS_CHUNK = 64

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
    """Of one step; float32 []."""

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
    weight: Float[Array, " b"],
) -> Sums:
    """Next-token cross-entropy in float32: the hidden state at t predicts the label at t + 1.

    Logits are computed chunk by chunk and again in the backward pass; a chunk in which no example
    has a label (most of a prompt) is skipped.

    Args:
        logits: the LLM's head.
        hidden: final hidden states.
        labels: IGNORE where no loss is borne; not shifted.
        weight: of each example.
    """
    examples, length, width = hidden.shape
    chunks = -(-(length - 1) // LOSS_CHUNK)
    rest = chunks * LOSS_CHUNK - (length - 1)
    hidden = jnp.pad(hidden[:, :-1], ((0, 0), (0, rest), (0, 0)))
    labels = jnp.pad(labels[:, 1:], ((0, 0), (0, rest)), constant_values=IGNORE)
    hidden = hidden.reshape(examples, chunks, LOSS_CHUNK, width)
    labels = labels.reshape(examples, chunks, LOSS_CHUNK)

    def of_chunk(hidden: Float[Array, "b c d"], labels: Int[Array, "b c"]) -> Sums:
        borne = (labels != IGNORE) * weight[:, None]  # [B, C]
        label = jnp.maximum(labels, 0)
        y = logits(hidden).astype(jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(y, label)
        return Sums(
            loss=jnp.sum(loss * borne),
            tokens=jnp.sum(borne),
            correct=jnp.sum((y.argmax(-1) == label) * borne),
        )

    def nothing(hidden: jax.Array, labels: jax.Array) -> Sums:
        return zero

    def add(sums: Sums, chunk: tuple[jax.Array, jax.Array]) -> tuple[Sums, None]:
        hidden, labels = chunk
        part = jax.lax.cond(jnp.any(labels != IGNORE), of_chunk, nothing, hidden, labels)
        return jax.tree.map(jnp.add, sums, part), None

    zero = Sums(*[jnp.zeros((), jnp.float32)] * 3)
    chunked = (jnp.swapaxes(hidden, 0, 1), jnp.swapaxes(labels, 0, 1))  # [chunks, B, C, …]
    return jax.lax.scan(jax.checkpoint(add), zero, chunked)[0]


def micro_batches(batch: Batch, accumulation: int) -> Batch:
    """[B, …] → [accumulation, B / accumulation, …].

    Micro-batch i takes every `accumulation`-th example from i on, so that a batch that is split
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
) -> tuple[TrainState, Metrics]:
    """One optimizer step.

    Args:
        graphdef: of the model, which has `hidden(batch, *, dropout_key)` and `llama.logits`.
        optimizer: of `state.params`.
        frozen: the parameters that do not train, in any dtype.
        state: before the step; not changed.
        batch: B examples, a multiple of `accumulation`.
        accumulation: micro-batches, one after the other.
    """
    key = jax.random.fold_in(state.key, state.step)

    def loss(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
        model = merge(graphdef, frozen | params)
        hidden = model.hidden(batch, dropout_key=key)
        hidden = jax.lax.with_sharding_constraint(hidden, PartitionSpec(BATCH_AXES))
        sums = next_token_sums(model.llama.logits, hidden, labels=batch.labels, weight=batch.weight)
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
    updates, opt_state = optimizer.tx.update(grads, state.opt_state, state.params)
    metrics = Metrics(
        loss=sums.loss / count,
        tokens=sums.tokens,
        accuracy=sums.correct / count,
        grad_norm=optax.tree.norm(grads),
        learning_rate=optimizer.learning_rate(state.step),
    )
    state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
    )
    return state, metrics


def state_shardings(
    state: TrainState, params: Mapping[str, NamedSharding], mesh: Mesh
) -> TrainState:
    """Where the state lives: moments with their parameters, counters and the key everywhere."""

    def place(path: tuple, leaf: Any) -> NamedSharding:
        name = getattr(path[-1], "key", None)
        return params.get(name, replicated(mesh))

    return jax.tree_util.tree_map_with_path(place, state)


def compile_step(
    graphdef: nnx.GraphDef,
    optimizer: Optimizer,
    *,
    frozen: Mapping[str, NamedSharding],
    state: TrainState,
    mesh: Mesh,
    accumulation: int,
) -> Callable[[Params, TrainState, Batch], tuple[TrainState, Metrics]]:
    """`train_step` under `jax.jit` on a mesh; compiled when it first meets a batch's shape.

    Args:
        graphdef: of the model.
        optimizer: of the trainable parameters.
        frozen: where the frozen parameters live.
        state: where the state lives, of `state_shardings`.
        mesh: to be entered by the caller with `jax.set_mesh`.
        accumulation: micro-batches of a step.

    Returns:
        (frozen, state, batch) → (state, metrics). The old state's buffers are given away.
    """
    return jax.jit(
        functools.partial(train_step, graphdef, optimizer, accumulation=accumulation),
        in_shardings=(dict(frozen), state, batch_sharding(mesh)),
        out_shardings=(state, replicated(mesh)),
        donate_argnums=1,
    )
