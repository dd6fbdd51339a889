"""A worker whose ranks Ray has placed on two machines: the tokens are those of one rank, KV goes in and out of both, and whatever dies, the
rest ends and the room in Ray's cluster is free again."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from baton.config import WorkerConfig
from baton.errors import ConfigError
from baton.models.create import create_model
from baton.models.registry import read_config
from baton.runtime.launch import connect_launcher
from tests.e2e.hosts import RAY_PORT, HostProcess, TestHost, two_hosts, until
from tests.e2e.test_direct_push import complete
from tests.e2e.test_tensor_parallel import BLOCK_SIZE, expected, prompt

HTTP_PORT, GRPC_PORT, METRICS_PORT, MASTER_PORT = 8000, 7001, 7101, 50051
RANK = "baton.runtime.rank"
KEPT = "ray::keep"


def config(**settings: object) -> WorkerConfig:
    parallel = {"launcher": "ray", **settings.pop("parallel", {})}  # type: ignore[dict-item]
    engine = {"tensor_parallel_size": 2, "device": "cpu", **settings.pop("engine", {})}  # type: ignore[dict-item]
    return WorkerConfig.model_validate({"parallel": parallel, "engine": engine, **settings})


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"needs Ray, which cannot be loaded .*; install baton\[ray\] here and on the cluster's nodes"):
        connect_launcher(config())


def test_a_head_that_does_not_answer_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no Ray cluster can be joined at parallel\.ray_address=127\.0\.0\.1:1 .*`ray start --head`"):
        connect_launcher(config(parallel={"ray_address": "127.0.0.1:1"}))


def test_what_to_compute_on_has_to_be_said() -> None:
    with pytest.raises(ConfigError, match=r"engine\.device=auto cannot be asked"):
        connect_launcher(config(engine={"device": "auto"}))


@dataclass
class Router:
    """As much of a RunningCluster as `complete` wants."""

    url: str


@dataclass
class Group:
    """A Ray cluster of two machines of one core each, and a router on the first."""

    first: TestHost
    second: TestHost
    model: Path

    def worker(self, role: str, port: int = GRPC_PORT, *settings: str, ranks: int = 2) -> HostProcess:
        """On the first machine."""
        service = "prefill" if role == "prefill" else "decode"
        common = [f"role={role}", f"model={self.model}", "engine.device=cpu", "engine.num_blocks=150", "engine.num_threads=1"]
        server = [f"server.id={role}-{port}", f"server.host={self.first.address}", f"server.grpc_port={port}", "security.insecure=true"]
        server.append(f"server.metrics_port={port + METRICS_PORT - GRPC_PORT}")
        parallel = ["parallel.launcher=ray", f"parallel.ray_address={self.first.address}:{RAY_PORT}"] if ranks > 1 else []
        degree = f"engine.tensor_parallel_size={ranks}"
        return self.first.start(sys.executable, "-m", f"services.{service}", *common, *server, *parallel, degree, *settings)

    @contextlib.contextmanager
    def router(self, *ports: int) -> Iterator[Router]:
        """In front of the workers at these ports."""
        workers = ",".join(f"'{self.first.address}:{port}'" for port in ports)
        settings = [
            f"model={self.model}",
            f"server.host={self.first.address}",
            "security.insecure=true",
            f"http_port={HTTP_PORT}",
            f"cluster.workers=[{workers}]",
        ]
        process = self.first.start(sys.executable, "-m", "services.router", *settings, "local_prefill=false", "cluster.lease_s=3")
        try:
            yield Router(f"http://{self.first.address}:{HTTP_PORT}")
        except BaseException:
            print(*self.first.tails(), sep="\n")
            raise
        finally:
            process.signal(signal.SIGKILL)
            process.exit_code(10)

    def metric(self, port: int, name: str, label: str = "") -> float:
        text = httpx.get(f"http://{self.first.address}:{port + METRICS_PORT - GRPC_PORT}/metrics").text
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(f"baton:{name}" + "{") and label in line)

    def assert_nothing_left(self) -> None:
        """Of a worker that has ended."""
        until(lambda: not any(host.processes(word) for host in (self.first, self.second) for word in (RANK, KEPT)), 10)


def ready(router: Router, count: int = 1) -> None:
    def is_ready() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            states = [worker["state"] for worker in httpx.get(f"{router.url}/cluster").json()["workers"]]
            return states == ["ready"] * count and httpx.get(f"{router.url}/ready").status_code == 200
        return False

    until(is_ready)


@pytest.fixture(scope="module")
def group(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    folder = Path(subprocess.check_output(["mktemp", "-d", "/tmp/ray-XXXX"], text=True).strip())  # short
    try:
        with two_hosts(folder) as (first, second):
            yield Group(first, second, tiny_model)
    finally:
        subprocess.run(["rm", "-r", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_machines_give_the_tokens_of_one_rank_and_end_in_order(group: Group) -> None:
    prompts = [prompt(length, length) for length in (5, 80, 300, 700)]
    answers = expected(group.model, prompts)
    worker = group.worker("unified")
    with group.router(GRPC_PORT) as router:
        ready(router)
        (rank,) = group.second.processes(RANK)
        assert f"--host={group.second.address}" in rank.cmdline()
        assert not group.first.processes(RANK)
        assert [complete(router, token_ids)[0] for token_ids in prompts] == answers  # type: ignore[arg-type]
        refused = group.worker("unified", GRPC_PORT + 1, "parallel.wait_s=3")
        assert refused.exit_code(60) == 2
        assert "for 3 s Ray had no room for 2 ranks of CPU 1 each, the first of them on" in refused.log.read_text()
        assert f"{group.second.address} has CPU 1" in refused.log.read_text()
        worker.signal(signal.SIGTERM)
        assert worker.exit_code(30) == 0
    group.assert_nothing_left()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_whoever_dies_all_end_and_the_room_is_free_again(group: Group) -> None:
    """Each worker but the first has room because nothing is left of the one before."""
    for victim in ("rank", "keeper", "worker"):
        worker = group.worker("unified")
        with group.router(GRPC_PORT) as router:
            ready(router)
            assert complete(router, prompt(1, 80))[0] == expected(group.model, [prompt(1, 80)])[0]  # type: ignore[arg-type]
            (rank,) = group.second.processes(RANK)
            if victim == "rank":
                rank.kill()
            elif victim == "keeper":
                group.second.processes(KEPT)[0].kill()
            else:
                rank.suspend()  # it does not notice by itself
                worker.signal(signal.SIGKILL)
            assert worker.exit_code(10) == (-signal.SIGKILL if victim == "worker" else 70)
            _, alive = psutil.wait_procs([rank], timeout=10)
            assert not alive
        if victim != "worker":
            assert "rank 1 has died; this worker ends" in worker.log.read_text()
        group.assert_nothing_left()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("prefill", "decode"), [(2, 1), (1, 2)])
def test_kv_is_pushed_from_and_to_both_machines(group: Group, prefill: int, decode: int) -> None:
    prompts = [prompt(length, length) for length in (65, 80, 300, 700)]
    answers, shape = expected(group.model, prompts), read_config(group.model)
    blocks = sum(-(-len(each) // BLOCK_SIZE) for each in prompts)
    block_bytes = shape.num_layers * 2 * shape.num_kv_heads * BLOCK_SIZE * shape.head_dim * 4
    sender = group.worker("prefill", GRPC_PORT, "push.verify=true", ranks=prefill)
    receiver = group.worker("decode", GRPC_PORT + 1, "push.verify=true", ranks=decode)
    with group.router(GRPC_PORT, GRPC_PORT + 1) as router:
        ready(router, 2)
        assert [complete(router, token_ids)[0] for token_ids in prompts] == answers  # type: ignore[arg-type]
        assert group.metric(GRPC_PORT, "kv_push_bytes_total") == blocks * block_bytes
        assert group.metric(GRPC_PORT + 1, "kv_push_verified_blocks_total") == blocks
        assert group.metric(GRPC_PORT + 1, "kv_push_corrupt_blocks_total") == 0
        for worker in (sender, receiver):
            worker.signal(signal.SIGTERM)
            assert worker.exit_code(30) == 0
    group.assert_nothing_left()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_both_machines_load_their_shares_from_the_pool(group: Group) -> None:
    """The device holds the last few prompts, the pool all."""
    pool = [f"pool.master={group.first.address}:{MASTER_PORT}", f"pool.host={group.first.address}", "pool.near=''"]
    server = f"server.host={group.first.address}"
    store = [sys.executable, "-m", "services.kvstore", server, "security.insecure=true"]
    master = group.first.start(*store, "mode=master", f"master_port={MASTER_PORT}")
    node = group.first.start(*store, "mode=node", *pool, "memory=64MiB")
    worker = group.worker("unified", GRPC_PORT, *pool, "pool.verify=true", "engine.num_blocks=66")
    prompts = [prompt(i, 200) for i in range(10)]
    answers = expected(group.model, prompts)
    with group.router(GRPC_PORT) as router:
        ready(router)
        deadline = time.monotonic() + 60
        while not group.metric(GRPC_PORT, "kv_tier_blocks_loaded_total", 'tier="pool"'):
            assert time.monotonic() < deadline, "nothing was loaded"
            for number in (*range(10), *reversed(range(10))):
                assert complete(router, prompts[number])[0] == answers[number]  # type: ignore[arg-type]
        assert group.metric(GRPC_PORT, "kv_pool_corrupt_blocks_total") == 0
        for process in (worker, node, master):
            process.signal(signal.SIGTERM)
            assert process.exit_code(30) == 0
    group.assert_nothing_left()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_other_machines_cannot_reach_is_refused(group: Group) -> None:
    cases = {
        "push.protocols=[nvlink_intra]": "push.protocols: nvlink_intra is not for a worker whose ranks are on several machines",
        "pool.master=127.0.0.1:50051": "pool.master=127.0.0.1:50051: this worker's ranks are on several machines",
        "push.host=localhost": "push.host or server.advertise=localhost: this worker's ranks are on several machines",
    }
    for setting, says in cases.items():
        worker = group.worker("decode", GRPC_PORT, setting)
        assert worker.exit_code(60) == 2
        assert says in worker.log.read_text()
        group.assert_nothing_left()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_another_model_under_the_same_path_is_refused(group: Group, tmp_path: Path) -> None:
    other = tmp_path / "other"
    create_model(other, "llama", max_len=1024, seed=1)
    subprocess.run([*group.second.enter, "mount", "--bind", str(other), str(group.model)], check=True)
    try:
        worker = group.worker("unified")
        assert worker.exit_code(60) == 2
    finally:
        subprocess.run([*group.second.enter, "umount", str(group.model)], check=True)
    assert "rank 1 of 2 has another model than rank 0 at the same path" in worker.log.read_text()
    group.assert_nothing_left()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_rank_0_computes_on_the_gpu_that_ray_has_reserved(group: Group) -> None:
    """As Ray names it; there is none."""
    code = f"""
