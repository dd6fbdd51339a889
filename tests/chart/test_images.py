"""The images: their Dockerfiles are read by hadolint, and what they install is installed here, by the same script, into fresh
environments."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.config import KVStoreConfig, RouterConfig, WorkerConfig
from tests.chart.rendering import ROOT

IMAGES = ROOT / "deploy/images"
FILES = {path.name.removesuffix(".Dockerfile"): path.read_text() for path in sorted(IMAGES.glob("*.Dockerfile"))}
each = pytest.mark.parametrize("name", FILES)


def run(*command: str | Path, code: int = 0, **environment: str) -> str:
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=ROOT, env={**clean, **environment}, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_there_is_an_image_for_each_name_in_the_chart() -> None:
    assert set(FILES) == {"router", "worker-cpu", "worker-cuda", "kvstore"}


@each
def test_images_are_pinned_and_not_for_root(name: str) -> None:
    text = FILES[name]
    assert len(set(re.findall(r"^FROM (\S+:\d+\.\d+\.\d+-\S+)", text, re.MULTILINE))) == 1
    assert re.findall(r"^FROM (\S+)", text, re.MULTILINE)[0] == re.findall(r"^FROM (\S+)", text, re.MULTILINE)[1]
    assert "USER 10001:10001" in text
    assert f"bash install.sh {name} /wheels/*.whl" in text
    assert 'ENTRYPOINT ["tini", "--", "baton", "serve"]' in text


@each
def test_what_is_copied_is_there_and_not_ignored(name: str) -> None:
    kept = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in re.findall(r"^COPY (?!--from)(.+)$", FILES[name], re.MULTILINE):
        for source in line.split()[:-1]:
            assert source in kept
            assert (ROOT / source).exists()


def pinned() -> set[str]:
    """name==version, of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {normal(line) for line in lines if line and not line.startswith("#")}


def normal(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", requirement.partition("==")[0]).lower() + "==" + requirement.partition("==")[2].partition("+")[0]


def extras(name: str) -> set[str]:
    """Of the package, that an image installs."""
    script = (IMAGES / "install.sh").read_text()
    (branch,) = re.findall(rf"^{name}\)(.*?);;", script, re.MULTILINE | re.DOTALL)
    return {extra for found in re.findall(r"\$wheel\[(.*?)\]", branch) for extra in found.split(",")}


@each
def test_who_traces_has_what_that_needs(name: str) -> None:
    configs = {"router": RouterConfig, "worker": WorkerConfig, "kvstore": KVStoreConfig}
    assert ("otel" in extras(name)) == ("tracing" in configs[name.partition("-")[0]].model_fields)


def test_what_images_ask_for_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    optional = project["project"]["optional-dependencies"]
    asked = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    installed = {"engine"}.union(*(extras(name) for name in FILES))  # the GPU's has the engine
    asked += [each for extra in installed for each in optional[extra] if not each.startswith("baton[")]
    names = {normal(re.split(r"[<>=]", each)[0]) for each in asked} - {"triton=="}  # torch says which
    assert not names - {each.partition("==")[0] + "==" for each in pinned()}


@pytest.mark.chart
@each
def test_hadolint_has_nothing_to_complain_of(name: str) -> None:
    run(ROOT / ".tools/venv/bin/hadolint", IMAGES / f"{name}.Dockerfile")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--constraint", "constraints.txt", "--wheel-dir", folder, ".")
    (found,) = folder.glob("baton-*.whl")
    return found


@pytest.fixture
def venv(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "venv"
    shutil.rmtree(tmp_path / "venv", ignore_errors=True)  # torch is large


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("variant", "service", "torch"), [("router", "router", False), ("kvstore", "kvstore", False), ("worker-cpu", "decode", True)]
)
def test_an_image_has_what_its_service_needs(variant: str, service: str, torch: bool, wheel: Path, venv: Path) -> None:
    run("bash", IMAGES / "install.sh", variant, wheel, venv, PYTHON=sys.executable)
    said = run(venv / "bin/baton", "serve", service, code=2)
    assert ("model is not set" if service != "kvstore" else "pool.master is not set") in said
    installed = [line for line in run(venv / "bin/python", "-m", "pip", "list", "--format=freeze").splitlines() if "==" in line]
    assert any(line.startswith("torch==") for line in installed) is torch
    assert not {normal(line) for line in installed if not line.startswith(("baton==", "pip==", "setuptools=="))} - pinned()
    if variant != "kvstore":
        trace = "make_tracer(TracingConfig(endpoint='http://127.0.0.1:9/v1/traces'), 'a', 'b').close()"
        run(venv / "bin/python", "-c", f"from baton.config import TracingConfig; from baton.tracing import make_tracer; {trace}")
    if variant == "router":
        assert "--revision" in run(venv / "bin/hf", "download", "--help"), "the job that fetches weights needs it"
    if variant != "router":
        run(venv / "bin/python", "-c", "import mooncake.store")
        assert (venv / "bin/mooncake_master").is_file()
