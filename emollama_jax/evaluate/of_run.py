"""Evaluates a model on a prepared split, both ways of answering.

- "generate": the model writes an answer to the category question, and the parser reads it;
- "score": the class whose word has the highest log-likelihood after the same prompt.

On several hosts each looks at its own rows of every batch; all take the same steps, and all have
all predictions at the end.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float

from emollama_jax.batch import Batch
from emollama_jax.checkpoint import ONE_DEVICE
from emollama_jax.config import Config, SourceConfig
from emollama_jax.data.chat import open_chat
from emollama_jax.data.elements import Encoder, Shown, stack
from emollama_jax.data.emotions import LabelSpace
from emollama_jax.data.pipeline import make_eval_batches
from emollama_jax.data.prompts import answer_ids
from emollama_jax.data.split import Split
from emollama_jax.errors import UserError
from emollama_jax.evaluate.asked import Asked, Reworded, map_classes
from emollama_jax.evaluate.parse.answers import best_label, parse_answer
from emollama_jax.evaluate.protocol import Prediction
from emollama_jax.generate.decode import decode, make_ending, texts
from emollama_jax.generate.label_scores import Labels, pad_labels, score
from emollama_jax.generate.prompt import Prompt, embed
from emollama_jax.generate.sampling import sampling
from emollama_jax.models.emollama import EmoLlama
from emollama_jax.models.llama_by_token import laid_out
from emollama_jax.sharding.distributed import gather, place_batch, share, whole
from emollama_jax.sharding.mesh import batch_shards, flags_for, make_mesh

Answering = Literal["generate", "score"]
ANSWER_TOKENS = 8  # of a class name, its end included; more would be an answer of another kind


class Speaker:
    """A model that answers batches of prompts; split once, for calls without end."""

    def __init__(self, cfg: Config, model: EmoLlama):
        self.chat = open_chat(cfg)
        self._model, self._llama = nnx.split(model), nnx.split(model.llama)
        self._how = sampling(cfg.generate)
        self._ending = make_ending(self.chat.stop, self.chat.pad)
        self._flags = flags_for(jax.devices()[0], cfg.xla_flags)

    def read(self, batch: Batch) -> Prompt:
        """Looks at the frames and reads the question."""
        return embed.under(self._flags)(*self._model, batch)

    def write(self, prompt: Prompt, *, max_new_tokens: int) -> list[str]:
        """The model's own words."""
        fixed = (self._how, self._ending)
        answer = decode.under(self._flags)
        ids = answer(*self._writer, prompt, *fixed, max_new_tokens=max_new_tokens)
        return texts(whole(ids), self.chat.tokenizer.decode)

    @functools.cached_property
    def _writer(self) -> tuple[nnx.GraphDef, nnx.State]:
        """The decoder for many tokens."""
        return nnx.split(laid_out(nnx.merge(*self._llama)))

    def rate(self, prompt: Prompt, labels: Labels) -> Float[np.ndarray, "b c"]:
        """The log-likelihood of each label."""
        return whole(score.under(self._flags)(*self._llama, prompt, labels))


