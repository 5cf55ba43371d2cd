"""A model that answers about a prepared split, in both ways of answering.

- "generate": the model writes an answer to the category question, and the parser reads it;
- "score": the class whose word has the highest log-likelihood after the same prompt.

On several hosts each looks at its own rows of every batch; all take the same steps, and all have
all predictions at the end.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float

from emollama_jax.batch import Batch
from emollama_jax.checkpoint import ONE_DEVICE
from emollama_jax.config import Config, SourceConfig
from emollama_jax.data.chat import open_chat
from emollama_jax.data.elements import Encoder, Shown
from emollama_jax.data.pipeline import make_eval_batches
from emollama_jax.data.prompts import answer_ids
from emollama_jax.data.rows import longest, shape_of_kind, shortened, stack
from emollama_jax.data.split import Split, space_of
from emollama_jax.errors import UserError
from emollama_jax.evaluate.asked import Asked, Reworded, map_classes
from emollama_jax.evaluate.options import Answering, Asking
from emollama_jax.evaluate.parse import parse_answer
from emollama_jax.evaluate.protocol import Prediction, subject_of
from emollama_jax.generate.decode import decode, make_ending, texts
from emollama_jax.generate.label_scores import Labels, pad_labels, score
from emollama_jax.generate.prompt import Prompt, embed
from emollama_jax.generate.sampling import sampling
from emollama_jax.models.emollama import EmoLlama
from emollama_jax.models.llama_by_token import laid_out
from emollama_jax.sharding.distributed import gather, place_batch, share, whole
from emollama_jax.sharding.mesh import batch_shards, flags_for, make_mesh

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
    how: Asking,
    *,
    shown: Shown = "all",
    progress: Callable[[int], None] = lambda done: None,
    mesh: Mesh | None = None,
) -> dict[Answering, list[Prediction]]:
    """One prediction for every example of a split, for each way of answering.

    Args:
        cfg: config of the model's run.
        model: trained.
        source: the data set and split.
        how: ways of answering, for all of which frames are looked at once, and what is asked.
        shown: "all" frames of a clip, its "middle" frame alone, or a "blank" picture.
        progress: called with the number of examples done.
        mesh: mesh that the model is spread over; None for one device.

    Raises:
        UserError: a batch that the mesh does not divide.
    """
    mesh = mesh or make_mesh(ONE_DEVICE, devices=jax.local_devices())
    asked, part = asked_in(cfg, source.name, how), share(mesh)
    if how.batch % batch_shards(mesh):
        wanted = f"a multiple of {batch_shards(mesh)}: mesh.data × mesh.fsdp"
        raise UserError(f"--batch is {how.batch}, wanted {wanted}")
    split = Split(cfg.data.dir, source.name, source.split)
    if not asked.native:
        split = split.with_examples(Reworded(split.examples, asked))
    steps = make_eval_batches(
        cfg,
        split,
        batch=how.batch,
        shown=shown,
        host_index=part.index,
        host_count=part.count,
    )
    answerer = _BatchAnswerer(cfg, model, split, asked)
    mine, done = part.rows(how.batch), 0
    found: dict[Answering, dict[int, Prediction]] = {way: {} for way in how.ways}  # by place
    with jax.set_mesh(mesh):
        for step, rows in enumerate(steps):
            batch = shortened(rows.batch, gather(longest(rows.batch)))
            prompt = answerer.speaker.read(place_batch(batch, mesh))
            first = step * how.batch + part.index * len(mine)  # of this host's first example
            for way, predictions in found.items():
                answers = answerer.answer(way, prompt)
                # The answers to the last batch's padding are left over.
                for row, example in enumerate(rows.examples):
                    predictions[first + row] = answerer.record(example, answers[mine[row]])
            done += len(rows.examples) * part.count
            progress(done)
        hosts = gather(found)
    return {way: _in_order(host[way] for host in hosts) for way in how.ways}


def _in_order(hosts: Iterable[Mapping[int, Prediction]]) -> list[Prediction]:
    """The predictions of all hosts by their places; several may have seen the same ones."""
    items = {place: item for host in hosts for place, item in host.items()}
    return [items[place] for place in sorted(items)]


def asked_in(cfg: Config, name: str, how: Asking) -> Asked:
    """Classes that the question lists for a set: its own, or those of `how.asked`."""
    space = space_of(cfg.data.dir, name if how.asked is None else how.asked)
    native = how.asked is None and how.order == "native"
    return Asked(space, how.order, how.seed, native=native)


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
        cfg: config of the model's run.
        model: trained.
        source: the data set and split.
        indices: numbers of the examples, at most `batch`.
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
    shape = shape_of_kind(cfg, source.kind, rounds=1)
    mesh = make_mesh(ONE_DEVICE, devices=jax.local_devices())
    with jax.set_mesh(mesh):
        prompt = speaker.read(place_batch(stack(padded, shape=shape, encoder=encoder), mesh))
        texts = speaker.write(prompt, max_new_tokens=cfg.generate.max_new_tokens)
    return texts[: len(rows)]


class _BatchAnswerer:
    """Predictions about batches of a split, in the tested set's words."""

    def __init__(self, cfg: Config, model: EmoLlama, split: Split, asked: Asked):
        self.speaker = Speaker(cfg, model)
        self._asked, self._tested = asked, split.space
        self._source = f"{split.name}:{split.split}"
        self._means = map_classes(asked.space, split.space)
        chat = self.speaker.chat
        self._labels = pad_labels([answer_ids(name, chat=chat) for name in asked.space.classes])

    def answer(self, way: Answering, prompt: Prompt) -> list[dict[str, Any]]:
        """The answers to a batch, as fields of a `Prediction`."""
        answers = self._written(prompt) if way == "generate" else self._scored(prompt)
        return [answer | self._mapped(answer["predicted"]) for answer in answers]

    def record(self, example: Mapping[str, Any], answer: dict[str, Any]) -> Prediction:
        """The prediction about an example."""
        return Prediction(
            id=example["id"],
            source=self._source,
            label=self._tested.classes[int(example["label"])],
            subject=subject_of(example),
            options=None if self._asked.native else self._asked.options(example["id"]),
            **answer,
        )

    def _mapped(self, named: str | None) -> dict[str, Any]:
        """A class that the tested set has none for is foreign."""
        if named is None or self._means[named] is not None:
            return {"predicted": self._means.get(named)}
        return {"predicted": None, "parsed": "foreign"}

    def _written(self, prompt: Prompt) -> list[dict[str, Any]]:
        texts = self.speaker.write(prompt, max_new_tokens=ANSWER_TOKENS)
        parsed = [parse_answer(text, self._asked.space) for text in texts]
        return [
            {"predicted": p.label, "parsed": p.how, "text": text, "scores": None}
            for text, p in zip(texts, parsed, strict=True)
        ]

    def _scored(self, prompt: Prompt) -> list[dict[str, Any]]:
        rows = [
            dict(zip(self._asked.space.classes, map(float, row), strict=True))
            for row in self.speaker.rate(prompt, self._labels)
        ]
        return [
            {"predicted": best_label(row), "parsed": "score", "text": None, "scores": row}
            for row in rows
        ]


def best_label(scores: dict[str, float]) -> str:
    """The class of the highest log-likelihood.

    Raises:
        UserError: a score that is no number; a diverged model would get a class by chance.
    """
    if not all(map(math.isfinite, scores.values())):
        raise UserError(f"label scores {scores}: wanted finite numbers; are the weights complete?")
    return max(scores, key=scores.__getitem__)
