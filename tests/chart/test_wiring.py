"""The chart's wiring, run: each rendered container is started as it stands, as a process in a network namespace of its own, with its
command, environment, configuration, user, rights and read-only root. It serves, is scaled and upgraded under load, and loses nothing."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file

from baton.cluster.etcd import EtcdMembership
from baton.config import EtcdAccessConfig
from baton.errors import MembershipError
from baton.kernels.cpu.build import cache_folder
from baton.types import Member, Role
from scripts.dashboards import exported
from tests.certificates import Authority
from tests.chart.connections import forbidden, listeners
from tests.chart.kubernetes import Kubernetes
from tests.chart.load import quiet, under_load
from tests.chart.pods import Pod
from tests.chart.rendering import ROOT, Object, example, render
from tests.faults.traffic import Prompt

pytestmark = [pytest.mark.chart, pytest.mark.slow, pytest.mark.timeout(600)]
DEMO = ROOT / "examples/demo-model"
# Nothing has failed or been hedged, and there is no file tier.
NOT_HERE = {"request_failures", "requests_refused", "hedges"} | {
    f"kv_tier_{name}" for name in ("evictions", "damaged", "used_bytes", "capacity_bytes")
}
SMALL = (
    "security.tls.secret=certs",
    "kvstore.node.memory=128Mi",
    "worker.settings.engine.kv_memory=32MiB",
    "worker.drainSeconds=20",
    "logFormat=json",
    *(
        f"{block}.{setting}"
        for block in ("worker", "kvstore.node")
        for setting in (
            "volumes[0].name=near",
            "volumes[0].hostPath.path=/run/baton",
            "volumeMounts[0].name=near",
            "volumeMounts[0].mountPath=/near",
            "settings.pool.near=/near",
        )
    ),
)


def wanted(*sets: str) -> list[Object]:
    return [thing for thing in render(example("cpu-demo"), *SMALL, *sets) if "helm.sh/hook" not in thing["metadata"].get("annotations", {})]


def certificates(folder: Path) -> Path:
    """As docs/security.md has cert-manager make them."""
    return Authority(folder).sign(folder / "secret", ["baton.internal", "*.rel-etcd"])


def shared(folder: Path) -> dict[str, Path]:
    """What all pods have: a cache with this machine's kernels, and where nodes of the pool and workers meet."""
    cache, near = folder / "cache", folder / "near"
    near.mkdir()
    compile_them = "from baton.kernels.cpu.build import extension; extension()"
    python = f"{Path(sys.prefix).resolve()}/bin/python"  # the pods', whose kernels depend on where it is
    subprocess.run([python, "-c", compile_them], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=500, check=False)
    (cache / "baton/kernels").mkdir(parents=True)
    for module in cache_folder().glob("*.so"):
        shutil.copy(module, cache / "baton/kernels")
    for path in (near, cache, *cache.rglob("*")):
        path.chmod(0o777)
    return {"cache": cache, "near": near}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubernetes]:
    folder = tmp_path_factory.mktemp("pods")
    other = folder / "another-version"
    shutil.copytree(DEMO, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    (other / "model.safetensors").chmod(0o644)
    images = {"/opt/baton/demo-model": DEMO, "/opt/baton/another-version": other}
    with Kubernetes(folder, images, shared(folder), {"certs": certificates(folder)}) as running:
        running.apply(wanted())
        yield running
    assert not running.failures


def router(cluster: Kubernetes) -> Pod:
    return next(pod for pod in list(cluster.pods["rel-demo-router"]) if pod.ready)


def url(cluster: Kubernetes) -> str:
    return f"http://{router(cluster).address}:8000"


@pytest.fixture(scope="module")
def expected(cluster: Kubernetes) -> dict[Prompt, list[int]]:
    return quiet(url(cluster))


def workers(cluster: Kubernetes) -> dict[str, str]:
    return {worker["id"]: worker["state"] for worker in httpx.get(f"{url(cluster)}/cluster").json()["workers"]}


def metric(pod: Pod, name: str) -> float:
    lines = httpx.get(f"http://{pod.address}:9101/metrics").text.splitlines()
    (value,) = [line.rpartition(" ")[2] for line in lines if line.startswith(name + "{")]
    return float(value)


def until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


# The first, since it has a cluster of its own: the others' begins with their first one.
def test_three_members_of_etcd_and_two_masters_of_the_pool(tmp_path: Path) -> None:
    fleet = ("etcd.replicas=3", "etcd.storage.size=1Gi", "kvstore.master.replicas=2", "kvstore.node.replicas=2")
    fleet = (*fleet, "security.tls.etcd=false")
    images, secrets = {"/opt/baton/demo-model": DEMO}, {"certs": certificates(tmp_path)}
    with Kubernetes(tmp_path, images, shared(tmp_path), secrets) as running:
        running.apply(wanted(*fleet))
        masters, nodes = running.pods["rel-demo-kvstore-master"], running.pods["rel-demo-kvstore-node"]
        (prefill,) = running.pods["rel-demo-prefill"]
        assert len(running.pods["rel-etcd"]) == 3
        until(lambda: {metric(node, "baton:kvstore_nodes") for node in nodes} == {2})
        until(lambda: sum(metric(master, "baton:kvstore_leader") for master in masters) == 1)
        quiet(url(running), count=4)
        until(lambda: metric(prefill, "baton:kv_pool_saved_blocks_total") > 0)
        assert not forbidden(running)
    assert not running.failures


async def test_members_of_etcd_ask_each_other_and_everybody_for_certificates(tmp_path: Path) -> None:
    folder = certificates(tmp_path)
    objects = wanted("etcd.replicas=3", "etcd.storage.size=1Gi")
    etcd = [thing for thing in objects if thing["metadata"]["name"] == "rel-etcd" or thing["kind"] not in ("Deployment", "StatefulSet")]
    with Kubernetes(tmp_path, {}, shared(tmp_path), {"certs": folder}) as running:
        running.apply(etcd)
        url = "https://" + ",".join(f"{pod.address}:2379" for pod in running.pods["rel-etcd"])
        files = {"authority": "ca.crt", "cert": "tls.crt", "key": "tls.key"}
        access = EtcdAccessConfig(name="baton.internal", **{setting: str(folder / file) for setting, file in files.items()})
        membership = EtcdMembership(url, "prod.rel.demo", lease_s=2, access=access)
        await membership.join(Member(id="w", role=Role.DECODE, address="a:1"))
        await membership.close()
        stranger = EtcdMembership(url, "prod.rel.demo", lease_s=2, access=access.model_copy(update={"cert": "", "key": ""}))
        with pytest.raises(MembershipError):
            await stranger.join(Member(id="x", role=Role.DECODE, address="a:1"))
        await stranger.close()
    assert not running.failures


def test_a_router_is_ready_with_a_decode_worker_and_degraded_without_a_prefill_worker(cluster: Kubernetes) -> None:
    pod = router(cluster)

    def said() -> tuple[int, str]:
        answer = httpx.get(f"http://{pod.address}:8000/ready")
        return answer.status_code, answer.json()["status"]

    until(lambda: said() == (200, "ready"))
    cluster.apply(wanted("prefill.replicas=0"))
    until(lambda: said() == (200, "degraded"))
    assert pod.ready
    assert metric(pod, "baton:degraded") == 1
    cluster.apply(wanted("prefill.replicas=0", "decode.replicas=0"))
    until(lambda: said() == (503, "not ready"))
    until(lambda: not pod.ready)
    cluster.apply(wanted())
    until(lambda: said() == (200, "ready") and pod.ready)


def test_a_forwarded_port_reaches_the_router(cluster: Kubernetes) -> None:
    ask = "import httpx; print(httpx.get('http://127.0.0.1:8000/ready').status_code)"
    assert router(cluster).run(sys.executable, "-c", ask) == "200\n"


def test_a_request_goes_the_whole_way(cluster: Kubernetes) -> None:
    body = {"messages": [{"role": "user", "content": "What is 3 + 4?"}], "max_tokens": 16, "model": "demo-model"}
    answer = httpx.post(f"{url(cluster)}/v1/chat/completions", json=body, timeout=60).raise_for_status()
    assert answer.json()["choices"][0]["message"]["content"]
    (node,) = cluster.pods["rel-demo-kvstore-node"]
    until(lambda: metric(node, "baton:kvstore_nodes") == 1)
    prompt = {"prompt": list(range(5, 305)), "max_tokens": 4, "ignore_eos": True}
    route = httpx.post(f"{url(cluster)}/v1/completions", json=prompt, timeout=60).raise_for_status().headers["x-baton-route"]
    assert "decode=rel-demo-decode-" in route
    assert "prefill=rel-demo-prefill-" in route, "the remote prefill was not used"
    (decode,) = cluster.pods["rel-demo-decode"]
    metrics = httpx.get(f"http://{decode.address}:9101/metrics").text
    assert f'worker="{decode.name}"' in metrics, "what KEDA's query picks pods by"
    (prefill,) = cluster.pods["rel-demo-prefill"]
    until(lambda: metric(prefill, "baton:kv_pool_saved_blocks_total") > 0)
    others = {other["id"] for other in httpx.get(f"{url(cluster)}/cluster").json()["others"]}
    assert {"rel-demo-kvstore-node-0", "rel-demo-kvstore-master-0"} <= others


def test_workers_map_the_memory_of_a_node_in_another_pod(cluster: Kubernetes) -> None:
    quiet(url(cluster), count=4)
    for component in ("prefill", "decode"):
        (pod,) = cluster.pods[f"rel-demo-{component}"]
        until(lambda log=pod.log: "are copied from its memory" in log.read_text())


def test_a_log_is_an_object_a_line(cluster: Kubernetes) -> None:
    lines = [json.loads(line) for line in router(cluster).log.read_text().splitlines()]
    assert {line["service"] for line in lines} == {"router"}
    assert any("joined at" in line["message"] for line in lines)


def test_dashboards_go_by_what_is_exported(cluster: Kubernetes) -> None:
    live = set()
    for pod in cluster.everybody():
        lines = httpx.get(f"http://{pod.address}:9101/metrics").text.splitlines()
        live |= {re.split(r"[{ ]", line)[0] for line in lines if line.startswith("baton:") and "_created{" not in line}
    assert live <= exported().keys()
    unseen = {re.sub(r"_(total|bucket|sum|count)$", "", name.removeprefix("baton:")) for name in exported().keys() - live}
    assert unseen <= NOT_HERE


def test_decode_is_scaled_up_and_down_under_load(cluster: Kubernetes, expected: dict[Prompt, list[int]]) -> None:
    with under_load(lambda: url(cluster), expected) as load:
        cluster.apply(wanted("decode.replicas=3"))
        assert len(workers(cluster)) == 4
        problems = forbidden(cluster)
        cluster.apply(wanted())
    assert not load.lost()
    assert not load.different()
    assert len(load.outcomes) > 4
    assert not problems, "connections that the policies do not let through"
    assert list(workers(cluster).values()) == ["ready", "ready"]


def test_prefill_is_upgraded_under_load(cluster: Kubernetes, expected: dict[Prompt, list[int]]) -> None:
    before = cluster.pods["rel-demo-prefill"][0].name
    with under_load(lambda: url(cluster), expected) as load:
        cluster.apply(wanted("prefill.settings.engine.max_num_seqs=16"))
    assert not load.lost()
    assert not load.different()
    assert before not in workers(cluster)
    assert len(workers(cluster)) == 2


def test_another_version_of_the_model_takes_over_under_load(cluster: Kubernetes, expected: dict[Prompt, list[int]]) -> None:
    settings, second = "prefill.settings.engine.max_num_seqs=16", "models.demo.versions.v2.path=/opt/baton/another-version"
    first_router = router(cluster).name
    with under_load(lambda: url(cluster), expected) as load:
        cluster.apply(wanted(settings, second))
        fingerprints = {worker["fingerprint"] for worker in httpx.get(f"{url(cluster)}/cluster").json()["workers"]}
        cluster.apply(wanted(settings, second, "models.demo.path="))
    assert len(fingerprints) == 2
    assert not load.lost()
    assert not load.short()
    assert load.different(), "the other weights answer"
    assert router(cluster).name != first_router, "it reads the tokenizer of the new version"
    assert len(workers(cluster)) == 2
    assert all("-v2-" in name for name in workers(cluster))


def test_policies_let_through_what_is_used_and_nothing_else_listens(cluster: Kubernetes) -> None:
    quiet(url(cluster), count=4)
    assert not forbidden(cluster)
    assert forbidden(cluster, without_mooncake=True), "what this looks at was not seen"
    (node,) = cluster.pods["rel-demo-kvstore-node"]
    used = sum(process.memory_info().rss for process in node.processes())
    assert used < (128 + 1024) * 2**20, "its container's limit"
    for pod in cluster.everybody():
        declared = set(pod.ports.values())
        for address, port in listeners(pod):
            component = pod.labels["app.kubernetes.io/component"]
            mooncakes = component not in ("router", "etcd") and 12000 <= port <= 17000
            bound = "0.0.0.0" if component == "router" else pod.address
            assert (address == bound and port in declared) or mooncakes, (pod.name, address, port)


def test_what_is_asked_without_a_certificate_is_not_answered(cluster: Kubernetes) -> None:
    """The last, since gRPC writes a line of its own to the log of whoever refused."""
    for pod in cluster.everybody():
        port = pod.ports["grpc" if "grpc" in pod.ports else "client"]
        with socket.create_connection((pod.address, port), timeout=5) as plain:
            plain.settimeout(5)
            plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            try:
                answer = plain.recv(9)
            except ConnectionResetError:
                answer = b""
        assert answer[3:4] != b"\x04", f"{pod.name} speaks HTTP/2 without TLS"