import os
from baton.runtime.ray_launch import RayLauncher, visible_gpus
os.environ["CUDA_VISIBLE_DEVICES"] = "5"
launcher = RayLauncher(2, cuda=True, cores=1, address="{group.first.address}:{RAY_PORT}", wait_s=20)
print("found", os.environ["CUDA_VISIBLE_DEVICES"], launcher._ray.get(launcher._in_bundle(1, visible_gpus).remote()), launcher.apart)
launcher.close()
launcher = RayLauncher(1, cuda=False, cores=1, address="{group.first.address}:{RAY_PORT}", wait_s=20)
print("alone", launcher.apart)
launcher.close()
"""
    process = group.first.start(sys.executable, "-c", code)
    assert process.exit_code(60) == 0, process.log.read_text()
    assert "found 0 0 True" in process.log.read_text()
    assert "alone False" in process.log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_machine_that_is_cut_off_ends_both_sides(group: Group) -> None:
    """The last: Ray's node there does not come back."""
    worker = group.worker("unified")
    with group.router(GRPC_PORT) as router:
        ready(router)
        (rank,) = group.second.processes(RANK)
        subprocess.run(["ip", "-n", group.second.namespace, "link", "set", "eth0", "down"], check=True)
        assert worker.exit_code(30) == 70
        _, alive = psutil.wait_procs([rank], timeout=30)
        assert not alive
