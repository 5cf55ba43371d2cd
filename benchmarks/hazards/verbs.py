"""The verbs that a campaign ill-treats: their inputs, their commands, and what must come out.

Each verb is small (seconds), runs in a folder of its own under the same relative names, and can be
compared with a reference that nothing disturbed.
"""

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent.parent
CLASSES = ("anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise")
OUT = "out"
MARK = "EMOLLAMA_CAMPAIGN"  # variable by which a campaign's processes are known


@dataclasses.dataclass(frozen=True)
class Verb:
    """One verb of the command line, small.

    Attributes:
        name: name in reports.
        words: command line, run in the work folder.
        result: everything of a finished work folder that must be as in the reference.
        line: text that its refusals begin with.
        finished: text of the refusal to do again what is done, where the verb refuses that.
    """

    name: str
    words: Sequence[str]
    result: Callable[[pathlib.Path], Mapping[str, bytes]]
    line: str = "emollama: "
    finished: str = ""


def environment(cache: pathlib.Path, token: str) -> dict[str, str]:
    """Variables of a verb's process.

    Args:
        cache: folder of compiled programs.
        token: value by which the campaign finds its processes.
    """
    keep = {k: v for k, v in os.environ.items() if k not in ("GEMINI_API_KEY", "GOOGLE_API_KEY")}
    more = {
        "PYTHONPATH": str(ROOT),
        "EMOLLAMA_CACHE": str(cache),
        "GEMINI_API_KEY": "not-a-key",
        "JAX_PLATFORMS": "cpu",
        MARK: token,
    }
    return keep | more


def make_verbs(
    home: pathlib.Path, url: str, *, faces: bool, items: int, rows: int, steps: int
) -> list[Verb]:
    """Makes the inputs, or finds them, and names the verbs.

    Args:
        home: folder for the inputs.
        url: server that answers as Gemini does.
        faces: whether prepare also computes face priors.
        items: number of examples to prepare and to ask about.
        rows: number of predictions to evaluate.
        steps: number of steps to train.
    """
    home.mkdir(parents=True, exist_ok=True)
    source, predictions = home / "pictures", home / "predictions.jsonl"
    weights, config = home / "weights", home / "toy.yaml"
    if not (home / "done").exists():
        _pictures(source, items)
        _predictions(predictions, rows)
        _checkpoint(weights, config)
        (home / "done").touch()
    python, cli = sys.executable, [sys.executable, "-m", "emollama_jax.cli"]
    columns = ["--truth-column", "truth", "--prediction-column", "prediction", "--id-column", "id"]
    prepare = [*cli, "data", "prepare", "own/x", "--source", str(source), "--dir", OUT]
    instruct = [*cli, "data", "instruct", "own/x", "--dir", OUT, "--by", "gemini", "--base-url"]
    return [
        Verb("train", [python, "-m", "benchmarks.hazards.toy_train", OUT, str(steps)], _run,
             "toy_train: "),
        Verb("prepare", [*prepare, "--processes", "2", *([] if faces else ["--splits"])], _set),
        Verb("instruct", [*instruct, url, "--per-minute", "100000", "--timeout", "5"], _said),
        Verb("convert",
             [python, "-m", "tools.convert_torch", "llama", "--src", str(weights),
              "--out", f"{OUT}/llama", "--config", str(config)], _weights, "convert_torch: ",
             "already exists"),
        Verb("eval", [*cli, "eval", "--predictions", str(predictions), *columns, "--out", OUT],
             _numbers),
    ]  # fmt: skip


# ---- inputs


def _pictures(folder: pathlib.Path, count: int) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, share in (("train", 0.8), ("test", 0.2)):
        for number in range(round(count * share)):
            home = folder / split / CLASSES[number % len(CLASSES)]
            home.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(home / f"{number:05d}.png")


def _predictions(path: pathlib.Path, count: int) -> None:
    rng = np.random.default_rng(1)
    with path.open("w") as file:
        for number in range(count):
            truth, answer = (CLASSES[i] for i in rng.integers(0, 7, 2))
            row = {"truth": truth, "prediction": f"The person shows {answer}.", "id": number}
            file.write(json.dumps(row) + "\n")


def _checkpoint(folder: pathlib.Path, config: pathlib.Path) -> None:
    """A LLaMA of random numbers as Hugging Face stores it, and our config of its sizes."""
    import yaml
    from safetensors.numpy import save_file

    from emollama_jax.config import to_dict
    from emollama_jax.testing.toy_model import TINY
    from tools.convert_torch.convert import shapes
    from tools.convert_torch.engine import emit
    from tools.convert_torch.llama_vid import llama
    from tools.convert_torch.settings import to_transformers
    from tools.convert_torch.sources import SOURCES

    model = TINY.model
    held = shapes(SOURCES["llama"], model)
    rng = np.random.default_rng(2)
    tensors = emit(lambda path: rng.standard_normal(held[path], np.float32), llama(model.llama))
    folder.mkdir(exist_ok=True)
    save_file(
        {k: np.ascontiguousarray(v) for k, v in dict(tensors).items()},
        folder / "model.safetensors",
    )
    settings = json.dumps(to_transformers(model, dtype="float32"))
    (folder / "config.json").write_text(settings)
    config.write_text(yaml.safe_dump(json.loads(json.dumps(to_dict(TINY)))))


# ---- what must come out


def _run(work: pathlib.Path) -> dict[str, bytes]:
    """Curve and last checkpoint's step."""
    steps = sorted(int(p.name) for p in (work / OUT / "checkpoints").iterdir() if p.name.isdigit())
    return {
        "metrics.jsonl": (work / OUT / "metrics.jsonl").read_bytes(),
        "checkpoints": json.dumps(steps).encode(),
    }


def _set(work: pathlib.Path) -> dict[str, bytes]:
    """Ids, labels, digests and priors of every example."""
    found = {}
    for path in sorted((work / OUT / "own").rglob("*.np[yz]")):
        with path.open("rb") as file:
            held = np.load(file)
            arrays = dict(held) if path.suffix == ".npz" else {"": held}
            for name, array in arrays.items():
                found[f"{path.relative_to(work)}:{name}"] = array.tobytes()
    return found


def _said(work: pathlib.Path) -> dict[str, bytes]:
    folder = work / OUT / "instruct"
    names = ("conversations.json", "set_aside.jsonl", "instruct.json")
    return {
        str(path.relative_to(work)): path.read_bytes()
        for name in names
        for path in sorted(folder.rglob(name))
    }


def _weights(work: pathlib.Path) -> dict[str, bytes]:
    from emollama_jax import imported

    folder = work / OUT / "llama"
    arrays = imported.load_numpy(folder, list(imported.leaves_of(folder)))
    return {path: array.tobytes() for path, array in arrays.items()}


def _numbers(work: pathlib.Path) -> dict[str, bytes]:
    names = ("predictions.jsonl", "evaluation.json", "table.tex", "report.html")
    return {name: (work / OUT / name).read_bytes() for name in names}


def difference(found: Mapping[str, bytes], wanted: Mapping[str, bytes]) -> str:
    """What is not as in the reference; empty if nothing."""
    if not wanted:
        return "the reference is empty"
    if missing := sorted(wanted.keys() ^ found.keys()):
        return f"{missing[0]} and {len(missing) - 1} more are not in both"
    changed = [name for name in wanted if found[name] != wanted[name]]
    if not changed:
        return ""
    lines = found[changed[0]].count(b"\n"), wanted[changed[0]].count(b"\n")
    return f"{changed[0]} differs ({lines[0]} lines, wanted {lines[1]})"
