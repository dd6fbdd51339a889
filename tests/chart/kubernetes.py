"""As much of Kubernetes as the chart needs, for a test: rendered objects in, processes in namespaces out. Probes, rollouts, drains and
names go by what is rendered. Not here: scheduling, cluster addresses (a service's name gives its ready pods), and policies, whose keeping
is asserted of the connections that there are."""

import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from tests.chart.network import NameServer, Network
from tests.chart.pods import Pod
from tests.chart.rendering import NAMESPACE, by_key, workloads

Object = dict[str, Any]
_TICK_S = 0.2


class Kubernetes:
    """Start with `apply`; apply again what has changed. `failures` are what should not have been: a pod that ended by itself, a grace that
    was over, a liveness probe that failed."""

    def __init__(
        self, folder: Path, images: Mapping[str, Path], shared: Mapping[str, Path], secrets: Mapping[str, Path] | None = None
    ) -> None:
        """`secrets`: a folder of files each."""
        self._folder, self._images, self._shared = folder, images, shared
        self._secrets = {name: {file.name: file.read_text() for file in path.iterdir()} for name, path in (secrets or {}).items()}
        self.network = Network()
        self.pods: dict[str, list[Pod]] = {}
        self.failures: list[str] = []
        self.objects: list[Object] = []
        self._keepers: list[threading.Thread] = []
        self._names = NameServer(self.network.host, self._find)

    def __enter__(self) -> "Kubernetes":
        self._on_term = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: everything is taken down
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        everybody = self.everybody()
        for pod in everybody:
            pod.ending = True
        if error is not None:
            print("\n".join(pod.tail() for pod in everybody))
        for keeper in self._keepers:
            keeper.join()
        for pod in everybody:
            pod.close()
        self._names.close()
        self.network.close()
        signal.signal(signal.SIGTERM, self._on_term)

    def everybody(self) -> list[Pod]:
        return [pod for pods in list(self.pods.values()) for pod in list(pods)]

    def apply(self, objects: Sequence[Object]) -> None:
        """Returns when all is as wanted: pods ready, those too many gone. Workloads are brought there side by side."""
        old, self.objects = workloads(self.objects), list(objects)
        tasks = []
        for name, new in workloads(objects).items():
            before = old.pop(name, None)
            changed = before is not None and before["spec"]["template"] != new["spec"]["template"]
            tasks.append(lambda new=new, changed=changed: self._bring(new, renew=changed))
        tasks += [lambda gone=gone: self._bring({**gone, "spec": {**gone["spec"], "replicas": 0}}, renew=False) for gone in old.values()]
        _together(tasks)

    def delete(self, pod: Pod) -> None:
        """What the kubelet does of a pod that shall go; endpoints lose it at once."""
        pod.ending, pod.ready = True, False
        pod.pre_stop()
        try:
            code = pod.terminate()
            if code:
                self.failures.append(f"{pod.name} ended with {code}\n{pod.tail()}")
        except subprocess.TimeoutExpired as error:
            self.failures.append(f"{pod.name} is not done within its grace: {error!r}")
        for pods in self.pods.values():
            if pod in pods:
                pods.remove(pod)
        pod.close()

    # -- controllers

    def _bring(self, workload: Object, *, renew: bool) -> None:
        name, wanted = workload["metadata"]["name"], workload["spec"].get("replicas", 1)
        pods = self.pods.setdefault(name, [])
        old = list(pods) if renew else []
        if workload["kind"] == "StatefulSet":
            for pod in old:
                number = int(pod.name.rpartition("-")[2])
                self.delete(pod)
                self._until_ready(self._add(workload, number), workload)
            old = []
        else:
            assert workload["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
            for pod in old[:wanted]:
                self._until_ready(self._add(workload, None), workload)
                self.delete(pod)
            for pod in old[wanted:]:
                self.delete(pod)
        fresh = [self._add(workload, number) for number in range(len(pods), wanted)]
        for pod in fresh:
            self._until_ready(pod, workload)
        _together([lambda pod=pod: self.delete(pod) for pod in pods[wanted:]])

    def _add(self, workload: Object, number: int | None) -> Pod:
        name = workload["metadata"]["name"]
        suffix = f"{secrets.token_hex(4)}-{secrets.token_hex(2)}" if workload["kind"] == "Deployment" else str(number)
        files = self._secrets | {thing["metadata"]["name"]: thing["data"] for thing in self.objects if thing["kind"] == "ConfigMap"}
        pod = Pod(f"{name}-{suffix}", workload["spec"]["template"], files, self.network, self._folder, self._images, self._shared)
        self.pods[name].append(pod)
        keeper = threading.Thread(target=self._keep, args=(pod,), name=pod.name)
        keeper.start()
        self._keepers.append(keeper)
        return pod

    def _until_ready(self, pod: Pod, workload: Object) -> None:
        """Within what a rollout may take without progress; a startup probe has less time, and only says that it lives."""
        deadline = time.monotonic() + workload["spec"].get("progressDeadlineSeconds", 600)
        while not pod.ready:
            if pod.ending or pod.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{pod.name} is not ready (exit code {pod.process.poll()})\n{pod.tail(40)}")
            time.sleep(_TICK_S)

    def _keep(self, pod: Pod) -> None:
        """Its probes, for as long as it lives; ten times as often as said while nothing is known."""
        startup = pod.container["startupProbe"]
        deadline = time.monotonic() + startup["periodSeconds"] * startup["failureThreshold"]
        while not pod.ending and pod.process.poll() is None and not _probe(pod, "startupProbe"):
            if time.monotonic() > deadline:
                self.failures.append(f"{pod.name} would have been killed: its startup probe fails")
                return
            time.sleep(_TICK_S)
        last, failed = 0.0, {"readinessProbe": 0, "livenessProbe": 0}
        while not pod.ending:
            if pod.process.poll() is not None:
                self.failures.append(f"{pod.name} has ended by itself, with {pod.process.returncode}\n{pod.tail()}")
                return
            if time.monotonic() - last >= (1.0 if pod.ready else _TICK_S):
                last = time.monotonic()
                for kind in failed:
                    failed[kind] = 0 if _probe(pod, kind) or pod.ending else failed[kind] + 1
                pod.ready = not pod.ending and (failed["readinessProbe"] == 0 or (pod.ready and failed["readinessProbe"] < 2))
                if failed["livenessProbe"] >= pod.container["livenessProbe"]["failureThreshold"]:
                    self.failures.append(f"{pod.name} would have been killed: its liveness probe fails")
            time.sleep(_TICK_S)

    # -- names

    def _find(self, name: str) -> list[str] | None:
        suffix = f".{NAMESPACE}.svc.cluster.local"
        if not name.endswith(suffix):
            return None
        pod, _, service = name.removesuffix(suffix).rpartition(".")
        found = by_key(self.objects).get(("Service", service))
        if found is None:
            return None
        spec = found["spec"]
        behind = [each for each in self.everybody() if spec["selector"].items() <= each.labels.items()]
        if pod:
            behind = [each for each in behind if each.name == pod and spec.get("clusterIP") == "None"]
        if not spec.get("publishNotReadyAddresses"):
            behind = [each for each in behind if each.ready]
        return [each.address for each in behind] or (None if pod else [])


def _probe(pod: Pod, kind: str) -> bool:
    return passes(pod.container[kind], pod.address, pod.ports)


def passes(probe: Object, address: str, ports: Mapping[str, int]) -> bool:
    """Whether a probe does, of ports by their names."""
    action, timeout = next(probe[key] for key in ("httpGet", "tcpSocket") if key in probe), probe["timeoutSeconds"]
    port = ports.get(action["port"], action["port"])
    try:
        if "httpGet" in probe:
            return httpx.get(f"http://{address}:{port}{action['path']}", timeout=timeout).status_code < 400
        socket.create_connection((address, port), timeout).close()
        return True
    except (OSError, httpx.HTTPError):
        return False


def _together(tasks: Sequence[Callable[[], None]]) -> None:
    """All at once; raises the first error."""
    errors: list[BaseException] = []

    def run(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
