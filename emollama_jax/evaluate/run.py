"""Evaluates a model on a prepared split, both ways of answering.

- "generate": the model writes an answer to the category question, and the parser reads it;
- "score": the class whose word has the highest log-likelihood after the same prompt.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from emollama_jax.batch import Batch
from emollama_jax.config import Config, SourceConfig
from emollama_jax.data.elements import Encoder, View, stack
from emollama_jax.data.emotions import LabelSpace, label_space
from emollama_jax.data.pipeline import make_eval_batches, open_source
from emollama_jax.data.prompts import answer_ids
from emollama_jax.data.tokenizers import Tokenizer, load_tokenizer
from emollama_jax.evaluate.protocol import Prediction, best_label, parse_answer
from emollama_jax.faces.priors import open_priors
from emollama_jax.generate.decode import generate, texts
from emollama_jax.generate.sampling import sampling
from emollama_jax.generate.score import Labels, pad_labels, score_labels
from emollama_jax.models.emollama import EmoLlama

Answering = Literal["generate", "score"]
ANSWER_TOKENS = 8  # of a class name, its end included; more would be an answer of another kind


def predict(
    cfg: Config,
    model: EmoLlama,
    source: SourceConfig,
    *,
    answering: Answering,
    batch: int,
    view: View = "all",
    progress: Callable[[int], None] = lambda done: None,
) -> list[Prediction]:
    """One prediction for every example of a split.

    Args:
        cfg: of the model's run.
        model: trained.
        source: the data set and split.
        answering: how.
        batch: examples at a time.
        view: "all" frames of a clip, its "middle" frame alone, or a "blank" picture.
        progress: called with the number of examples done.
    """
    tokenizer = load_tokenizer(cfg.data.llm_tokenizer)
    space = label_space(source.name)
    labels = pad_labels(
        [[*answer_ids(name, tokenizer=tokenizer), tokenizer.eos] for name in space.classes]
    )
    answer = {
        "generate": functools.partial(_generated, cfg, model, tokenizer, space),
        "score": functools.partial(_scored, model, labels, space),
    }[answering]
    predictions: list[Prediction] = []
    batches = make_eval_batches(cfg, source, batch=batch, open_priors=open_priors, view=view)
    for prompts in batches:
        for example, known in zip(prompts.examples, answer(prompts.batch), strict=False):
            predictions.append(
                Prediction(
                    id=example["id"],
                    source=f"{source.name}:{source.split}",
                    label=space.classes[int(example["label"])],
                    subject=str(int(example["subject"])),
                    **known,
                )
            )
        progress(len(predictions))
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
    batch, _ = stack(rows)
    return _write(cfg, model, encoder.llm, batch, max_new_tokens=cfg.generate.max_new_tokens)


def _write(
    cfg: Config, model: EmoLlama, tokenizer: Tokenizer, batch: Batch, *, max_new_tokens: int
) -> list[str]:
    generated = generate(
        model,
        batch,
        how=sampling(cfg.generate),
        max_new_tokens=max_new_tokens,
        stop=(tokenizer.eos,),
        pad=tokenizer.pad,
    )
    return texts(generated, tokenizer.decode)


def _generated(
    cfg: Config, model: EmoLlama, tokenizer: Tokenizer, space: LabelSpace, batch: Batch
) -> list[dict[str, Any]]:
    answers = _write(cfg, model, tokenizer, batch, max_new_tokens=ANSWER_TOKENS)
    parsed = [parse_answer(text, space) for text in answers]
    return [
        {"predicted": p.label, "parsed": p.how, "text": text, "scores": None}
        for text, p in zip(answers, parsed, strict=True)
    ]


def _scored(
    model: EmoLlama, labels: Labels, space: LabelSpace, batch: Batch
) -> list[dict[str, Any]]:
    scores = np.asarray(score_labels(model, batch, labels))
    rows = [dict(zip(space.classes, map(float, row), strict=True)) for row in scores]
    return [
        {"predicted": best_label(row).label, "parsed": "score", "text": None, "scores": row}
        for row in rows
    ]
