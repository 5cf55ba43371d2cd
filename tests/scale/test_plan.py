"""Planning: topologies, model FLOPs, arguments, the search; and real compilation for TPUs."""

import collections
import dataclasses
import functools
import importlib.util
import io
import json
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from emollama_jax import cli, config
from emollama_jax.errors import UserError
from emollama_jax.models.emollama import EmoLlama
from emollama_jax.models.parameters import named_parameters
from emollama_jax.models.rngs import abstract
from emollama_jax.scale import cost, flops, hlo, plan, search, steps, table, topologies
from emollama_jax.sharding.mesh import make_mesh
from emollama_jax.train.setup import set_up

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install '.[plan]'"
)

# A part of everything but the face tower, which takes longest to compile.
SMALL = (
    "mesh.fsdp=-1",
    "model.fim.branches=none",
    "model.llama.layers=2",
    "model.vision.depth=1",
    "data.clip_frames=2",
    'train.trainable=["llama/.*lora_[AB]", "qformer/.*"]',
    'train.projector=["qformer/.*"]',
)


# ------------------------------------------------------------------ topologies


def test_unknown_topologies_are_refused_with_the_list(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "tiny", "--topology", "v5e:3x3"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert all(name in said for name in topologies.TOPOLOGIES)


def test_without_libtpu_one_line_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "tiny", "--topology", "v5e:2x4"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "emollama: libtpu is not installed: pip install 'emollama-jax[plan]'\n"
    )


@needs_libtpu
@pytest.mark.parametrize("name", topologies.TOPOLOGIES)
def test_every_topology_is_described(name):
    chip = topologies.chip_of(name)
    found = topologies.devices(name)
    assert len(found) == chip.devices * math.prod(map(int, name.partition(":")[2].split("x")))
    assert found[0].platform == "tpu"


@pytest.fixture
def mesh_of():
    def make(topology, data, fsdp, tensor):
        sizes = config.MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
        return plan.slice_mesh(sizes, topologies.devices(topology))

    return make


# ------------------------------------------------------------------ real programs


@needs_libtpu
def test_a_scanned_product_is_counted_as_it_is(mesh_of):
    """Seven layers whose weights are gathered over fsdp and whose sums go over tensor."""
    mesh = mesh_of("v5e:2x4", 1, 4, 2)
    layers, rows, width = 7, 512, 1024

    def step(x, w):
        with jax.named_scope("llm"):
            y = jax.lax.with_sharding_constraint(x, P("fsdp", "tensor")) @ w
        return jax.lax.with_sharding_constraint(y, P("fsdp")), None

    def abstract(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    with jax.set_mesh(mesh), topologies.compiling():
        compiled = (
            jax.jit(lambda w, x: jax.lax.scan(step, x, w)[0])
            .lower(
                abstract((layers, width, width), P(None, "tensor", "fsdp")),
                abstract((rows, width), P("fsdp")),
            )
            .compile()
        )
    module = hlo.parse(compiled.as_text())
    counted = cost.cost(module, dict(mesh.shape), plan.make_price(topologies.CHIPS["v5e"], mesh))
    assert counted.flops == {"llm": layers * 2 * rows * width * width / 8}
    assert counted.cycles["llm"] > layers * 1000
    axes = collections.defaultdict(set)
    for key in counted.collectives:
        axes[key.kind].add(key.axes)
    assert axes["all-reduce"] == {("tensor",)}
    assert axes["all-gather"] == {("fsdp",)}
    gathered = sum(t.bytes for k, t in counted.collectives.items() if k.kind == "all-gather")
    reduced = sum(t.bytes for k, t in counted.collectives.items() if k.kind == "all-reduce")
    assert gathered == layers * width // 2 * width * 2
    assert reduced in (layers * rows // 4 * width * 2, layers * rows // 4 * width * 4)
    said = compiled.memory_analysis()
    entry = module.computations[module.entry]
    padded = sum(x.result[0].padded for x in entry.parameters.values())
    assert padded == said.argument_size_in_bytes


@needs_libtpu
@pytest.mark.parametrize("topology", ["v4:4x4x4", "v5e:2x2", "v5p:2x2x1", "v6e:2x4", "tpu7x:2x2x2"])
def test_cycles_of_a_large_product_are_near_the_peak(topology, mesh_of):
    """Calibration of clock and peak: between 80 % and all of a device's FLOP/s."""
    chip = topologies.chip_of(topology)
    mesh = mesh_of(topology, len(topologies.devices(topology)), 1, 1)
    x, w = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P()))
        for shape in ((4096, 4096), (4096, 4096))
    )
    with topologies.compiling():
        text = jax.jit(jnp.matmul).lower(x, w).compile().as_text()
    counted = cost.cost(hlo.parse(text), dict(mesh.shape), lambda sent, members: 0)
    seconds = sum(counted.cycles.values()) / chip.clock
    assert sum(counted.flops.values()) == 2 * 4096**3
    share = 2 * 4096**3 / seconds / (chip.peak / chip.devices)
    print(f"{topology}: {share:.3f} of the peak")
    assert 0.8 <= share <= 1.0


