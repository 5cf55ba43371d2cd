"""What `emollama plan` does: one plan, or a search, as tables or as JSON."""

import functools
import json
import sys

from rich.console import Console

from emollama_jax.config import Config
from emollama_jax.data.lengths import Lengths, measure
from emollama_jax.errors import UserError
from emollama_jax.scale import steps, topologies
from emollama_jax.scale.options import Planned
from emollama_jax.scale.plan import make_plan, to_dict
from emollama_jax.scale.search import search
from emollama_jax.scale.table import show, show_search


def run(
    cfg: Config,
    topology: str,
    planned: Planned,
    *,
    as_json: bool,
    searching: bool,
    console: Console,
) -> None:
    """Plans, with progress on `console`, and prints the result to stdout.

    Args:
        cfg: config of the run.
        topology: name in `TOPOLOGIES`.
        planned: the step, and what it works on.
        as_json: instead of tables.
        searching: for the largest batch and the best preset.
        console: terminal for progress.

    Raises:
        UserError: as `make_plan` and `search`.
    """
    topologies.chip_of(topology)
    step, kind = planned.step, planned.kind
    if kind is None:
        kinds = {source.kind for source in cfg.data.sources}
        kind = "clip" if "clip" in kinds else "image"
    lengths = _lengths(cfg, step, kind, planned.tokens)
    out = Console(width=None if sys.stdout.isatty() else 110)
    with console.status("") as status:
        if not searching:
            plan = make_plan(
                cfg,
                topology,
                step=step,
                kind=kind,
                examples=planned.batch,
                lengths=lengths,
                tell=status.update,
            )
            found = []
        else:
            count = len(topologies.devices(topology, cfg.mesh.slices))
            make = functools.partial(make_plan, lengths=lengths)
            found = search(
                cfg, topology, count, step=step, kind=kind, tell=console.print, plan=make
            )
            plan = next(best.plan for best in found if best.plan)
    if as_json:
        tree = to_dict(plan)
        if found:
            tree["search"] = [best.to_dict() for best in found]
        print(json.dumps(tree, indent=2))
        return
    if found:
        show_search(found, out)
    show(plan, out)


def _lengths(
    cfg: Config, step: steps.Step, kind: steps.Kind, tokens: float | None
) -> Lengths | None:
    """Lengths of the examples that a step trains on; None where they are not known."""
    if step != "train":
        return None
    kind_drawn = None if cfg.data.packed is not None else kind
    if tokens is None:
        try:
            return measure(cfg, kind=kind_drawn)
        except UserError:
            return None  # nothing is prepared here; the plan says how to tell it
    frames = {"image": 1, "clip": cfg.data.clip_frames}
    drawn = [x for x in cfg.data.sources if kind_drawn in (None, x.kind)]
    weight = sum(x.weight for x in drawn) or 1.0
    shown = sum(x.weight * frames[x.kind] for x in drawn) / weight
    question = steps.shapes(cfg, kind, step, examples=None).question_length
    return Lengths(0, tokens, tokens**2, 0.0, shown, shown, question)
