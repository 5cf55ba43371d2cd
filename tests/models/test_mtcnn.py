"""MTCNN against facenet-pytorch's numbers and PyTorch's layers, and pictures of every size."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from emollama_jax import compile_cache
from emollama_jax.data.media import read_image
from emollama_jax.models import mtcnn, mtcnn_search
from emollama_jax.models.mtcnn import FACENET, Detector, Mtcnn, load_mtcnn
from emollama_jax.models.mtcnn_search import pyramid

GOLDEN = json.loads((pathlib.Path(__file__).parent.parent / "golden" / "mtcnn.json").read_text())


def photo(name):
    if name == "astronaut.png":
        skimage = pytest.importorskip("skimage", reason="scikit-image carries astronaut.png")
        return read_image(pathlib.Path(skimage.__file__).parent / "data" / name)
    import matplotlib.cbook

    return read_image(matplotlib.cbook.get_sample_data(name, asfileobj=False))


def resized(picture, width, height):
    return np.array(Image.fromarray(picture).resize((width, height), Image.BICUBIC))


@pytest.fixture(scope="module")
def networks():
    return load_mtcnn()


@pytest.fixture(scope="module")
def detect(networks):
    return Detector(networks)


@pytest.fixture(scope="module")
def portrait():
    """A face of about 60 pixels in 100 × 96: the smallest canvas, and quick."""
    return resized(photo("astronaut.png")[20:212, 130:330], 100, 96)


def torch_weights(networks, name):
    """One network's state dict in PyTorch's layout."""
    torch = pytest.importorskip("torch", reason="PyTorch is the reference")
    from tools.convert_torch.engine import extract
    from tools.convert_torch.mtcnn import table

    state = extract(getattr(networks, name), table(name))
    return torch, {key: torch.from_numpy(np.array(value)) for key, value in state.items()}


def torch_network(torch, state, x, *, pools, dense=None):
    """P, R or O up to its heads: NHWC in, features out."""
    f = torch.nn.functional
    x = torch.from_numpy(np.asarray(x)).permute(0, 3, 1, 2)
    for i, pool in enumerate(pools, 1):
        x = f.conv2d(x, state[f"conv{i}.weight"], state[f"conv{i}.bias"])
        x = f.prelu(x, state[f"prelu{i}.weight"])
        if pool:
            x = f.max_pool2d(x, pool, 2, ceil_mode=True)
    if dense:
        x = x.permute(0, 3, 2, 1).reshape(len(x), -1)
        x = f.prelu(torch_linear(torch, state, x, f"dense{dense}"), state[f"prelu{dense}.weight"])
    return x


def torch_linear(torch, state, x, name):
    return torch.nn.functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def assert_close(found, wanted):
    """Within 1e-5 of the largest value, the tolerance of single layers."""
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)


def test_weights(networks):
    state = nnx.state(networks, nnx.Param)
    leaves = jax.tree.leaves(state)
    assert sum(x.size for x in leaves) == 495_850
    counts = {n: sum(x.size for x in jax.tree.leaves(state[n])) for n in ("pnet", "rnet", "onet")}
    assert counts == {"pnet": 6_632, "rnet": 100_178, "onet": 389_040}
    for path, leaf in nnx.to_flat_state(state):
        assert len(leaf.axes) == leaf.ndim, path


def test_table_covers_everything(networks):
    """Back to PyTorch and again into fresh networks: every leaf returns, bit for bit."""
    from tools.convert_torch.engine import assign, extract
    from tools.convert_torch.mtcnn import LAYERS, table

    fresh = Mtcnn(rngs=nnx.Rngs(1))
    for name in LAYERS:
        assign(
            getattr(fresh, name),
            extract(getattr(networks, name), table(name)),
            table(name),
            ignore={},
        )
    jax.tree.map(np.testing.assert_array_equal, nnx.state(fresh), nnx.state(networks))


@pytest.mark.parametrize("shape", [(12, 12), (13, 15), (40, 33), (31, 64)])
def test_pnet(networks, shape):
    """Odd and even sizes, alone and in a larger canvas with rubbish around."""
    torch, state = torch_weights(networks, "pnet")
    x = np.random.default_rng(0).uniform(-1, 1, (1, *shape, 3)).astype(np.float32)
    features = torch_network(torch, state, x, pools=(2, 0, 0))
    scores = torch.nn.functional.conv2d(features, state["conv4_1.weight"], state["conv4_1.bias"])
    shifts = torch.nn.functional.conv2d(features, state["conv4_2.weight"], state["conv4_2.bias"])
    scores = scores.softmax(1)[0, 1].numpy()
    rows, columns = scores.shape
    assert (rows, columns) == tuple(-(-(n - 2) // 2) - 4 for n in shape)
    rubbish = np.full((1, 40, 70, 3), 1e3, np.float32)
    rubbish[:, : shape[0], : shape[1]] = x
    pnet = jax.jit(networks.pnet)
    for canvas in (x, rubbish):
        probability, boxes = pnet(canvas, sizes=np.array([shape]))
        assert_close(probability[0, :rows, :columns], scores)
        assert_close(boxes[0, :rows, :columns], shifts[0].permute(1, 2, 0))
        assert (probability[0, rows:] == -1).all() and (probability[0, :, columns:] == -1).all()


def test_rnet_and_onet(networks):
    x = np.random.default_rng(0).uniform(-1, 1, (3, 48, 48, 3)).astype(np.float32)
    torch, state = torch_weights(networks, "rnet")
    features = torch_network(torch, state, x[:, :24, :24], pools=(3, 3, 0), dense=4)
    probability, shifts = jax.jit(networks.rnet)(x[:, :24, :24])
    assert_close(probability, torch_linear(torch, state, features, "dense5_1").softmax(1)[:, 1])
    assert_close(shifts, torch_linear(torch, state, features, "dense5_2"))

    torch, state = torch_weights(networks, "onet")
    features = torch_network(torch, state, x, pools=(3, 3, 2, 0), dense=5)
    probability, shifts, points = jax.jit(networks.onet)(x)
    assert_close(probability, torch_linear(torch, state, features, "dense6_1").softmax(1)[:, 1])
    assert_close(shifts, torch_linear(torch, state, features, "dense6_2"))
    assert_close(points, torch_linear(torch, state, features, "dense6_3"))


@pytest.mark.parametrize(
    ("height", "width", "levels", "cells"),
    [
        (224, 224, 8, 7_248),
        (512, 512, 10, 42_866),
        (720, 1280, 11, 158_201),
        (1080, 1920, 12, 362_055),
    ],
)
def test_pyramid(height, width, levels, cells):
    """Counts of facenet-pytorch; each setting of the pyramid changes it."""
    found = pyramid(height, width, min_face=FACENET.min_face, factor=FACENET.factor)
    assert len(found) == levels
    sides = [[-(-(side - 2) // 2) - 4 for side in level[1:]] for level in found]
    assert sum(rows * columns for rows, columns in sides) == cells
    assert pyramid(height, width, min_face=40.0, factor=FACENET.factor) != found
    assert pyramid(height, width, min_face=FACENET.min_face, factor=0.5) != found
    assert pyramid(19, width, min_face=FACENET.min_face, factor=FACENET.factor) == []


@pytest.mark.parametrize(
    "rectangle", [(0, 60, 0, 80), (7, 13, 20, 41), (59, 1, 3, 2), (5, 50, 9, 1)]
)
def test_area_resize(rectangle):
    """PyTorch's area interpolation, up and down, of any rectangle."""
    torch = pytest.importorskip("torch", reason="PyTorch is the reference")
    picture = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    top, rows, left, columns = rectangle
    part = torch.from_numpy(picture[top : top + rows, left : left + columns]).permute(2, 0, 1)
    wanted = torch.nn.functional.interpolate(part[None].float(), size=(24, 31), mode="area")
    integral = mtcnn_search.integral_image(picture)
    np.testing.assert_array_equal(integral[1:, 1:], np.cumsum(np.cumsum(picture, 0, int), 1))
    found = mtcnn_search.area_resize(integral, np.array([rectangle, rectangle]), (24, 31))
    wanted = (wanted[0].permute(1, 2, 0).numpy() - 127.5) / 128
    np.testing.assert_allclose(found[0], wanted, atol=1e-6)
    np.testing.assert_array_equal(found[0], found[1])


