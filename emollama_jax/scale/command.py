"""What `emollama plan` does: one plan, or a search, as tables or as JSON."""

import json
import sys

from rich.console import Console

from emollama_jax.config import Config
from emollama_jax.scale import steps, topologies
from emollama_jax.scale.plan import make_plan, to_dict
from emollama_jax.scale.search import search
from emollama_jax.scale.table import show, show_search


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
        cfg: config of the run.
        topology: name in `TOPOLOGIES`.
        step: which.
        kind: kind of batch; clips if the config has some.
        examples: examples per step, over all devices.
        as_json: instead of tables.
        searching: for the largest batch and the best preset.
        console: terminal for progress.

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