@needs_libtpu
def test_the_command_plans_a_training_step(capsys):
    cli.main(["plan", "tiny", *SMALL, "--topology", "v5e:2x4", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (told["chips"], told["mesh"]) == (8, {"data": 1, "fsdp": 8, "tensor": 1})
    assert told["memory"]["fits"]
    # `check_arguments` has compared every array; here the sums, anew. Parameters are split over
    # fsdp along `embed`, where it divides.
    cfg = config.load("tiny", SMALL)
    model = abstract(lambda rngs: EmoLlama(cfg.model, rngs=rngs))
    parts = collections.Counter()
    for path, leaf in named_parameters(model).items():
        split = any(a == "embed" and n % 8 == 0 for a, n in zip(leaf.axes, leaf.shape, strict=True))
        trains = "lora_" in path or path.startswith("qformer/")
        width = 4 if trains or cfg.train.frozen_dtype == "float32" else 2
        parts[trains] += leaf.size * width // (8 if split else 1)
    arguments = told["memory"]["arguments"]
    assert arguments["trained parameters"] == parts[True]
    assert arguments["frozen parameters"] == parts[False]
    assert arguments["optimizer"] == 2 * parts[True] + 3 * 4 + 2 * 4  # three counters and the key
    hlo_by_part = told["flops_per_device"]["hlo_by_part"]
    assert {"llm", "vision", "qformer", "visual_tokens", "loss"} <= set(hlo_by_part)
    # The frozen tower is split over the frames: its FLOPs are those of the mathematics.
    assert hlo_by_part["vision"] == pytest.approx(told["model"]["forward"]["vision"] / 8, rel=1e-6)
    assert 0.5 < told["flops_per_device"]["useful"] < 1.2
    assert told["compiler"]["cycles"]["llm"] > 0
    assert told["compiler"]["loops_of_unknown_length"] == []
    assert all(row["axes"] == ["fsdp"] for row in told["collectives"])
    # What is gathered or exchanged is parameters, but for gradients of one row a frame.
    a_row_a_frame = told["batch"]["rows"] * told["batch"]["frames"] * cfg.model.llama.width
    for one in told["activations_moved"]:
        assert one["part"] == "visual_tokens" and "transpose" in one["op_name"], one
        assert math.prod(one["dims"]) <= a_row_a_frame, one
    assert 0 < told["roofline"]["mfu"] < 1


@needs_libtpu
def test_a_row_for_each_device_is_multiplied_by_the_matrix_unit():
    """Padded, so that the text shows its products; one row costs no more than two."""
    cfg = config.load("tiny", [*SMALL, "mesh.fsdp=1", "mesh.tensor=4"])
    one, two = (
        plan.make_plan(cfg, "v5e:2x4", step="decode", kind="image", examples=count)
        for count in (1, 2)
    )
    assert one.useful < 1
    assert one.cost.total <= two.cost.total
    # What no padding reaches would be left out, and told.
    shown = []
    for made in (one, dataclasses.replace(one, cost=dataclasses.replace(one.cost, flops={}))):
        console = rich.console.Console(file=io.StringIO(), width=200)
        table.show(made, console)
        shown.append(console.file.getvalue())
        json.dumps(plan.to_dict(made))
    assert ["multiplied and added row by row" in text for text in shown] == [False, True]


# ------------------------------------------------------------------ model FLOPs


def jaxpr_flops(jaxpr):
    """FLOPs of the matrix products of a traced function, scans multiplied out."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (left, _), _ = eqn.params["dimension_numbers"]
            summed = math.prod(eqn.invars[0].aval.shape[axis] for axis in left)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * summed
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        inner = [jaxpr_flops(sub) for sub in jax.extend.core.jaxprs_in_params(eqn.params)]
        if inner:
            total += times * (max(inner) if eqn.primitive.name == "cond" else sum(inner))
    return total


def traced(cfg, shapes):
    """(FLOPs of the traced train step, the analytic ones)."""
    mesh = make_mesh(cfg.mesh, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        setup, batch = set_up(cfg, mesh), steps.abstract_batch(cfg, mesh, shapes)
        jaxpr = jax.make_jaxpr(setup.step)(setup.frozen, setup.state, batch)
    analytic = flops.train_flops(cfg, setup.model.trainable, plan.padded_load(shapes))
    return jaxpr_flops(jaxpr.jaxpr), analytic


def test_model_flops_are_those_of_the_traced_step():
    """Without rematerialisation, what is traced is the mathematics, but for the causal half of
    attention, the loss's head (run again, in chunks of 64) and FaceXFormer's heads."""
    overrides = [f"model.{part}.remat=none" for part in ("llama", "vision", "qformer", "face")]
    overrides += ["model.llama.layers=2", "model.vision.depth=2", "train.accumulation=1"]
    cfg = config.load("emollama_7b", overrides)
    shapes = steps.Shapes(
        rows=1,
        examples=1,
        frames=2,
        again=2,
        tokens=513,
        question_length=256,
        most=1,
        questions=2,
    )
    found, analytic = traced(cfg, shapes)
    wanted = analytic.total + analytic.forward["loss"] + analytic.attention["llm"]
    assert found == pytest.approx(wanted, rel=0.01)


def test_frozen_kernels_have_no_gradient():
    cfg = config.load("emollama_7b")
    shapes = dataclasses.replace(steps.shapes(cfg, "clip", "train", examples=1), tokens=2048)
    load = plan.padded_load(shapes)
    lora = flops.train_flops(cfg, {"llama/layers/q_proj/lora_A"}, load)
    assert lora.backward["vision"] == lora.backward["face"] == lora.backward["qformer"] == 0
    kernels = 2 * 2048 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert lora.forward["llm"] == pytest.approx(kernels, rel=0.15)
    # Input gradients of everything, the kernel's of one adapter, attention's twice.
    own = 2 * 2048 * 32 * 4096 * 64
    assert lora.backward["llm"] == lora.forward["llm"] + own + lora.attention["llm"] / 3
    assert lora.backward["loss"] == lora.forward["loss"]


def test_a_token_costs_two_flops_a_parameter():
    cfg = config.load("emollama_7b", ["model.llama.lora.rank=0"])
    one = flops.decode_flops(cfg, examples=1, slots=0)
    llama = cfg.model.llama
    layer = 4 * llama.width**2 + 3 * llama.width * llama.mlp_width
    parameters = llama.layers * layer + llama.width * llama.vocab_rows
    assert one.total == 2 * parameters


# ------------------------------------------------------------------ arguments


def held(*shapes):
    return {"parameters": collections.Counter(("float32", shape) for shape in shapes)}


def entry(*shapes):
    lines = [f"  %p{i} = f32[{s}]{{0:T(256)}} parameter({i})" for i, s in enumerate(shapes)]
    lines.append("  ROOT %r = f32[] constant(0)")
    return hlo.parse("ENTRY %main (p: f32[]) -> f32[] {\n" + "\n".join(lines) + "\n}\n")


def test_arguments_may_only_be_what_they_should_be():
    program = steps.Program("train", "other", None, held((100,), (256,), (7,)))
    assert plan.check_arguments(program, entry(100, 256), 2 * 1024) == 156 * 4  # (7,) is not used
    with pytest.raises(UserError, match=r"too many: f32\[256\]: something is duplicated"):
        plan.check_arguments(program, entry(100, 256, 256), 3 * 1024)
    with pytest.raises(UserError, match="3,072 bytes a device for 2,048"):
        plan.check_arguments(program, entry(100, 256), 3 * 1024)


def test_shards_count_what_one_device_holds():
    mesh = make_mesh(config.MeshConfig(data=1, fsdp=4, tensor=2))
    x = jax.ShapeDtypeStruct(
        (8, 6), jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp", "tensor"))
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = steps.placed(key, NamedSharding(mesh, P()))
    found = steps.shards([x, x, key])
    assert found == {("bfloat16", (2, 3)): 2, ("uint32", (2,)): 1}
    assert steps.device_bytes(found) == 2 * 12 + 8


def test_a_batch_that_does_not_divide_is_refused():
    cfg = config.load("emollama_7b", ["mesh.fsdp=8"])
    mesh = make_mesh(cfg.mesh)
    shapes = steps.shapes(cfg, "clip", "train", examples=12)
    with pytest.raises(UserError, match="a batch of 12 rows, wanted a multiple of 8"):
        steps.abstract_batch(cfg, mesh, shapes)


# ------------------------------------------------------------------ prices and memory


@dataclasses.dataclass
class Device:
    coords: tuple[int, int, int]
    slice_index: int | None = None


def fake_mesh(rows, columns):
    grid = [[Device((x, y, 0)) for x in range(columns)] for y in range(rows)]
    devices = np.empty((1, rows, columns), object)
    devices[0] = grid
    return dataclasses.make_dataclass("Mesh", ["devices"])(devices)


def test_interconnect_has_two_ports_a_ring_and_one_a_line():
    chip = topologies.CHIPS["v5e"]
    second = chip.link / chip.clock  # bytes a cycle of one port
    ring = plan.make_price(chip, fake_mesh(16, 16))
    assert ring(100.0, np.arange(16)[None]) == pytest.approx(100 / second / 2)
    assert ring(100.0, np.arange(256)[None]) == pytest.approx(100 / second / 4)
    line = plan.make_price(chip, fake_mesh(2, 4))
    assert line(100.0, np.arange(4)[None]) == pytest.approx(100 / second)
    assert line(100.0, np.arange(8)[None]) == pytest.approx(100 / second / 2)


def test_slices_are_joined_by_the_network():
    """Each slice sums among its four first; a quarter of the bytes then crosses."""
    chip = topologies.CHIPS["v5e"]
    mesh = fake_mesh(2, 4)
    for place, device in enumerate(mesh.devices.flat):
        device.slice_index = place // 4
        device.coords = (place % 4, 0, 0)
    price = plan.make_price(chip, mesh)
    inside, across = price(100.0, np.arange(4)[None]), price(100.0, np.arange(8)[None])
    assert across - inside == pytest.approx(100 / 4 / chip.network * chip.clock)
    assert price(100.0, np.array([[0, 4]])) > 100 / chip.network * chip.clock


@needs_libtpu
def test_a_mesh_over_two_slices():
    mesh = plan.slice_mesh(
        config.MeshConfig(data=2, fsdp=-1, tensor=1, slices=2), topologies.devices("v5e:2x4", 2)
    )
    assert dict(mesh.shape) == {"data": 2, "fsdp": 8, "tensor": 1}
    assert [device.slice_index for device in mesh.devices[:, 0, 0]] == [0, 1]
    with pytest.raises(UserError, match="its DCN is not known"):
        topologies.devices("v4:4x4x4", 2)


def test_ninety_percent_is_what_fits():
    memory = plan.Memory(
        arguments={"a": 50}, padding=5, temporaries=25, outputs=5, program=5, capacity=100
    )
    assert memory.total == 90
    assert memory.fits
    assert not dataclasses.replace(memory, program=6).fits


# ------------------------------------------------------------------ search


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 5, 8, 13])
def test_the_largest_count_is_found_by_doubling_and_halving(limit):
    tried = []

    def trial(count):
        tried.append(count)
        return count if count <= limit else None

    assert search.largest(trial) == (limit or None)
    assert len(tried) == len(set(tried)) <= 2 * math.ceil(math.log2(limit + 2)) + 1


def test_the_best_needs_the_least_time_for_an_example():
    """Presets first, then the policies with the best preset; what keeps more than what did not fit
    is not tried."""
    cfg = config.load("tiny", ["mesh.fsdp=-1", "model.llama.remat=full"])
    told, tried = [], []
    seconds = {"fsdp": 3.0, "fsdp+tensor": 2.0, "replicated-frozen": 1.0}
    shares = {"fsdp": 10, "fsdp+tensor": 50, "replicated-frozen": 95}
    faster = {"save_out_proj": 0.5, "save_qkv_proj": 0.1, "qkv_proj_offloaded": -0.5}

    @dataclasses.dataclass
    class Made:
        shapes: steps.Shapes
        seconds: float
        memory: plan.Memory

    def fake(cfg, topology, *, step, kind, examples, tell):
        remat = cfg.model.llama.remat
        tried.append((cfg.mesh.preset, remat))
        if examples > (8 if remat == "save_out_proj" else 16):
            raise plan.DoesNotFit("too much")
        share = shares[cfg.mesh.preset] + (50 if remat == "save_qkv_proj" else 0)
        memory = plan.Memory({"a": share}, 0, 0, 0, 0, 100)
        time = seconds[cfg.mesh.preset] - faster.get(remat, 0)
        return Made(steps.Shapes(examples, examples, 1, 0, 1, 1, 1, 1), time * examples, memory)

    found = search.search(
        cfg, "v5e:2x4", 8, step="train", kind="image", tell=told.append, plan=fake
    )
    assert [(x.preset, x.remat, x.plan and x.plan.shapes.examples) for x in found[:3]] == [
        ("fsdp+tensor", "save_out_proj", 8),
        ("fsdp+tensor", "full", 16),
        ("fsdp+tensor", "minimal_offloaded", 16),
    ]
    unfit = {(x.preset, x.remat) for x in found if x.plan is None}
    assert unfit == {("replicated-frozen", "full"), ("fsdp+tensor", "save_qkv_proj")}
    assert not {"minimal", "save_dot_except_mlp"} & {remat for _, remat in tried}
    assert any("95% of memory" in line for line in told)
    before = len(tried)
    search.search(cfg, "v5e:2x4", 8, step="prefill", kind="image", tell=told.append, plan=fake)
    assert {remat for _, remat in tried[before:]} == {"full"}
    with pytest.raises(UserError, match="nothing fits with one example"):
        search.search(
            cfg,
            "v5e:2x4",
            8,
            step="train",
            kind="image",
            tell=told.append,
            plan=functools.partial(_never),
        )


def _never(*args, **kwargs):
    raise plan.DoesNotFit("too much")
