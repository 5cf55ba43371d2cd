"""Compiled programs on the disk: kept, found, bounded, shared, and made again where broken."""

import os
import pathlib
import subprocess
import sys
import threading

import pytest

from emollama_jax import compile_cache
from emollama_jax.compile_cache import Store
from emollama_jax.errors import UserError

PROGRAM = """
from emollama_jax import compile_cache
compile_cache.start()
import jax, jax.numpy as jnp
print(float(jax.jit(lambda x: jnp.tanh(x) @ x.T)(jnp.ones((3, 4)))[0, 0]))
counted = compile_cache.counted()
print(counted.compiled, counted.found)
"""


def run(folder: pathlib.Path) -> list[str]:
    environment = os.environ | {compile_cache.VARIABLE: str(folder)}
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split("\n")


def test_a_second_process_compiles_nothing_and_a_broken_entry_is_made_again(tmp_path):
    first = run(tmp_path)
    compiled = int(first[1].split()[0])
    assert compiled > 0
    again = run(tmp_path)
    assert again[0] == first[0] and again[1] == f"0 {compiled}"
    (folder,) = tmp_path.iterdir()
    programs = sorted(folder.glob("*.program"), key=lambda path: path.stat().st_size)
    whole = programs[-1].read_bytes()
    programs[-1].write_bytes(whole[: len(whole) // 2])
    after = run(tmp_path)
    assert after[0] == first[0] and after[1] == f"1 {compiled - 1}"
    assert run(tmp_path)[1] == f"0 {compiled}"


def test_the_store_gives_back_what_it_was_given(tmp_path):
    store = Store(tmp_path)
    assert store.get("a") is None
    store.put("a", b"program")
    store.put("b", b"")
    assert store.get("a") == b"program" and store.get("b") == b""
    store.put("a", b"other")
    assert store.get("a") == b"other"
    path = tmp_path / "a.program"
    whole = path.read_bytes()
    for broken in (whole[:20], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(broken)
        assert store.get("a") is None and not path.exists()


def test_what_was_not_used_for_longest_goes_first(tmp_path):
    store = Store(tmp_path, largest=3 * 132)
    for age, key in enumerate("abc"):
        store.put(key, bytes(100))
        os.utime(tmp_path / f"{key}.program", (1000 + age, 1000 + age))
    assert store.get("a") is not None  # used now
    store.put("d", bytes(100))
    assert [store.get(key) is not None for key in "abcd"] == [True, False, True, True]
    Store(tmp_path, largest=10).put("e", bytes(100))
    assert list(tmp_path.iterdir()) == []


def test_many_writers_and_readers_share_a_folder(tmp_path):
    store, troubles = Store(tmp_path, largest=20 * 1000), []

    def work(number: int) -> None:
        for turn in range(60):
            key = f"{(number + turn) % 12}"
            store.put(key, key.encode() * 2000)
            found = store.get(key)
            if found not in (None, key.encode() * 2000):
                troubles.append(key)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not troubles
    assert not list(tmp_path.glob("half-*"))


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    store = Store(tmp_path / "gone")
    store.put("a", b"program")
    assert store.get("a") is None


def test_the_variable_moves_it_or_turns_it_off(tmp_path, monkeypatch):
    monkeypatch.setenv(compile_cache.VARIABLE, "none")
    assert compile_cache.folder() is None
    monkeypatch.setenv(compile_cache.VARIABLE, str(tmp_path / "here"))
    assert compile_cache.folder().parent == tmp_path / "here"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/programs")
    assert compile_cache.folder() is None
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv(compile_cache.VARIABLE, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert compile_cache.folder().parent == tmp_path / "cache" / "emollama_jax"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(compile_cache.VARIABLE, str(tmp_path / "file"))
    with pytest.raises(UserError, match="EMOLLAMA_CACHE="):
        compile_cache.folder()
