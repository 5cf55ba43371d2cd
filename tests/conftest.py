"""What every test stands on: eight CPU devices, full precision, a compilation cache, no network.

Environment variables are set before JAX is imported, so that subprocesses of a test (the command
line) inherit them. Eight devices cost single-device tests nothing measurable: without a mesh,
everything runs on the first.
"""

import functools
import importlib
import os
import pathlib
import socket

import jaxtyping
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Matrix products of the parity tests; on a CPU float32 is exact anyway.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "agg"

DEVICES = "--xla_force_host_platform_device_count=8"
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}".strip()


def pytest_configure(config: pytest.Config) -> None:
    """Checks array annotations, and keeps compiled programs under pytest's cache, for all processes
    of this run and the next."""

    importlib.import_module("tests.helpers.array_checks")  # where the hook finds it by name
    jaxtyping.install_import_hook("emollama_jax", "tests.helpers.array_checks.check")
    from emollama_jax import compile_cache

    os.environ[compile_cache.VARIABLE] = str(config.cache.mkdir("programs"))
    compile_cache.start()


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this machine may be connected to, e.g. a test's own server."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def guard(original):
        def guarded(self, address, *args):
            if self.family != socket.AF_UNIX and address[0] not in (
                "127.0.0.1",
                "::1",
                "localhost",
            ):
                raise RuntimeError(f"a test wants the network: {address}; tests run without it")
            return original(self, address, *args)

        return guarded

    monkeypatch.setattr(socket.socket, "connect", guard(connect))
    monkeypatch.setattr(socket.socket, "connect_ex", guard(connect_ex))


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
    """The checkout."""
    return pathlib.Path(__file__).parent.parent


@pytest.fixture
def rng():
    """A seeded NumPy generator, the same in every test."""
    import numpy as np

    return np.random.Generator(np.random.PCG64(0))


@pytest.fixture(scope="session")
def tiny_config():
    """`configs/tiny.yaml`."""
    from emollama_jax import config

    return config.load("tiny")


@pytest.fixture(scope="session")
def abstract_model():
    """Config name → its whole model with shapes instead of numbers; built once for all tests."""
    from emollama_jax import config
    from emollama_jax.models.emollama import EmoLlama
    from emollama_jax.models.rngs import abstract

    @functools.cache
    def build(name: str) -> EmoLlama:
        cfg = config.load(name).model
        return abstract(lambda rngs: EmoLlama(cfg, rngs=rngs))

    return build
