"""House rules that a machine can check: arrows, imports, parameter axes, files."""

import ast
import graphlib
import importlib.metadata
import json
import re
import socket
import subprocess
import sys
import tomllib

import jaxtyping
import numpy as np
import pytest

import emollama_jax
from emollama_jax.models.facexformer import to_pixels
from emollama_jax.models.parameters import named_parameters
from emollama_jax.sharding.rules import FSDP

# Which part of the package may import which other. `models` and `data` do not know each other;
# they meet in `batch`. Nothing imports `cli`.
BASE = {
    "errors",
    "config",
    "config_content",
    "config_weights",
    "batch",
    "ahead",
    "paths",
    "disk",
    "foreign_json",
    "workers",
    "redact",
    "tables",
    "locks",
    "preflight",
    "runs",
    "packed",
    "status",
    "terms",
    "compile_cache",
}
LOWER = BASE | {"models", "data", "sharding", "imported", "base", "checkpoint"}
MAY_IMPORT = {
    "errors": set(),
    "batch": set(),
    "ahead": set(),
    "terms": set(),
    "foreign_json": set(),
    "workers": set(),
    "redact": set(),
    "disk": {"errors"},
    "paths": {"errors", "disk"},
    "bounds": set(),
    "yaml_file": {"errors", "paths"},
    "config_fields": {"bounds"},
    "config_overrides": {"errors", "yaml_file", "config_fields"},
    "config_content": {"errors"},
    "config_weights": set(),
    "config": {
        *("errors", "paths", "bounds", "yaml_file", "terms"),
        *("config_content", "config_fields", "config_overrides", "config_weights"),
    },
    "tables": {"errors", "foreign_json"},
    "preflight": {"errors"},
    "runs": {"errors", "paths"},
    "packed": {
        *("errors", "config", "models", "paths", "runs", "yaml_file"),
        *("disk", "foreign_json"),
    },
    "status": set(),
    "compile_cache": {"errors"},
    "locks": {"errors", "paths"},
    "dispatch": {"errors", "disk", "redact"},
    "cli_words": {"config", "redact"},
    "cli_results": BASE | {"cli_words", "data", "evaluate", "remote", "sharding"},
    "cli_speed": {
        "errors",
        "config",
        "preflight",
        "compile_cache",
        "cli_words",
        "runs",
        "bench",
        "scale",
    },
    "cli_serve": {"errors", "preflight", "runs", "cli_words", "serve", "tiny"},
    "models": BASE | {"sharding"},  # the named points
    "sharding": BASE,
    "data": BASE,
    "remote": BASE,
    "instruct": BASE | {"data", "remote"},
    "imported": BASE,
    "base": BASE | {"models", "sharding", "imported"},
    "checkpoint": BASE | {"models", "sharding", "base"},
    "faces": LOWER,
    "prepare": LOWER | {"faces"},
    "generate": LOWER,
    "train": LOWER | {"faces"},
    "evaluate": LOWER | {"faces", "generate", "train", "remote"},
    "serve": LOWER | {"faces", "generate", "train"},
    "bench": LOWER | {"faces", "generate", "train", "tiny", "serve"},
    "scale": LOWER | {"faces", "generate", "train"},
    "tiny": LOWER | {"prepare", "faces", "generate", "train", "evaluate", "serve", "scale"},
    "cli": LOWER
    | {"prepare", "faces", "generate", "train", "evaluate", "serve", "scale", "tiny"}
    | {"remote", "instruct", "bench", "dispatch"}
    | {"cli_words", "cli_results", "cli_serve", "cli_speed"},
    "testing": LOWER | {"faces"},
}
HEAVY = ("torch", "matplotlib", "transformers", "gradio", "tensorflow", "google.genai")


def sources(root, *folders):
    for folder in folders:
        yield from sorted((root / folder).rglob("*.py"))


def module_of(root, path):
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree):
    """(module or module.name, at import time) of every import statement."""

    def visit(node, top):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ImportFrom):
                yield from ((f"{child.module}.{name.name}", top) for name in child.names)
            elif isinstance(child, ast.Import):
                yield from ((name.name, top) for name in child.names)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from visit(child, top and not inside)

    yield from visit(tree, True)


@pytest.fixture(scope="module")
def modules(root):
    """Module name → its imports, of the whole package."""
    return {
        module_of(root, path): list(imports(ast.parse(path.read_text())))
        for path in sources(root, "emollama_jax")
    }


# ------------------------------------------------------------------ imports


def test_arrows_point_down(modules):
    wrong = []
    for name, imported in modules.items():
        part = [*name.split("."), ""][1]
        for target, _ in imported:
            pieces = target.split(".")
            if pieces[0] != "emollama_jax" or not part or len(pieces) < 2 or pieces[1] == part:
                continue
            if pieces[1] not in MAY_IMPORT[part]:
                wrong.append(f"{name} imports {target}")
    assert wrong == []


