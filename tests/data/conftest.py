"""Small sets in memory and a config for them."""

import pytest

from emollama_jax import config
from emollama_jax.testing.toy_sets import Store, make_config, small_bpe


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> str:
    """The path of a small tokenizer."""
    path = tmp_path_factory.mktemp("bpe") / "bpe.json"
    path.write_text(small_bpe())
    return str(path)


@pytest.fixture
def cfg(bpe) -> config.Config:
    return make_config(bpe)
