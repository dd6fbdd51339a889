"""Etcd: the chart's own, and one of another."""

import base64
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from baton.cluster.machine import free_port
from tests.chart.kubernetes import passes
from tests.chart.rendering import by_key, config_of, container_of, example, pod_of, render, rendered, workloads

pytestmark = pytest.mark.chart


def test_an_etcd_of_another_gets_what_it_asks_for() -> None:
    secrets = ("authoritySecret.name=ca", "certificateSecret=ours", "user=baton", "passwordSecret.name=password", "name=etcd.infra")
    told = ["etcd.endpoints={https://etcd.infra:2379}", *(f"etcd.access.{secret}" for secret in secrets), "kvstore.master.replicas=1"]
    objects = render(example("external-etcd"), *told)
    (volume,) = [each for each in pod_of(workloads(objects)["rel-qwen3-8b-router"])["volumes"] if each["name"] == "etcd-access"]
    files = {item["path"]: source["secret"]["name"] for source in volume["projected"]["sources"] for item in source["secret"]["items"]}
    assert files == {"ca.crt": "ca", "tls.crt": "ours", "tls.key": "ours", "password": "password"}
    access = config_of(objects, "rel-qwen3-8b-router")["cluster"]["etcd_access"]
    assert {Path(access[setting]).name for setting in ("authority", "cert", "key", "password_file")} == files.keys()
    assert (access["user"], access["name"]) == ("baton", "etcd.infra")


def test_an_etcd_that_is_there_is_used() -> None:
    objects = rendered("external-etcd")
    assert ("StatefulSet", "rel-etcd") not in by_key(objects)
    assert config_of(objects, "rel-qwen3-8b-router")["cluster"]["etcd"].count("http://") == 3
    masters = render(example("external-etcd"), "security.tls.secret=certs", "kvstore.master.replicas=2")
    assert config_of(masters, "rel-qwen3-8b-kvstore-master")["cluster"]["etcd_access"] == {}, "certificates of services are not shown to it"


class Member:
    """Of this machine's etcd, with the chart's probes."""

    def __init__(self, folder: Path, *options: str, others: int = 0) -> None:
        client, peer, metrics, *away = (free_port() for _ in range(3 + others))
        self.url, self.metrics, self._ports = (
            f"http://127.0.0.1:{client}",
            f"http://127.0.0.1:{metrics}",
            {"client": client, "metrics": metrics},
        )
        peers = {"m": peer} | {f"away-{port}": port for port in away}
        flags = {
            "name": "m",
            "data-dir": str(folder / "data"),
            "listen-client-urls": self.url,
            "advertise-client-urls": self.url,
            "listen-peer-urls": f"http://127.0.0.1:{peer}",
            "initial-advertise-peer-urls": f"http://127.0.0.1:{peer}",
            "initial-cluster": ",".join(f"{name}=http://127.0.0.1:{port}" for name, port in peers.items()),
            "listen-metrics-urls": self.metrics,
        }
        with (folder / "log").open("w") as log:
            words = ["etcd", *(f"--{name}={value}" for name, value in flags.items()), *options]
            self._process = subprocess.Popen(words, stdout=log, stderr=log)

    def __enter__(self) -> "Member":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()

    def passes(self, probe: str) -> bool:
        return passes(container_of(workloads(rendered("cpu-demo"))["rel-etcd"])[f"{probe}Probe"], "127.0.0.1", self._ports)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_member_whose_quota_is_used_up_is_not_killed_and_can_be_asked(tmp_path: Path) -> None:
    with Member(tmp_path, f"--quota-backend-bytes={2**19}") as member:
        until(lambda: member.passes("readiness"))
        value = {"key": "aw==", "value": base64.b64encode(bytes(2**16)).decode()}
        until(lambda: "space exceeded" in httpx.post(f"{member.url}/v3/kv/put", json=value).text)
        until(lambda: httpx.get(f"{member.metrics}/health").status_code == 503)
        assert [probe for probe in ("startup", "readiness", "liveness") if not member.passes(probe)] == []


def test_a_member_that_waits_for_a_quorum_is_not_killed_and_not_ready(tmp_path: Path) -> None:
    with Member(tmp_path, others=2) as member:
        until(lambda: member.passes("startup"))
        assert member.passes("liveness")
        assert not member.passes("readiness")
