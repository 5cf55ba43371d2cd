"""The conversion engine: both directions, and one error that names all that is wrong."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from emollama_jax import config
from emollama_jax.errors import UserError
from emollama_jax.models.emollama import EmoLlama
from emollama_jax.models.rngs import abstract
from tests.helpers import llama_vid_golden
from tools.convert_torch import engine
from tools.convert_torch.engine import PATCHES, QKV, SAME, TRANSPOSE, Row, drop_leading
from tools.convert_torch.llama_vid import BUFFERS, KEEP, llama_vid


@pytest.mark.parametrize(
    ("transform", "shape", "ours"),
    [
        (SAME, (5,), (5,)),
        (TRANSPOSE, (2, 3), (3, 2)),
        (drop_leading(2), (1, 1, 4), (4,)),
        (PATCHES, (6, 3, 2, 2), (12, 6)),
        (QKV, (12, 4), (4, 3, 4)),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_transforms_invert(transform, shape, ours):
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    assert transform.to_ours(x).shape == ours
    np.testing.assert_array_equal(transform.to_torch(transform.to_ours(x)), x)


@pytest.mark.parametrize("shape", [(3, 5), (513, 257), (1100, 300)])
@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_filling_transposes_and_casts(rng, shape, kind):
    """Whole tiles and what is left at the edges; a window of a larger matrix too."""
    whole = rng.standard_normal((shape[0] + 2, shape[1] + 3), np.float32)
    whole[0, 0] = np.nan  # stays: not numbers but bits are moved
    for given in (whole, whole.astype(kind)):
        for part in (given.T, given[1:-1, 2:-1].T, given, given[1:-1, 2:-1]):
            out = np.empty(part.shape, kind)
            engine.fill(out, part)
            wanted = np.ascontiguousarray(part).astype(kind)
            np.testing.assert_array_equal(out.view(np.uint8), wanted.view(np.uint8))


def test_round_trip_is_bit_identical():
    """State dict → model → state dict, every key but the buffers."""
    wanted = llama_vid_golden.tiny_state_dict()
    rows = llama_vid(
        llama_vid_golden.TINY_LLAMA, llama_vid_golden.TINY_QFORMER.cross_attention_every
    )
    got = engine.extract(llama_vid_golden.tiny_model(), rows)
    buffers = set(wanted) - set(got)
    assert all(key.endswith(("inv_freq", "position_ids")) for key in buffers) and buffers
    assert set(got) <= set(wanted)
    for key, value in got.items():
        assert value.dtype == wanted[key].dtype
        np.testing.assert_array_equal(value, wanted[key], err_msg=key)


def test_layers_do_not_swap():
    """Torch's layer i is slot i of LLaMA, and slot i // n of the Q-Former's groups of n."""
    model, tensors = llama_vid_golden.tiny_model(), llama_vid_golden.tiny_state_dict()
    for i in range(4):
        group = model.qformer.groups
        layer = group.cross if i % 2 == 0 else group.plain[0]
        key = f"model.vlm_att_encoder.bert.encoder.layer.{i}.intermediate_query.dense.weight"
        np.testing.assert_array_equal(layer.query_ffn.intermediate.kernel[i // 2], tensors[key].T)


class Two(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.stacked = nnx.Param(jnp.zeros((2, 3, 4)), axes=("layers", "embed", "mlp"))
        self.vector = nnx.Param(jnp.zeros((5,), jnp.bfloat16), axes=("embed",))
        self.adapter = nnx.Param(rngs.params.normal((2,)), axes=("rank",))


ROWS = [Row("layer.{i}.w", "stacked", TRANSPOSE, first=1, stride=2), Row("v", "vector")]
GOOD = {
    "layer.1.w": np.ones((4, 3), np.float32),
    "layer.3.w": np.full((4, 3), 2, np.float16),
    "v": np.full((5,), 3, np.float32),
}


def test_assign_keeps_our_dtypes_and_what_is_kept():
    module = Two()
    adapter = np.asarray(module.adapter[...])
    engine.assign(module, GOOD, ROWS, ignore={}, keep={"adapter": "no base weight"})
    np.testing.assert_array_equal(module.stacked[...], np.repeat([1, 2], 12).reshape(2, 3, 4))
    assert module.vector.dtype == jnp.bfloat16 and module.stacked.dtype == jnp.float32
    np.testing.assert_array_equal(module.adapter[...], adapter)
    assert module.stacked.axes == ("layers", "embed", "mlp")


def test_one_error_names_everything_and_changes_nothing():
    module = Two()
    tensors = {
        "layer.1.w": np.ones((3, 4), np.float32),
        "v": np.arange(5),
        "extra": np.ones(1, np.float32),
        "buffer": np.ones(1, np.float32),
    }
    rows = [*ROWS, Row("gone", "no/such/leaf"), Row("v", "vector")]
    with pytest.raises(UserError) as error:
        engine.assign(module, tensors, rows, ignore={"buffer": "follows from the sizes"})
    lines = str(error.value).splitlines()
    assert "7 problems" in lines[0]
    assert [line.strip() for line in lines[1:]] == [
        "layer.1.w: shape (3, 4) gives (4, 3) by transpose, stacked wants (3, 4)",
        "layer.3.w: missing (for stacked)",
        "v: dtype int64, wanted float32 or float16 or bfloat16",
        "no/such/leaf: in the table, but not in the model",
        "vector: filled by more than one row",
        "adapter: no row of the table fills it",
        "extra: no row of the table reads it",
    ]
    assert not module.stacked[...].any() and not module.vector[...].any()


def test_a_key_read_twice_is_a_mistake_of_the_table():
    rows = [*ROWS, Row("v", "adapter")]
    with pytest.raises(UserError, match="v: read by more than one row"):
        engine.assign(Two(), GOOD, rows, ignore={})


@pytest.mark.parametrize(
    ("transform", "shape", "what"),
    [
        (drop_leading(1), (2, 5), r"drop_leading\(1\): \(2, 5\) does not start with \(1,\)"),
        (PATCHES, (5, 3, 2, 1), r"patches: .* is not the kernel of square patches"),
        (QKV, (5, 2), r"qkv: .* does not hold q, k and v"),
    ],
)
def test_a_transform_that_cannot_apply_says_so(transform, shape, what):
    tensors = {**GOOD, "v": np.ones(shape, np.float32)}
    rows = [ROWS[0], Row("v", "vector", transform)]
    with pytest.raises(UserError, match=what):
        engine.assign(Two(), tensors, rows, ignore={}, keep={"adapter": "no base weight"})


def test_extract_refuses_a_table_of_another_model():
    with pytest.raises(UserError, match="not in the model, but in the table: no/such/leaf"):
        engine.extract(Two(), [Row("x", "no/such/leaf")])


def test_llama_vid_ignores_buffers_only():
    """Nothing that trains is ignored, and every pattern is of use."""
    keys = list(llama_vid_golden.tiny_state_dict())
    rows = llama_vid(llama_vid_golden.TINY_LLAMA, 2)
    leaves = llama_vid_golden.parameters(llama_vid_golden.tiny_model())
    read = {key for row in rows for key in row.keys(leaves[row.path].shape)}
    ignored = [key for key in keys if key not in read]
    for pattern in BUFFERS:
        assert any(engine.matches_any(key, {pattern: ""}) for key in ignored)
    assert not any(engine.matches_any(key, BUFFERS) for key in read)
    assert not any(engine.matches_any(row.path, KEEP) for row in rows)


@pytest.mark.parametrize("name", ["tiny", "emollama_7b", "emollama_13b"])
def test_llama_vid_covers_the_assembled_model(name):
    """Every leaf is filled once or kept for a reason; every row has its leaf."""
    cfg = config.load(name).model
    leaves = set(llama_vid_golden.parameters(abstract(lambda rngs: EmoLlama(cfg, rngs=rngs))))
    paths = [row.path for row in llama_vid(cfg.llama, cfg.qformer.cross_attention_every)]
    assert len(paths) == len(set(paths))
    assert leaves - set(paths) == {path for path in leaves if engine.matches_any(path, KEEP)}
    assert set(paths) <= leaves
