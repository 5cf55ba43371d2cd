"""The lock file covers what CI installs, and known holes are found without a network."""

import json
import subprocess
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from emollama_jax.errors import UserError
from tools import audit

INSTALLED = ("test", "parity", "docs", "plan")  # extras that `.ci/run` installs


def test_the_lock_holds_what_ci_installs(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"]]
    for extra in INSTALLED:
        wanted += project["optional-dependencies"][extra]
    pinned, wrong = audit.read_lock(audit.LOCK), []
    for line in wanted:
        need = Requirement(line)
        version = pinned.get(canonicalize_name(need.name))
        if version is None or not need.specifier.contains(version.partition("+")[0]):
            wrong.append(f"{line}: locked {version}: run `make lock`")
    assert wrong == []
    assert len(pinned) > len(wanted)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a>=1\n", "a>=1: not pinned"), ("a==1\nb==2 \\\n    --hash=sha256:0\n", "a==1: not pinned")],
)
def test_what_is_not_pinned_is_refused(tmp_path, text, message):
    (tmp_path / "lock").write_text(text)
    with pytest.raises(UserError, match=message):
        audit.read_lock(tmp_path / "lock")
    with pytest.raises(UserError, match="make lock"):
        audit.read_lock(tmp_path / "absent")


LOCK = """# by uv
Pillow==11.3.0 \\
    --hash=sha256:00
    # via x
torch==2.13.0+cpu \\
    --hash=sha256:11
"""
RECORDS = {
    "by-version": {"versions": ["11.3.0"]},
    "by-range": {"ranges": [{"type": "ECOSYSTEM", "events": [
        {"introduced": "0"}, {"fixed": "11.4"}]}]},
    "mended": {"ranges": [{"type": "ECOSYSTEM", "events": [
        {"introduced": "0"}, {"fixed": "11.3"}]}]},
    "later": {"ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "12"}]}]},
    "last": {"ranges": [{"type": "ECOSYSTEM", "events": [
        {"introduced": "11"}, {"last_affected": "11.3.0"}]}]},
    "git": {"ranges": [{"type": "GIT", "events": [{"introduced": "0"}]}]},
}  # fmt: skip


@pytest.fixture
def database(tmp_path):
    (tmp_path / "lock").write_text(LOCK)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name, affected in RECORDS.items():
            affected = affected | {"package": {"name": "pillow", "ecosystem": "PyPI"}}
            record = {"id": name, "summary": "a hole", "affected": [affected]}
            archive.writestr(f"{name}.json", json.dumps(record))
        torch = {"package": {"name": "torch"}, "versions": ["2.13.0"]}
        archive.writestr("t.json", json.dumps({"id": "local", "affected": [torch]}))
    return tmp_path / "all.zip"


def test_holes_are_found_in_a_copy_of_the_database(tmp_path, database, capsys):
    with pytest.raises(SystemExit) as stop:
        audit.main(["--lock", str(tmp_path / "lock"), "--database", str(database)])
    assert stop.value.code == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["by-version", "by-range", "last", "local"]
    assert last == "2 packages, 2 looked up, 4 known holes"


def test_without_a_network_nothing_fails(tmp_path, database, capsys, monkeypatch):
    asked = []

    unknown = json.dumps({"dependencies": [{"name": "pillow", "skip_reason": "not found"}]})

    def run(words, **how):
        asked.append(words)
        said = "" if len(asked) == 1 else unknown
        return subprocess.CompletedProcess(words, 1, stdout=said, stderr="no connection")

    monkeypatch.setattr(subprocess, "run", run)
    audit.main(["--lock", str(tmp_path / "lock")])
    assert "not audited" in capsys.readouterr().err
    audit.main(["--lock", str(tmp_path / "lock")])
    assert "not audited" in capsys.readouterr().err and len(asked) == 2


def test_what_pip_audit_says_is_told(tmp_path, database, capsys, monkeypatch):
    tree = {"dependencies": [
        {"name": "pillow", "version": "11.3.0", "vulns": [{"id": "CVE-1", "fix_versions": ["12"]}]},
        {"name": "torch", "skip_reason": "not there"},
    ]}  # fmt: skip
    done = subprocess.CompletedProcess([], 1, stdout=json.dumps(tree))
    monkeypatch.setattr(subprocess, "run", lambda words, **how: done)
    with pytest.raises(SystemExit):
        audit.main(["--lock", str(tmp_path / "lock")])
    said = capsys.readouterr().out
    assert "pillow 11.3.0: CVE-1, mended in 12" in said
    assert "2 packages, 1 looked up, 1 known holes" in said


def test_another_file_is_no_database(tmp_path, database):
    (tmp_path / "x.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="not a copy of OSV's database"):
        list(audit._by_database({"a": "1"}, tmp_path / "x.zip"))
