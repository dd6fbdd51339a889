"""The gRPC service that every worker offers, and how a worker hosts its engine. Torch-free: the engine is behind a Protocol."""

import asyncio
import dataclasses
import logging
import os
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import grpc
import grpc.aio

from baton.config import WorkerConfig
from baton.errors import EXIT_SOFTWARE, BatonError, Draining, InternalError, RequestCancelled
from baton.hosting.engine import Engine, Sequence
from baton.hosting.heartbeat import with_heartbeat
from baton.hosting.server import Host
from baton.metrics import WorkerMetrics
from baton.rpc import convert
from baton.rpc.certificates import Certificates
from baton.rpc.v1 import worker_pb2 as pb
from baton.rpc.v1 import worker_pb2_grpc
from baton.types import GenerateRequest, Member, MemberState, PushTarget

logger = logging.getLogger(__name__)
SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Worker"].full_name
Context = Any  # grpc.aio.ServicerContext, whose type parameters nobody can name


async def abort(context: Context, error: BatonError) -> None:
    """Ends a call with an error of our tree. Raises, as gRPC's abort does."""
    status, message, metadata = convert.error_status(error)
    await context.abort(status, message, metadata)


class Intake:
    """The door to the engine: refuses while draining, and knows what is inside."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.draining = False
        self._inside: dict[str, Sequence] = {}

    def submit(
        self, request: GenerateRequest, *, hold: bool = False, await_saves: bool = False, push: PushTarget | None = None
    ) -> Sequence:
        if self.draining:
            raise Draining("this worker is draining; send the request to another one")
        sequence = self.engine.submit(request, hold=hold, await_saves=await_saves, push=push)
        self._inside[request.request_id] = sequence
        return sequence

    def done(self, request_id: str) -> None:
        """Must follow every submit, whatever happened: frees what the request still holds."""
        sequence = self._inside.pop(request_id, None)
        if sequence is not None:
            sequence.close()

    def cancel(self, request_id: str) -> bool:
        sequence = self._inside.get(request_id)
        if sequence is not None:
            sequence.close()
        return sequence is not None

    async def drain(self, grace_s: float) -> int:
        """Takes nothing new; returns how many requests are left when all are done or the time is over."""
        self.draining = True
        deadline = asyncio.get_running_loop().time() + grace_s
        while self._inside and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        return len(self._inside)


class WorkerServicer(worker_pb2_grpc.WorkerServicer):
    def __init__(self, intake: Intake, member: Callable[[], Member], *, lease_s: float) -> None:
        self._intake, self._member, self._interval_s = intake, member, min(lease_s / 4, 1.0)

    async def GetMember(self, request: pb.GetMemberRequest, context: Context) -> pb.Member:
        return convert.member_to_proto(self._current())

    async def WatchState(self, request: pb.WatchStateRequest, context: Context) -> AsyncIterator[pb.StateUpdate]:
        """When the engine has nothing to say, as in a long step, the last load is repeated, so the numbering is the stream's own."""
        sequence, last = 0, None
        async for news in with_heartbeat(self._intake.engine.watch(), self._interval_s):
            update = news or (last and dataclasses.replace(last, events=(), snapshot=False, arrived=()))
            if update is None:  # the snapshot has not come yet
                continue
            yield convert.state_to_proto(dataclasses.replace(update, sequence=sequence, state=self._current().state))
            sequence, last = sequence + 1, update

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        return pb.CancelResponse(found=self._intake.cancel(request.request_id))

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        return pb.DrainResponse(num_unfinished=await self._intake.drain(request.grace_seconds))

    async def CheckIntegrity(self, request: pb.CheckIntegrityRequest, context: Context) -> pb.CheckIntegrityResponse:
        problems = await self._intake.engine.check_integrity()
        return pb.CheckIntegrityResponse(problems=problems, load=convert.load_to_proto(self._intake.engine.load))

    def _current(self) -> Member:
        member = self._member()
        return dataclasses.replace(member, state=MemberState.DRAINING) if self._intake.draining else member


class guarded:
    """`async with guarded(context, …)`: errors of our tree become gRPC statuses, any other a logged InternalError."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, grpc.aio.AbortError):
            await abort(self._context, as_ours(error))


def as_ours(error: Exception) -> BatonError:
    if isinstance(error, BatonError):
        return error
    if isinstance(error, grpc.aio.InternalError):  # a message could not be sent
        return RequestCancelled("the caller is gone")
    logger.error("a call failed", exc_info=error)
    return InternalError(f"{type(error).__name__}: {error}")


async def end_if_stuck(engine: Engine, limit_s: float) -> None:
    """Ends the process when its engine has been in one step for `limit_s`: peers see broken streams, and a supervisor starts it again."""
    tick_s, stuck_s, turns = min(limit_s / 5, 1.0), 0.0, engine.turns  # in ticks, so that a pause of the whole process counts as one
    while stuck_s < limit_s:
        await asyncio.sleep(tick_s)
        if engine.stopped:  # saving what is queued has a limit of its own
            return
        before, turns = turns, engine.turns
        stuck_s = stuck_s + tick_s if turns == before else 0.0
    logger.critical("the engine has been stuck in a step for %g s (engine.step_timeout_s); ending this process", limit_s)
    os._exit(EXIT_SOFTWARE)


async def host_worker(
    config: WorkerConfig,
    engine: Engine,
    member: Member,
    metrics: WorkerMetrics,
    add_services: Callable[[Host, Intake], list[str]],
    certificates: Certificates | None = None,
) -> None:
    """Serves an engine until the process is told to stop. `add_services` adds the role's own services and returns their full names."""
    engine.start()
    intake = Intake(engine)
    host = Host(config.server, config.cluster, member, metrics, certificates=certificates)
    cast(Any, worker_pb2_grpc).add_WorkerServicer_to_server(
        WorkerServicer(intake, lambda: host.member, lease_s=config.cluster.lease_s), host.grpc
    )
    services = add_services(host, intake)

    async def drain() -> None:
        end = asyncio.get_running_loop().time() + config.drain_grace_s
        left = await intake.drain(config.drain_grace_s)
        if left:
            logger.warning("%d requests are not finished after %.0f s; they must move", left, config.drain_grace_s)
        await engine.stop(flush_s=max(end - asyncio.get_running_loop().time(), 0.0))

    def start_draining() -> None:
        intake.draining = True

    watchdog = asyncio.create_task(end_if_stuck(engine, config.engine.step_timeout_s), name="watchdog")
    try:
        await host.run([SERVICE_NAME, *services], drain, on_draining=start_draining)
    finally:
        await engine.stop()
        watchdog.cancel()
