"""The router's process: HTTP and gRPC on one event loop."""

import asyncio
import collections.abc
import contextlib
import gc
import math
import socket
from pathlib import Path
from typing import Any, cast

import uvicorn
import uvloop

from baton.config import RouterConfig, member_id, served_names
from baton.errors import ConfigError
from baton.hosting.members import make_membership
from baton.hosting.process import certificates_of, run_service
from baton.hosting.server import Host
from baton.metrics import RouterMetrics
from baton.rpc.certificates import Certificates
from baton.rpc.channel import Channels
from baton.rpc.v1 import router_pb2, router_pb2_grpc
from baton.tokenizer import Tokenizer, read_settings
from baton.tracing import OFF, Tracer, make_tracer
from baton.types import Member, Role
from services.router.admission import Admission
from services.router.app import Gateway, make_app
from services.router.dispatch import Dispatcher
from services.router.events import front
from services.router.generation import Generator
from services.router.policies import POLICIES
from services.router.servicer import RouterServicer
from services.router.tenants import Tenants
from services.router.workers import Workers

_LAST_WORDS_S = 2  # that clients have to take the error with which what they wait for has ended; whoever does not is cut off
# So long a connection is kept without a request. Clients (httpx: 5 s) and load balancers (60 s) must close it first: what they send while
# we do is lost, and a load balancer makes a 502 of it.
_KEEP_ALIVE_S = 75


class _Server(uvicorn.Server):
    """Signals are the host's business."""

    @contextlib.contextmanager
    def capture_signals(self) -> collections.abc.Generator[None]:
        yield


def build(config: RouterConfig, workers: Workers, channels: Channels, tracer: Tracer = OFF) -> Gateway:
    if not config.model:
        raise ConfigError("model is not set: give the Hugging Face folder that the workers serve, model=/path/to/model")
    folder = Path(config.model)
    tokenizer = Tokenizer(folder)
    model, defaults = read_settings(folder / "config.json"), read_settings(folder / "generation_config.json")
    eos = defaults.get("eos_token_id", model.get("eos_token_id"))
    eos_ids = frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos)
    names = served_names(config)
    metrics = RouterMetrics(names[0])
    dispatcher = Dispatcher(
        workers,
        channels,
        config.policy,
        POLICIES[config.policy],
        lease_s=config.cluster.lease_s,
        max_migrations=config.max_migrations,
        local_prefill=config.local_prefill,
        on_migration=metrics.migrations.inc,
        on_first_token=metrics.predicted,
        hedging=config.hedging,
        on_hedge=metrics.hedged,
    )
    metrics.index = workers.counts
    admission = Admission(config.admission, metrics, lease_s=config.cluster.lease_s, problem=dispatcher.placer.problem)
    return Gateway(
        names=names,
        tokenizer=tokenizer,
        defaults=defaults,
        context_len=int(model.get("max_position_embeddings", 2**31)),
        dispatcher=dispatcher,
        generator=Generator(tokenizer, dispatcher, admission, metrics, eos_ids, explained=config.explained, tracer=tracer, model=names[0]),
        tenants=Tenants.read(config.tenants),
        metrics=metrics,
        max_body=config.max_body,
        lease_s=config.cluster.lease_s,
        allowed_origins=config.allowed_origins,
    )


async def serve(config: RouterConfig) -> None:
    certificates = certificates_of(config.security)
    front_door = Certificates(config.tls.cert, config.tls.key, setting="tls") if config.tls.cert else None
    channels = Channels(config.cluster.lease_s, certificates)
    membership = make_membership(config.cluster, certificates)
    workers = Workers(membership, channels, lease_s=config.cluster.lease_s)
    name = member_id(config.server, Role.ROUTER)
    tracer = make_tracer(config.tracing, "router", name)
    gateway = build(config, workers, channels, tracer)
    member = Member(id=name, role=Role.ROUTER, address="")
    shown = front_door or certificates
    credentials = shown.server(demand=False) if shown is not None else None  # clients have keys, and no certificates
    host = Host(
        config.server,
        config.cluster,
        member,
        gateway.metrics,
        certificates=certificates,
        credentials=credentials,
        max_receive=config.max_body,
    )
    servicer = RouterServicer(gateway)
    cast(Any, router_pb2_grpc).add_RouterServicer_to_server(servicer, host.grpc)
    listener = _listen(config.server.host, config.http_port)
    server = _Server(
        uvicorn.Config(
            front(make_app(gateway)),
            http="httptools",
            log_config=None,
            access_log=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=math.ceil(config.drain_grace_s) + _LAST_WORDS_S,
            ssl_certfile=config.tls.cert or None,
            ssl_keyfile=config.tls.key or None,
        )
    )
    gc.set_threshold(20_000, 20, 20)  # a token leaves a dozen objects, none in a cycle: by default, looking for some takes 5 % of the core
    workers.start()
    http = asyncio.create_task(server.serve([listener]), name="http")
    gauges = asyncio.create_task(gateway.keep_gauges(), name="gauges")
    tasks = [http, gauges]

    async def drain() -> None:
        """Both faces take nothing new, and finish what they have; what is left when the grace is over is told to go elsewhere. Who watches
        our health, or asks what is served, is not waited for. gRPC refuses by closing its port and its idle connections, so that clients go
        elsewhere. Calls that it has read and not yet given us it cancels (grpc/grpc#41785)."""
        server.should_exit = True
        tasks.append(asyncio.create_task(host.grpc.stop(config.drain_grace_s + _LAST_WORDS_S), name="grpc"))
        asyncio.get_running_loop().call_later(config.drain_grace_s, gateway.generator.grace.end)
        await http
        await servicer.finished()

    def start_draining() -> None:
        gateway.draining = True

    try:
        await host.run([router_pb2.DESCRIPTOR.services_by_name["Router"].full_name], drain, on_draining=start_draining)
    finally:
        server.should_exit = True
        gauges.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await workers.close()
        await membership.close()
        await channels.close()
        await asyncio.to_thread(tracer.close)


def _listen(host: str, port: int) -> socket.socket:
    # With the protocol named, asyncio turns Nagle's algorithm off; else each small chunk of a stream waits 40 ms for an acknowledgement.
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port} (http_port): {error.strerror}") from error
    return listener


if __name__ == "__main__":
    run_service("router", RouterConfig, serve, loop_factory=uvloop.new_event_loop)
