"""FaceXFormer: against the original's numbers, its decoder against SAM's, sizes, conversion."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax import config
from emollama_jax.data import face_labels
from emollama_jax.errors import UserError
from emollama_jax.models.facexformer import (
    PARSING_CLASSES,
    TASKS,
    FaceXFormer,
    TwoWayTransformer,
    Upscale,
    from_pixels,
    to_pixels,
)
from emollama_jax.models.parameters import named_parameters
from emollama_jax.models.rngs import abstract
from tests.helpers.llama_vid_golden import LAYER, WHOLE, fill
from tools.convert_torch import engine
from tools.convert_torch.facexformer import (
    CHECKPOINT_KEY,
    IGNORE,
    UPSCALE,
    facexformer,
    two_way_transformer,
    unread,
    unwrap,
)
from tools.convert_torch.golden import facexformer_arrays, facexformer_run, off, tensor

FOLDER = pathlib.Path(__file__).parent.parent / "golden"
REAL = dataclasses.replace(config.load("emollama_7b").model.face, dtype="float32")
TINY = config.load("tiny").model.face
SMALL = dataclasses.replace(  # maps of 8 and 4
    TINY, width=32, swin=dataclasses.replace(TINY.swin, image_size=32, depths=(2, 2), heads=(1, 2))
)


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


class Holder(nnx.Module):
    """Weight tables name the network `face`."""

    def __init__(self, face):
        self.face = face


def shapes(cfg) -> FaceXFormer:
    return abstract(lambda rngs: FaceXFormer(cfg, rngs=rngs))


def manifest() -> dict:
    return json.loads((FOLDER / "facexformer.json").read_text())


@pytest.fixture(scope="module")
def real():
    """The real network without numbers."""
    return shapes(REAL)


@pytest.fixture(scope="module")
def small():
    """A small network with deterministic weights."""
    return fill(shapes(SMALL), seed=5)


@pytest.fixture(scope="module")
def image():
    """Two pictures for the small network."""
    return np.random.default_rng(2).standard_normal((2, 32, 32, 3), dtype=np.float32)


@pytest.fixture(scope="module")
def seen(small, image):
    """What the small network makes of them."""
    return facexformer_run(small, image)


@pytest.fixture(scope="module")
def said():
    """What we make of the golden pictures, under the golden arrays' names and cuts."""
    tensors = {
        key: tensor(key, tuple(entry["shape"]), 11)
        for key, entry in manifest().items()
        if entry["dtype"].startswith("float")
    }
    model = shapes(REAL)
    engine.assign(Holder(model), tensors, facexformer(REAL), ignore=IGNORE)
    return facexformer_arrays(model, seed=11)


@pytest.fixture(scope="module")
def golden():
    with np.load(FOLDER / "facexformer.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize(
    "name",
    [f"stage{i}_slice" for i in range(4)]
    + ["fused_slice", "pe_slice", "task_tokens", "landmarks", "headpose", "attributes"]
    + ["visibility", "age", "gender", "race", "parsing_slice"],
)
def test_is_the_original(said, golden, name):
    assert off(said[name], golden[name]) < WHOLE


def test_every_golden_array_is_compared(said, golden):
    assert set(said) == set(golden)


def test_published_parameter_count(real):
    """91,985,943, of which Swin's unused last norm has 2,048; the Fourier matrix is a buffer."""
    sizes = {name: leaf.size for name, leaf in named_parameters(real).items()}
    assert sum(sizes.values()) - sizes["pe"] + 2048 == 91_985_943


def test_table_and_unread_are_the_whole_state_dict(real):
    shapes = {key: tuple(entry["shape"]) for key, entry in manifest().items()}
    leaves = {f"face/{path}": leaf for path, leaf in named_parameters(real).items()}
    read = {key for row in facexformer(REAL) for key in row.keys(leaves[row.path].shape)}
    rest = unread(REAL)
    assert read.isdisjoint(rest)
    assert read | set(rest) == set(shapes)
    assert {key: value.shape for key, value in rest.items()} == {key: shapes[key] for key in rest}