def test_integral_image_reaches_the_longest_side():
    assert 255 * FACENET.longest**2 < 2**31
    with pytest.raises(ValueError, match="longest 2902"):
        Detector(cfg=dataclasses.replace(FACENET, longest=2902))


def test_keep_best():
    """Against the textbook loop over a list that shrinks."""
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 60, (43, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(10, 40, (43, 2))], 1).astype(np.float32)

    def overlap(a, b, pixel, smaller):
        w = min(a[2], b[2]) - max(a[0], b[0]) + pixel
        h = min(a[3], b[3]) - max(a[1], b[1]) + pixel
        areas = [(x[2] - x[0] + pixel) * (x[3] - x[1] + pixel) for x in (a, b)]
        shared = max(w, 0) * max(h, 0)
        return shared / (min(areas) if smaller else sum(areas) - shared)

    for rule, pixel, smaller in (
        (mtcnn_search.over_union, 0, False),
        (mtcnn_search.over_smaller, 1, True),
    ):
        left, wanted = list(range(43)), []
        while left:
            best = left.pop(0)
            wanted.append(best)
            left = [j for j in left if overlap(boxes[best], boxes[j], pixel, smaller) <= 0.3]
        kept = mtcnn_search.keep_best(boxes, threshold=0.3, overlap=rule)
        assert kept.tolist() == wanted
        assert 1 < len(wanted) < 43
        assert mtcnn_search.keep_best(boxes[:0], threshold=0.3, overlap=rule).tolist() == []


