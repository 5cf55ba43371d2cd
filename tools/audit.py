"""Known holes in what CI installs: `python -m tools.audit`.

The versions are those of `requirements/ci.txt`. They are looked up by pip-audit, in PyPI's database
over the network, or with --database in a copy of OSV's, a zip of one JSON file a record:
https://osv-vulnerabilities.storage.googleapis.com/PyPI/all.zip. Where no network is, nothing is
known, which is said and is no error.
"""

import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import tyro
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from emollama_jax import foreign_json
from emollama_jax.errors import UserError
from tools.command import run

LOCK = pathlib.Path(__file__).parent.parent / "requirements" / "ci.txt"


def audit(lock: pathlib.Path = LOCK, database: pathlib.Path | None = None) -> None:
    """Tells of known holes; exit status 1 if there are any.

    Args:
        lock: file of pinned requirements.
        database: copy of OSV's database for PyPI; the network by default.
    """
    pinned = read_lock(lock)
    known = len(pinned)  # packages that were looked up
    if database is None:
        known, found = _by_pip_audit(pinned)
        if not known:
            print("no network, or no pip-audit: not audited (see --database)", file=sys.stderr)
            return
    else:
        found = list(_by_database(pinned, database))
    for line in found:
        print(line)
    print(f"{len(pinned)} packages, {known} looked up, {len(found)} known holes")
    if found:
        sys.exit(1)


def read_lock(path: pathlib.Path) -> dict[str, str]:
    """Name → version of every requirement; each must be pinned and hashed.

    Raises:
        UserError: no such file, or a requirement that is not pinned or has no hash.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file: `make lock` writes it")
    found = {}
    for entry in re.split(r"\n(?=[A-Za-z0-9])", path.read_text(encoding="utf-8")):
        if not re.match(r"[A-Za-z0-9]", entry):
            continue
        match = re.match(r"([A-Za-z0-9._-]+)==(\S+)", entry)
        if match is None or "--hash=sha256:" not in entry:
            raise UserError(f"{path}: {entry.splitlines()[0]}: not pinned with a hash: make lock")
        found[canonicalize_name(match[1])] = match[2]
    return found


def _by_pip_audit(pinned: Mapping[str, str]) -> tuple[int, list[str]]:
    """How many packages pip-audit could look up, and a line for each hole."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "pinned.txt")
        # Without local parts: PyPI knows torch 2.13.0, not 2.13.0+cpu.
        lines = [f"{name}=={version.partition('+')[0]}\n" for name, version in pinned.items()]
        path.write_text("".join(lines))
        words = ["--requirement", str(path), "--no-deps", "--disable-pip", "--format", "json"]
        done = subprocess.run(
            [sys.executable, "-m", "pip_audit", *words, "--progress-spinner", "off"],
            capture_output=True,
            text=True,
        )
    try:
        # Where no network is, every package is said to be unknown.
        asked = [p for p in foreign_json.parse(done.stdout)["dependencies"] if "version" in p]
        return len(asked), [
            f"{package['name']} {package['version']}: {hole['id']}, mended in "
            f"{', '.join(hole['fix_versions']) or 'no version'}"
            for package in asked
            for hole in package["vulns"]
        ]
    except (ValueError, KeyError, TypeError):
        return 0, []


def _by_database(pinned: Mapping[str, str], database: pathlib.Path) -> Iterator[str]:
    try:
        with zipfile.ZipFile(database) as archive:
            for name in archive.namelist():
                record = foreign_json.parse(archive.read(name))
                for affected in record.get("affected", ()):
                    package = canonicalize_name(affected["package"]["name"])
                    version = pinned.get(package)
                    if version is not None and is_affected(version, affected):
                        words = record.get("summary") or "no summary"
                        yield f"{package} {version}: {record['id']}: {words}"
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{database}: not a copy of OSV's database ({error})") from None


def is_affected(version: str, affected: Mapping[str, Any]) -> bool:
    """Whether a version is one of those that a record of OSV names, or within its ranges."""
    plain = version.partition("+")[0]
    if plain in affected.get("versions", ()):
        return True
    for span in affected.get("ranges", ()):
        if span["type"] != "ECOSYSTEM":
            continue
        inside = False
        for event in span["events"]:
            try:
                if "introduced" in event:
                    low = event["introduced"]
                    inside = inside or low == "0" or Version(plain) >= Version(low)
                elif "fixed" in event:
                    inside = inside and Version(plain) < Version(event["fixed"])
                elif "last_affected" in event:
                    inside = inside and Version(plain) <= Version(event["last_affected"])
            except InvalidVersion:
                inside = False
        if inside:
            return True
    return False


def main(args: list[str] | None = None) -> None:
    """Runs the command."""
    run("audit", lambda: tyro.cli(audit, prog="python -m tools.audit", args=args))


if __name__ == "__main__":
    main()
