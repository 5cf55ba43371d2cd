"""A result as a LaTeX table (booktabs): recalls, UAR and WAR, beside the field's numbers."""

import math
import re
from collections.abc import Sequence

from emollama_jax.evaluate.metrics import Folds
from emollama_jax.evaluate.protocol import Evaluation
from emollama_jax.evaluate.published import Published

_SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def table(
    title: str,
    rows: Sequence[tuple[str, Evaluation]],
    *,
    others: Sequence[Published],
    folds: Folds | None,
) -> str:
    """The whole `table` environment.

    Args:
        title: title for the caption.
        rows: name of the row and its numbers, all over the same classes.
        others: published results, which have no recalls.
        folds: mean and standard deviation over the rows, where they are folds.
    """
    classes = rows[0][1].classes
    lines = [
        "% needs \\usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape(title)}: recall per class, UAR and WAR in \%.}}",
        rf"\begin{{tabular}}{{l{'r' * (len(classes) + 2)}}}",
        r"\toprule",
        _line(["", *map(escape, classes), "UAR", "WAR"]),
        r"\midrule",
    ]
    for name, e in rows:
        recalls = [_percent(value) for value in e.per_class.recall.tolist()]
        lines.append(_line([escape(name), *recalls, _percent(e.uar), _percent(e.war)]))
    empty = [""] * len(classes)
    if folds:
        means = [
            f"{_percent(mean)} $\\pm$ {_percent(std)}"
            for mean, std in ((folds.uar, folds.uar_std), (folds.war, folds.war_std))
        ]
        lines += [r"\midrule", _line([f"mean of {len(folds.wars)} folds", *empty, *means])]
    if others:
        lines.append(r"\midrule")
    for other in others:
        uar = "--" if other.uar is None else f"{other.uar:.2f}"
        name = escape(f"{other.model}, {other.how}")
        lines.append(_line([name, *empty, uar, f"{other.war:.2f}"]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def escape(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return re.sub(r"[\\~^&%$#_{}]", lambda found: _SPECIAL.get(found[0], "\\" + found[0]), text)


def _percent(share: float) -> str:
    return "--" if math.isnan(share) else f"{100 * share:.2f}"


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"
