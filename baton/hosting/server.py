"""Hosting: one gRPC server with health and reflection, a metrics endpoint, a place in the cluster, and an orderly end.

    build ─▶ listen (alive) ─▶ join (ready: others may call now) ─▶ … ─▶ SIGTERM: say draining ─▶ finish what is there ─▶ leave ─▶ stop

A second signal ends the process at once. Knows nothing of what is served.
"""

import asyncio
import contextlib
import dataclasses
import gc
import logging
import os
import secrets
import signal
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from baton.cluster.machine import this_machine
from baton.cluster.membership import Membership
from baton.config import ClusterConfig, ServerConfig
from baton.errors import ConfigError, MembershipError
from baton.hosting.members import make_membership
from baton.metrics import Metrics, serve_metrics
from baton.rpc.certificates import Certificates
from baton.rpc.channel import server_options
from baton.types import Member, MemberState

logger = logging.getLogger(__name__)
_HEALTH_S = 2.0


class Host:
    """`member` is who this process is; its address, metrics address and pid are filled in when the servers listen."""

    def __init__(
        self,
        server: ServerConfig,
        cluster: ClusterConfig,
        member: Member,
        metrics: Metrics | None = None,
        *,
        certificates: Certificates | None = None,
        credentials: grpc.ServerCredentials | None = None,
        max_receive: int = -1,
    ) -> None:
        """`certificates`: of calls between services, this one's to others and theirs to this one, who must have one too. `credentials`: of
        a port for clients, who have none. `max_receive`: bytes of a gRPC message; -1: any number."""
        self._config, self._metrics = server, metrics
        self._credentials = credentials or (certificates.server() if certificates is not None else None)
        self.member = dataclasses.replace(member, pid=os.getpid(), instance=member.instance or secrets.token_hex(8), machine=this_machine())
        self.membership: Membership = make_membership(cluster, certificates)
        self.grpc: Any = cast(Any, grpc.aio).server(options=server_options(cluster.lease_s, max_receive))
        self._health: Any = cast(Any, health).aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()

    async def run(
        self,
        services: Sequence[str],
        drain: Callable[[], Awaitable[None]],
        *,
        on_ready: Callable[[Member], Awaitable[None]] | None = None,
        on_draining: Callable[[], None] = lambda: None,
    ) -> None:
        """Serves until SIGTERM or SIGINT, then `drain`s and returns. `services` are the full names of what was added to `self.grpc`.

        Raises ConfigError when a port is taken.
        """
        await self._health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)  # it begins with SERVING
        reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), self.grpc)
        host = self._config.host
        advertised = self._config.advertise or host
        address = f"{host}:{self._config.grpc_port}"
        try:
            if self._credentials is None:
                port = self.grpc.add_insecure_port(address)
            else:
                port = self.grpc.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {address} (server.grpc_port); is the port taken?") from error
        exporter = None
        metrics_address = ""
        if self._metrics is not None:
            try:
                exporter, metrics_port = serve_metrics(self._metrics, host, self._config.metrics_port, self._ready)
            except OSError as error:
                raise ConfigError(f"cannot listen on {host}:{self._config.metrics_port} (server.metrics_port): {error.strerror}") from error
            metrics_address = f"{advertised}:{metrics_port}"
        self.member = dataclasses.replace(self.member, address=f"{advertised}:{port}", metrics_address=metrics_address)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._signalled)
        await self.grpc.start()
        try:
            await self._join()
            for service in ("", *services):
                await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
            logger.info("%s serves on %s", self.member.id, self.member.address)
            gc.collect()
            gc.freeze()  # modules, weights and tables live as long as the process: no collection need look at them again
            if on_ready is not None:
                await on_ready(self.member)
            await self._stop.wait()
            logger.info("%s drains", self.member.id)
            self.member = dataclasses.replace(self.member, state=MemberState.DRAINING)
            on_draining()
            await self._health.enter_graceful_shutdown()
            with contextlib.suppress(MembershipError):
                await self.membership.join(self.member)
            await drain()
        finally:
            await self.membership.close()
            await self.grpc.stop(0.5)
            if exporter is not None:
                exporter.shutdown()
                exporter.server_close()
        logger.info("%s has left", self.member.id)

    async def _join(self) -> None:
        """An etcd that is away at the start is waited for: workers and etcd may start in any order."""
        warned = False
        while not self._stop.is_set():
            try:
                await self.membership.join(self.member)
                return
            except MembershipError as error:
                if not warned:
                    logger.warning("%s; trying on", error)
                    warned = True
                await asyncio.sleep(0.5)

    def _ready(self) -> bool:
        """What gRPC's health service says; for another thread, where the kubelet asks, which has no certificate."""
        asked: Any = self._health.Check(health_pb2.HealthCheckRequest(), None)
        answer = asyncio.run_coroutine_threadsafe(asked, self._loop).result(_HEALTH_S)
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    def _signalled(self) -> None:
        if self._stop.is_set():
            os._exit(1)
        self._stop.set()