def test_crops_of_boxes():
    """1-based first pixel, last pixel included, truncated towards zero, cut at the edge."""
    boxes = [
        [3.9, 4.2, 10.9, 11.1],
        [-5.5, -0.9, 4, 4],
        [90, 70, 130, 130],
        [101, 5, 120, 20],
        [5, 5, 4, 9],
    ]
    crops, some = mtcnn_search.trunc_crops(np.array(boxes, np.float32), height=80, width=100)
    assert some.tolist() == [True, True, True, False, False]
    wanted = [[3, 8, 2, 8], [0, 4, 0, 4], [69, 11, 89, 11]]
    assert crops[some].tolist() == wanted  # first row, rows, first column, columns


@pytest.mark.parametrize("shape", [(41, 52), (120, 75), (300, 310)])
def test_tiles_hold_each_cell_once(networks, shape):
    """P on tiles gives what P gives on whole levels, wherever a tile ends."""
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    levels = pyramid(*shape, min_face=FACENET.min_face, factor=FACENET.factor)
    integral = mtcnn_search.integral_image(picture)
    tiles = mtcnn_search.cut_tiles(integral, levels)
    pnet = jax.jit(networks.pnet)
    said = [np.asarray(x) for x in pnet(tiles.pixels, sizes=tiles.sizes)]
    for number, (_, height, width) in enumerate(levels[:2]):
        whole = mtcnn_search.area_resize(
            integral, np.array([[0, shape[0], 0, shape[1]]]), (height, width)
        )
        wanted = [np.asarray(x)[0] for x in pnet(whole, sizes=np.array([[height, width]]))]
        again = [np.full_like(x, np.nan) for x in wanted]
        for tile in np.flatnonzero(tiles.levels == number):
            y, x = tiles.corners[tile]
            for one, part in zip(again, said, strict=True):
                room = one[y : y + mtcnn_search.TILE_CELLS, x : x + mtcnn_search.TILE_CELLS]
                assert np.isnan(room).all()
                room[:] = part[tile][: room.shape[0], : room.shape[1]]
        for one, right in zip(again, wanted, strict=True):
            np.testing.assert_allclose(one, right, atol=2e-6)


@pytest.mark.parametrize("name", list(GOLDEN))
def test_golden(detect, name):
    picture, golden = photo(name), GOLDEN[name]
    assert [picture.shape[1], picture.shape[0]] == golden["size"]
    faces = detect(picture)
    assert faces.boxes.shape == (len(golden["boxes"]), 4) and faces.boxes.dtype == np.float32
    np.testing.assert_allclose(faces.boxes, golden["boxes"], atol=0.01)
    np.testing.assert_allclose(faces.landmarks, golden["landmarks"], atol=0.01)
    np.testing.assert_allclose(faces.probabilities, golden["probs"], atol=1e-5)


def test_several_faces_by_size(detect):
    """Faces of three sizes side by side come largest first, each as when it is alone."""
    picture = photo("astronaut.png")[20:260, 130:330]  # 240 × 200
    mosaic = np.zeros((500, 480, 3), np.uint8)
    mosaic[:240, :200] = resized(picture, 200, 240)
    mosaic[:336, 200:] = resized(picture, 280, 336)
    mosaic[370:490, 20:120] = resized(picture, 100, 120)
    faces = detect(mosaic)
    assert len(faces) == 3
    sides = faces.boxes[:, 2:] - faces.boxes[:, :2]
    areas = sides.prod(1)
    assert (np.diff(areas) < 0).all()
    centres = (faces.boxes[:, :2] + faces.boxes[:, 2:]) / 2
    assert (centres[0] > [200, 0]).all() and (centres[1] < [200, 240]).all() and centres[2, 1] > 370
    for box, points in zip(faces.boxes, faces.landmarks, strict=True):
        assert (points > box[:2]).all() and (points < box[2:]).all()
        assert points[0, 0] < points[1, 0] and points[0, 1] < points[2, 1] < points[3, 1]