def test_conversion_round_trip_is_bit_identical(small):
    cfg = small.cfg
    tensors = engine.extract(Holder(small), facexformer(cfg))
    again = shapes(cfg)
    engine.assign(Holder(again), tensors | unread(cfg), facexformer(cfg), ignore=IGNORE)
    wanted = named_parameters(small)
    for name, leaf in named_parameters(again).items():
        np.testing.assert_array_equal(leaf[...], wanted[name][...], err_msg=name)


def test_unwrap_finds_the_network_in_the_release():
    state = {"linear_fuse.weight": 0}
    assert unwrap({CHECKPOINT_KEY: state, "optimizer": {}}) is state
    assert unwrap(state) is state
    with pytest.raises(UserError, match="it holds epoch; wanted"):
        unwrap({"epoch": 3})


@pytest.fixture(scope="module")
def decoders():
    """SAM's two-way transformer with random weights, and ours with the same."""
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    pytest.importorskip("transformers")
    from transformers.models.sam.configuration_sam import SamMaskDecoderConfig
    from transformers.models.sam.modeling_sam import SamTwoWayTransformer

    cfg = dataclasses.replace(TINY, width=32, decoder_depth=3, decoder_mlp_width=48)
    torch.manual_seed(0)
    theirs = SamTwoWayTransformer(
        SamMaskDecoderConfig(
            hidden_size=cfg.width,
            num_hidden_layers=cfg.decoder_depth,
            num_attention_heads=cfg.decoder_heads,
            mlp_dim=cfg.decoder_mlp_width,
            attention_downsample_rate=cfg.attention_downsample,
            layer_norm_eps=cfg.norm_eps,
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            start = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(start, 0.1 if parameter.ndim == 1 else parameter.shape[1] ** -0.5)
    ours = abstract(lambda rngs: TwoWayTransformer(cfg, rngs=rngs))
    tensors = {
        f"theirs.{name.replace('layer_norm', 'norm')}": tensor.numpy()
        for name, tensor in theirs.state_dict().items()
    }
    holder = Holder(nnx.Dict(transformer=ours))
    rows = two_way_transformer(cfg.decoder_depth, torch="theirs")
    engine.assign(holder, tensors, rows, ignore={})
    return theirs, ours


@pytest.fixture
def scene(rng):
    """A face map of 5 × 4 cells with its positions, and 18 tokens with theirs."""
    return {
        "face": rng.standard_normal((2, 20, 32), dtype=np.float32),
        "face_pe": rng.standard_normal((20, 32), dtype=np.float32),
        "tokens": rng.standard_normal((2, 18, 32), dtype=np.float32),
        "token_pe": rng.standard_normal((18, 32), dtype=np.float32),
    }


def test_decoder_is_sams(decoders, scene):
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    theirs, ours = decoders

    def as_map(x):  # [B, 20, 32] → [B, 32, 5, 4]
        return torch.from_numpy(np.array(x).reshape(-1, 5, 4, 32)).permute(0, 3, 1, 2)

    token_pe = np.broadcast_to(scene["token_pe"], (2, 1, 18, 32)).copy()
    face_pe = np.broadcast_to(scene["face_pe"], (2, 20, 32))
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(token_pe), as_map(scene["face"]), as_map(face_pe), None)
    tokens, face = ours(scene["face"], token_pe=scene["token_pe"], face_pe=scene["face_pe"])
    assert off(tokens, wanted[0][:, 0].numpy()) < WHOLE
    assert off(face, wanted[1][:, 0].numpy()) < WHOLE


@pytest.mark.parametrize("index", [0, 1])
def test_a_two_way_block_is_sams(decoders, scene, index):
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    theirs, ours = decoders
    tensors = {name: torch.from_numpy(value) for name, value in scene.items()}
    with torch.no_grad():
        wanted = theirs.layers[index](
            queries=tensors["tokens"][:, None],
            keys=tensors["face"][:, None],
            query_point_embedding=tensors["token_pe"].expand(2, 1, 18, 32),
            key_point_embedding=tensors["face_pe"].expand(2, 1, 20, 32),
            attention_similarity=None,
        )
    layer, token_pe = ours.layers[index], scene["token_pe"]
    tokens = jnp.asarray(scene["tokens"])
    tokens = layer.first(tokens) if index == 0 else layer.later(tokens, token_pe=token_pe)
    tokens, face = layer.cross(
        tokens, face=scene["face"], token_pe=token_pe, face_pe=scene["face_pe"]
    )
    assert off(tokens, wanted[0][:, 0].numpy()) < LAYER
    assert off(face, wanted[1][:, 0].numpy()) < LAYER


def test_cross_attention_is_sams(decoders, scene):
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    theirs, ours = (side.final_attn_token_to_image for side in decoders)
    tokens, face = (torch.from_numpy(scene[name])[:, None] for name in ("tokens", "face"))
    with torch.no_grad():
        wanted = theirs(query=tokens, key=face, value=face)[0][:, 0].numpy()
    assert off(ours(jnp.asarray(scene["tokens"]), k=scene["face"], v=scene["face"]), wanted) < LAYER


def test_fusion_is_torch(small, rng):
    """Linear, resize, concatenation from coarse to fine, 1×1 convolution, in this order."""
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    sides = (8, 4)
    stages = [
        rng.standard_normal((2, side, side, SMALL.swin.width * 2**i), dtype=np.float32)
        for i, side in enumerate(sides)
    ]
    maps = []
    for stage, linear in zip(stages, small.linear_c, strict=True):
        y = torch.from_numpy(stage @ np.asarray(linear.kernel) + np.asarray(linear.bias))
        maps.append(
            torch.nn.functional.interpolate(
                y.permute(0, 3, 1, 2), size=(8, 8), mode="bilinear", align_corners=False
            )
        )
    kernel = torch.from_numpy(np.array(small.linear_fuse.kernel)).T[:, :, None, None]
    wanted = torch.nn.functional.conv2d(torch.cat(maps[::-1], dim=1), kernel)
    actual = small.fuse(tuple(map(jnp.asarray, stages)))
    assert actual.shape == (2, 8, 8, SMALL.width)
    assert off(actual, wanted.permute(0, 2, 3, 1).numpy()) < LAYER


def test_upscale_is_a_transposed_convolution(rng):
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    torch.manual_seed(0)
    theirs = torch.nn.ConvTranspose2d(6, 5, kernel_size=2, stride=2)
    ours = Upscale(6, 5, dtype="float32", rngs=nnx.Rngs(0))
    ours.kernel.set_value(jnp.asarray(UPSCALE.to_ours(theirs.weight.detach().numpy())))
    ours.bias.set_value(jnp.asarray(theirs.bias.detach().numpy()))
    x = rng.standard_normal((2, 3, 4, 6), dtype=np.float32)
    wanted = theirs(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert off(ours(jnp.asarray(x)), wanted.detach().numpy()) < LAYER


@pytest.mark.parametrize("name", ["tiny", "emollama_7b"])
def test_shapes(name):
    cfg = config.load(name).model.face
    size, side = cfg.swin.image_size, cfg.swin.image_size // cfg.swin.patch_size
    model = shapes(cfg)
    image = jax.ShapeDtypeStruct((3, size, size, 3), jnp.float32)
    output = nnx.eval_shape(lambda m, x: m(x), model, image)
    parsing = nnx.eval_shape(lambda m, y: m.parsing(y), model, output)
    assert output.fused.shape == (3, side, side, cfg.width)
    assert output.fused.dtype == cfg.dtype
    assert output.face_tokens.shape == (3, side * side, cfg.width)
    assert output.task_tokens.shape == (3, 18, cfg.width)
    assert [stage.shape for stage in output.stages] == [
        (3, -(-side // 2**i), -(-side // 2**i), cfg.swin.width * 2**i)
        for i in range(len(cfg.swin.depths))
    ]
    wanted = {
        "landmarks": (68, 2),
        "headpose": (3,),
        "attributes": (len(face_labels.ATTRIBUTES),),
        "visibility": (29,),
        "age": (len(face_labels.AGE_LABELS),),
        "gender": (len(face_labels.GENDER_LABELS),),
        "race": (len(face_labels.RACE_LABELS["measured"]),),
    }
    for head, shape in wanted.items():
        assert getattr(output, head).shape == (3, *shape)
        assert getattr(output, head).dtype == jnp.float32
    assert parsing.shape == (3, len(face_labels.PARSING_LABELS), size, size)


def test_every_parameter_names_its_axes(real):
    known = {"layers", "embed", "mlp", "heads", None}
    for name, leaf in named_parameters(real).items():
        assert len(leaf.axes) == leaf.ndim, name
        assert set(leaf.axes) <= known, name


def test_bfloat16_stays_near(seen, image):
    half = fill(shapes(dataclasses.replace(SMALL, dtype="bfloat16")), seed=5)
    output, _ = facexformer_run(half, image)
    assert output.task_tokens.dtype == jnp.bfloat16
    assert off(output.task_tokens.astype(jnp.float32), seen[0].task_tokens) < 0.1


def test_pictures_do_not_mix(small, seen, image):
    alone, _ = facexformer_run(small, image[1:])
    assert off(alone.landmarks, seen[0].landmarks[1:]) < LAYER


def test_frequencies_get_no_gradient(small):
    """They stand still in training, as a buffer does in PyTorch; yet positions depend on them."""
    graphdef, state = nnx.split(small)
    grads = jax.grad(lambda s: nnx.merge(graphdef, s).positions(2, 3)[1, 1])(state)
    assert not np.any(grads["pe"][...])
    wanted = small.positions(2, 3)
    state["pe"] = state["pe"] * 2
    assert off(nnx.merge(graphdef, state).positions(2, 3), wanted) > 0.1


@pytest.mark.parametrize("field", ["norm_eps", "parsing_norm_eps", "decoder_heads"])
def test_fields_without_a_shape_matter(seen, image, field):
    """Every other field of the network changes a parameter's shape, or the dtype."""
    value = 2 if field == "decoder_heads" else 0.3
    changed = fill(shapes(dataclasses.replace(SMALL, **{field: value})), seed=5)
    assert off(facexformer_run(changed, image)[1], seen[1]) > 1e-3


def test_landmark_rule_both_ways(rng):
    """The crop's outer edges are -1 and 1, half a pixel beyond the outer pixel centres."""
    np.testing.assert_allclose(
        to_pixels(np.array([[-1.0, 0], [0, 1]]), 224), [[-0.5, 111.5], [111.5, 223.5]]
    )
    pixels = rng.uniform(0, 63, (68, 2))
    np.testing.assert_allclose(to_pixels(from_pixels(pixels, 64), 64), pixels)


def test_labels_are_the_heads():
    sizes = {"age": face_labels.AGE_LABELS, "gender": face_labels.GENDER_LABELS}
    assert {name: len(names) for name, names in sizes.items()} == {
        name: TASKS[name] for name in sizes
    }
    assert len(set(face_labels.ATTRIBUTES)) == TASKS["attribute"]
    assert len(set(face_labels.PARSING_LABELS)) == PARSING_CLASSES
    measured, published = (
        face_labels.RACE_LABELS["measured"],
        face_labels.RACE_LABELS["as_published"],
    )
    assert len(measured) == TASKS["race"]
    assert [i for i in range(5) if measured[i] != published[i]] == [2, 3]
    assert (measured[2], published[2]) == ("Asian", "Indian")
