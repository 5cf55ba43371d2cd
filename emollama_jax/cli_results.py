"""The verbs that measure: a run, anybody's predictions in a file, other models asked zero-shot."""

import pathlib
from typing import Annotated, Literal

import tyro

from emollama_jax import compile_cache
from emollama_jax.cli_words import Overrides, Run, new_console
from emollama_jax.data import sets
from emollama_jax.errors import UserError
from emollama_jax.evaluate.options import ZeroShot
from emollama_jax.preflight import at_least, check_writable

Inline = tyro.conf.OmitArgPrefixes


def evaluate(
    run: Run = "",
    overrides: Overrides = (),
    source: str | None = None,
    split: str = "test",
    fold: str | None = None,
    dir: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None,
    answering: Literal["both", "generate", "score"] = "both",
    asked: str | None = None,
    order: Literal["native", "shuffled"] = "native",
    seed: int = 0,
    batch: int = 32,
    pictures: bool = False,
    without: str | None = None,
    predictions: tuple[pathlib.Path, ...] = (),
    truth_column: str = "label",
    prediction_column: str = "predicted",
    id_column: str | None = None,
    classes: str | None = None,
    json: bool = False,
    out: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None,
) -> None:
    """WAR, UAR, per-class recall and confusion matrix of a trained run on a prepared split, or of
    anyone's predictions in a file (--predictions), for which no model is needed.

    WAR is the share of right answers; UAR, the mean of the classes' recalls, weighs rare classes
    as much as frequent ones. The model is spread over devices as it was in training; to change
    that: mesh.fsdp=-1. On several hosts, the same command runs on each, as for training.

    Args:
        run: folder of `emollama train`, or one checkpoint in it; gs:// too; or package, the one
            that the package carries. With --fold all, {fold} in it is replaced by the number: one
            run for each fold.
        overrides: changes of the sections mesh, distributed and generate.
        source: data set, e.g. raf_db, dfew; actionfaces/images by default. With --predictions: the
            set whose classes count; what the file says by default.
        split: split of the data set.
        fold: fold of dfew and mafw: 1 … 5, or all: the mean over the five.
        dir: data folder; the run's by default, data for --predictions. What is prepared there
            tells the age, gender and race that the face network sees: errors by group.
        answering: the written answer, parsed; the likeliest label word; or both.
        asked: set whose label words the question lists, e.g. the one that was trained on.
        order: order of the options in the question; shuffled measures position bias.
        seed: seed of shuffled options.
        batch: examples at a time.
        pictures: show mistakes of a set under a research licence in the report.
        without: another split, e.g. train: a second number, without the items that also stand in
            it by their name or their content.
        predictions: a CSV, JSON or JSON lines file; or five, one for each fold of --source.
        truth_column: column of the true label.
        prediction_column: column of the answer: a label, a ranked list (its first counts), or free
            text.
        id_column: column of the item's name, each once, by which the prepared set knows it; items
            are named by their line by default.
        classes: label words with commas, for sets that are not known here.
        json: print WAR, UAR, n, unparsed, recall and errors by group as JSON, as shares.
        out: folder of predictions.jsonl, evaluation.json, table.tex and report.html; RUN/eval by
            default, runs/package/eval for package, nothing for --predictions.
    """
    if out is not None:
        check_writable(out)
    if predictions:
        from emollama_jax.evaluate.beside import Place
        from emollama_jax.evaluate.of_file import report_files

        columns = (truth_column, prediction_column, id_column)
        place = Place(split=split, dir=dir, without=without)
        print(
            report_files(predictions, columns, source, classes, out=out, as_json=json, place=place)
        )
        return
    if not run:
        raise UserError("name a run (emollama eval RUN), or a file: --predictions FILE")
    at_least(1, batch=batch)
    source = source or "actionfaces/images"
    for name in (source, *((asked,) if asked else ())):
        sets.family_of(name)
    if dir is not None:
        sets.check_prepared(dir, [source])
    if "{fold}" not in run:
        from emollama_jax.runs import find

        find(run)
    compile_cache.start()
    from emollama_jax import config
    from emollama_jax.sharding import distributed

    distributed.start(config.how_to_run(overrides), saves_on_notice=False)
    from emollama_jax.evaluate.command import How, evaluate_source

    said = evaluate_source(
        run,
        overrides,
        source,
        split,
        fold=fold,
        folder=dir,
        how=How(
            answering=answering,
            batch=batch,
            asked=asked,
            order=order,
            seed=seed,
            pictures=pictures,
            without=without,
        ),
        out=out,
        as_json=json,
        console=new_console(),
    )
    if distributed.leads():
        print(said)


def zero_shot(options: Inline[ZeroShot]) -> None:
    """WAR, UAR and the rest of any other model, under the same protocol: a Hugging Face
    image-text model, an OpenAI-compatible endpoint, or Gemini.

    Begin with --limit 20. Answers are kept in the journal of the output folder. Stopped or killed?
    Re-run the command to resume; a finished one asks nothing. Keys are read from the environment:
    GEMINI_API_KEY, and OPENAI_API_KEY where the endpoint wants one.

    Args:
        options: the model, the data and the limits.
    """
    from emollama_jax.remote.clients import check_spec

    check_spec(options.model)
    if options.out is not None:
        check_writable(options.out)
    sets.check_prepared(options.dir, [options.data])
    from emollama_jax.evaluate.of_remote import run

    print(run(options, new_console()))
