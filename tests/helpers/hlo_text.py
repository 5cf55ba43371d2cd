"""Small HLO texts for the tests of the reader."""

# ruff: noqa: E501 (lines of HLO)


def module_text(entry: str, before: str = "") -> str:
    """A module whose entry computation has these lines."""
    return (
        f"HloModule m\n\n{before}\nENTRY %main (p: f32[]) -> f32[] {{\n{entry.strip(chr(10))}\n}}\n"
    )


def collective(kind: str, given: int, taken: int, *, groups: str | None = None) -> str:
    """One collective of float32 vectors over the middle axis of a 1 × 4 × 2 mesh."""
    where = groups or "replica_groups={{0,2,4,6},{1,3,5,7}}"
    return module_text(
        f"  %p = f32[{given}]{{0}} parameter(0)\n"
        f"  ROOT %c = f32[{taken}]{{0}} {kind}(%p), channel_id=1, {where}\n"
    )


def counted_loop(
    start: int, bound: int | None, step: int, direction: str, *, hoisted: bool, around: int = 0
) -> str:
    """A loop whose body costs 10 cycles.

    Args:
        start: of the counter.
        bound: that it is compared with; None: it is data.
        step: that the body adds.
        direction: of the comparison.
        hoisted: the bound is carried in the loop's tuple, and compared inside a fusion.
        around: the trip count of a loop around it; 0 for none.
    """
    carried = "(s32[], s32[], f32[8])"
    limit = "%b = s32[] parameter(1)" if bound is None else f"%b = s32[] constant({bound})"
    if hoisted:
        condition = f"""%less (i: s32[], n: s32[]) -> pred[] {{
  %i = s32[] parameter(0)
  %n = s32[] parameter(1)
  ROOT %c = pred[] compare(%i, %n), direction={direction}
}}

%condition (t: {carried}) -> pred[] {{
  %t = {carried} parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] get-tuple-element(%t), index=1
  ROOT %c = pred[] fusion(%i, %n), kind=kLoop, calls=%less
}}
"""
    else:
        own = (
            "%n = s32[] get-tuple-element(%t), index=1"
            if bound is None
            else limit.replace("%b", "%n")
        )
        condition = f"""%condition (t: {carried}) -> pred[] {{
  %t = {carried} parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  {own}
  ROOT %c = pred[] compare(%i, %n), direction={direction}
}}
"""
    body = f"""%body (t: {carried}) -> {carried} {{
  %t = {carried} parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] get-tuple-element(%t), index=1
  %x = f32[8] get-tuple-element(%t), index=2
  %one = s32[] constant({step})
  %next = s32[] add(%i, %one)
  %y = f32[8] copy(%x), backend_config={{"estimated_cycles":"10"}}
  ROOT %r = {carried} tuple(%next, %n, %y)
}}
"""
    loop = f"""  %start = s32[] constant({start})
  {limit}
  %tuple = {carried} tuple(%start, %b, %p)
  %loop = {carried} while(%tuple), condition=%condition, body=%body
"""
    if not around:
        entry = f"  %p = f32[8] parameter(0)\n{loop}  ROOT %o = f32[8] get-tuple-element(%loop), index=2\n"
        return module_text(entry, f"{condition}\n{body}")
    outer = f"""%outer_condition (t: (s32[], f32[8])) -> pred[] {{
  %t = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] constant({around})
  ROOT %c = pred[] compare(%i, %n), direction=LT
}}

%outer_body (t: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %t = (s32[], f32[8]) parameter(0)
  %k = s32[] get-tuple-element(%t), index=0
  %p = f32[8] get-tuple-element(%t), index=1
{loop}  %one = s32[] constant(1)
  %next = s32[] add(%k, %one)
  %y = f32[8] get-tuple-element(%loop), index=2
  ROOT %r = (s32[], f32[8]) tuple(%next, %y)
}}
"""
    entry = """  %p = f32[8] parameter(0)
  %zero = s32[] constant(0)
  %t = (s32[], f32[8]) tuple(%zero, %p)
  %w = (s32[], f32[8]) while(%t), condition=%outer_condition, body=%outer_body
  ROOT %o = f32[8] get-tuple-element(%w), index=1
"""
    return module_text(entry, f"{condition}\n{body}\n{outer}")