def predict(
    cfg: Config,
    model: EmoLlama,
    source: SourceConfig,
    *,
    answerings: Sequence[Answering],
    batch: int,
    shown: Shown = "all",
    asked: Asked | None = None,
    progress: Callable[[int], None] = lambda done: None,
    mesh: Mesh | None = None,
) -> dict[Answering, list[Prediction]]:
    """One prediction for every example of a split, for each way of answering.

    Args:
        cfg: of the model's run.
        model: trained.
        source: the data set and split.
        answerings: how; frames are looked at once for all ways.
        batch: examples at a time.
        shown: "all" frames of a clip, its "middle" frame alone, or a "blank" picture.
        asked: what the question lists, mapped back by name; None: the set's own classes as they
            are stored.
        progress: called with the number of examples done.
        mesh: that the model is spread over; None for one device.

    Raises:
        UserError: a batch that the mesh does not divide.
    """
    if mesh is None:
        mesh = make_mesh(ONE_DEVICE, devices=jax.local_devices())
    if batch % batch_shards(mesh):
        raise UserError(
            f"--batch is {batch}, wanted a multiple of {batch_shards(mesh)}: mesh.data × mesh.fsdp"
        )
    part = share(mesh)
    mine = part.rows(batch)
    speaker = Speaker(cfg, model)
    split = Split(cfg.data.dir, source.name, source.split)
    tested = split.space
    space = asked.space if asked else tested
    means = map_classes(space, tested)
    labels = pad_labels([answer_ids(name, chat=speaker.chat) for name in space.classes])
    ways = {
        "generate": lambda prompt: _written(speaker, prompt, space),
        "score": lambda prompt: _scored(speaker, prompt, labels, space),
    }

    if asked:
        split = split.with_examples(Reworded(split.examples, asked))
    found: dict[Answering, dict[int, Prediction]] = {way: {} for way in answerings}  # by place
    steps = make_eval_batches(
        cfg,
        split,
        batch=batch,
        shown=shown,
        host_index=part.index,
        host_count=part.count,
    )
    done = 0
    with jax.set_mesh(mesh):
        for step, rows in enumerate(steps):
            prompt = speaker.read(place_batch(rows.batch, mesh))
            first = step * batch + part.index * len(mine)  # place of this host's first example
            for way, predictions in found.items():
                answers = ways[way](prompt)
                # The answers to the last batch's padding are left over.
                for row, example in enumerate(rows.examples):
                    subject = int(example["subject"])
                    predictions[first + row] = Prediction(
                        id=example["id"],
                        source=f"{source.name}:{source.split}",
                        label=tested.classes[int(example["label"])],
                        subject=str(subject) if subject >= 0 else None,
                        options=asked.options(example["id"]) if asked else None,
                        **_mapped(answers[mine[row]], means),
                    )
            done += len(rows.examples) * part.count
            progress(done)
        hosts = gather(found)
    return {
        way: [
            at[1] for at in sorted({k: v for host in hosts for k, v in host[way].items()}.items())
        ]
        for way in answerings
    }


def describe(
    cfg: Config,
    model: EmoLlama,
    source: SourceConfig,
    indices: Sequence[int],
    question: str,
    *,
    batch: int,
) -> list[str]:
    """The model's free answers to a question about chosen examples of a split.

    Args:
        cfg: of the model's run.
        model: trained.
        source: the data set and split.
        indices: of the examples, at most `batch`.
        question: the same for all.
        batch: rows that are read together; as many as in `predict`, and the towers are not compiled
            again.
    """
    encoder = Encoder(cfg)
    split = Split(cfg.data.dir, source.name, source.split)
    rows = []
    for index in indices:
        media, prior = split.examples[index]["media"], split.priors[index]
        look = encoder.look(media, kind=source.kind, prior=prior)
        rows.append(encoder.prompt_row(look, kind=source.kind, question=question, index=index))
    speaker = Speaker(cfg, model)
    padded = rows + rows[-1:] * (batch - len(rows))
    mesh = make_mesh(ONE_DEVICE, devices=jax.local_devices())
    with jax.set_mesh(mesh):
        prompt = speaker.read(place_batch(stack(padded)[0], mesh))
        texts = speaker.write(prompt, max_new_tokens=cfg.generate.max_new_tokens)
    return texts[: len(rows)]


def _mapped(answer: dict[str, Any], means: Mapping[str, str | None]) -> dict[str, Any]:
    """An answer in the tested set's words; one that it has no class for is foreign."""
    named = answer["predicted"]
    if named is None or means[named] is not None:
        return answer | {"predicted": means.get(named)}
    return answer | {"predicted": None, "parsed": "foreign"}


def _written(speaker: Speaker, prompt: Prompt, space: LabelSpace) -> list[dict[str, Any]]:
    answers = speaker.write(prompt, max_new_tokens=ANSWER_TOKENS)
    parsed = [parse_answer(text, space) for text in answers]
    return [
        {"predicted": p.label, "parsed": p.how, "text": text, "scores": None}
        for text, p in zip(answers, parsed, strict=True)
    ]


def _scored(
    speaker: Speaker, prompt: Prompt, labels: Labels, space: LabelSpace
) -> list[dict[str, Any]]:
    rows = [
        dict(zip(space.classes, map(float, row), strict=True))
        for row in speaker.rate(prompt, labels)
    ]
    return [
        {"predicted": best_label(row).label, "parsed": "score", "text": None, "scores": row}
        for row in rows
    ]
