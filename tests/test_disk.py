"""Files that appear whole or not at all, and one line where the disk is full."""

import errno
import os

import pytest

from emollama_jax import disk
from emollama_jax.disk import is_full, room, sweep, whole_file
from emollama_jax.errors import UserError


@pytest.fixture
def bytes_free(monkeypatch):
    """Sets how much room there is."""

    def set_to(number):
        monkeypatch.setattr(disk, "free", lambda folder: number)

    return set_to


def test_a_file_appears_whole(tmp_path):
    with whole_file(tmp_path / "a.npz", wanted=3) as half:
        half.write_bytes(b"new")
        assert not (tmp_path / "a.npz").exists()
        assert str(os.getpid()) in half.name
    assert (tmp_path / "a.npz").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.npz"]


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "a") as half:
        half.write_bytes(b"ne")
        raise ZeroDivisionError
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_too_little_room_is_told_before_anything_is_written(tmp_path, bytes_free):
    bytes_free(100_000)
    with pytest.raises(UserError) as caught, whole_file(tmp_path / "a", wanted=1_000_000) as half:
        half.write_bytes(b"")
    assert str(caught.value) == (
        f"{tmp_path}: No space left on device: 1,000,000 bytes wanted, 100,000 free: free some "
        "space, then re-run the command to resume"
    )
    assert os.listdir(tmp_path) == []
    with room(tmp_path, 100_000 - disk.SLACK):
        pass


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [28]"),
    ],
)
def test_a_disk_that_fills_up_meanwhile(tmp_path, error):
    assert is_full(error)
    with (
        pytest.raises(UserError, match="5 bytes wanted"),
        whole_file(tmp_path / "a", wanted=5) as h,
    ):
        h.write_bytes(b"ab")
        raise error
    assert os.listdir(tmp_path) == []


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(OSError, match="Input/output"), room(tmp_path, 0):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_what_killed_processes_left_is_swept(tmp_path):
    for name in ("a.npz.123.partial", "b.array_record.7.partial", "c.npz"):
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert os.listdir(tmp_path) == ["c.npz"]
    sweep(tmp_path / "absent")


def test_room_is_looked_up_where_a_folder_will_be(tmp_path):
    assert disk.free(tmp_path / "a" / "b") == pytest.approx(disk.free(tmp_path), rel=0.5)
