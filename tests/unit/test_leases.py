"""Leases on both sides, where the order of things decides what may be said."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from baton.errors import InternalError
from baton.kv.push import PushResult, PushStatus
from baton.rpc.channel import Channels
from baton.rpc.v1.decode_pb2 import PrefillCandidate
from baton.runtime.pushing import Pusher
from baton.scheduling.blocks import BlockPool
from baton.types import LeaseEnd, PushShard, PushTarget, Role
from services.decode import leases
from tests.workers import worker

SIZE = 4


class Sender:
    def __init__(self) -> None:
        self.pushes: list[tuple[Callable[[PushResult], None], Callable[[], None]]] = []

    def push(
        self, target: PushTarget, first: int, block_ids: Sequence[int], done: Callable[[PushResult], None], settled: Callable[[], None]
    ) -> None:
        self.pushes.append((done, settled))

    def close(self) -> None:
        pass


def pusher() -> tuple[Pusher, Sender, BlockPool]:
    pool, sender = BlockPool(16), Sender()
    made = Pusher(pool, sender, block_size=SIZE, post=lambda action: action())
    return made, sender, pool


def target(lease: str, num_blocks: int, first: int = 0) -> PushTarget:
    shard = PushShard("m", (("tcp", "s"),), tuple(range(num_blocks)))
    return PushTarget(lease=lease, first_block=first, shards=(shard,))


def ended(made: Pusher, lease: str) -> list[LeaseEnd]:
    answers: list[LeaseEnd] = []
    made.when_over(lease, answers.append)
    return answers


def test_a_lease_that_nobody_knows_is_not_opened_later() -> None:
    made, sender, pool = pusher()
    assert ended(made, "a") == [LeaseEnd(known=False, clean=True)]
    shipment = made.open(target("a", 2), 8, lambda: None)
    made.send(shipment, pool.take(2), 8)
    assert shipment.ended
    assert not sender.pushes


def test_the_end_waits_for_what_is_under_way() -> None:
    for result, clean in (
        (PushResult(PushStatus.GOOD, 1, 0.0), True),
        (PushResult(PushStatus.FAILED, 1, 0.0), True),  # nothing had begun
        (PushResult(PushStatus.UNKNOWN, 1, 0.0, lands_late=True), False),
    ):
        made, sender, pool = pusher()
        blocks = pool.take(2)
        shipment = made.open(target("a", 2), 8, lambda: None)
        made.send(shipment, blocks, 8)
        pool.release(blocks)
        made.close(shipment)
        answers = ended(made, "a")
        again = made.open(target("a", 2), 8, lambda: None)  # a second request under the name says nothing about the first
        made.close(again)
        assert answers == []
        assert pool.num_free == 14
        done, settled = sender.pushes[0]
        done(result)
        assert answers == []
        settled()
        assert answers == [LeaseEnd(known=True, clean=clean)]
        assert pool.num_free == 16
        assert ended(made, "a") == [LeaseEnd(known=True, clean=clean)]


def test_a_target_that_does_not_fit_the_prompt_is_not_waited_for() -> None:
    made, _, _ = pusher()
    assert all(made.open(wrong, 8, lambda: None).ended for wrong in (target("a", 0), target("b", 3), target("c", 1, first=2)))


class Decoder:
    """The engine's side of leases: a fence ends all that there were when it began; one that has failed goes on where it was."""

    def __init__(self) -> None:
        self.leases: set[str] = set()
        self.num_fences = self.num_failures = 0
        self.revocable = True
        self._before: set[str] | None = None  # leases of the generation that is to end

    async def reserved(self, lease: str) -> bool:
        await asyncio.sleep(0.005)  # as long as a step takes
        return lease in self.leases

    def settle(self, lease: str) -> None:
        self.leases.discard(lease)

    async def fence(self, grace_s: float) -> None:
        self._before = before = set(self.leases) if self._before is None else self._before
        await asyncio.sleep(grace_s)
        if self.num_failures:
            self.num_failures -= 1
            raise InternalError("not certain")
        self.num_fences, self._before = self.num_fences + 1, None
        if self.revocable:
            self.leases -= before


@asynccontextmanager
async def ending(engine: Decoder, lease_s: float = 0.2) -> AsyncIterator[leases.Leases]:
    channels = Channels(1.0)
    made = leases.Leases(engine, channels, lease_s=lease_s)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        await made.close()
        await channels.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


