"""A BERT as the start of a Q-Former: its part is BERT's, the rest is drawn when a run starts."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from emollama_jax import config, imported
from emollama_jax.base import abstract_model, base_reference, init_model, load_face
from emollama_jax.errors import UserError
from emollama_jax.models.parameters import WEIGHTS, matching, named_parameters
from emollama_jax.sharding.mesh import make_mesh
from tests.helpers.torch_models import (
    Queries,
    assert_close,
    convert,
    leaves,
    partly_filled,
    randomise,
    sized,
    text_alone,
    torch,
    transformers,
)
from tools.convert_torch.golden import jitted

SIZES = dict(
    vocab_size=60,
    hidden_size=24,
    num_hidden_layers=4,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=16,
    layer_norm_eps=1e-6,
)
QFORMER = dict(  # what BERT does not say
    encoder_width=config.load("tiny").model.vision.width,
    encoder_norm_eps=1e-5,
    cross_attention_every=2,
    queries=3,
)
MODEL = sized(qformer=QFORMER)
FITTING = sized(
    qformer=QFORMER
    | dict(
        vocab_size=60,
        width=24,
        layers=4,
        heads=3,
        mlp_width=40,
        max_positions=16,
        norm_eps=1e-6,
    )
)


@pytest.fixture(scope="module")
def bert():
    return randomise(transformers.BertModel(transformers.BertConfig(**SIZES)), 3)


@pytest.fixture(scope="module")
def folder(bert, tmp_path_factory):
    """BERT's part of a Q-Former, converted."""
    here = tmp_path_factory.mktemp("bert")
    bert.save_pretrained(here / "theirs")
    convert("bert", here / "theirs", here / "ours", MODEL)
    return here / "ours"


def test_the_text_part_is_bert(bert, folder):
    """Text without queries runs through the Q-Former's layers as through BERT's."""
    network = partly_filled(Queries, FITTING.qformer, folder)
    rng = np.random.default_rng(0)
    text = rng.integers(0, 60, (2, 9))
    mask = np.arange(9) < np.array([[9], [6]])
    with torch.no_grad():
        wanted = bert(
            input_ids=torch.from_numpy(text),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
            output_hidden_states=True,
        ).hidden_states
    got = jitted(network, text_alone)(jnp.asarray(text), jnp.asarray(mask))
    assert len(got) == len(wanted) == 1 + 4
    for ours, reference in zip(got, wanted, strict=True):
        assert_close(np.asarray(ours)[mask], reference.numpy()[mask])


def test_queries_start_from_berts_feed_forward(folder):
    found = leaves(folder)
    copies = [path for path in found if "/query_ffn/" in path]
    assert len(copies) == 2 * 6  # of the layer with cross-attention, and of the one without
    for path in copies:
        np.testing.assert_array_equal(found[path], found[path.replace("query_ffn", "text_ffn")])


def test_a_run_draws_what_bert_lacks(folder):
    """By the initialisers that each parameter has; and reads one of the package's towers beside."""
    tiny = config.load("tiny")
    model = dataclasses.replace(
        FITTING, llama=tiny.model.llama, vision=tiny.model.vision, face=tiny.model.face
    )
    cfg = dataclasses.replace(tiny, model=model, weights=(str(folder), "tiny:face"))
    elsewhere = ("llama/.*", "vision/.*", "fim/.*", "visual_tokens/.*")  # not made: it takes long
    mesh = make_mesh(cfg.mesh)
    filled = matching(elsewhere, abstract_model(cfg, mesh).leaves, key="")
    found = named_parameters(init_model(cfg, mesh, given=filled))
    given, face = leaves(folder), load_file(WEIGHTS / "tiny_face.safetensors")
    drawn = {}
    for path, leaf in found.items():
        if path in given:
            np.testing.assert_array_equal(leaf[...], given[path], path)
        elif path.startswith("face/"):
            wanted = face[path.removeprefix("face/")].astype(np.float32)
            np.testing.assert_array_equal(leaf[...], wanted, path)
        elif path.startswith("qformer/"):
            drawn[path.removeprefix("qformer/")] = np.asarray(leaf[...])
    assert 0.01 < drawn.pop("query").std() < 0.03
    assert len(drawn) == 4 * 2 + 2  # four Linears of cross-attention and its norm
    for path, value in drawn.items():
        assert path.startswith("groups/cross/crossattention/"), path
        if path.endswith("kernel"):
            bound = value.shape[-2] ** -0.5  # as PyTorch draws a Linear
            assert 0.9 * bound < np.abs(value).max() <= bound, path
        else:
            np.testing.assert_array_equal(value, float(path.endswith("scale")), path)
    reference = base_reference(cfg)
    assert list(reference["sha256"]) == ["tiny_face"]
    assert reference["fingerprints"] == [["bert", imported.read_manifest(folder).fingerprint]]
    read = named_parameters(load_face(cfg))
    np.testing.assert_array_equal(read["swin/patch_embed/bias"], face["swin/patch_embed/bias"])


def test_words_for_the_packages_towers():
    with pytest.raises(UserError, match=r"'tiny:fase': the package has no such tower .*tiny:face"):
        config.load("tiny", ["weights=[here, 'tiny:fase']"])
    cfg = config.load("tiny", ["weights=['tiny:vision', 'tiny:face']"])
    assert list(base_reference(cfg)["sha256"]) == ["tiny_vision", "tiny_face"]
    with pytest.raises(UserError, match=r"face/.* is in none of"):
        load_face(dataclasses.replace(cfg, weights=("tiny:vision",)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "roberta"}, "model_type is 'roberta', wanted 'bert'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', wanted 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "wanted 'absolute'"),
        ({"num_attention_heads": 5}, "wanted a divisor of hidden_size 24"),
        ({"num_hidden_layers": 3}, "wanted a multiple of model.qformer.cross_attention_every 2"),
        ({"num_hidden_layers": 2}, "no row of the table reads it"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps is 'small'"),
    ],
)
def test_what_is_refused(bert, tmp_path, changed, message):
    bert.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    with pytest.raises(UserError, match=message):
        convert("bert", tmp_path / "theirs", tmp_path / "ours", MODEL)
    assert not (tmp_path / "ours").exists()


def test_weights_without_their_settings_or_a_tensor(bert, tmp_path):
    bert.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json beside the weights"):
        convert("bert", tmp_path / "theirs", tmp_path / "ours", MODEL)
    bert.save_pretrained(tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    del tensors["encoder.layer.2.output.dense.bias"]
    save_file(tensors, tmp_path / "theirs" / "model.safetensors")
    with pytest.raises(UserError, match=r"encoder\.layer\.2\.output\.dense\.bias: missing"):
        convert("bert", tmp_path / "theirs", tmp_path / "ours", MODEL)


def test_a_folder_for_another_qformer_is_refused(folder):
    shapes = {path: leaf.shape for path, leaf in leaves(folder).items()}
    for field, value in (("heads", 6), ("norm_eps", 1e-12), ("cross_attention_every", 1)):
        changed = dataclasses.replace(FITTING.qformer, **{field: value})
        with pytest.raises(UserError, match=rf"model\.qformer\.{field}"):
            imported.check_base([folder], dataclasses.replace(FITTING, qformer=changed), shapes)
    other = dataclasses.replace(FITTING.qformer, queries=9, encoder_width=64)  # not of BERT
    imported.check_base([folder], dataclasses.replace(FITTING, qformer=other), shapes)