def circle(modules):
    """Rooms that import one another, in a ring; [] if there is none."""
    below = {}
    for name, imported in modules.items():
        room = [*name.split("."), ""][1]
        rooms = {target.split(".")[1] for target, _ in imported if "emollama_jax." in target}
        below[room] = below.get(room, set()) | rooms - {room}
    try:
        graphlib.TopologicalSorter(below).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_rooms_form_no_circle(modules):
    assert circle(modules) == []
    upward = modules["emollama_jax.errors"] + [("emollama_jax.cli.main", False)]
    assert {"errors", "cli"} <= set(circle(modules | {"emollama_jax.errors": upward}))


def test_array_annotations_are_checked():
    with pytest.raises(jaxtyping.TypeCheckError, match="to_pixels"):
        to_pixels(np.zeros((4, 3)), 224)  # landmarks have two coordinates


def test_no_list_of_parameters_is_long(root):
    long = [
        f"{path.relative_to(root)}: {node.name}"
        for path in sources(root, "emollama_jax", "tools")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        if len({x.arg for x in (*node.args.args, *node.args.kwonlyargs)} - {"self", "cls"}) > 8
    ]
    assert long == []


def test_torch_is_not_in_the_package_and_heavy_libraries_are_imported_where_used(modules):
    wrong = [
        f"{name} imports {target}"
        for name, imported in modules.items()
        for target, top in imported
        if target.split(".")[0] in HEAVY and (top or target.split(".")[0] == "torch")
    ]
    assert wrong == []


def test_every_imported_package_is_declared(root, modules):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w-]+", line)[0].lower() for line in project["dependencies"]}
    providers = importlib.metadata.packages_distributions()
    own = {*sys.stdlib_module_names, "emollama_jax"}
    # What is imported where it is used may come from an extra.
    extras = {
        re.match(r"[\w-]+", line)[0].lower()
        for lines in project["optional-dependencies"].values()
        for line in lines
    }
    every = [pair for imported in modules.values() for pair in imported]
    used = {target.split(".")[0] for target, _ in every}
    at_import = {target.split(".")[0] for target, top in every if top}
    missing = {
        name: providers.get(name)
        for name in used - own
        if not {dist.lower().replace("_", "-") for dist in providers.get(name, [])}
        & (declared if name in at_import else declared | extras)
    }
    assert missing == {}


def probe(code):
    """Runs code in a new interpreter and reads the JSON that it prints last."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("module", ["emollama_jax", "emollama_jax.cli"])
def test_import_is_quick_and_light(module):
    seconds, loaded = probe(
        "import json, sys, time; import jax; start = time.process_time()\n"
        f"import {module}\n"
        "print(json.dumps([time.process_time() - start, sorted(sys.modules)]))"
    )
    assert seconds < 1
    assert [name for name in loaded if name.split(".")[0] in HEAVY] == []


def test_no_module_of_the_package_loads_a_heavy_library(modules):
    loaded = probe(
        "import importlib, json, sys\n"
        f"for name in {sorted(modules)!r}: importlib.import_module(name)\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    assert "emollama_jax.models.emollama" in loaded
    # jaxtyping and TFDS may look at what is there; they load none of these.
    assert [name for name in loaded if name in HEAVY] == []


def test_public_names_exist():
    for name in emollama_jax.__all__:
        assert getattr(emollama_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = emollama_jax.nothing


# ------------------------------------------------------------------ parameters


@pytest.mark.parametrize("name", ["tiny", "emollama_135m", "emollama_7b", "emollama_13b"])
def test_every_parameter_names_its_axes(name, abstract_model):
    wrong = [
        f"{path} {leaf.shape}: {axes}"
        for path, leaf in named_parameters(abstract_model(name)).items()
        for axes in [leaf.get_metadata().get("axes")]
        if axes is None or len(axes) != len(leaf.shape) or not set(axes) <= set(FSDP)
    ]
    assert wrong == []


# ------------------------------------------------------------------ files


def test_every_axis_of_the_rules_is_used(abstract_model):
    used = set()
    for name in ("tiny", "emollama_7b"):
        for leaf in named_parameters(abstract_model(name)).values():
            used |= set(leaf.axes)
    assert set(FSDP) - used == set()


def test_files_stay_short(root):
    long = {
        str(path.relative_to(root)): lines
        for path in sources(root, "emollama_jax", "tests", "tools", "benchmarks")
        if (lines := path.read_text().count("\n")) > 500
    }
    assert long == {}


def test_modules_say_what_they_are(root):
    silent = [
        str(path.relative_to(root))
        for path in sources(root, "emollama_jax", "tests", "tools", "benchmarks")
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


def test_nothing_is_left_for_later(root):
    words = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX|NotImplemented" + r"Error)\b")
    left = [
        f"{path.relative_to(root)}:{number}: {line.strip()}"
        for path in sources(root, "emollama_jax", "tests", "tools", "benchmarks")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if words.search(line)
    ]
    assert left == []


def test_changelog_has_the_version(root):
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    assert f"## {version}" in (root / "CHANGELOG.md").read_text()


def test_tests_have_no_network():
    with (
        socket.socket() as connection,
        pytest.raises(RuntimeError, match="tests run without it"),
    ):
        connection.connect(("192.0.2.1", 80))  # a documentation address: RFC 5737
