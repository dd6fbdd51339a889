"""Weights: the job that fetches them, and the pods that wait for it."""

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import pytest

from tests.chart.rendering import CHART, Object, both, container_of, example, pod_of, render, rendered, workloads

pytestmark = pytest.mark.chart


def test_weights_come_by_a_job_and_workers_wait_for_them() -> None:
    objects = render(example("one-gpu-node"), "models.qwen3-8b.fetch.tokenSecret.name=hugging-face")
    (job,) = [thing for thing in objects if thing["kind"] == "Job"]
    environment = {entry["name"]: entry for entry in pod_of(job)["containers"][0]["env"]}
    assert environment["HF_TOKEN"]["valueFrom"] == {"secretKeyRef": {"name": "hugging-face", "key": "token"}}
    for workload in workloads(objects).values():
        waits = bool(pod_of(workload).get("initContainers"))
        assert waits == (container_of(workload)["name"] in ("router", "prefill", "decode"))


def job_of(objects: Sequence[Object]) -> Object:
    (job,) = [thing for thing in objects if thing["kind"] == "Job"]
    return job


@pytest.mark.parametrize(
    "change", ["image.tag=v2", "image.pullPolicy=Always", "security.runAsUser=7", "models.qwen3-8b.mountPath=/m", "worker.drainSeconds=7"]
)
def test_a_job_that_is_another_has_another_name(change: str) -> None:
    before, after = job_of(rendered("one-gpu-node")), job_of(render(example("one-gpu-node"), change))
    assert (before["spec"] == after["spec"]) == (change == "worker.drainSeconds=7")
    assert (before["metadata"]["name"] == after["metadata"]["name"]) == (before["spec"] == after["spec"]), "a job cannot be changed"


def test_another_chart_has_the_same_job_or_one_of_another_name(tmp_path: Path) -> None:
    chart = shutil.copytree(CHART, tmp_path / "baton")
    text = (chart / "Chart.yaml").read_text().replace("0.1.0", "0.2.0")
    (chart / "Chart.yaml").write_text(text)
    for sets in ([], ["image.tag=v1"]):
        before, after = (job_of(render(example("one-gpu-node"), *sets, chart=each)) for each in (CHART, chart))
        assert before["metadata"]["labels"] != after["metadata"]["labels"]
        assert (before["metadata"]["name"] == after["metadata"]["name"]) == (before["spec"] == after["spec"]) == bool(sets)


def test_helm_3_and_4_give_a_job_the_same_name(tmp_path: Path) -> None:
    """The name is made from numbers and lists that each of them writes its own way."""
    fetch = {"repository": "a/b", "tokenSecret": {"name": "t"}}
    model = {"path": "/models/a", "volume": {"hostPath": {"path": "/a"}}, "fetch": fetch}
    first, second = both(tmp_path, {"models": {"a": model}, "image": {"pullSecrets": [{"name": "p"}]}})
    (ours,), (theirs,) = ([thing for thing in objects.values() if thing["kind"] == "Job"] for objects in (first, second))
    assert ours == theirs


class Fetch:
    """The job's container, with an `hf` that fetches nothing."""

    def __init__(self, folder: Path) -> None:
        (self.container,) = pod_of(job_of(rendered("one-gpu-node")))["containers"]
        given = {entry["name"]: entry["value"] for entry in self.container["env"]}
        assert (given["REPOSITORY"], given["FOLDER"]) == ("Qwen/Qwen3-8B", "/models/qwen3-8b")
        self.weights, self.broken, self._calls = (folder / name for name in ("weights", "broken", "calls"))
        stub = folder / "hf"
        stub.write_text('#!/bin/sh\necho "$@" >> "$CALLS"\necho "$4" > "$6/config.json"\ntouch "$6/of-$4"\n[ ! -e "$BROKEN" ]\n')
        stub.chmod(0o755)
        paths = {"FOLDER": self.weights, "CALLS": self._calls, "BROKEN": self.broken}
        self.environment = given | {name: str(path) for name, path in paths.items()} | {"PATH": f"{folder}:/usr/bin:/bin"}

    def run(self, revision: str = "main") -> tuple[int, str]:
        """Its exit code, and what it says."""
        environment = self.environment | {"REVISION": revision}
        done = subprocess.run(self.container["command"], env=environment, check=False, timeout=60, capture_output=True, text=True)
        return done.returncode, done.stderr

    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines()


@pytest.fixture
def fetch(tmp_path: Path) -> Fetch:
    return Fetch(tmp_path)


def test_the_job_gives_the_weights_their_name_when_they_are_whole(fetch: Fetch) -> None:
    fetch.broken.touch()
    assert fetch.run()[0] != 0
    assert not fetch.weights.exists(), "half of it is not taken for the whole"
    fetch.broken.unlink()
    assert fetch.run() == (0, "")
    assert (fetch.weights / "config.json").is_file()
    assert fetch.run() == (0, "")
    command = f"download Qwen/Qwen3-8B --revision main --local-dir {fetch.weights}.partial"
    assert fetch.calls() == [command] * 2, "what is there is not fetched again"


def test_another_revision_is_not_taken_to_be_there(fetch: Fetch) -> None:
    assert fetch.run("v1") == (0, "")
    code, said = fetch.run("v2")
    assert code == 1
    assert "has Qwen/Qwen3-8B@v1 and not Qwen/Qwen3-8B@v2" in said
    assert "a path of its own (versions)" in said
    assert (fetch.weights / "config.json").read_text() == "v1\n"
    assert fetch.run("v1") == (0, "")


def test_weights_that_somebody_else_has_put_there_are_left(fetch: Fetch) -> None:
    fetch.weights.mkdir()
    (fetch.weights / "config.json").write_text("mine")
    assert fetch.run() == (0, "")
    assert [path.name for path in fetch.weights.iterdir()] == ["config.json"]


def test_half_of_another_revision_is_not_mixed_with_this_one(fetch: Fetch) -> None:
    fetch.broken.touch()
    assert fetch.run("v1")[0] != 0
    fetch.broken.unlink()
    assert fetch.run("v2") == (0, "")
    assert [path.name for path in fetch.weights.glob("of-*")] == ["of-v2"]


def ended_by_sigterm(command: Sequence[str], environment: Mapping[str, str], begun: str) -> int:
    """The exit code of what is process 1, as in a container: the kernel gives it no signal that it does not ask for."""
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    words = ["unshare", *as_root, "--pid", "--fork", "--kill-child", *command]
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith(begun)
            (first,) = psutil.Process(process.pid).children()
            first.send_signal(signal.SIGTERM)
            return process.wait(30)
        finally:
            process.kill()


def test_a_pod_that_waits_for_weights_goes_when_it_is_told_to(tmp_path: Path) -> None:
    (waits,) = pod_of(workloads(rendered("one-gpu-node"))["rel-qwen3-8b-decode"])["initContainers"]
    command = [str(tmp_path) if word == "/models/qwen3-8b" else word for word in waits["command"]]
    assert ended_by_sigterm(command, {"PATH": "/usr/bin:/bin"}, f"waiting for {tmp_path}") == 128 + signal.SIGTERM
    (tmp_path / "config.json").touch()
    assert subprocess.run(command, check=False, timeout=60).returncode == 0


def test_a_job_that_fetches_goes_when_it_is_told_to(fetch: Fetch, tmp_path: Path) -> None:
    (tmp_path / "hf").write_text("#!/bin/sh\necho fetching\nexec sleep 600\n")
    assert ended_by_sigterm(fetch.container["command"], fetch.environment, "fetching") == 128 + signal.SIGTERM
    assert not fetch.weights.exists()
