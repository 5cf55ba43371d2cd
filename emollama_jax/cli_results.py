"""The verbs that measure: a run, a file of predictions, another model zero-shot."""

import json
import sys
from typing import Annotated

import tyro

from emollama_jax import compile_cache
from emollama_jax.cli_words import FLAT, new_console
from emollama_jax.data import sets
from emollama_jax.errors import UserError
from emollama_jax.evaluate.options import Asking, Output, PredictionFiles, Tested, ZeroShot
from emollama_jax.preflight import at_least, check_writable

Inline = tyro.conf.OmitArgPrefixes


def evaluate(
    what: Annotated[Tested, FLAT],
    how: Annotated[Asking, FLAT],
    files: Annotated[PredictionFiles, FLAT],
    output: Annotated[Output, FLAT],
) -> None:
    """WAR, UAR, per-class recall and confusion matrix of a trained run on a prepared split, or of
    predictions in a file (--predictions), which needs no model.

    WAR is the share of correct answers; UAR, the mean recall over the classes, weighs rare classes
    as much as frequent ones. The model is sharded as in training; override that with e.g.
    mesh.fsdp=-1. On several hosts, run the command on each, as for training.
    """
    if output.out is not None:
        check_writable(output.out)
    if files.predictions:
        _evaluate_files(what, how, files, output)
        return
    if not what.run:
        raise UserError("name a run (emollama eval RUN), or a file: --predictions FILE")
    at_least(1, batch=how.batch)
    for name in filter(None, (what.name, how.asked)):
        sets.family_of(name)
    if what.dir is not None:
        sets.check_prepared(what.dir, [what.name])
    if "{fold}" not in what.run:
        from emollama_jax.runs import find

        find(what.run)
    compile_cache.start()
    from emollama_jax import config
    from emollama_jax.sharding import distributed

    distributed.start(config.how_to_run(what.overrides), saves_on_notice=False)
    from emollama_jax.evaluate.of_run import evaluate_runs

    result, home = evaluate_runs(what, how, output.out, new_console())
    if not distributed.leads():
        return
    if not output.json:
        print(result.lines(home))
        return
    if result.warning and result.mean is None:
        print(result.warning, file=sys.stderr)
    _print_json(result.summary() | {"report": f"{home}/report.html"})


def _evaluate_files(what: Tested, how: Asking, files: PredictionFiles, output: Output) -> None:
    from emollama_jax.evaluate import of_file
    from emollama_jax.evaluate.beside import Place
    from emollama_jax.evaluate.publish import publish
    from emollama_jax.locks import hold
    from emollama_jax.paths import as_path

    place = Place(split=what.split, dir=what.dir, without=how.without)
    result = of_file.evaluate_files(files, what.source, place)
    if output.out is not None:
        out = as_path(output.out)
        of_file.check_kept(result, out, files.predictions)
        with hold(out, instead="choose another --out"):
            publish(result, out)
    if not output.json:
        print(of_file.lines(result))
        return
    if result.warning:
        print(result.warning, file=sys.stderr)
    if result.groups.why and place.named:
        print(f"no errors by group: {result.groups.why}", file=sys.stderr)
    _print_json(result.summary())


def _print_json(tree: dict) -> None:
    print(json.dumps(tree, ensure_ascii=False, allow_nan=False))


def zero_shot(options: Inline[ZeroShot]) -> None:
    """Evaluates any other model under the same protocol: a Hugging Face image-text model, an
    OpenAI-compatible endpoint, or Gemini.

    Start with --limit 20. Answers are cached in the journal of the output folder. Stopped or
    killed? Re-run the command to resume; a finished run asks nothing. Keys are read from the
    environment: GEMINI_API_KEY, and OPENAI_API_KEY if the endpoint needs one.

    Args:
        options: model, data and limits.
    """
    from emollama_jax.remote.clients import check_spec

    check_spec(options.model)
    if options.out is not None:
        check_writable(options.out)
    sets.check_prepared(options.dir, [options.data])
    from emollama_jax.evaluate.of_remote import evaluate_remote, out_folder

    home = out_folder(options)
    print(evaluate_remote(options, home, new_console()).lines(home))
