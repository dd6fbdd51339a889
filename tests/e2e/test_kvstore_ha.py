"""Two masters of the KV pool: the one that leads is killed, requests go on, and the other one knows all keys; nobody else is restarted."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest

from baton.errors import StoreError
from baton.hashing import block_hashes
from baton.kv.layout import block_key
from baton.kv.mooncake import leader
from baton.rpc.v1 import kvstore_pb2, kvstore_pb2_grpc
from tests.cluster import RunningCluster, running_cluster

pytestmark = [pytest.mark.alone, pytest.mark.timeout(240)]
BLOCK_SIZE, COUNT = 16, 12
LEASE_S = 3.0


@pytest.fixture(scope="module")
def cluster(demo_model: Path) -> Iterator[RunningCluster]:
    counts = {"prefill": 1, "decode": 1, "kvstore": 2, "kvstore_masters": 2}
    with running_cluster(model=demo_model, options=["--set", f"all.cluster.lease_s={LEASE_S:g}"], **counts) as running:
        yield running


def stats(cluster: RunningCluster, name: str) -> kvstore_pb2.GetStatsResponse:
    """Not available where it does not answer at all."""
    address = next((other["address"] for other in cluster.status()["others"] if other["id"] == name), None)
    if address is None:
        return kvstore_pb2.GetStatsResponse()
    with grpc.insecure_channel(address) as channel:
        try:
            return kvstore_pb2_grpc.KVStoreStub(channel).GetStats(kvstore_pb2.GetStatsRequest(), timeout=10)
        except grpc.RpcError:
            return kvstore_pb2.GetStatsResponse()


def until_stats(cluster: RunningCluster, name: str, timeout_s: float = 40, **wanted: int) -> None:
    """Until it is available and has at least so much."""
    deadline = time.monotonic() + timeout_s
    while True:
        seen = stats(cluster, name)
        values = {"num_keys": seen.num_keys, "num_nodes": len(seen.segments)}
        if seen.available and all(values[key] >= least for key, least in wanted.items()):
            return
        assert time.monotonic() < deadline, seen
        time.sleep(0.2)


class Client:
    """See `pool_peer`."""

    def __init__(self, etcd: str) -> None:
        command = [sys.executable, "-m", "tests.e2e.pool_peer", etcd, "baton"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def digest(self, keys: list[str]) -> str | None:
        """Of the blocks; None where not all are to be had."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(keys) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def complete(cluster: RunningCluster, prompt: list[int]) -> list[int]:
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60).raise_for_status()
    return answer.json()["choices"][0]["token_ids"]


def make_prompt(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(4, 2000) for _ in range(COUNT * BLOCK_SIZE + 5)]


def test_the_leader_is_killed_and_nothing_is_lost(cluster: RunningCluster) -> None:
    until_stats(cluster, "kvstore-0", num_nodes=2)
    etcd = cluster.describe_etcd()
    prompts = [make_prompt(seed) for seed in range(5)]
    expected = [complete(cluster, prompt) for prompt in prompts]
    until_stats(cluster, "kvstore-1", num_keys=len(prompts) * COUNT)
    fingerprint = cluster.workers()[0]["fingerprint"]
    keys = [[block_key(fingerprint, key) for key in block_hashes(prompt, BLOCK_SIZE, "")] for prompt in prompts]
    with Client(etcd) as client:
        content = [client.digest(each) for each in keys]
        assert None not in content
        before = {name: child.pid for name, child in cluster.children().items()}
        leads, standby = ("0", "1") if stats(cluster, "kvstore-master-0").available else ("1", "0")
        assert "stands by" in stats(cluster, f"kvstore-master-{standby}").problem
        address = leader(etcd, "baton")
        killed, slowest, number = time.monotonic(), 0.0, 100
        while leader_or_none(etcd) in (None, address) or not stats(cluster, f"kvstore-master-{standby}").available:
            if f"mooncake_master-{leads}" in cluster.children():  # started again, it could lead again
                cluster.signal(f"mooncake_master-{leads}", signal.SIGKILL)
            began = time.monotonic()
            complete(cluster, make_prompt(number))  # with what the pool has not
            assert complete(cluster, prompts[number % len(prompts)]) == expected[number % len(prompts)]
            slowest, number = max(slowest, time.monotonic() - began), number + 1
            assert time.monotonic() - killed < 60
        assert slowest < LEASE_S + 2
        deadline = time.monotonic() + 30
        while client.digest(keys[0]) is None:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert [client.digest(each) for each in keys] == content
        until_stats(cluster, "kvstore-0", num_keys=len(prompts) * COUNT, num_nodes=2)
        deadline = time.monotonic() + 30
        while stats(cluster, "kvstore-1").num_keys == len(prompts) * COUNT:  # new ones are taken, too
            assert time.monotonic() < deadline
            number += 1
            complete(cluster, make_prompt(number))
        while "stands by" not in stats(cluster, f"kvstore-master-{leads}").problem:  # it has come back, behind the other
            assert time.monotonic() < deadline
            time.sleep(0.2)
        after = {name: child.pid for name, child in cluster.children().items()}
        assert {name for name in before if before[name] != after[name]} == {f"mooncake_master-{leads}"}
    cluster.assert_clean()


def leader_or_none(etcd: str) -> str | None:
    try:
        return leader(etcd, "baton")
    except StoreError:
        return None