NOBODY = PrefillCandidate(address="127.0.0.1:9")


async def test_one_fence_does_not_bring_the_next(monkeypatch: Any) -> None:
    """Those whose pushes a fence breaks find their leases ended."""
    monkeypatch.setattr(leases, "GRACE_S", 0.05)
    engine = Decoder()
    async with ending(engine) as made:
        engine.leases |= {str(number) for number in range(20)}
        made.end("0", NOBODY, well=False, broken=True)
        await until(lambda: bool(engine.num_fences))
        engine.leases.add("later")
        for number in range(1, 20):
            made.end(str(number), NOBODY, well=False, broken=True)
        await asyncio.sleep(0.5)
        assert engine.num_fences == 1
        assert engine.leases == {"later"}


async def test_leases_that_end_together_all_end(monkeypatch: Any) -> None:
    """A worker has died: each of its leases asks for a fence while the fence looks who needs it."""
    monkeypatch.setattr(leases, "GRACE_S", 0.0)
    engine = Decoder()
    async with ending(engine) as made:
        for number in range(40):
            engine.leases.add(str(number))
            made.end(str(number), NOBODY, well=False, broken=True)
            await asyncio.sleep(0.001 * (number % 3))
        await until(lambda: not engine.leases)


async def test_a_fence_that_has_failed_ends_no_later_lease(monkeypatch: Any) -> None:
    """What was reserved meanwhile has sessions that the fence leaves open: it takes the next one."""
    monkeypatch.setattr(leases, "GRACE_S", 0.05)
    engine = Decoder()
    engine.num_failures = 2
    async with ending(engine, lease_s=0.1) as made:
        engine.leases.add("a")
        made.end("a", NOBODY, well=False, broken=True)
        await until(lambda: engine.num_failures == 1)
        engine.leases.add("later")
        made.end("later", NOBODY, well=False, broken=True)
        await until(lambda: not engine.leases)
        assert engine.num_fences == 2


async def test_what_no_fence_ends_waits_for_its_sender(monkeypatch: Any) -> None:
    """Over NVLink the sender's device writes by itself: a sender that is stopped may go on, one that is gone will not."""
    monkeypatch.setattr(leases, "GRACE_S", 0.0)
    monkeypatch.setattr(leases, "GONE_S", 0.1)
    engine = Decoder()
    engine.revocable = False
    engine.leases |= {"stopped", "dead", "alive", "elsewhere"}
    with socket.socket() as stopped, socket.socket() as dead:
        stopped.bind(("127.0.0.1", 0))
        stopped.listen()  # who is stopped still has its sockets
        dead.bind(("127.0.0.1", 0))
        async with ending(engine) as made:
            for name, sender in (("stopped", stopped), ("dead", dead)):
                address = f"127.0.0.1:{sender.getsockname()[1]}"
                made.end(name, PrefillCandidate(address=address), well=False, broken=True)
            made.end("elsewhere", PrefillCandidate(address="127.0.0.1:9", machine="another"), well=False, broken=True)
            await until(lambda: engine.leases == {"stopped", "alive"})
            await asyncio.sleep(1)
            assert engine.leases == {"stopped", "alive"}
            stopped.close()
            await until(lambda: engine.leases == {"alive"})


@pytest.mark.parametrize(
    ("instance", "broken", "num_fences"),
    [
        ("present", False, 0),  # the client has gone before its request got there
        ("present", True, 0),  # it refused the call in good order
        ("past", False, 1),  # the process before it may have written
        ("past", True, 1),
        ("", False, 0),  # nobody knows who it was: it is believed where the call did not break
        ("", True, 1),
    ],
)
async def test_who_knows_nothing_of_a_lease_is_believed_if_it_is_who_was_asked(
    monkeypatch: Any, instance: str, broken: bool, num_fences: int
) -> None:
    monkeypatch.setattr(leases, "GRACE_S", 0.0)
    engine = Decoder()
    engine.leases.add("a")
    async with worker(Role.PREFILL, {}, name="present") as sender, ending(engine, lease_s=10) as made:
        made.end("a", PrefillCandidate(address=sender.address, instance=instance), well=False, broken=broken)
        await until(lambda: not engine.leases)
        assert engine.num_fences == num_fences
