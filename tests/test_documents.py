"""README, docs and their site: commands, links, files and pages exist, and the Python runs."""

import importlib
import pathlib
import re
import shlex

import pytest
import skimage
import yaml
from PIL import Image

from emollama_jax import _PUBLIC as PUBLIC
from emollama_jax import cli, config
from emollama_jax.models.parameters import named_parameters
from tools.convert_torch import __main__ as convert_torch

NAMES = ("tiny", "emollama_135m", "emollama_7b", "emollama_13b")  # of the parameter table


def documents(root):
    return [root / name for name in ("README.md", "CONTRIBUTING.md")] + sorted(
        (root / "docs").glob("*.md")
    )


def commands(root):
    """(document, words) of every line in a shell block, prompts and comments left out."""
    for path in documents(root):
        for block in re.findall(
            r"^```(?:sh|bash|console)\n(.*?)^```", path.read_text(), re.M | re.S
        ):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                while words and re.match(r"[A-Z_]+=", words[0]):  # an environment variable
                    words.pop(0)
                if words:
                    yield path.name, words


def help_of(words, capsys, main=cli.main):
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_documented_commands_exist(root, capsys):
    found = list(commands(root))
    assert ("README.md", ["make", "demo"]) in found
    assert any("emollama" in words[0] for _, words in found)
    makefile = (root / "Makefile").read_text()
    for document, words in found:
        program, *args = words
        where = f"{document}: {' '.join(words)}"
        if program == "make":
            targets = [word for word in args if "=" not in word]
            assert all(f"\n{target}:" in makefile for target in targets), where
        elif program.endswith("emollama"):
            verb = args[:2] if args[0] in cli.NESTED else args[:1]
            text = help_of(verb, capsys)
            for word in args[len(verb) :]:
                if word.startswith("--"):
                    flag = word.partition("=")[0]
                    assert re.search(rf"{re.escape(flag)}\b", text), f"{where}: no {flag}"
            if verb == ["train"]:
                overrides = [word for word in args if re.match(r"[a-z_.]+=", word)]
                config.load(args[1], overrides)
        elif args[:2] == ["-m", "tools.convert_torch"]:
            if args[2].isupper():  # stands for any
                continue
            text = help_of(args[2:3], capsys, convert_torch.main)
            for flag in (word for word in args if word.startswith("--")):
                assert re.search(rf"{flag}\b", text), f"{where}: no {flag}"
            if args[2] == "export" and not args[3].isupper():
                assert f"{args[3]}," in text, where
        elif args[:1] == ["-m"] and args[1].startswith("tools."):
            package = (root / args[1].replace(".", "/")).is_dir()
            module = importlib.import_module(f"{args[1]}.__main__" if package else args[1])
            text = help_of((), capsys, module.main)
            for flag in (word for word in args if word.startswith("--")):
                assert re.search(rf"{flag}\b", text), f"{where}: no {flag}"
        elif program.endswith("python"):
            assert (root / args[0]).is_file() or args[0] == "resave.py", where
        elif program in ("pip", "docker", "gcloud", "kubectl", "xpk"):  # docs/cloud_tpu.md
            continue
        elif (program, *args[:1]) == ("serve", "run"):  # Ray's own, docs/serving.md
            assert (root / f"{args[1].partition(':')[0].replace('.', '/')}.py").is_file(), where
        elif program == ".ci/run":
            assert (root / program).is_file(), where
        else:
            assert program in ("git", "cd", ".venv/bin/pre-commit"), where


def test_every_verb_is_in_the_readme(root):
    text = (root / "README.md").read_text()
    verbs = [verb for verb in cli.VERBS if verb not in cli.NESTED]
    verbs += [f"{outer} {verb}" for outer, inner in cli.NESTED.items() for verb in inner]
    assert [verb for verb in verbs if f"`emollama {verb}" not in text] == []


def test_documents_link_to_what_exists(root):
    broken = []
    for path in documents(root):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
            if not (path.parent / target).exists():
                broken.append(f"{path.relative_to(root)} → {target}")
    assert broken == []


def prose(path):
    """The text of a document without its code blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)


def test_prose_wraps_at_100(root):
    long = [
        f"{path.name}: {line}"
        for path in documents(root)
        for line in prose(path).splitlines()
        if len(line) > 100 and not line.startswith("|")
    ]
    assert long == []


def test_documents_name_files_that_exist(root):
    missing = []
    for path in documents(root):
        for name in re.findall(r"`((?:[a-z_]+/)+(?:[a-z_]+\.py)?)`", prose(path)):
            if name.startswith(
                ("tests/", "docs/", "benchmarks/", "deploy/", "tools/", "emollama_jax/")
            ):
                found = (root / name).exists()
            elif name.endswith(".py"):
                found = (root / "emollama_jax" / name).exists()
            else:  # a folder of the user's
                continue
            if not found:
                missing.append(f"{path.name}: {name}")
    assert missing == []


def test_the_site_has_every_page_and_every_public_name(root):
    site = yaml.safe_load((root / "mkdocs.yml").read_text())
    pages = {page for entry in site["nav"] for part in entry.values() for page in listed(part)}
    written = {path.name for path in (root / "docs").glob("*.md")}
    assert pages == written | {"index.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"}
    api = re.findall(r"^::: (.*)$", (root / "docs" / "api.md").read_text(), re.M)
    assert sorted(api) == sorted(f"{module}.{name}" for name, module in PUBLIC.items())


def listed(part):
    """The pages of a navigation entry."""
    return [part] if isinstance(part, str) else [page for entry in part for page in entry.values()]


def test_parameter_table_is_what_is_built(root, abstract_model):
    text = (root / "docs" / "model.md").read_text()
    rows = {
        "EVA-ViT": "vision",
        "FaceXFormer": "face",
        "Face Info Mining": "fim",
        "Q-Former": "qformer",
        "projectors": "visual_tokens",
        "LLaMA": "llama",
    }
    models = [abstract_model(name) for name in NAMES]
    for title, part in rows.items():
        counts = [
            sum(
                leaf.size
                for path, leaf in named_parameters(getattr(model, part)).items()
                if not path.endswith(("lora_A", "lora_B"))
            )
            for model in models
        ]
        assert f"| {title} | {' | '.join(f'{count:,}' for count in counts)} |" in text


def test_python_of_the_readme_runs(root, tmp_path, monkeypatch, capsys):
    (block,) = re.findall(r"^```python\n(.*?)^```", (root / "README.md").read_text(), re.M | re.S)
    picture = pathlib.Path(skimage.__file__).parent / "data" / "astronaut.png"
    face = Image.open(picture).convert("RGB").crop((130, 0, 330, 200))
    face.save(tmp_path / "photo.jpg", quality=95)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block, names)
    assert names["faces"].boxes.shape == (1, 4)
    assert names["seen"].prior.found.all()
    assert capsys.readouterr().out.startswith("[[")
