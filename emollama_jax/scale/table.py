"""A plan as tables for a terminal."""

import collections
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from emollama_jax.scale.cost import OTHER, PARTS
from emollama_jax.scale.plan import SHARE, Plan
from emollama_jax.scale.search import Best

GiB = 2**30


def show(plan: Plan, console: Console) -> None:
    """Prints a plan."""
    _head(plan, console)
    _memory(plan, console)
    _work(plan, console)
    _collectives(plan, console)
    _time(plan, console)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right")
    return table


def _head(plan: Plan, console: Console) -> None:
    mesh = " × ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    shapes, parts = plan.shapes, plan.mesh["data"] * plan.mesh["fsdp"]
    console.print(
        f"[bold]{plan.config}[/] on [bold]{plan.topology}[/]: {plan.step} step, {plan.chips} chips"
        + ("" if plan.chips == plan.device_count else f" ({plan.device_count} devices)")
    )
    what = f"{plan.kind}s" if shapes.most == 1 else f"{shapes.examples} examples in rows"
    asked = shapes.frames + shapes.again
    console.print(
        f"mesh {mesh}, preset {plan.preset}; {what}: {shapes.rows} rows "
        f"({shapes.rows / parts:g} for each part of the batch), each of {shapes.tokens} tokens, "
        f"{shapes.frames} frames and {asked} pairs of a frame and a question of "
        f"{shapes.question_length} tokens"
    )
    console.print(f"XLA flags: {' '.join(plan.flags) or 'none'}")
    console.print(f"compiled in {plan.compile_seconds:.0f} s")
    if plan.replicated:
        console.print(
            f"{len(plan.replicated)} dimensions are replicated on every device, e.g. "
            f"{plan.replicated[0]}"
        )


def _memory(plan: Plan, console: Console) -> None:
    memory = plan.memory
    table = _table("HBM of one device", "", "GiB", "share")
    rows = memory.arguments | {
        "padding of arguments": memory.padding,
        "temporaries": memory.temporaries,
        "new outputs": memory.outputs,
        "program": memory.program,
    }
    for name, size in rows.items():
        table.add_row(name, f"{size / GiB:.2f}", f"{size / memory.capacity:.1%}")
    table.add_section()
    verdict = "fits" if memory.fits else "[red]does not fit[/]"
    table.add_row("all", f"{memory.total / GiB:.2f}", f"{memory.total / memory.capacity:.1%}")
    console.print(table)
    console.print(
        f"{verdict} in {SHARE:.0%} of the {memory.capacity / GiB:.0f} GiB that a device has"
    )


def _work(plan: Plan, console: Console) -> None:
    columns = ("part", "model TFLOP", "of it backward", "HLO TFLOP", "Mcycles", "share", "HBM GB")
    table = _table("Work of one device, a step", *columns)
    model, counted = plan.model, plan.cost
    cycles = sum(counted.cycles.values())
    for part in (*PARTS, OTHER):
        forward, backward = model.forward.get(part, 0.0), model.backward.get(part, 0.0)
        mine = counted.cycles.get(part, 0)
        if not any((forward, backward, counted.flops.get(part, 0), mine)):
            continue
        table.add_row(
            part,
            f"{(forward + backward) / plan.device_count / 1e12:.4g}",
            f"{backward / plan.device_count / 1e12:.4g}",
            f"{counted.flops.get(part, 0) / 1e12:.4g}",
            f"{mine / 1e6:.1f}",
            f"{mine / cycles:.1%}" if cycles else "",
            f"{counted.traffic.get(part, 0) / 1e9:.1f}",
        )
    if counted.kernels:
        table.add_row("kernels", "", "", f"{plan.kernel_flops / 1e12:.4g}", "", "", "")
    table.add_section()
    backward = sum(model.backward.values()) / plan.device_count / 1e12
    table.add_row(
        "all",
        f"{plan.model_flops / 1e12:.4g}",
        f"{backward:.4g}",
        f"{plan.hlo_flops / 1e12:.4g}",
        f"{cycles / 1e6:.1f}",
        "",
        f"{sum(counted.traffic.values()) / 1e9:.1f}",
    )
    console.print(table)
    useful = "unknown" if plan.useful is None else f"{plan.useful:.2f}"
    console.print(
        f"useful work: model ÷ HLO FLOPs {useful}; run again (rematerialised): "
        f"{counted.recomputed / 1e12:.4g} TFLOP; model FLOPs of a step, all chips: "
        f"{model.total / 1e12:,.1f} TFLOP"
    )
    if plan.useful is None or plan.useful > 1:
        console.print(
            "some products are multiplied and added row by row, outside the matrix unit: HLO TFLOP "
            "and the roofline's compute leave them out; cycles do not"
        )
    if counted.kernels:
        names = ", ".join(f"{n} × {name}" for name, n in counted.kernels.items())
        console.print(
            f"Pallas kernels, for which the compiler gives no cycles: {names}; their FLOPs are "
            "added from the config, at peak speed"
        )
    if counted.unbounded:
        console.print(f"loops of unknown length, counted once: {', '.join(counted.unbounded)}")
    console.print("conditionals count their most expensive branch")


