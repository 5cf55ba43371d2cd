"""`emollama eval --predictions`: anyone's predictions, scored without a model and without JAX."""

import contextlib
import dataclasses
import importlib.metadata
import json
import pathlib
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from emollama_jax.data.emotions import LABEL_SPACES, LabelSpace
from emollama_jax.data.sets import label_space
from emollama_jax.errors import UserError
from emollama_jax.evaluate import folds, groups
from emollama_jax.evaluate.beside import ANYWHERE, Place, known
from emollama_jax.evaluate.parse.unparsed import warning
from emollama_jax.evaluate.predictions import named_classes, read_foreign
from emollama_jax.evaluate.protocol import Prediction, protocol_of, write_predictions
from emollama_jax.evaluate.publish import Tested, make_tested, summarise, write_results
from emollama_jax.evaluate.report import DEFINITIONS
from emollama_jax.evaluate.trace import file_hash
from emollama_jax.paths import as_path, is_remote


@dataclasses.dataclass(frozen=True)
class Scored:
    """The numbers of predictions files."""

    result: dict[str, Any]  # WAR, UAR, n, unparsed and recall as shares; of folds also std
    warning: str  # that many answers are unparsed; "" where they are not
    no_groups: str  # why there are no numbers by group; "" where there are


def score_files(
    paths: Sequence[pathlib.Path],
    *,
    truth_column: str,
    prediction_column: str,
    id_column: str | None,
    source: str | None,
    classes: str | None,
    out: epath.Path | None,
    place: Place = ANYWHERE,
) -> Scored:
    """Scores predictions files.

    Args:
        paths: one file, or one for each official fold of `source`, in order; a pipe, or "-" for
            the standard input, is read once.
        truth_column: of the true label.
        prediction_column: of the answer.
        id_column: of the item's name; None: none.
        source: the set whose classes count; None: what the file says.
        classes: their names instead, with commas.
        out: gets the predictions, the report, its JSON and its LaTeX table; None: nothing is
            written.
        place: of the prepared set that the items belong to.

    Returns:
        The numbers, and what to know before them.

    Raises:
        UserError: a file, column, label or number of folds that does not fit.
    """
    space = _space(source, classes)
    protocol = protocol_of(source) if source else None
    if len(paths) > 1 and place.without is not None:
        raise UserError(f"--without {place.without}: of one file, not of {len(paths)} folds")
    if len(paths) > 1 and (protocol is None or protocol.folds == 1):
        raise UserError(
            f"{len(paths)} predictions files: name the set whose folds they are with --source "
            f"({', '.join(name for name in LABEL_SPACES if _folds(name))})"
        )
    tested, seen = [], []
    with _files(paths) as files:
        hashes = list(map(file_hash, files))
        for number, path in enumerate(files, 1):
            found, space = read_foreign(
                path,
                truth_column=truth_column,
                prediction_column=prediction_column,
                id_column=id_column,
                space=space,
            )
            title = f"fold {number}" if len(files) > 1 else path.name
            name = f"{source}/fold{number}" if len(files) > 1 else source
            items = known(found, name, place, named=id_column is not None)
            seen.append(items.seen)
            tested.append(
                make_tested(title, found, space, seen=items.seen, left_out=items.left_out)
            )
    mean = pooled = None
    evaluations = [item.evaluation for item in tested]
    if len(paths) > 1 and source is not None:
        if len(set(hashes)) < len(paths):
            raise UserError("a predictions file is given twice: wanted one for each fold")
        mean = folds.join(dict(enumerate(evaluations, 1)), source)
        if id_column or all(":" in item.predictions[0].source for item in tested):
            folds.check_disjoint([item.predictions for item in tested])
        result = folds.summary(evaluations, mean)
        every = [one for item in tested for one in item.predictions]
        pooled = groups.by_group(every, groups.joined(seen), space)
        if not pooled.why:
            result["groups"] = groups.tree(pooled)
    else:
        result = summarise(tested[0])
    why = (pooled or tested[0].groups).why
    scored = Scored(result, warning(evaluations), why)
    if out is not None:
        name = source or tested[0].predictions[0].source.partition(":")[0]
        for number, item in enumerate(tested, 1):
            file = (out / f"fold{number}" if len(tested) > 1 else out) / "predictions.jsonl"
            if not is_remote(file) and any(_same(path, pathlib.Path(file)) for path in files):
                raise UserError(f"{file}: --out would overwrite these predictions; name another")
            write_predictions(file, _sourced(item, source, named=id_column is not None))
        write_results(
            out,
            title=", ".join(path.name for path in files),
            lede=f"{result['n']:,} predictions, scored as they stand in the file.",
            source=name,
            tested=tested,
            folds=mean,
            pooled=pooled,
            command=shlex.join(
                [
                    "emollama",
                    "eval",
                    *("--predictions", *map(str, paths)),
                    *("--truth-column", truth_column),
                    *("--prediction-column", prediction_column),
                    *(("--without", place.without) if place.without else ()),
                ]
            ),
            config=f"truth_column: {truth_column}\nprediction_column: {prediction_column}\n"
            f"classes: {json.dumps(space.classes if space else [], ensure_ascii=False)}\n",
            versions={"emollama-jax": importlib.metadata.version("emollama-jax")},
            trace=dict(zip((path.name for path in files), hashes, strict=True)),
        )
    return scored


