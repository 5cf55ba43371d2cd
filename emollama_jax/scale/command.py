"""What `emollama plan` does: one plan, or a search, as tables or as JSON."""

import json
import sys

from rich.console import Console
from rich.table import Table

from emollama_jax.config import Config
from emollama_jax.scale import steps, topologies
from emollama_jax.scale.plan import make_plan, to_dict
from emollama_jax.scale.search import search
from emollama_jax.scale.table import show


def run(
    cfg: Config,
    topology: str,
    *,
    step: steps.Step,
    kind: steps.Kind | None,
    examples: int | None,
    as_json: bool,
    searching: bool,
    console: Console,
) -> None:
    """Plans, with progress on `console`, and prints the result to stdout.

    Args:
        cfg: of the run.
        topology: of `TOPOLOGIES`.
        step: which.
        kind: of batch; clips if the config has some.
        examples: of a step, all devices together.
        as_json: instead of tables.
        searching: for the largest batch and the best preset.
        console: gets progress.

    Raises:
        UserError: as `make_plan` and `search`.
    """
    topologies.chip_of(topology)
    if kind is None:
        kinds = {source.kind for source in cfg.data.sources}
        kind = "clip" if "clip" in kinds else "image"
    out = Console(width=None if sys.stdout.isatty() else 110)
    with console.status("") as status:
        if not searching:
            plan = make_plan(
                cfg, topology, step=step, kind=kind, examples=examples, tell=status.update
            )
            found = []
        else:
            count = len(topologies.devices(topology, cfg.mesh.slices))
            found = search(cfg, topology, count, step=step, kind=kind, tell=console.print)
            plan = next(one.plan for one in found if one.plan)
    if as_json:
        tree = to_dict(plan)
        if found:
            tree["search"] = [
                {
                    "preset": one.preset,
                    "examples": one.plan.shapes.examples if one.plan else 0,
                    "seconds_per_example": one.per_example if one.plan else None,
                }
                for one in found
            ]
        print(json.dumps(tree, indent=2))
        return
    if found:
        table = Table(title="Presets, the best first", title_justify="left", title_style="bold")
        for column in ("preset", "largest batch that fits", "s an example", "memory"):
            table.add_column(column)
        for one in found:
            if one.plan is None:
                table.add_row(one.preset, one.why, "", "")
                continue
            memory = one.plan.memory
            table.add_row(
                one.preset,
                f"{one.plan.shapes.examples}",
                f"{one.per_example:.4f}",
                f"{memory.total / memory.capacity:.0%}",
            )
        out.print(table)
    show(plan, out)
