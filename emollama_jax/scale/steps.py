"""The real steps, lowered with shapes in place of arrays: no weight is read, nothing is allocated.

The train step is that of `train/setup.py`; prefill and decode are `generate`'s jitted
functions, as `emollama eval` calls them. What differs from a run is that every argument is a
`jax.ShapeDtypeStruct` with the sharding that the run would give it.
"""

import collections
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from emollama_jax.base import AbstractModel, abstract_model
from emollama_jax.batch import Batch
from emollama_jax.config import Config
from emollama_jax.data.rows import packed_shape, shape_of_kind
from emollama_jax.errors import UserError
from emollama_jax.generate import decode
from emollama_jax.generate.prompt import Prompt, embed
from emollama_jax.models.parameters import is_adapter, named_parameters
from emollama_jax.scale.cost import OTHER
from emollama_jax.scale.options import Kind, Step
from emollama_jax.sharding.mesh import batch_sharding, batch_shards, replicated
from emollama_jax.terms import LANDMARKS
from emollama_jax.train.setup import set_up

# (dtype, shape of one device's part) → how many
Shards = collections.Counter[tuple[str, tuple[int, ...]]]


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The static shape of a batch, and the examples that it holds; letters as in `Batch`."""

    rows: int  # B
    examples: int  # of a step, in packed rows those that the config draws
    frames: int  # F of a row
    again: int  # X of a row
    tokens: int  # T of a row
    question_length: int  # L
    most: int  # E, examples of a row
    questions: int  # Q of a row


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted function, lowered for a mesh."""

    name: str
    part: str  # of the model that it is, where no scope says (`cost.PARTS`)
    lowered: jax.stages.Lowered
    arguments: dict[str, Shards]  # of one device, as shape × dtype × sharding predict


def shapes(cfg: Config, kind: Kind, step: Step, *, examples: int | None) -> Shapes:
    """Shapes of the config's batches.

    Args:
        cfg: the run.
        kind: kind of batch; packed rows hold both.
        step: training reads all rounds of a conversation, an answer follows one question.
        examples: examples over all devices, rows where these hold several; the config's training
            batch by default.
    """
    packed = cfg.data.packed
    if step == "train" and packed is not None:
        row, given = packed_shape(cfg), packed.rows
        each = packed.examples
    else:
        row = shape_of_kind(cfg, kind, rounds=cfg.data.rounds if step == "train" else 1)
        given, each = cfg.train.image_batch if kind == "image" else cfg.train.clip_batch, 1
    rows = given if examples is None else examples
    return Shapes(
        rows=rows,
        examples=rows * each,
        frames=row.frames,
        again=row.again,
        tokens=row.tokens,
        question_length=row.question_length,
        most=row.examples,
        questions=row.questions,
    )


