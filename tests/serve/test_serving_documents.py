"""The commands and programs of docs/serving.md, and what deploy/ and the Dockerfile say."""

import ast
import json
import re
import shlex
import subprocess

import kubernetes_validate
import pytest
import yaml

from emollama_jax.tiny.actionfaces.examples import drawn_faces
from tests.helpers.fake_engine import FakeEngine, serving, settings

ADDRESS = "http://127.0.0.1:8000"
MANIFESTS = ("gpu", "tpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a photograph, as a reader has one."""
    path = tmp_path_factory.mktemp("reader")
    (path / "photo.jpg").write_bytes(next(drawn_faces())[1])
    return path


@pytest.fixture(scope="module")
def url():
    with serving(FakeEngine(), settings(name="emollama")) as (address, _):
        yield address


def blocks(root, language):
    """Code blocks of docs/serving.md."""
    text = (root / "docs" / "serving.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def test_curl_lines(root, folder, url):
    found = blocks(root, "shell")
    assert len(found) == 3
    for block in found:
        script = f"set -eu\n{block.replace(ADDRESS, url)}"
        done = subprocess.run(
            ["bash", "-c", script], cwd=folder, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        if "/metrics" in block:
            assert "emollama:num_requests_running" in done.stdout
            continue
        answer = json.loads(done.stdout)
        assert answer["object"] in ("chat.completion", "score"), answer
        assert answer["emollama"]["face_found"]


def test_python(root, folder, url, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    names = {}
    for block in blocks(root, "python"):
        exec(block.replace(ADDRESS, url), names)
    names["client"].close()
    said = capsys.readouterr().out
    assert said.startswith("Describe the face in the image and name the emotion.")
    assert "happiness [{'label': 'happiness', 'log_likelihood'" in said


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_fit_kubernetes_schemas(root, name):
    documents = list(yaml.safe_load_all((root / "deploy/kubernetes" / f"{name}.yaml").read_text()))
    assert [document["kind"] for document in documents] == [
        *("Deployment", "Service", "PodDisruptionBudget")
    ]
    for document in documents:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        documents[0]["spec"]["template"]["spec"]["containers"][0]["ports"] = "8000"
        kubernetes_validate.validate(documents[0], kubernetes_validate.latest_version())


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_pod_drains_before_it_is_killed(root, name):
    deployment, service, budget = yaml.safe_load_all(
        (root / "deploy/kubernetes" / f"{name}.yaml").read_text()
    )
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    labels = pod["metadata"]["labels"]
    for selector in (
        deployment["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        budget["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    arguments = container["args"]
    grace = float(arguments[arguments.index("--grace") + 1])
    pause = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["spec"]["terminationGracePeriodSeconds"] > grace + pause
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    liveness = container["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > grace + pause


def test_dockerfile_copies_what_exists_and_starts_the_verb(root):
    lines = (root / "Dockerfile").read_text().splitlines()
    copied = [shlex.split(line)[1:-1] for line in lines if line.startswith("COPY")]
    assert copied
    for names in copied:
        assert all((root / name).exists() for name in names), names
    (start,) = [line for line in lines if line.startswith("ENTRYPOINT")]
    assert json.loads(start.removeprefix("ENTRYPOINT "))[:2] == ["emollama", "serve"]


def test_the_ray_application_names_what_exists(root):
    tree = ast.parse((root / "deploy" / "ray_serve.py").read_text())
    imported = {
        f"{node.module}.{name.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("emollama_jax")
        for name in node.names
    }
    assert "emollama_jax.serve.app.App" in imported
    for target in imported:
        module, _, name = target.rpartition(".")
        exec(f"from {module} import {name}", {})
