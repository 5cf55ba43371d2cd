"""The `Result` of anyone's predictions in files, made without a model and without JAX."""

import contextlib
import dataclasses
import json
import pathlib
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from emollama_jax.data.emotions import LABEL_SPACES
from emollama_jax.data.sets import label_space
from emollama_jax.errors import UserError
from emollama_jax.evaluate import folds
from emollama_jax.evaluate.beside import Place, look_up
from emollama_jax.evaluate.foreign import named_classes, read_foreign
from emollama_jax.evaluate.options import PredictionFiles
from emollama_jax.evaluate.protocol import Prediction, folds_of
from emollama_jax.evaluate.report import DEFINITIONS
from emollama_jax.evaluate.result import Answers, Result, Settings
from emollama_jax.evaluate.trace import file_hash, versions
from emollama_jax.paths import is_remote


def evaluate_files(
    files: PredictionFiles, source: str | None = None, place: Place | None = None
) -> Result:
    """The result of predictions files.

    Args:
        files: one file, or one for each official fold of `source`, in order, and their columns; a
            pipe, or "-" for the standard input, is read once.
        source: the set whose classes count; None: what the file says.
        place: the prepared set that the items belong to.

    Raises:
        UserError: a file, column, label or number of folds that does not fit.
    """
    place, many = place or Place(), len(files.predictions) > 1
    space = None if source is None else label_space(source)
    if files.classes is not None:
        space = named_classes(files.classes)
    if many and place.without is not None:
        count = len(files.predictions)
        raise UserError(f"--without {place.without}: works for one file, not for {count} folds")
    if many and (source is None or folds_of(source) == 1):
        raise UserError(
            f"{len(files.predictions)} predictions files: name the set whose folds they are with "
            f"--source ({', '.join(name for name in LABEL_SPACES if folds_of(name) > 1)})"
        )
    named, answers = files.id_column is not None, []
    with _readable(files.predictions) as paths:
        hashes = list(map(file_hash, paths))
        for number, path in enumerate(paths, 1):
            found, space = read_foreign(path, files, space)
            name = f"{source}/fold{number}" if many else source
            seen, copies = look_up(found, name, place, named=named)
            title = f"fold {number}" if many else path.name
            answers.append(Answers.of(title, found, space, seen=seen, copies=copies))
    mean = pooled = None
    if many and source is not None and space is not None:
        if len(set(hashes)) < len(paths):
            raise UserError("a predictions file is given twice: wanted one for each fold")
        mean, pooled = folds.mean_of(answers, source), folds.pool(answers, space)
        if named or all(":" in item.predictions[0].source for item in answers):
            folds.check_disjoint([item.predictions for item in answers])
    return Result(
        title=", ".join(path.name for path in paths),
        lede=f"{sum(item.evaluation.n for item in answers):,} predictions, scored as given in "
        "the file.",
        source=source or answers[0].predictions[0].source.partition(":")[0],
        answers=answers,
        mean=mean,
        pooled=pooled,
        predictions={
            f"fold{number}/predictions.jsonl" if many else "predictions.jsonl": _sourced(
                item.predictions, source, named=named
            )
            for number, item in enumerate(answers, 1)
        },
        settings=_settings(files, paths, place, space.classes if space else ()),
        trace=dict(zip((path.name for path in paths), hashes, strict=True)),
    )


def check_kept(result: Result, out: epath.Path, given: Sequence[pathlib.Path]) -> None:
    """Refuses a folder in which a result would overwrite the files that it was made of.

    Raises:
        UserError: naming the file.
    """
    for name in result.predictions:
        file = out / name
        if is_remote(file) or not file.exists():
            continue
        if any(path.exists() and pathlib.Path(file).samefile(path) for path in given):
            raise UserError(f"{file}: --out would overwrite these predictions; choose another")


def lines(result: Result) -> str:
    """The numbers as the terminal shows them, in per cent; what is wrong with them comes first."""
    tree, without = result.summary(), result.headline.without
    head = f"WAR {_percent(tree['WAR'])}  UAR {_percent(tree['UAR'])}  n {tree['n']}"
    head += f"  unparsed {_percent(tree['unparsed'])}"
    found = [*filter(None, [result.warning]), DEFINITIONS, head]
    if "std" in tree:
        war, uar = (_percent(tree["std"][name]) for name in ("WAR", "UAR"))
        found.append(f"± {war} WAR, {uar} UAR over the folds")
    found += [f"  {name:<16}{100 * value:6.2f}" for name, value in tree["recall"].items()]
    if without is not None:
        found.append(without.line(_percent))
    if result.groups.why:
        found.append(f"no errors by group: {result.groups.why}")
    else:
        found += _by_group(tree["groups"])
    return "\n".join(found)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _by_group(groups: dict[str, Any]) -> list[str]:
    """A line for each group, in the order of its classes."""
    found = ["as the face network sees them: n, WAR and its interval"]
    for attribute, group in groups.items():
        for name, numbers in group.items():
            if numbers["n"]:
                low, high = (_percent(numbers["WAR_interval"][end]) for end in ("low", "high"))
                war = f"{100 * numbers['WAR']:6.2f}  {low} – {high}"
                found.append(f"  {attribute + ', ' + name:<24}{numbers['n']:>7}  {war}")
    return found


def _settings(
    files: PredictionFiles, paths: Sequence[pathlib.Path], place: Place, classes: Sequence[str]
) -> Settings:
    truth, answer = files.truth_column, files.prediction_column
    words = ["emollama", "eval", "--predictions", *map(str, paths)]
    words += ["--truth-column", truth, "--prediction-column", answer]
    words += ["--without", place.without] if place.without else []
    named = json.dumps(classes, ensure_ascii=False)
    config = f"truth_column: {truth}\nprediction_column: {answer}\nclasses: {named}\n"
    return Settings(shlex.join(words), config, versions("emollama-jax"))


@contextlib.contextmanager
def _readable(paths: Sequence[pathlib.Path]) -> Iterator[list[pathlib.Path]]:
    """The files; what can be read only once (a pipe, "-") is first copied."""
    with tempfile.TemporaryDirectory() as folder:
        files, given = [], {}
        for number, path in enumerate(paths):
            stdin = str(path) == "-"
            if stdin or (path.exists() and not path.is_file() and not path.is_dir()):
                copy = pathlib.Path(folder, str(number), "standard input" if stdin else path.name)
                copy.parent.mkdir()
                copy.write_bytes(sys.stdin.buffer.read() if stdin else path.read_bytes())
                given[str(copy)] = copy.name if stdin else str(path)
                path = copy
            files.append(path)
        try:
            yield files
        except UserError as error:
            text = str(error)
            for copy, name in given.items():
                text = text.replace(copy, name)
            raise UserError(text) from None


def _sourced(
    predictions: Sequence[Prediction], source: str | None, *, named: bool
) -> Sequence[Prediction]:
    """Records that say which set's classes they bear, so that they can be scored again."""
    if source is None or any(":" in one.source for one in predictions):
        return predictions
    return [
        dataclasses.replace(
            one,
            id=one.id if named else f"{one.source}, {one.id}",
            source=f"{source}:{one.source}",
        )
        for one in predictions
    ]
