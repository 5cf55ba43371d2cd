"""Reading HLO text: arrays, trip counts, groups of devices, FLOPs, traffic, collectives."""

# ruff: noqa: E501 (lines of HLO)

import dataclasses
import pathlib

import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from emollama_jax import config
from emollama_jax.base import abstract_model
from emollama_jax.scale import cost, hlo, moved, steps
from emollama_jax.sharding.mesh import AXES
from tests.helpers.hlo_text import collective, counted_loop, module_text

SHAPE = {"data": 1, "fsdp": 4, "tensor": 2}
GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "scanned_matmul.hlo"


def price(sent, members):
    """100 bytes a cycle, however the group lies."""
    return sent / 100


def count(text):
    return cost.cost(hlo.parse(text), SHAPE, price)


@pytest.fixture(scope="module")
def golden():
    """Five layers x ← relu(x @ w) of 512 × 1024 on fsdp 4 × tensor 2 of v5e:2x4, gathered weights;
    then x @ xᵀ in one branch of a conditional (tests/golden/README.md)."""
    return hlo.parse(GOLDEN.read_text())


# ------------------------------------------------------------------ a real program


def test_golden_trip_count_and_groups(golden):
    entry = golden.computations[golden.entry]
    (loop,) = [x for x in entry.instructions.values() if x.opcode == "while"]
    assert hlo.trip_count(golden, (entry, {}), loop) == 5
    (gather,) = [
        x
        for x in golden.computations[loop.called_by("body")].instructions.values()
        if x.opcode == "all-gather"
    ]
    members = hlo.groups(gather.attributes)
    assert members.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert hlo.mesh_axes(members, SHAPE) == ("fsdp",)


def test_golden_counts(golden):
    counted = cost.cost(golden, SHAPE, price)
    # A device holds 128 of 512 rows; the product of all rows in the conditional is everyone's.
    assert counted.flops == {
        "other": 5 * 2 * 128 * 1024 * 1024,
        "loss": 2 * 512 * 512 * 1024,
    }
    # The loop's three costs, five times; the copy after it; reduction and product of the loss.
    assert counted.cycles["other"] == 5 * (5206 + 2946 + 5170) + 10728
    assert counted.cycles["loss"] == 8596 + 16148
    ((key, traffic),) = counted.collectives.items()
    assert key == cost.Collective("all-gather", ("fsdp",), "other")
    assert traffic.count == 6
    weights, activations = 1024 * 1024 * 2, 512 * 1024 * 2
    assert traffic.bytes == 5 * weights + activations
    assert traffic.sent == traffic.bytes * 3 / 4
    assert traffic.exposed == traffic.cycles == pytest.approx(traffic.sent / 100)
    assert counted.unbounded == []


def test_golden_arguments_take_what_their_shapes_make(golden):
    given = golden.computations[golden.entry].parameters
    assert [given[i].result[0].padded for i in (0, 1)] == [5 * 256 * 1024 * 2, 128 * 1024 * 2]


# ------------------------------------------------------------------ small texts


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule nothing\n")


def test_a_kernels_text_does_not_end_its_computation():
    text = module_text(
        """
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %k = f32[8,128]{1,0:T(8,128)} custom-call(%p), custom_call_target="tpu_custom_call", backend_config={
  "kernel": "
}, %fake (x: f32[]) -> f32[] {
"}, metadata={op_name="jit(f)/llm/splash_fwd"}
  ROOT %q = f32[8,128]{1,0:T(8,128)} copy(%k), backend_config={"estimated_cycles":"7"}
"""
    )
    counted = count(text)
    assert counted.kernels == {"splash_fwd": 1}
    assert counted.cycles == {"other": 7, "llm": 0}


@pytest.mark.parametrize(
    ("dtype", "dims", "layout", "size"),
    [
        ("f32", "3,100", "1,0:T(8,128)", 8 * 128 * 4),
        ("bf16", "3,100", "0,1:T(8,128)(2,1)", 104 * 128 * 2),
        ("s32", "", ":T(128)", 128 * 4),
        ("u8", "5,8,128", "2,1,0:T(8,128)(4,1)", 5 * 8 * 128),
        ("pred", "7", "0:T(512)(128)(4,1)", 512),
    ],
)
def test_tiles_are_filled_up(dtype, dims, layout, size):
    assert hlo._array(dtype, dims, layout).padded == size


