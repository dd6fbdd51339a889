"""The end of leases: blocks that were reserved for a prefill worker's writes come back, whatever became of it."""

import asyncio
import logging

import grpc.aio

from baton.hosting.engine import Leases as EngineLeases
from baton.rpc.channel import Channels
from baton.rpc.v1 import prefill_pb2, prefill_pb2_grpc

logger = logging.getLogger(__name__)
GRACE_S = 0.5  # that other leases have to end well before a fence


class Leases:
    """A lease that ended well is settled at once. Else its sender is asked; where it can't say that nothing is under way, or is gone,
    the receiver's sessions are fenced."""

    def __init__(self, leases: EngineLeases, channels: Channels, *, lease_s: float) -> None:
        self._leases, self._channels, self._lease_s = leases, channels, lease_s
        self._tasks = set[asyncio.Task[None]]()
        self._fence: asyncio.Task[None] | None = None
        self._dirty = set[str]()  # leases that only a fence can end

    def end(self, lease: str, address: str, *, well: bool, broken: bool) -> None:
        """`well`: the sender has said that everything arrived. `broken`: its call has failed, so that it may have died meanwhile."""
        if well:
            self._leases.settle(lease)
            return
        task = asyncio.create_task(self._ask(lease, address, broken), name=f"lease-{lease}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, lease: str, address: str, broken: bool) -> None:
        if not await self._leases.reserved(lease):  # a fence has ended it already
            return
        try:
            stub = prefill_pb2_grpc.PrefillStub(self._channels.get(address))
            answer = await stub.EndLease(prefill_pb2.EndLeaseRequest(lease=lease), timeout=self._lease_s)
            if answer.clean and (answer.known or not broken):
                self._leases.settle(lease)
                return
            why = "not all of its writes have ended well" if answer.known else "its sender has been replaced"
        except grpc.aio.AioRpcError as error:
            why = f"{address} does not answer ({error.code().name})"
        except Exception as error:
            logger.exception("ending lease %s", lease)
            why = f"{type(error).__name__}"
        logger.warning("the blocks reserved under lease %s are fenced: %s", lease, why)
        self._dirty.add(lease)
        if self._fence is None or self._fence.done():
            self._fence = asyncio.create_task(self._fence_until_clean(), name="fence")

    async def _fence_until_clean(self) -> None:
        """A fence ends all leases from before it, so those that it takes along need no other."""
        while True:
            for lease in tuple(self._dirty):  # it grows meanwhile
                if not await self._leases.reserved(lease):
                    self._dirty.discard(lease)
            if not self._dirty:
                return
            try:
                await self._leases.fence(GRACE_S)
            except Exception:
                logger.exception("sessions cannot be fenced; their blocks stay reserved, and it is tried again")
                await asyncio.sleep(self._lease_s)

    async def close(self) -> None:
        tasks = [*self._tasks, *([self._fence] if self._fence is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
