"""The end of leases: blocks that were reserved for a prefill worker's writes come back, whatever became of it."""

import asyncio
import logging

import grpc.aio

from baton.cluster.machine import this_machine
from baton.hosting.engine import Leases as EngineLeases
from baton.rpc.channel import Channels
from baton.rpc.v1 import prefill_pb2, prefill_pb2_grpc
from baton.rpc.v1.decode_pb2 import PrefillCandidate

logger = logging.getLogger(__name__)
GRACE_S = 0.5  # that other leases have to end well before a fence
GONE_S = 1.0  # after which nothing is left of a process whose sockets are closed


class Leases:
    """A lease that ended well is settled at once. Else its sender is asked; where it can't say that nothing is under way, or is gone,
    the receiver's sessions are fenced. Where a fence can't end everything (NVLink), the sender must have answered, or be gone, before; a
    lease whose sessions have ended meanwhile, with those of another, needs no fence of its own."""

    def __init__(self, leases: EngineLeases, channels: Channels, *, lease_s: float) -> None:
        self._leases, self._channels, self._lease_s = leases, channels, lease_s
        self._tasks = set[asyncio.Task[None]]()
        self._fence: asyncio.Task[None] | None = None
        self._dirty = set[str]()  # leases that a fence alone can end: their senders write nothing more by themselves

    def end(self, lease: str, sender: PrefillCandidate, *, well: bool, broken: bool) -> None:
        """`well`: the sender has said that everything arrived. `broken`: its call has failed, so that it may have died meanwhile."""
        if well:
            self._leases.settle(lease)
            return
        task = asyncio.create_task(self._ask(lease, sender, broken), name=f"lease-{lease}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, lease: str, sender: PrefillCandidate, broken: bool) -> None:
        address = sender.address
        only_it_can_end = not self._leases.revocable and sender.machine in ("", this_machine())  # NVLink stays on one machine
        if not only_it_can_end and not await self._leases.reserved(lease):  # a fence has ended it already
            self._leases.settle(lease)
            return
        answer, why = await self._answer(lease, address)
        if answer is None and only_it_can_end:
            logger.warning("the blocks reserved under lease %s wait until their sender answers or is gone: %s", lease, why)
            broken = True  # who answers later may be another
        while answer is None and only_it_can_end and not await _is_gone(address):
            await asyncio.sleep(self._lease_s)
            answer, why = await self._answer(lease, address)
        if answer is not None and answer.clean and (answer.known or _is_who_was_asked(answer, sender, broken)):
            self._leases.settle(lease)
            return
        logger.warning("the blocks reserved under lease %s are fenced: %s", lease, why)
        self._dirty.add(lease)
        if self._fence is None or self._fence.done():
            self._fence = asyncio.create_task(self._fence_until_clean(), name="fence")

    async def _answer(self, lease: str, address: str) -> tuple[prefill_pb2.EndLeaseResponse | None, str]:
        """What the sender says once all that it began has ended, or none; and why that is not enough."""
        try:
            stub = prefill_pb2_grpc.PrefillStub(self._channels.get(address))
            answer = await stub.EndLease(prefill_pb2.EndLeaseRequest(lease=lease), timeout=self._lease_s)
            return answer, "not all of its writes have ended well" if answer.known else "its sender has been replaced"
        except grpc.aio.AioRpcError as error:
            return None, f"{address} does not answer ({error.code().name})"
        except Exception as error:
            logger.exception("ending lease %s", lease)
            return None, f"{type(error).__name__}"

    async def _fence_until_clean(self) -> None:
        """A fence may end more leases than it was made for: those need no other."""
        while True:
            for lease in tuple(self._dirty):  # it grows meanwhile
                if not await self._leases.reserved(lease):
                    self._leases.settle(lease)
                    self._dirty.discard(lease)
            if not self._dirty:
                return
            ending = tuple(self._dirty)
            while not await self._fenced():  # who comes meanwhile may hold sessions that this fence does not end
                await asyncio.sleep(self._lease_s)
            for lease in ending:
                self._leases.settle(lease)

    async def _fenced(self) -> bool:
        try:
            await self._leases.fence(GRACE_S)
        except Exception:
            logger.exception("sessions cannot be fenced; their blocks stay reserved, and it is tried again")
            return False
        return True

    async def close(self) -> None:
        tasks = [*self._tasks, *([self._fence] if self._fence is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _is_gone(address: str) -> bool:
    """Whether the process that served there has ended: its machine, which is this one, refuses connections; and goes on to, so that all
    that the process had is torn down."""
    host, _, port = address.rpartition(":")
    for wait_s in (0.0, GONE_S):
        await asyncio.sleep(wait_s)
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(host, int(port)), GONE_S)
        except ConnectionRefusedError:
            continue
        except (OSError, TimeoutError):
            return False
        writer.close()
        return False
    return True


def _is_who_was_asked(answer: prefill_pb2.EndLeaseResponse, sender: PrefillCandidate, broken: bool) -> bool:
    """Whether the process that answers is the one that was to send: then what it knows nothing of has never begun."""
    return answer.instance == sender.instance if sender.instance else not broken