def _collectives(plan: Plan, console: Console) -> None:
    table = _table(
        "Collectives of one device, a step",
        "kind",
        "mesh axis",
        "part",
        "count",
        "GB",
        "GB sent",
        "Mcycles",
        "not hidden",
    )
    rows = sorted(plan.cost.collectives.items(), key=lambda row: -row[1].sent)
    sums: dict[str, list[float]] = collections.defaultdict(lambda: [0.0] * 2)
    for key, traffic in rows:
        table.add_row(
            key.kind,
            " × ".join(key.axes) or "none",
            key.part,
            f"{traffic.count}",
            f"{traffic.bytes / 1e9:.4g}",
            f"{traffic.sent / 1e9:.4g}",
            f"{traffic.cycles / 1e6:.1f}",
            f"{traffic.exposed / 1e6:.1f}",
        )
        total = sums[f"{key.kind} over {' × '.join(key.axes) or 'none'}"]
        total[0] += traffic.bytes
        total[1] += traffic.sent
    if not rows:
        console.print("no collectives")
        return
    console.print(table)
    for name, (size, sent) in sums.items():
        console.print(f"{name}: {size / 1e9:.2f} GB, {sent / 1e9:.2f} GB sent")
    for one in plan.activations:
        console.print(
            f"no parameter: {one.kind} of {one.dtype}{list(one.dims)}, {one.bytes / 1e6:.2f} MB, "
            f"in {one.part or 'other'}",
            markup=False,
        )


def _time(plan: Plan, console: Console) -> None:
    table = _table("Estimates of a step's time", "", "s", "MFU")
    binds = max(plan.roofline, key=plan.roofline.__getitem__)
    for name, seconds in plan.roofline.items():
        mark = " (binds)" if name == binds else ""
        mfu = f"{plan.utilisation(seconds):.1%}" if mark else ""
        table.add_row(f"roofline: {name}{mark}", f"{seconds:.4g}", mfu)
    table.add_section()
    clock = plan.chip.clock
    table.add_row("compiler's cycles", f"{sum(plan.cost.cycles.values()) / clock:.4g}", "")
    table.add_row("collectives not hidden", f"{plan.cost.exposed / clock:.4g}", "")
    table.add_row("Pallas kernels at peak", f"{plan.kernel_flops / plan.peak:.4g}", "")
    table.add_row("all three", f"{plan.seconds:.4g}", f"{plan.utilisation(plan.seconds):.1%}")
    console.print(table)
    _real(plan, console)
    console.print(
        f"both are estimates, nothing ran: {clock / 1e9:.2f} GHz, {plan.peak / 1e12:.0f} TFLOP/s, "
        f"{plan.chip.bandwidth / plan.chip.devices / 1e9:,.0f} GB/s HBM, {plan.chip.links} links "
        f"of {plan.chip.link / 1e9:.0f} GB/s"
    )


def _real(plan: Plan, console: Console) -> None:
    """What of it is no padding."""
    if plan.step != "train":
        return
    shapes = plan.shapes
    console.print(
        f"{plan.examples_per_second:,.1f} examples/s; "
        f"{shapes.rows * shapes.tokens / plan.seconds:,.0f} tokens/s and "
        f"{shapes.rows * shapes.frames / plan.seconds:,.0f} frames/s, padding included"
    )
    if plan.lengths is None or plan.real is None:
        console.print(
            "what of it is padding is not known: prepare the config's data sets, or give the mean "
            "tokens of an example as --tokens"
        )
        return
    mean = plan.lengths
    source = f"of {mean.count:,} drawn examples" if mean.count else "as given"
    console.print(
        f"without padding ({mean.tokens:.0f} tokens and {mean.frames:.1f} frames an example, "
        f"{source}): {plan.examples_per_second * mean.tokens:,.0f} tokens/s, "
        f"{plan.examples_per_second * mean.frames:,.0f} frames/s; real tokens "
        f"{plan.real_token_share:.1%} of the places; useful work: real ÷ HLO FLOPs "
        f"{plan.real.total / plan.device_count / plan.hlo_flops:.2f}; MFU by real tokens "
        f"{plan.mfu_real:.1%}"
    )


def show_search(found: Sequence[Best], console: Console) -> None:
    """Prints what `search` found."""
    title = "Presets and rematerialisation, the best first"
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("preset", "remat", "largest batch that fits", "s an example", "memory"):
        table.add_column(column)
    for best in found:
        if best.plan is None:
            table.add_row(best.preset, best.remat, "one example does not fit", "", "")
            continue
        memory = best.plan.memory
        table.add_row(
            best.preset,
            best.remat,
            f"{best.plan.shapes.examples}",
            f"{best.per_example:.4f}",
            f"{memory.total / memory.capacity:.0%}",
        )
    console.print(table)