@pytest.mark.parametrize("shape", [(1, 1), (19, 300), (20, 20), (100, 100)])
def test_no_face(detect, shape):
    faces = detect(np.full((*shape, 3), 127, np.uint8))
    assert len(faces) == 0
    assert faces.boxes.shape == (0, 4) and faces.landmarks.shape == (0, 5, 2)
    assert faces.probabilities.shape == (0,)


def test_large_pictures_are_shrunk(networks, detect, portrait):
    """Ten times as long as a small detector takes."""
    small = Detector(networks, dataclasses.replace(FACENET, longest=128))
    picture = np.zeros((1280, 1000, 3), np.uint8)
    picture[:960] = portrait.repeat(10, 0).repeat(10, 1)
    faces, alone = small(picture), detect(portrait)
    assert len(faces) == len(alone) == 1
    np.testing.assert_allclose(faces.boxes, alone.boxes * 10, atol=15)
    np.testing.assert_allclose(faces.landmarks, alone.landmarks * 10, atol=15)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("thresholds", (0.9999999, 0.7, 0.7)),
        ("thresholds", (0.6, 0.99999999, 0.7)),
        ("thresholds", (0.6, 0.7, 0.99999999)),
        ("overlaps", (0.05, 0.7, 0.7, 0.7)),
        ("overlaps", (0.5, 0.05, 0.7, 0.7)),
        ("overlaps", (0.5, 0.7, 0.05, 0.7)),
        ("overlaps", (0.5, 0.7, 0.7, 1.0)),
    ],
)
def test_every_rule_matters(networks, portrait, field, value, monkeypatch):
    """Each changes the faces, or at least the candidates on the way to them."""
    seen = []
    keep_best = mtcnn_search.keep_best

    def record(boxes, **rules):
        kept = keep_best(boxes, **rules)
        seen.append((len(boxes), kept.tolist()))
        return kept

    monkeypatch.setattr(mtcnn_search, "keep_best", record)
    Detector(networks)(portrait)
    usual, seen[:] = list(seen), []
    Detector(networks, dataclasses.replace(FACENET, **{field: value}))(portrait)
    assert usual != seen


def test_many_pictures_over_the_devices(networks, detect, portrait):
    """Batches find what single searches find, bit for bit, whatever is left of a batch."""
    tiny, blank = np.zeros((12, 12, 3), np.uint8), np.zeros((96, 96, 3), np.uint8)
    mirrored = np.ascontiguousarray(portrait[:, ::-1])
    pictures = [portrait, tiny, blank, mirrored, portrait[:90], portrait[:, 4:]]
    mesh = jax.make_mesh(
        (4,), ("frames",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
    )
    few = dataclasses.replace(FACENET, rows=(8, 16, 4))
    alone = [detect(picture) for picture in pictures]
    assert [len(faces) for faces in alone] == [1, 0, 0, 1, 1, 1]
    for many, atol in ((detect, 0), (Detector(networks, few, mesh=mesh), 1e-3)):
        found = many.many(pictures)
        for faces, wanted in zip(found, alone, strict=True):
            np.testing.assert_allclose(faces.boxes, wanted.boxes, atol=atol, rtol=0)
            np.testing.assert_allclose(faces.probabilities, wanted.probabilities, atol=atol)
            np.testing.assert_allclose(faces.landmarks, wanted.landmarks, atol=atol, rtol=0)
        assert many.many([]) == []


def test_large_groups_are_cut(networks, detect, portrait, monkeypatch):
    monkeypatch.setattr(mtcnn, "GROUP_PIXELS", 2 * portrait.shape[0] * portrait.shape[1])
    found = detect.many([portrait] * 5)
    assert [len(faces) for faces in found] == [1] * 5


def test_refuses_what_is_no_picture(detect):
    with pytest.raises(ValueError, match=r"float32 \(20, 20, 3\), wanted uint8"):
        detect(np.zeros((20, 20, 3), np.float32))
    with pytest.raises(ValueError, match=r"\(20, 20\), wanted"):
        detect(np.zeros((20, 20), np.uint8))


def test_pictures_of_any_size_are_searched_by_the_programs_that_are_there(detect, rng):
    """Sixty sizes once took nineteen compilations of ten seconds each, and a gigabyte."""
    sizes = [tuple(map(int, size)) for size in rng.integers(60, 400, (24, 2))]

    def programs():
        counted = compile_cache.counted()
        return counted.compiled + counted.found

    def search(some):
        for height, width in some:
            detect.many([rng.integers(0, 256, (height, width, 3), np.uint8)])

    search([(400, 400), *sizes[:9]])
    before = programs()
    search(sizes[9:])
    assert programs() == before > 0
