"""Evaluates a model on a prepared split, both ways of answering.

- "generate": the model writes an answer to the category question, and the parser reads it;
- "score": the class whose word has the highest log-likelihood after the same prompt.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from flax import nnx
from jaxtyping import Float

from emollama_jax.batch import Batch
from emollama_jax.config import Config, SourceConfig
from emollama_jax.data.elements import Encoder, View, stack
from emollama_jax.data.emotions import LabelSpace, label_space
from emollama_jax.data.pipeline import make_eval_batches, open_source
from emollama_jax.data.prompts import answer_ids
from emollama_jax.data.tokenizers import load_tokenizer
from emollama_jax.evaluate.protocol import Prediction, best_label, parse_answer
from emollama_jax.faces.priors import open_priors
from emollama_jax.generate.decode import decode, make_ending, texts
from emollama_jax.generate.prompt import Prompt, embed
from emollama_jax.generate.sampling import sampling
from emollama_jax.generate.score import Labels, pad_labels, score
from emollama_jax.models.emollama import EmoLlama

Answering = Literal["generate", "score"]
ANSWER_TOKENS = 8  # of a class name, its end included; more would be an answer of another kind


class Speaker:
    """A model that answers batches of prompts; split once, for calls without end."""

    def __init__(self, cfg: Config, model: EmoLlama):
        self.tokenizer = load_tokenizer(cfg.data.llm_tokenizer)
        self._model, self._llama = nnx.split(model), nnx.split(model.llama)
        self._how = sampling(cfg.generate)
        self._ending = make_ending((self.tokenizer.eos,), self.tokenizer.pad)

    def read(self, batch: Batch) -> Prompt:
        """Looks at the frames and reads the question."""
        return embed(*self._model, batch)

    def write(self, prompt: Prompt, *, max_new_tokens: int) -> list[str]:
        """The model's own words."""
        ids = decode(*self._llama, prompt, self._how, self._ending, max_new_tokens=max_new_tokens)
        return texts(ids, self.tokenizer.decode)

    def rate(self, prompt: Prompt, labels: Labels) -> Float[np.ndarray, "b c"]:
        """The log-likelihood of each label."""
        return np.asarray(score(*self._llama, prompt, labels))


def predict(
    cfg: Config,
    model: EmoLlama,
    source: SourceConfig,
    *,
    answerings: Sequence[Answering],
    batch: int,
    view: View = "all",
    progress: Callable[[int], None] = lambda done: None,
) -> dict[Answering, list[Prediction]]:
    """One prediction for every example of a split, for each way of answering.

    Args:
        cfg: of the model's run.
        model: trained.
        source: the data set and split.
        answerings: how; frames are looked at once for all ways.
        batch: examples at a time.
        view: "all" frames of a clip, its "middle" frame alone, or a "blank" picture.
        progress: called with the number of examples done.
    """
    speaker = Speaker(cfg, model)
    tokenizer, space = speaker.tokenizer, label_space(source.name)
    labels = pad_labels(
        [[*answer_ids(name, tokenizer=tokenizer), tokenizer.eos] for name in space.classes]
    )
    ways = {
        "generate": lambda prompt: _written(speaker, prompt, space),
        "score": lambda prompt: _scored(speaker, prompt, labels, space),
    }
    predictions: dict[Answering, list[Prediction]] = {way: [] for way in answerings}
    done = 0
    for rows in make_eval_batches(cfg, source, batch=batch, open_priors=open_priors, view=view):
        prompt = speaker.read(rows.batch)
        for way, found in predictions.items():
            # The answers to the last batch's padding are left over.
            for example, answer in zip(rows.examples, ways[way](prompt), strict=False):
                found.append(
                    Prediction(
                        id=example["id"],
                        source=f"{source.name}:{source.split}",
                        label=space.classes[int(example["label"])],
                        subject=str(int(example["subject"])),
                        **answer,
                    )
                )
        done += len(rows.examples)
        progress(done)
    return predictions


def describe(
    cfg: Config, model: EmoLlama, source: SourceConfig, indices: Sequence[int], question: str
) -> list[str]:
    """The model's free answers to a question about chosen examples of a split.

    Args:
        cfg: of the model's run.
        model: trained.
        source: the data set and split.
        indices: of the examples.
        question: the same for all.
    """
    encoder = Encoder(cfg)
    data = open_source(cfg.data.dir, source.name, source.split)
    priors = open_priors(cfg.data.dir, source.name, source.split)
    rows = []
    for index in indices:
        look = encoder.look(data[index]["media"], kind=source.kind, prior=priors[index])
        rows.append(encoder.prompt_row(look, kind=source.kind, question=question, index=index))
    speaker = Speaker(cfg, model)
    prompt = speaker.read(stack(rows)[0])
    return speaker.write(prompt, max_new_tokens=cfg.generate.max_new_tokens)


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
