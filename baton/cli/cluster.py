"""A whole cluster as processes of this machine: what `baton up` starts, watches and stops.

    etcd ─▶ kvstore master ─▶ kvstore nodes, prefill, decode, unified ─▶ router ─▶ ready
    a child that dies is started again under its name; stopping goes the other way round, each child asked first and killed at last

Children run in sessions of their own, so that a terminal's Ctrl-C reaches the supervisor alone, and die with it, however it dies.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import yaml

from baton.cluster.machine import die_with_parent, free_port, gpus
from baton.config import KVStoreConfig, RouterConfig, WorkerConfig, check_policy, load_config
from baton.errors import EXIT_CONFIG, BatonError, ConfigError

logger = logging.getLogger(__name__)
_DRAIN_GRACE_S = 10.0  # of each child, unless it is told otherwise
_LEAVE_S = 5.0  # beyond that, until it is killed
_TELL_S = 30.0  # between two lines that say what a start waits for
_STEADY_S = 10.0  # a child of a cluster that serves, which lived so long, may be started again at once
_MAX_QUICK_DEATHS = 5
_CONFIGS = {"prefill": WorkerConfig, "decode": WorkerConfig, "router": RouterConfig, "kvstore": KVStoreConfig}
_WORKERS = ("prefill", "decode", "unified")
_TARGETS = (*_WORKERS, "router", "kvstore", "kvstore-master")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is wanted."""

    model: Path
    served_model_names: tuple[str, ...] = ()  # none: the folder's name
    prefill: int = 1
    decode: int = 1
    unified: int = 0
    routers: int = 1  # the second listens on the next ports, and so on
    kvstore: int = 1
    kvstore_masters: int = 1
    tensor_parallel_size: int = 1  # of each worker, unless its settings say otherwise
    policy: str = "predicted"
    http_port: int = 8000
    grpc_port: int = 9000
    etcd: str = "auto"
    settings: tuple[str, ...] = ()  # role.key=value
    log_dir: Path | None = None
    start_timeout_s: float = 600.0  # 0: as long as the processes live


@dataclasses.dataclass(slots=True)
class Child:
    name: str
    role: str
    command: list[str]
    log: Path
    process: asyncio.subprocess.Process | None = None
    gpus: str = ""  # CUDA_VISIBLE_DEVICES: its own first
    drain_grace_s: float = _DRAIN_GRACE_S
    quick_deaths: int = 0
    keeper: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        return self.process.pid if self.process is not None else 0


