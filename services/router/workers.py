"""Workers: the router's live view. Who is there comes from the membership; load and cached blocks from each worker's state stream.

A worker is usable while it is a ready member and its state stream speaks: a broken stream takes it out at once, silence after a lease. The
stream is opened again until the member is gone, and begins with a snapshot. A gap in its numbers opens it again too, and so does a digest
that is not the index's own: then the worker stays usable, with what is known of it. A member that is gone gets no new requests, but it is
let go of, and what it still answers with it, only when its stream has ended as well: a lease may run out under a healthy worker.
"""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Any, cast

import grpc
import grpc.aio

from baton.cluster.membership import Membership
from baton.hashing import block_hashes, num_matchable_blocks
from baton.rpc import convert
from baton.rpc.channel import Channels
from baton.rpc.v1 import worker_pb2, worker_pb2_grpc
from baton.types import Digest, Member, Role, Tier
from services.router.fleet import Fleet, Worker
from services.router.index import OWN_TIERS
from services.router.view import View

logger = logging.getLogger(__name__)
_RETRY_S = 0.2
SERVING = frozenset({Role.PREFILL, Role.DECODE, Role.UNIFIED})


class Workers:
    def __init__(self, membership: Membership, channels: Channels, *, lease_s: float) -> None:
        self._membership, self._channels, self._lease_s = membership, channels, lease_s
        self._fleet = Fleet()
        self._workers = self._fleet.workers
        self._watchers: dict[Worker, asyncio.Task[None]] = {}
        self.others: dict[str, Member] = {}  # members that serve no requests: kvstore, routers
        self._changed = asyncio.Condition()
        self._watcher: asyncio.Task[None] | None = None
        self.counts: dict[str, float] = {"index_gaps": 0, "index_mismatches": 0, "index_snapshots": 0}
        """Since the start, of all workers."""

    def start(self) -> None:
        self._watcher = asyncio.create_task(self._watch_members(), name="members")

    async def close(self) -> None:
        tasks = [*self._watchers.values(), *([] if self._watcher is None else [self._watcher])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def all(self) -> list[Worker]:
        return [worker for worker in self._workers.values() if not worker.gone]

    @property
    def max_model_len(self) -> int:
        """Tokens of a request that all of them take; 0: none has said."""
        return self._fleet.max_model_len

    def member(self, worker_id: str) -> Member:
        return self._workers[worker_id].member

    def instance(self, worker_id: str) -> str | None:
        """Of its process; None: nobody has this id."""
        worker = self._workers.get(worker_id)
        return None if worker is None else worker.member.instance

    def indexed(self, worker: Worker) -> dict[Tier, frozenset[bytes]]:
        """The blocks that it is known to hold."""
        return {tier: self._fleet.index.blocks(worker.member.id, tier) for tier in OWN_TIERS}

    def digests(self, worker: Worker) -> dict[Tier, Digest]:
        """Of these."""
        return self._fleet.index.digests(worker.member.id)

    @property
    def num_indexed(self) -> int:
        """Blocks on devices; what several hold counts for each of them."""
        return len(self._fleet.index)

    def view(self, hashes_by_size: "HashesBySize", exclude: Sequence[str] = ()) -> View:
        """Usable workers, with how much of a prompt each one need not compute."""
        return self._fleet.view(hashes_by_size.matchable, exclude)

    def routed(self, worker_id: str, request_id: str, tokens: int, pairs: int, expected: Sequence[bytes] = ()) -> None:
        """A request is on its way there; see `Fleet.routed`."""
        self._fleet.routed(worker_id, request_id, tokens, pairs, expected)

    def unrouted(self, worker_id: str, request_id: str, *, silent: bool = False) -> None:
        self._fleet.unrouted(worker_id, request_id, silent=silent)

    def lost(self, worker_id: str) -> None:
        """A call found it gone; it is not used until its stream speaks again."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            self._fleet.silent(worker)

    async def wait_change(self, timeout_s: float) -> None:
        """Until something about the workers changes, or the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait()

    async def _watch_members(self) -> None:
        while True:
            try:
                await self._follow_members()
            except Exception:
                logger.exception("the members cannot be followed")
            await asyncio.sleep(_RETRY_S)

    async def _follow_members(self) -> None:
        async for view in self._membership.watch():
            self.others = {name: member for name, member in view.items() if member.role not in SERVING}
            serving = {name: member for name, member in view.items() if member.role in SERVING}
            absent = [worker for name, worker in self._workers.items() if name not in serving]
            for worker in absent:
                self._fleet.is_member(worker, None)
            for worker in absent:
                if worker.state is None:
                    await self._forget(worker)
            for name, member in serving.items():
                known = self._workers.get(name)
                if known is not None and _process(known.member) != _process(member):
                    await self._forget(known)
                    known = None
                if known is None:
                    worker = self._fleet.add(member)
                    self._watchers[worker] = asyncio.create_task(self._watch_worker(worker), name=f"watch-{name}")
                    logger.info("%s %s joined at %s", member.role, name, member.address)
                else:
                    self._fleet.is_member(known, member)
            await self._notify()

    async def _forget(self, worker: Worker) -> None:
        name = worker.member.id
        if self._workers.get(name) is not worker:  # forgotten already
            return
        self._fleet.remove(worker)
        watcher = self._watchers.pop(worker)
        if watcher is not asyncio.current_task():
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
        if worker.member.address not in {other.member.address for other in self._workers.values()}:  # a successor may have it by now
            await self._channels.drop(worker.member.address)
        logger.info("%s left", name)

    async def _watch_worker(self, worker: Worker) -> None:
        while True:
            try:
                if await self._follow(worker):
                    await asyncio.sleep(_RETRY_S)
                    continue
            except (grpc.aio.AioRpcError, TimeoutError) as error:
                ended = isinstance(error, grpc.aio.AioRpcError)
                if worker.drains and ended:
                    logger.info("%s has drained", worker.member.id)
                elif worker.state is not None:
                    logger.warning("%s is lost: %s", worker.member.id, error.details() if ended else "silent")
            except (asyncio.CancelledError, grpc.aio.UsageError):  # its channel was closed; or we were
                if cast(Any, asyncio.current_task()).cancelling():
                    raise
            except Exception:
                logger.exception("the state of %s cannot be followed", worker.member.id)
            spoke = worker.state is not None
            self._fleet.silent(worker)
            if worker.gone:
                await self._forget(worker)
            if spoke or worker.gone:
                await self._notify()
            if worker.gone:
                return
            await asyncio.sleep(_RETRY_S)

    async def _follow(self, worker: Worker) -> bool:
        """Until the stream ends. True where it is to be opened again because something was missed. Raises on its errors and its silence."""
        stub: Any = worker_pb2_grpc.WorkerStub(self._channels.get(worker.member.address))
        if not await self._is_there(worker, stub):
            return False
        call: grpc.aio.UnaryStreamCall[worker_pb2.WatchStateRequest, worker_pb2.StateUpdate] = stub.WatchState(
            worker_pb2.WatchStateRequest()
        )
        expected, checked = -1, True
        try:
            if not await self._is_there(worker, stub):  # since
                return False
            while True:
                async with asyncio.timeout(self._lease_s):
                    message = await call.read()
                if not isinstance(message, worker_pb2.StateUpdate):
                    return False
                update = convert.state_from_proto(message)
                if not update.snapshot and update.sequence != expected:
                    worker.gaps += 1
                    self.counts["index_gaps"] += 1
                    logger.warning("updates %d to %d of %s did not come; asking for all", expected, update.sequence - 1, worker.member.id)
                    return True
                expected = update.sequence + 1
                if self._fleet.update(worker, update):
                    await self._notify()
                self.counts["index_snapshots"] += update.snapshot
                if checked and not self._fleet.index.agrees(worker.member.id, update.digests):
                    worker.mismatches += 1
                    self.counts["index_mismatches"] += 1
                    logger.warning("%s holds other blocks than its updates have told (update %d)", worker.member.id, update.sequence)
                    if not update.snapshot:
                        return True
                    checked = False  # another snapshot would be no better
        finally:
            call.cancel()

    async def _is_there(self, worker: Worker, stub: Any) -> bool:
        """Whether it is this very process that answers at its address, and no successor. Raises AioRpcError."""
        there = await stub.GetMember(worker_pb2.GetMemberRequest(), timeout=self._lease_s)
        return (there.id, there.instance) == (worker.member.id, worker.member.instance)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


class HashesBySize:
    """A prompt's block hashes, computed once for each block size that some worker has."""

    def __init__(self, token_ids: Sequence[int], salt: str) -> None:
        self._token_ids, self._salt = token_ids, salt
        self._hashes: dict[int, list[bytes]] = {}

    def __call__(self, block_size: int) -> list[bytes]:
        if block_size not in self._hashes:
            self._hashes[block_size] = block_hashes(self._token_ids, block_size, self._salt)
        return self._hashes[block_size]

    def matchable(self, block_size: int) -> list[bytes]:
        """Of the blocks that a worker may find in a cache."""
        return self(block_size)[: num_matchable_blocks(len(self._token_ids), block_size)]


def _process(member: Member) -> tuple[str, int, str]:
    return member.address, member.pid, member.instance