@pytest.mark.parametrize(
    ("start", "bound", "step", "direction", "times"),
    [
        (0, 32, 1, "LT", 32),
        (0, 7, 2, "LT", 4),  # a collective matmul, unrolled by two
        (3, 8, 1, "LE", 6),
        (9, -1, -1, "GT", 10),
        (5, 5, 1, "LT", 0),
    ],
)
@pytest.mark.parametrize("hoisted", [False, True])
def test_trip_counts(start, bound, step, direction, times, hoisted):
    text = counted_loop(start, bound, step, direction, hoisted=hoisted)
    assert count(text).cycles["other"] == 10 * times


def test_nested_loops_multiply_and_data_dependent_ones_are_named():
    inner = counted_loop(0, 3, 1, "LT", hoisted=True, around=4)
    assert count(inner).cycles["other"] == 4 * 3 * 10
    unknown = count(counted_loop(0, None, 1, "LT", hoisted=False))
    assert unknown.cycles["other"] == 10
    assert unknown.unbounded == ["loop"]


@pytest.mark.parametrize(
    ("text", "members"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("[1,4]<=[4]", [[0, 1, 2, 3]]),
        ("mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
    ],
)
def test_three_ways_of_writing_groups(text, members):
    line = f", channel_id=1, replica_groups={text}, dimensions={{0}}"
    assert hlo.groups(line).tolist() == members


def test_no_groups_mean_all_devices():
    assert hlo.groups(", replica_groups={}, to_apply=%add") is None


def test_axes_of_groups():
    shape = {"data": 2, "fsdp": 2, "tensor": 2}
    for members, axes in [
        ([[0, 1], [2, 3], [4, 5], [6, 7]], ("tensor",)),
        ([[0, 2], [1, 3], [4, 6], [5, 7]], ("fsdp",)),
        ([[0, 4], [1, 5], [2, 6], [3, 7]], ("data",)),
        ([[0, 2, 4, 6], [1, 3, 5, 7]], ("data", "fsdp")),
    ]:
        assert hlo.mesh_axes(np.array(members), shape) == axes


@pytest.mark.parametrize(
    ("kind", "given", "taken", "size", "sent"),
    [
        ("all-gather", 10, 40, 160, 120),
        ("all-reduce", 40, 40, 160, 240),
        ("reduce-scatter", 40, 10, 160, 120),
        ("all-to-all", 40, 40, 160, 120),
    ],
)
def test_bytes_of_collectives(kind, given, taken, size, sent):
    ((key, traffic),) = count(collective(kind, given, taken)).collectives.items()
    assert key.kind == kind
    assert key.axes == ("fsdp",)
    assert (traffic.count, traffic.bytes, traffic.sent) == (1, size, sent)


def test_permutes_move_all_they_are_given():
    text = collective("collective-permute", 40, 40, groups="source_target_pairs={{0,2},{2,4}}")
    ((key, traffic),) = count(text).collectives.items()
    assert key.axes == ("fsdp",)
    assert traffic.sent == 160


def test_work_between_start_and_done_hides_a_collective():
    """4,000 bytes take 30 cycles at 100 bytes a cycle and three quarters sent; 10 are hidden."""
    text = module_text(
        """
  %p = f32[250]{0} parameter(0)
  %s = (f32[250]{0}, f32[1000]{0}) all-gather-start(%p), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %w = f32[250]{0} copy(%p), backend_config={"estimated_cycles":"10"}
  ROOT %d = f32[1000]{0} all-gather-done(%s)
"""
    )
    ((_, traffic),) = count(text).collectives.items()
    assert (traffic.count, traffic.bytes, traffic.cycles) == (1, 4000, 30)
    assert traffic.exposed == 20


def test_a_collective_that_stands_in_three_fusions_is_one():
    gather = (
        "  ROOT %g = f32[1000]{0} all-gather(%a), channel_id=9, "
        "replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}\n"
    )
    inner = [
        f"%f{i} (a: f32[250]) -> f32[1000] {{\n  %a = f32[250]{{0}} parameter(0)\n{gather}}}\n"
        for i in range(3)
    ]
    text = module_text(
        """
  %p = f32[250]{0} parameter(0)
  %async-collective-start = f32[1000]{0} fusion(%p), kind=kCustom, calls=%f0
  %beside = f32[1000]{0} fusion(%p), kind=kCustom, calls=%f1, backend_config={"estimated_cycles":"25"}
  ROOT %async-collective-done = f32[1000]{0} fusion(%p), kind=kCustom, calls=%f2
""",
        "\n".join(inner),
    )
    ((_, traffic),) = count(text).collectives.items()
    assert (traffic.count, traffic.cycles, traffic.exposed) == (1, 30, 5)


@pytest.mark.parametrize(
    ("left", "right", "out", "attributes", "flops"),
    [
        ("8,16", "16,4", "8,4", "dim_labels=bf_io->bf", 2 * 8 * 16 * 4),
        # Three heads of 8 × 16 @ 16 × 4, as TPUs write a batched product.
        (
            "3,8,16",
            "3,16,4",
            "3,8,4",
            "window={size=3 stride=2 pad=0_0 lhs_dilate=3}, dim_labels=0bf_0io->0bf",
            3 * 2 * 8 * 16 * 4,
        ),
        # A 3 × 3 convolution: 25 + 4 · 5 · 2 … positions that meet no padding, 13² in all.
        (
            "1,5,5,2",
            "3,3,2,6",
            "1,5,5,6",
            "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
            2 * 2 * 6 * 13 * 13,
        ),
    ],
)
def test_flops_of_convolutions(left, right, out, attributes, flops):
    text = module_text(
        f"""
  %a = f32[{left}] parameter(0)
  %b = f32[{right}] parameter(1)
  ROOT %c = f32[{out}] convolution(%a, %b), {attributes}, metadata={{op_name="jit(f)/transpose(jvp(llm))/x"}}
"""
    )
    assert count(text).flops == {"llm": flops}


def test_flops_of_a_dot_and_what_is_run_again():
    text = module_text(
        """
  %a = f32[2,8,16] parameter(0)
  %b = f32[2,16,4] parameter(1)
  ROOT %c = f32[2,8,4] dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}, metadata={op_name="jit(f)/llm/checkpoint/rematted_computation/dot_general"}
"""
    )
    counted = count(text)
    assert counted.flops == {"llm": 2 * 2 * 8 * 16 * 4}
    assert counted.recomputed == 2 * 2 * 8 * 16 * 4


@pytest.mark.parametrize(
    ("op_name", "part"),
    [
        ("jit(train_step)/while/body/jvp(llm)/while/body/dot_general", "llm"),
        ("jit(train_step)/transpose(jvp(visual_tokens))/qformer/add", "qformer"),
        ("jit(train_step)/optimizer/mul", "optimizer"),
        ("jit(train_step)/jvp()/surface/mul", ""),
        ("", ""),
    ],
)
def test_parts_come_from_scopes(op_name, part):
    assert cost.part_of(op_name) == part


def test_traffic_counts_slices_and_what_lies_in_hbm():
    """A fusion reads one slice of a stack, and writes to vector memory; a copy brings it back."""
    inner = """%slice (a: f32[5,256], i: s32[]) -> f32[1,256] {
  %a = f32[5,256]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %s = f32[1,256]{1,0:T(8,128)S(1)} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={1,256}
}
"""
    text = module_text(
        """
  %p = f32[5,256]{1,0} parameter(0)
  %n = s32[]{:S(6)} parameter(1)
  %f = f32[1,256]{1,0:T(8,128)S(1)} fusion(%p, %n), kind=kLoop, calls=%slice
  ROOT %c = f32[1,256]{1,0} copy(%f)
""",
        inner,
    )
    assert count(text).traffic == {"other": 256 * 4 + 256 * 4}


def test_traffic_of_a_slice_in_other_tiles():
    """int8 stacks are sliced through a nested fusion that only names their tiles anew."""
    inner = """%tiled (a: s8[5,256]) -> s8[5,256] {
  %a = s8[5,256]{1,0:T(32,128)(4,1)} parameter(0)
  ROOT %c = s8[5,256]{1,0:T(8,128)(4,1)} copy(%a)
}
%slice (b: s8[5,256], i: s32[]) -> s8[1,256] {
  %b = s8[5,256]{1,0:T(32,128)(4,1)} parameter(0)
  %t = s8[5,256]{1,0:T(8,128)(4,1)} fusion(%b), kind=kLoop, calls=%tiled
  %i = s32[] parameter(1)
  ROOT %s = s8[1,256]{1,0:T(8,128)S(1)} dynamic-slice(%t, %i, %i), dynamic_slice_sizes={1,256}
}
"""
    text = module_text(
        """
  %p = s8[5,256]{1,0:T(32,128)(4,1)} parameter(0)
  %n = s32[]{:S(6)} parameter(1)
  ROOT %f = s8[1,256]{1,0:T(8,128)S(1)} fusion(%p, %n), kind=kLoop, calls=%slice
""",
        inner,
    )
    assert count(text).traffic == {"other": 256}


def test_traffic_of_a_scatter_is_what_it_scatters():
    inner = """%write (a: f32[500,256], i: s32[2], u: f32[2,256]) -> f32[500,256] {
  %a = f32[500,256]{1,0} parameter(0)
  %i = s32[2]{0} parameter(1)
  %u = f32[2,256]{1,0} parameter(2)
  ROOT %s = f32[500,256]{1,0} scatter(%a, %i, %u), update_window_dims={1}
}
"""
    text = module_text(
        """
  %p = f32[500,256]{1,0} parameter(0)
  %n = s32[2]{0} parameter(1)
  %q = f32[2,256]{1,0} parameter(2)
  ROOT %f = f32[500,256]{1,0} fusion(%p, %n, %q), kind=kCustom, calls=%write
""",
        inner,
    )
    rows = 2 * 256 * 4
    assert count(text).traffic == {"other": rows + 2 * 4 + rows}  # read with its places, written


@pytest.mark.parametrize(
    ("kind", "dims", "known"),
    [
        ("all-gather", "[4096,1024]", True),
        ("all-gather", "[1024,4096]", True),  # turned
        ("all-gather", "[1,16,64,4096]", True),  # one layer, its heads apart
        ("all-gather", "[128,4096]", False),  # rows of the batch
        ("all-to-all", "[8,512,1024]", True),
        ("all-to-all", "[8,16,1024]", False),
        ("all-reduce", "[128,4096]", True),  # sums are no gathers
        ("all-gather", "[64,64]", True),  # too small to tell
    ],
)
def test_what_is_gathered_is_a_parameter_or_named(kind, dims, known):
    text = module_text(
        "  %p = bf16[8,8]{1,0} parameter(0)\n"
        f"  ROOT %c = bf16{dims} {kind}(%p), replica_groups={{{{0,1}}}}, "
        'metadata={op_name="jit(step)/jvp(fim)/dot"}\n'
    )
    found = moved.activations(hlo.parse(text), {(4096, 1024), (39, 7)})
    assert bool(found) is not known
    assert all((one.kind, one.part) == (kind, "fim") for one in found)


def test_parameters_may_stay_split_over_tensor_or_come_in_parts():
    """The tiny LLM's queries, [128, 128] a layer: over fsdp 4 and tensor 2 a part is [32, 64]."""
    mesh = AbstractMesh(tuple(SHAPE.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    whole = abstract_model(config.load("tiny"), mesh)
    path = "llama/layers/q_proj/kernel"
    alone = dataclasses.replace(whole, params={path: whole.params[path]})
    shapes = {shape for shape in steps.gathered_shapes(alone) if len(shape) == 2}
    over_fsdp, over_both = {(128, 64), (32, 256)}, {(256, 64), (32, 512)}
    assert shapes == {(128, 128)} | over_fsdp | over_both


def test_a_started_gather_is_its_result_not_its_operand():
    text = module_text(
        "  %p = bf16[128,1024]{1,0} parameter(0)\n"
        "  ROOT %c = (bf16[128,1024]{1,0}, bf16[1024,1024]{1,0}) all-gather-start(%p), "
        "replica_groups={{0,1}}\n"
    )
    assert [one.dims for one in moved.activations(hlo.parse(text), set())] == [(1024, 1024)]