class Cluster:
    def __init__(self, plan: Plan) -> None:
        """Raises ConfigError for what can be seen to be wrong before anything is started."""
        _check(plan)
        self._plan = plan
        self._folder = Path(tempfile.mkdtemp(prefix="baton-"))
        self._logs = plan.log_dir or self._folder
        self._groups: list[list[Child]] = []  # in starting order
        self._awaited: list[str] = []  # the processes that a start waits for now
        self._stopping = self._was_ready = False
        self._failed: asyncio.Future[str] | None = None
        scheme = "https" if any(setting.startswith("router.tls.cert=") for setting in plan.settings) else "http"
        ports = [[port + i if port else free_port() for port in (plan.http_port, plan.grpc_port)] for i in range(plan.routers)]
        names = [f"router-{i}" if plan.routers > 1 else "router" for i in range(plan.routers)]
        self.routers = [
            {"id": name, "http": f"{scheme}://127.0.0.1:{http}", "grpc": f"127.0.0.1:{grpc}"}
            for name, (http, grpc) in zip(names, ports, strict=True)
        ]
        self.http, self.grpc = self.routers[0]["http"], self.routers[0]["grpc"]
        self.etcd = ""

    async def start(self) -> None:
        """Returns when the first request can be served. Raises ConfigError with the last lines of the log of a child that can't start, or
        where the time is over."""
        self._failed = asyncio.get_running_loop().create_future()
        begun, limit = time.monotonic(), self._plan.start_timeout_s or math.inf
        starting = asyncio.create_task(self._start(), name="start")
        try:
            while True:
                left = max(begun + limit - time.monotonic(), 0.0)
                done, _ = await asyncio.wait({starting, self._failed}, timeout=min(left, _TELL_S), return_when=asyncio.FIRST_COMPLETED)
                if starting in done:
                    return starting.result()
                if self._failed in done:
                    raise ConfigError(self._failed.result())
                passed, names = time.monotonic() - begun, ", ".join(self._awaited)
                if passed >= limit:
                    raise ConfigError(f"not ready after {limit:g} s (--start-timeout): {names}; their logs are kept in {self._logs}")
                logger.warning("waiting for %s, for %.0f s now; their logs are in %s", names, passed, self._logs)
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)

    async def run(self) -> None:
        """Until a child fails for good. Raises ConfigError then."""
        assert self._failed is not None
        raise ConfigError(await asyncio.shield(self._failed))

    async def stop(self, *, keep_logs: bool = False) -> None:
        """All children, in reverse order; then the run folder. Nothing is left but logs to be kept, and the settings beside them."""
        self._stopping = True
        for group in reversed(self._groups):
            await asyncio.gather(*(self._end(child) for child in group))
        shutil.rmtree(self._folder / "etcd" if keep_logs and any(self._folder.glob("*.log")) else self._folder, ignore_errors=True)

    def kill(self) -> None:
        """All children, at once; `stop` goes on from there."""
        for child in (child for group in self._groups for child in group):
            if child.process is not None and child.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.process.kill()

    @property
    def drain_grace_s(self) -> float:
        """For so long streams may go on once it stops."""
        return max((child.drain_grace_s for group in self._groups for child in group if child.role == "router"), default=_DRAIN_GRACE_S)

    def describe(self) -> dict[str, Any]:
        processes = [{"id": c.name, "role": c.role, "pid": c.pid, "log": str(c.log)} for group in self._groups for c in group]
        return {
            "http": self.http,
            "grpc": self.grpc,
            "routers": self.routers,
            "etcd": self.etcd,
            "pid": os.getpid(),
            "processes": processes,
        }

    # -- what to start

    def _plan_groups(self) -> list[list[Child]]:
        plan = self._plan
        groups: list[list[Child]] = []
        program = shutil.which("etcd")
        if plan.etcd == "auto" and program is not None:
            client, peer = free_port(), free_port()
            self.etcd = f"http://127.0.0.1:{client}"
            command = [program, "--name=baton", f"--data-dir={self._folder / 'etcd'}", "--log-level=warn"]
            command += [f"--listen-client-urls={self.etcd}", f"--advertise-client-urls={self.etcd}"]
            command += [f"--listen-peer-urls=http://127.0.0.1:{peer}", f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}"]
            command += [f"--initial-cluster=baton=http://127.0.0.1:{peer}", "--unsafe-no-fsync"]
            groups.append([Child("etcd", "etcd", command, self._logs / "etcd.log")])
        elif plan.etcd not in ("auto", "none"):
            self.etcd = plan.etcd
        counts = {"prefill": plan.prefill, "decode": plan.decode, "unified": plan.unified}
        names = [(role, f"{role}-{i}") for role, count in counts.items() for i in range(count)]
        ports = {name: free_port() for _, name in names}
        cluster = {"etcd": self.etcd} if self.etcd else {"workers": [f"127.0.0.1:{port}" for port in ports.values()]}
        masters, pool, node = self._plan_pool(cluster)
        if masters:
            groups.append(masters)
        model = {"model": str(plan.model), "served_model_name": list(plan.served_model_names)}
        degrees = {name: _degree(plan, role, name) for role, name in names}
        ranks = sum(degrees.values())
        cores, busy = os.cpu_count() or 1, ranks if plan.unified else -(-ranks // 2)  # prefill and decode take turns
        threads = max(1, cores // max(busy, 1))
        workers = [
            self._service(
                "prefill" if role == "prefill" else "decode",
                role,
                name,
                {
                    "role": role,
                    **model,
                    "server": {"grpc_port": ports[name]},
                    "cluster": cluster,
                    "pool": pool,
                    "engine": {"num_threads": threads, "tensor_parallel_size": degrees[name]},
                },
            )
            for role, name in names
        ]
        devices, own = gpus(), 0
        for worker in workers if len(devices) > 1 else []:  # each sees the others' too: NVLink maps their memory
            worker.gpus = ",".join(devices[own:] + devices[:own])
            own = (own + degrees[worker.name]) % len(devices)
        workers += [self._service("kvstore", "kvstore", f"kvstore-{i}", node) for i in range(plan.kvstore)]
        groups.append(workers)
        shared = {**model, "policy": plan.policy, "cluster": cluster}
        groups.append([self._service("router", "router", each["id"], {**shared, **_listening_at(each)}) for each in self.routers])
        return groups

    def _plan_pool(self, cluster: Mapping[str, Any]) -> tuple[list[Child], dict[str, Any], dict[str, Any]]:
        """The masters, a worker's `pool` section and a node's configuration. Of several masters one leads, by etcd."""
        count = self._plan.kvstore_masters if self._plan.kvstore else 0
        ports = [(free_port(), free_port()) for _ in range(count)]
        if not ports:
            return [], {}, {}
        several = count > 1
        if several and not self.etcd:
            raise ConfigError("several masters need etcd: install it (Debian: apt-get install etcd-server), or give --etcd URL")
        masters = [
            self._service(
                "kvstore",
                "kvstore-master",
                f"kvstore-master-{i}" if several else "kvstore-master",
                {"mode": "master", "ha": several, "cluster": cluster, "master_port": rpc, "master_metrics_port": metrics},
            )
            for i, (rpc, metrics) in enumerate(ports)
        ]
        pool = {"master": "etcd" if several else f"127.0.0.1:{ports[0][0]}"}
        admins = [f"127.0.0.1:{metrics}" for _, metrics in ports]
        return masters, pool, {"mode": "node", "cluster": cluster, "pool": pool, "masters": admins}

    def _service(self, service: str, role: str, name: str, config: Mapping[str, Any]) -> Child:
        tree = {"drain_grace_s": _DRAIN_GRACE_S, **config, "server": {"id": name, **config.get("server", {})}}
        path = self._folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        overrides: list[str] = []
        for setting in self._plan.settings:
            key, _, value = setting.partition("=")
            target, _, rest = key.partition(".")
            if target in (role, service, name, "all"):
                overrides.append(f"{rest}={value}")
        try:
            drain_grace_s = load_config(_CONFIGS[service], path, overrides).drain_grace_s
        except ConfigError as error:  # of what was set: nobody has written that file
            raise ConfigError(f"{name}: {error.message.removeprefix(f'{path}: ')} (--set {role}.KEY=VALUE)") from error
        command = [sys.executable, "-m", f"services.{service}", "--config", str(path), *overrides]
        return Child(name, role, command, self._logs / f"{name}.log", drain_grace_s=drain_grace_s)

    # -- children

    async def _spawn(self, child: Child) -> None:
        environment = {**os.environ, "BATON_DIE_WITH_PARENT": str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        if child.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = child.gpus
        with child.log.open("ab") as log:
            child.process = await asyncio.create_subprocess_exec(
                *child.command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
                preexec_fn=_die_with(os.getpid()) if child.role == "etcd" else None,
            )  # fmt: skip

    async def _keep(self, child: Child) -> None:
        """Starts the child again each time it dies, unless it does nothing but die, or refuses its configuration from the start."""
        while True:
            started = time.monotonic()
            code = await child.process.wait() if child.process is not None else None
            steady = self._was_ready and code is not None and time.monotonic() - started > _STEADY_S
            child.quick_deaths = 0 if steady else child.quick_deaths + 1
            refused = code == EXIT_CONFIG and child.role != "etcd" and not self._was_ready
            if self._stopping:
                return
            if refused or child.quick_deaths > _MAX_QUICK_DEATHS:
                assert self._failed is not None
                if not self._failed.done():
                    self._failed.set_result(f"{child.name} cannot run (exit code {code}); from {child.log}:\n{_tail(child.log)}")
                return
            logger.warning("%s %s (exit code %s); starting it again", child.name, "ended" if code == 0 else "died", code)
            await asyncio.sleep(0.1 * 2**child.quick_deaths)
            if self._stopping:
                return
            child.process = None
            try:
                await self._spawn(child)
            except (OSError, subprocess.SubprocessError, RuntimeError) as error:
                logger.warning("%s cannot be started now: %s", child.name, error)

    async def _end(self, child: Child) -> None:
        if child.keeper is not None:
            child.keeper.cancel()
            await asyncio.gather(child.keeper, return_exceptions=True)
        process = child.process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), child.drain_grace_s + _LEAVE_S)
            except TimeoutError:
                told = (child.name, child.drain_grace_s + _LEAVE_S, _tail(child.log, 1))
                logger.warning("%s has not ended after %g s; killing it. The end of its log: %s", *told)
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()

    # -- waiting

    async def _start(self) -> None:
        for group in self._plan_groups():
            self._groups.append(group)
            self._awaited = [child.name for child in group]
            for child in group:
                await self._spawn(child)
                child.keeper = asyncio.create_task(self._keep(child), name=f"keep-{child.name}")
            if group[0].role == "etcd" or (group[0].role == "kvstore-master" and len(group) == 1):
                await self._listening(group[0])
        await self._ready()
        self._was_ready = True

    async def _listening(self, child: Child) -> None:
        url = self.etcd if child.role == "etcd" else None
        port = int(url.rpartition(":")[2]) if url else yaml.safe_load((self._folder / f"{child.name}.yaml").read_text())["master_port"]
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return
            except OSError:
                await asyncio.sleep(0.05)

    async def _ready(self) -> None:
        workers = [child.name for group in self._groups for child in group if child.role in _WORKERS]
        async with httpx.AsyncClient(timeout=2.0, verify=False) as client:  # our own children, on this machine
            for router in self.routers:
                self._awaited = [*workers, router["id"]]
                while True:
                    with contextlib.suppress(httpx.HTTPError, json.JSONDecodeError):
                        seen = (await client.get(f"{router['http']}/cluster")).json()
                        ready = [worker["id"] for worker in seen["workers"] if worker["state"] == "ready"]
                        if seen["ready"] and len(ready) == len(workers):
                            break
                        self._awaited = [name for name in workers if name not in ready] or [router["id"]]
                    await asyncio.sleep(0.1)


def _check(plan: Plan) -> None:
    check_policy(plan.policy)
    if not (plan.model / "config.json").is_file():
        raise ConfigError(f"{plan.model} is not a Hugging Face model folder: it has no config.json")
    if plan.log_dir is not None:
        try:
            plan.log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--log-dir {plan.log_dir} cannot be made ({error.strerror}); choose another folder") from error
    if not plan.unified and not (plan.prefill and plan.decode):
        raise ConfigError("a cluster needs a prefill and a decode worker, or a unified one: --prefill 1 --decode 1, or --unified 1")
    if plan.etcd == "auto" and shutil.which("etcd") is None:
        logger.warning("etcd is not installed (Debian: apt-get install etcd-server); going on with a static list of workers")
    for port in (port + i for port in (plan.http_port, plan.grpc_port) if port for i in range(plan.routers)):
        if port > 65535:
            raise ConfigError(f"{plan.routers} routers need as many ports from --http-port and --grpc-port on: choose lower ones, or 0")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise ConfigError(
                    f"port {port} is taken ({error.strerror}); choose another with --http-port or --grpc-port, 0 for any"
                ) from error
    for setting in plan.settings:
        if "=" not in setting or "." not in setting.partition("=")[0]:
            raise ConfigError(f"--set {setting!r} must look like role.key=value, for example decode.engine.block_size=32")
        target = setting.partition(".")[0]
        if target != "all" and re.sub(r"-\d+$", "", target) not in _TARGETS:
            raise ConfigError(
                f"--set {setting!r}: there is no role {target!r}; there are all, {', '.join(_TARGETS)}, or one process, decode-0"
            )


def _listening_at(router: Mapping[str, str]) -> dict[str, Any]:
    http, grpc = (int(router[what].rpartition(":")[2]) for what in ("http", "grpc"))
    return {"http_port": http, "server": {"grpc_port": grpc}}


def _degree(plan: Plan, role: str, name: str) -> int:
    """Ranks of a worker: so many GPUs are its own. What is no number its service refuses."""
    degree, service = plan.tensor_parallel_size, "prefill" if role == "prefill" else "decode"
    for setting in plan.settings:
        key, _, value = setting.partition("=")
        target, _, rest = key.partition(".")
        if rest == "engine.tensor_parallel_size" and value.isdecimal() and target in (role, service, name, "all"):
            degree = max(int(value), 1)
    return degree


def _tail(log: Path, lines: int = 15) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except OSError as error:
        return f"(its log cannot be read: {error})"


def _die_with(parent: int) -> Any:
    return lambda: die_with_parent(parent)


async def run_until_signal(plan: Plan, on_ready: "Callable[[Cluster], None]") -> None:
    """Starts the cluster, calls `on_ready(cluster)`, and stops everything on SIGINT, SIGTERM, a closed terminal or failure."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()

    def signalled() -> None:
        if stopped.is_set():
            cluster.kill()
        else:
            told = "stopping when the streams have ended, or %g s have gone by (router.drain_grace_s); a second Ctrl-C stops at once"
            logger.warning(told, cluster.drain_grace_s)
        stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            loop.add_signal_handler(number, signalled)
    cluster = Cluster(plan)

    async def life() -> None:
        await cluster.start()
        on_ready(cluster)
        await cluster.run()

    task, stop = asyncio.create_task(life()), asyncio.create_task(stopped.wait())
    try:
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        for each in (task, stop):
            each.cancel()
        results = await asyncio.gather(task, stop, return_exceptions=True)
        await cluster.stop(keep_logs=any(isinstance(result, BatonError) for result in results))
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError | BatonError):
                logger.error("supervisor failed", exc_info=result)
