"""Scaling: brings a Deployment to the number that was planned, without a stream on a worker that goes.

    too many ─▶ the least busy are told to drain: routers send them nothing new ─▶ … empty ─▶ their pods are the first to go, replicas - n

A round does what can be done now and keeps nothing: who drains is seen in the cluster, so another planner can go on. A worker that drains
does not come back: whoever is needed meanwhile is started anew, in its place once it is empty, since there may be room (a GPU) for no more.
Workers and pods have the same name, as the chart has it.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import grpc
import grpc.aio

from baton.errors import ConfigError, Unavailable
from baton.rpc.certificates import Certificates
from baton.rpc.channel import Channels
from baton.rpc.v1 import worker_pb2, worker_pb2_grpc
from services.planner.kubernetes import Kubernetes, Pod, Scale

logger = logging.getLogger(__name__)
_PATIENCE_S = 5.0
Worker = Mapping[str, Any]  # of a router's /cluster
Drain = Callable[[Worker], Awaitable[int]]


async def scale(kubernetes: Kubernetes, drain: Drain, deployment: str, workers: Sequence[Worker], wanted: int, at_most: int) -> str:
    """One round; what was done, for people. `workers`: of the pool, as a router knows them; `wanted`: how many are to serve; `drain` tells
    one to take nothing new and returns how many requests it still holds. Raises ConfigError, Unavailable."""
    now = await kubernetes.scale(deployment)
    pods = {pod.name: pod for pod in await kubernetes.pods(now.selector)}
    draining = [worker for worker in workers if worker["id"] in pods and worker["state"] == "draining"]
    serving = now.replicas - len(draining)
    starting = [pod.name for pod in pods.values() if not pod.ready and pod.name not in {worker["id"] for worker in workers}]
    missing = max(wanted - serving, len(starting)) if wanted >= serving else 0
    if missing and draining:
        ended = [worker["id"] for worker in draining if not await drain(worker)][:missing]
        for name in ended:
            await kubernetes.delete(name)
        if ended:
            return f"{', '.join(ended)}, empty: others are started in their place"
    if wanted > serving:
        replicas = min(wanted + len(draining), max(at_most, now.replicas))
        if replicas > now.replicas:
            await kubernetes.set_scale(deployment, replicas, now.version)
            return f"scaled out from {now.replicas} to {replicas}"
        return f"{len(draining)} of {now.replicas} drain, and {at_most} are the most that may be there: {wanted} once they are gone"
    if starting and wanted < serving:  # theirs are the pods that Kubernetes takes first
        return await _scale_in(kubernetes, deployment, now, starting[: serving - wanted], "not there yet")
    if problem := _unsettled(list(pods.values()), now.replicas):
        return f"{problem}: none is taken away" if wanted < serving or draining else ""
    ready = [worker for worker in workers if worker["id"] in pods and worker["state"] == "ready"]
    idlest = sorted(ready, key=lambda worker: (worker["running"] + worker["waiting"], worker["blocks_cached"], worker["id"]))
    held = {worker["id"]: await drain(worker) for worker in [*draining, *idlest[: serving - wanted]]}
    empty = [name for name, count in held.items() if not count]
    if empty:
        return await _scale_in(kubernetes, deployment, now, empty, "empty")
    return ", ".join(f"{name} drains, {count} requests to go" for name, count in held.items())


async def _scale_in(kubernetes: Kubernetes, deployment: str, now: Scale, names: Sequence[str], why: str) -> str:
    for name in names:
        await kubernetes.first_to_go(name)
    await kubernetes.set_scale(deployment, now.replicas - len(names), now.version)
    return f"scaled in from {now.replicas} to {now.replicas - len(names)}: {', '.join(names)}, {why}"


def _unsettled(pods: Sequence[Pod], replicas: int) -> str:
    """Why Kubernetes would take others away than those that were marked."""
    if len({pod.template for pod in pods}) > 1:
        return "a rollout is under way"
    if len(pods) != replicas or not all(pod.ready for pod in pods):
        return "not all pods are ready"
    return ""


class Drains:
    """Tells workers to drain, over gRPC."""

    def __init__(self, certificates: Certificates | None = None) -> None:
        self._channels = Channels(_PATIENCE_S, certificates)

    async def close(self) -> None:
        await self._channels.close()

    async def __call__(self, worker: Worker) -> int:
        stub: Any = worker_pb2_grpc.WorkerStub(self._channels.get(worker["address"]))
        try:
            there = await stub.GetMember(worker_pb2.GetMemberRequest(), timeout=_PATIENCE_S)
            if there.id != worker["id"]:
                raise Unavailable(f"{there.id} answers at {worker['address']}, where {worker['id']} was: the next round looks again")
            answer = await stub.Drain(worker_pb2.DrainRequest(grace_seconds=0), timeout=_PATIENCE_S)
        except grpc.aio.AioRpcError as error:
            raise Unavailable(f"{worker['id']} at {worker['address']} cannot be told to drain: {error.details()}") from error
        if worker["state"] != "draining":
            logger.info("%s was told to drain", worker["id"])
        return int(answer.num_unfinished)


def deployment_name(text: str) -> str:
    """Raises ConfigError."""
    kind, slash, name = text.rpartition("/")
    if kind not in ("", "deployment", "deployments", "deploy") or (slash and not kind) or not name:
        raise ConfigError(
            f"{text!r} is no Deployment: of a StatefulSet the last pod goes first, whatever it does; give the name of a Deployment, as the "
            "chart makes them for workers"
        )
    return name