def abstract_batch(cfg: Config, mesh: Mesh, shapes: Shapes) -> Batch:
    """A batch without numbers, split over the mesh.

    Raises:
        UserError: examples that the mesh does not divide.
    """
    parts = batch_shards(mesh) * cfg.train.accumulation
    if shapes.rows % parts or not shapes.rows:
        raise UserError(
            f"a batch of {shapes.rows} rows, wanted a multiple of {parts}: mesh.data × "
            "mesh.fsdp × train.accumulation; set --batch"
        )
    size, face_size = cfg.model.vision.image_size, cfg.model.face.swin.image_size
    frames, tokens, asked = shapes.frames, shapes.tokens, (shapes.questions, shapes.question_length)
    place = batch_sharding(mesh)

    def leaf(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((shapes.rows, *shape), dtype, sharding=place)

    return Batch(
        frames=leaf(np.uint8, frames, size, size, 3),
        faces=leaf(np.uint8, frames, face_size, face_size, 3),
        face_found=leaf(np.bool_, frames),
        landmarks=leaf(np.float32, frames, LANDMARKS, 2),
        ids=leaf(np.int32, tokens),
        labels=leaf(np.int32, tokens),
        segment=leaf(np.int32, tokens),
        position=leaf(np.int32, tokens),
        visual=leaf(np.int32, tokens),
        question=leaf(np.int32, frames + shapes.again),
        again=leaf(np.int32, shapes.again),
        questions=leaf(np.int32, *asked),
        question_mask=leaf(np.bool_, *asked),
        weight=leaf(np.float32, shapes.most),
        index=leaf(np.int32, shapes.most),
    )


def gathered_shapes(whole: AbstractModel) -> set[tuple[int, ...]]:
    """Shapes that a gather of parameters gives, and that of one layer where they are stacked.

    A parameter may come together over `fsdp` alone and stay split over `tensor`; and the parts of
    devices may stand one after the other along any axis, to be put in order afterwards.
    """
    shapes = set()
    for path, leaf in whole.params.items():
        assert isinstance(leaf.sharding, NamedSharding)
        mesh = leaf.sharding.mesh.shape
        spec = (*leaf.sharding.spec, *[None] * (leaf.ndim - len(leaf.sharding.spec)))
        names = [(axis,) if isinstance(axis, str) else axis or () for axis in spec]
        kept = [math.prod(mesh[axis] for axis in axes if axis == "tensor") for axes in names]
        parts = [math.prod(mesh[axis] for axis in axes) for axes in names]
        split = tuple(size // n for size, n in zip(leaf.shape, kept, strict=True))
        part = tuple(size // n for size, n in zip(leaf.shape, parts, strict=True))
        layers = whole.leaves[path].axes[:1] == ("layers",)
        for first in {0, int(layers)}:
            shapes |= {leaf.shape[first:], split[first:]}
            for count in {math.prod(parts), math.prod(parts) // math.prod(kept)}:
                for i in range(first, leaf.ndim):
                    shapes.add((*part[first:i], part[i] * count, *part[i + 1 :]))
    return shapes


def lower_train(cfg: Config, mesh: Mesh, shapes: Shapes) -> list[Program]:
    """The train step of `train/setup.py`. The mesh must be entered."""
    setup, batch = set_up(cfg, mesh), abstract_batch(cfg, mesh, shapes)
    return [
        Program(
            "train",
            OTHER,
            setup.step.lower(setup.frozen, setup.state, batch),
            {
                "frozen parameters": shards(setup.frozen),
                "trained parameters": shards(setup.state.params),
                "optimizer": shards(setup.state.replace(params={})),
                "batch": shards(batch),
            },
        )
    ]


def lower_prefill(cfg: Config, mesh: Mesh, shapes: Shapes) -> list[Program]:
    """Both towers and the text, then the prompt's pass and the first token."""
    whole = abstract_model(cfg, mesh)
    batch = abstract_batch(cfg, mesh, shapes)
    graphdef, state = _split(whole.module, whole.params)
    return [
        Program(
            "towers",
            OTHER,
            embed.under(cfg.xla_flags).lower(graphdef, state, batch),
            {"parameters": shards(state), "batch": shards(batch)},
        ),
        _first(cfg, mesh, shapes, whole),
    ]


def lower_decode(
    cfg: Config, mesh: Mesh, shapes: Shapes, compile: Callable[[Program], jax.stages.Compiled]
) -> list[Program]:
    """One token, its cache laid out as the compiled prefill leaves it."""
    whole = abstract_model(cfg, mesh)
    first = _first(cfg, mesh, shapes, whole)
    loop = jax.tree.map(placed, first.lowered.out_info, compile(first).output_shardings)
    graphdef, state = _split(whole.module.llama, _llama(whole))
    rest = _fixed(mesh)
    return [
        Program(
            "token",
            "llm",
            decode.next_token.under(cfg.xla_flags).lower(graphdef, state, loop, *rest),
            {
                "parameters": shards(state),
                "cache": shards(loop.cache),
                "batch": shards((loop.replace(cache=None), rest)),
            },
        )
    ]


def _first(cfg: Config, mesh: Mesh, shapes: Shapes, whole: AbstractModel) -> Program:
    dtype, width = cfg.model.llama.dtype, cfg.model.llama.width
    place = batch_sharding(mesh)
    prompt = Prompt(
        embeds=jax.ShapeDtypeStruct((shapes.rows, shapes.tokens, width), dtype, sharding=place),
        length=jax.ShapeDtypeStruct((shapes.rows,), np.int32, sharding=place),
    )
    graphdef, state = _split(whole.module.llama, _llama(whole))
    rest = _fixed(mesh)
    limit, first = cfg.generate.max_new_tokens, decode.first_token.under(cfg.xla_flags)
    return Program(
        "prefill",
        "llm",
        first.lower(graphdef, state, prompt, *rest, max_new_tokens=limit),
        {"parameters": shards(state), "batch": shards((prompt, rest))},
    )


def _llama(whole: AbstractModel) -> dict[str, jax.ShapeDtypeStruct]:
    """The decoder's parameters by their paths inside it, adapters as `laid_out` has them."""
    dtype = whole.cfg.model.llama.dtype
    return {
        path.removeprefix("llama/"): x.update(dtype=dtype) if is_adapter(path) else x
        for path, x in whole.params.items()
        if path.startswith("llama/")
    }


def _split(
    module: nnx.Module, params: dict[str, jax.ShapeDtypeStruct]
) -> tuple[nnx.GraphDef, nnx.State]:
    """`nnx.split` of a module whose leaves are these."""
    leaves = named_parameters(module)
    for path, leaf in leaves.items():
        leaf.set_value(params[path])
    return nnx.split(module)


def _fixed(mesh: Mesh) -> tuple[None, decode.Ending]:
    """How tokens are drawn, greedily, and what ends an answer; one stop token."""
    stop, pad = (
        jax.ShapeDtypeStruct(shape, np.int32, sharding=replicated(mesh)) for shape in ((1,), ())
    )
    return None, decode.Ending(stop=stop, pad=pad)


def placed(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """Shape and dtype of x with a sharding."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def shards(tree: Any) -> Shards:
    """One device's shards of a tree's leaves that have shape, dtype and sharding."""
    found: Shards = collections.Counter()
    for x in jax.tree.leaves(tree):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = placed(jax.eval_shape(jax.random.key_data, x), replicated(x.sharding.mesh))
        found[str(x.dtype), x.sharding.shard_shape(x.shape)] += 1
    return found


def device_bytes(held: Shards) -> int:
    """Bytes of them, without the padding of tiles."""
    return sum(
        count * math.prod(shape) * jnp.dtype(dtype).itemsize
        for (dtype, shape), count in held.items()
    )