def _same(given: pathlib.Path, file: pathlib.Path) -> bool:
    return file.exists() and file.samefile(given)


@contextlib.contextmanager
def _files(paths: Sequence[pathlib.Path]) -> Iterator[list[pathlib.Path]]:
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


def _sourced(item: Tested, source: str | None, *, named: bool) -> Sequence[Prediction]:
    """Records that say which set's classes they bear, so that they can be scored again."""
    if source is None or any(":" in one.source for one in item.predictions):
        return item.predictions
    return [
        dataclasses.replace(
            one,
            id=one.id if named else f"{one.source}, {one.id}",
            source=f"{source}:{one.source}",
        )
        for one in item.predictions
    ]


def report_files(
    paths: Sequence[pathlib.Path],
    columns: tuple[str, str, str | None],
    source: str | None,
    classes: str | None,
    *,
    out: str | None,
    as_json: bool,
    place: Place,
) -> str:
    """What the command prints of `score_files`; columns are those of truth, answer and name."""
    scored = score_files(
        paths,
        truth_column=columns[0],
        prediction_column=columns[1],
        id_column=columns[2],
        source=source,
        classes=classes,
        out=None if out is None else as_path(out),
        place=place,
    )
    if as_json:
        if scored.warning:
            print(scored.warning, file=sys.stderr)
        if scored.no_groups and place.named:
            print(f"no errors by group: {scored.no_groups}", file=sys.stderr)
        return json.dumps(scored.result, ensure_ascii=False)
    return lines(scored)


def lines(scored: Scored) -> str:
    """The numbers as the terminal shows them, in per cent; what is wrong with them comes first."""
    result = scored.result
    head = f"WAR {100 * result['WAR']:.2f}  UAR {100 * result['UAR']:.2f}  n {result['n']}"
    head += f"  unparsed {100 * result['unparsed']:.2f}"
    found = [*filter(None, [scored.warning]), DEFINITIONS, head]
    if "std" in result:
        std = result["std"]
        found.append(f"± {100 * std['WAR']:.2f} WAR, {100 * std['UAR']:.2f} UAR over the folds")
    found += [f"  {name:<16}{100 * value:6.2f}" for name, value in result["recall"].items()]
    if "without" in result:
        less = result["without"]
        found.append(
            f"without the {less['left_out']:,} that also stand in {less['split']}: WAR "
            f"{100 * less['WAR']:.2f}  UAR {100 * less['UAR']:.2f}  n {less['n']}"
        )
    found += _by_group(result) if "groups" in result else []
    if scored.no_groups:
        found.append(f"no errors by group: {scored.no_groups}")
    return "\n".join(found)


def _by_group(result: dict[str, Any]) -> list[str]:
    """A line for each group, in the order of its classes."""
    found = ["as the face network sees them: n, WAR and its interval"]
    for attribute, group in result["groups"].items():
        for name, numbers in group.items():
            if numbers["n"]:
                low, high = (100 * numbers["WAR_interval"][end] for end in ("low", "high"))
                war = f"{100 * numbers['WAR']:6.2f}  {low:.2f} – {high:.2f}"
                found.append(f"  {attribute + ', ' + name:<24}{numbers['n']:>7}  {war}")
    return found


def _space(source: str | None, classes: str | None) -> LabelSpace | None:
    if classes is not None:
        return named_classes(classes)
    return None if source is None else label_space(source)


def _folds(name: str) -> bool:
    protocol = protocol_of(name)
    return protocol is not None and protocol.folds > 1
