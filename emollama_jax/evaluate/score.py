"""`emollama eval --predictions`: anyone's predictions, scored without a model and without JAX."""

import importlib.metadata
import json
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any

from etils import epath

from emollama_jax.data.emotions import LABEL_SPACES, LabelSpace, label_space
from emollama_jax.errors import UserError
from emollama_jax.evaluate import folds as joined
from emollama_jax.evaluate.predictions import named_classes, read_foreign, summary
from emollama_jax.evaluate.protocol import evaluate, protocol_of
from emollama_jax.evaluate.results import Tested, write_results
from emollama_jax.evaluate.trace import file_hash
from emollama_jax.paths import as_path


def score_files(
    paths: Sequence[pathlib.Path],
    *,
    truth_column: str,
    prediction_column: str,
    id_column: str | None,
    source: str | None,
    classes: str | None,
    out: epath.Path | None,
) -> dict[str, Any]:
    """Scores predictions files.

    Args:
        paths: one file, or one for each official fold of `source`, in order.
        truth_column: of the true label.
        prediction_column: of the answer.
        id_column: of the item's name; None: none.
        source: the set whose classes count; None: what the file says.
        classes: their names instead, with commas.
        out: gets the report, its JSON and its LaTeX table; None: nothing is written.

    Returns:
        WAR, UAR, n, unparsed and recall as shares; of folds also their standard deviations.

    Raises:
        UserError: a file, column, label or number of folds that does not fit.
    """
    space = _space(source, classes)
    protocol = protocol_of(source) if source else None
    if len(paths) > 1 and (protocol is None or protocol.folds == 1):
        raise UserError(
            f"{len(paths)} predictions files: name the set whose folds they are with --source "
            f"({', '.join(name for name in LABEL_SPACES if _folds(name))})"
        )
    tested = []
    for number, path in enumerate(paths, 1):
        found, space = read_foreign(
            path,
            truth_column=truth_column,
            prediction_column=prediction_column,
            id_column=id_column,
            space=space,
        )
        title = f"fold {number}" if len(paths) > 1 else path.name
        tested.append(Tested(title=title, predictions=found, evaluation=evaluate(found, space)))
    mean = None
    evaluations = [item.evaluation for item in tested]
    if len(paths) > 1 and source is not None:
        if len({file_hash(path) for path in paths}) < len(paths):
            raise UserError("a predictions file is given twice: wanted one for each fold")
        mean = joined.join(dict(enumerate(evaluations, 1)), source)
        if id_column or all(":" in item.predictions[0].source for item in tested):
            joined.check_disjoint([item.predictions for item in tested])
        result = joined.summary(evaluations, mean)
    else:
        result = summary(evaluations[0])
    if out is not None:
        name = source or tested[0].predictions[0].source.partition(":")[0]
        write_results(
            out,
            title=", ".join(path.name for path in paths),
            lede=f"{result['n']:,} predictions, scored as they stand in the file.",
            source=name,
            tested=tested,
            folds=mean,
            command=shlex.join(
                [
                    "emollama",
                    "eval",
                    *("--predictions", *map(str, paths)),
                    *("--truth-column", truth_column),
                    *("--prediction-column", prediction_column),
                ]
            ),
            config=f"truth_column: {truth_column}\nprediction_column: {prediction_column}\n"
            f"classes: {json.dumps(space.classes if space else [], ensure_ascii=False)}\n",
            versions={"emollama-jax": importlib.metadata.version("emollama-jax")},
            trace={path.name: file_hash(path) for path in paths},
        )
    return result


def report_files(
    paths: Sequence[pathlib.Path],
    columns: tuple[str, str, str | None],
    source: str | None,
    classes: str | None,
    *,
    out: str | None,
    as_json: bool,
) -> str:
    """What the command prints of `score_files`; columns are those of truth, answer and name."""
    result = score_files(
        paths,
        truth_column=columns[0],
        prediction_column=columns[1],
        id_column=columns[2],
        source=source,
        classes=classes,
        out=None if out is None else as_path(out),
    )
    return json.dumps(result, ensure_ascii=False) if as_json else lines(result)


def lines(result: dict[str, Any]) -> str:
    """The numbers as the terminal shows them, in per cent."""
    head = f"WAR {100 * result['WAR']:.2f}  UAR {100 * result['UAR']:.2f}  n {result['n']}"
    head += f"  unparsed {100 * result['unparsed']:.2f}"
    found = [head]
    if "std" in result:
        std = result["std"]
        found.append(f"± {100 * std['WAR']:.2f} WAR, {100 * std['UAR']:.2f} UAR over the folds")
    found += [f"  {name:<16}{100 * value:6.2f}" for name, value in result["recall"].items()]
    return "\n".join(found)


def _space(source: str | None, classes: str | None) -> LabelSpace | None:
    if classes is not None:
        return named_classes(classes)
    return None if source is None else label_space(source)


def _folds(name: str) -> bool:
    protocol = protocol_of(name)
    return protocol is not None and protocol.folds > 1
