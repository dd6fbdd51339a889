"""Fences with real leases, reservations and receivers, where some sessions can be ended from here and others (NVLink) cannot: nothing
that may still be written to is given away, and one fence does not bring the next. Engines are made up, for NVLink needs devices."""

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest
import torch

from baton.cluster.machine import this_machine
from baton.kv import mooncake_push
from baton.kv.direct import DirectReceiver
from baton.kv.layout import KVLayout
from baton.kv.mooncake_push import MooncakeReceiver
from baton.kv.pool import KVPool
from baton.kv.shards import Share
from baton.rpc.channel import Channels
from baton.rpc.v1 import prefill_pb2, prefill_pb2_grpc
from baton.rpc.v1.decode_pb2 import PrefillCandidate
from baton.runtime.crew import Solo
from baton.runtime.feed import Feed
from baton.runtime.leases import EngineLeases
from baton.runtime.pushing import Pusher, Reservations
from baton.runtime.rank_kv import RankKV
from baton.runtime.spread import TeamReceiver
from baton.scheduling.blocks import BlockPool
from baton.scheduling.cache import KVCache
from baton.scheduling.request import Request
from baton.types import GenerateRequest, LeaseEnd, PushTarget, SamplingParams
from services.decode import leases

LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=2, block_size=4, dtype="float32")
NUM_BLOCKS, EACH = 64, 4  # blocks, and of them each lease's
LEASE_S = 0.2
TCP, BOTH = ("tcp",), ("nvlink_intra", "tcp")
DIRTY = prefill_pb2.EndLeaseResponse(known=True, clean=False, instance="p")


class Engine:
    made: list["Engine"]
    gate: threading.Event  # no engine ends before

    def __init__(self, *_: Any) -> None:
        self.session, self.ending, self.closed = f"h:{len(self.made)}", False, False
        self.made.append(self)

    def close(self) -> None:
        self.ending = True
        assert self.gate.wait(30)
        self.closed = True


class Sender(prefill_pb2_grpc.PrefillServicer):
    """A prefill worker that says what it is told to, when it is told to."""

    def __init__(self) -> None:
        self.asked, self.answers = Counter[str](), dict[str, prefill_pb2.EndLeaseResponse]()
        self.server = grpc.aio.server()
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        prefill_pb2_grpc.add_PrefillServicer_to_server(self, self.server)

    async def EndLease(self, request: prefill_pb2.EndLeaseRequest, context: Any) -> prefill_pb2.EndLeaseResponse:
        self.asked[request.lease] += 1
        while request.lease not in self.answers:
            await asyncio.sleep(0.01)
        return self.answers[request.lease]


class Decoder:
    """The receiving side, whole."""

    def __init__(self, protocols: tuple[str, ...], channels: Channels, sender: Sender) -> None:
        pool = KVPool(LAYOUT, NUM_BLOCKS, torch.device("cpu"))
        self._receivers = {name: MooncakeReceiver(pool.region, host="h", protocol=name) for name in protocols}
        own = DirectReceiver(self._receivers)
        kv = RankKV(pool=pool, layout=LAYOUT, share=Share(0, 1), prefix="f/", sender=None, receiver=own, tiers=())
        receiver = TeamReceiver(kv, Solo())
        self._cache = KVCache(NUM_BLOCKS, LAYOUT.block_size)
        self._reservations = Reservations(self._cache, receiver, after_steps=lambda action: action(), patience_s=60.0)
        pusher = Pusher(self._cache.pool, None, block_size=LAYOUT.block_size, post=lambda action: action())
        engine = EngineLeases(pusher, self._reservations, receiver, post=lambda action: action(), stopping=lambda: False)
        self.leases = leases.Leases(engine, channels, lease_s=LEASE_S)
        self.sender, self._count = sender, 0

    def reserve(self) -> PushTarget:
        self._count += 1
        num_tokens = EACH * LAYOUT.block_size
        tokens = tuple(range(1000 * self._count, 1000 * self._count + num_tokens))
        request = GenerateRequest(request_id=str(self._count), prompt_token_ids=tokens, sampling=SamplingParams(max_tokens=1))
        inner = Request.create(request, eos_token_ids=frozenset(), max_model_len=10**6, block_size=LAYOUT.block_size, arrival=0.0)
        answers: list[PushTarget | None] = []
        feed = Feed(inner, hold=True, await_saves=False, num_tokens=num_tokens, num_blocks=EACH, looked_up=True)
        self._reservations.reserve(feed, answers.append)
        [target] = answers
        assert target is not None
        return target

    def end(self, target: PushTarget, *, machine: str, instance: str = "p", broken: bool = False) -> None:
        sender = PrefillCandidate(address=self.sender.address, instance=instance, machine=machine)
        self.leases.end(target.lease, sender, well=False, broken=broken)

    def reserved(self) -> int:
        """Leases whose blocks are nobody else's."""
        taken, rest = divmod(NUM_BLOCKS - self._cache.pool.num_free, EACH)
        assert not rest
        return taken

    def is_open(self, target: PushTarget) -> bool:
        """Over TCP."""
        session = dict(target.shards[0].sessions)["tcp"]
        return not next(engine for engine in Engine.made if engine.session == session).closed

    @property
    def num_fences(self) -> int:
        return len(Engine.made) - len(self._receivers)


@asynccontextmanager
async def decoder(protocols: tuple[str, ...]) -> AsyncIterator[Decoder]:
    sender, channels = Sender(), Channels(1.0)
    await sender.server.start()
    made = Decoder(protocols, channels, sender)
    try:
        yield made
    finally:
        Engine.gate.set()
        await made.leases.close()
        await channels.close()
        await sender.server.stop(0)


@pytest.fixture(autouse=True)
def engines(monkeypatch: pytest.MonkeyPatch) -> None:
    Engine.made, Engine.gate = [], threading.Event()
    Engine.gate.set()
    monkeypatch.setattr(mooncake_push, "Engine", Engine)
    monkeypatch.setattr(leases, "GRACE_S", 0.0)
    monkeypatch.setattr(leases, "GONE_S", 0.05)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(("protocols", "elsewhere"), [(TCP, True), (BOTH, True), (BOTH, False)])
async def test_whose_sessions_a_fence_has_ended_needs_no_other(protocols: tuple[str, ...], elsewhere: bool) -> None:
    machine = "another" if elsewhere else this_machine()
    async with decoder(protocols) as here:
        first, victim = here.reserve(), here.reserve()
        here.sender.answers |= {target.lease: DIRTY for target in (first, victim)}
        here.end(first, machine=machine)
        await until(lambda: here.num_fences == 1 and not here.is_open(first))
        later = here.reserve()
        here.end(victim, machine=machine)  # its push has failed with its session
        await until(lambda: here.reserved() == 1)
        assert here.num_fences == 1
        assert here.is_open(later)
        here.sender.answers[later.lease] = DIRTY
        here.end(later, machine=machine)  # its sessions are those after the fence: that was none of its own
        await until(lambda: here.reserved() == 0)
        assert here.num_fences == 2
        assert not here.is_open(later)


@pytest.mark.parametrize("goes_on", [True, False])
async def test_a_fence_of_others_gives_nothing_away_that_nvlink_may_write(goes_on: bool) -> None:
    """TCP's sessions have ended, but the sender's device may write by itself until the sender answers, or is gone."""
    async with decoder(BOTH) as here:
        first, silent = here.reserve(), here.reserve()
        here.sender.answers[first.lease] = DIRTY
        here.end(first, machine=this_machine())
        await until(lambda: here.reserved() == 1)
        assert not here.is_open(silent)
        here.end(silent, machine=this_machine())
        await until(lambda: here.sender.asked[silent.lease] >= 2)
        assert here.reserved() == 1
        if goes_on:
            here.sender.answers[silent.lease] = DIRTY
        else:
            await here.sender.server.stop(0)
        await until(lambda: here.reserved() == 0)
        assert here.num_fences == 1


@pytest.mark.parametrize("protocols", [TCP, BOTH])
async def test_what_is_reserved_during_a_fence_takes_the_next_one(protocols: tuple[str, ...]) -> None:
    async with decoder(protocols) as here:
        first = here.reserve()
        here.sender.answers[first.lease] = DIRTY
        Engine.gate.clear()
        here.end(first, machine="another")
        await until(lambda: any(engine.ending for engine in Engine.made))
        later = here.reserve()
        here.sender.answers[later.lease] = DIRTY
        here.end(later, machine="another")
        await until(lambda: here.sender.asked[later.lease] == 1)
        assert here.reserved() == 2
        Engine.gate.set()
        await until(lambda: here.reserved() == 0)
        assert here.num_fences == 2
        assert not here.is_open(later)


@pytest.mark.parametrize(
    ("known", "answerer", "asked", "num_fences"),
    [
        (True, "p", "p", 0),  # the push took as long as the question may
        (False, "p", "p", 0),  # it was asked, and had never begun
        (False, "q", "p", 1),  # another process: what the one before sent over TCP may be on its way
        (False, "q", "", 1),  # perhaps
    ],
)
async def test_a_late_answer_is_worth_what_an_early_one_is(known: bool, answerer: str, asked: str, num_fences: int) -> None:
    async with decoder(BOTH) as here:
        target = here.reserve()
        here.end(target, machine=this_machine(), instance=asked)
        await until(lambda: here.sender.asked[target.lease] == 2)
        assert here.reserved() == 1
        here.sender.answers[target.lease] = prefill_pb2.EndLeaseResponse(known=known, clean=True, instance=answerer)
        await until(lambda: here.reserved() == 0)
        assert here.num_fences == num_fences


def test_who_knows_nothing_of_a_lease_says_so_whenever_it_is_asked() -> None:
    """Else the successor of a sender would vouch for it, where its first answer was lost."""
    pusher, answers = Pusher(BlockPool(1), None, block_size=4, post=lambda action: action()), list[LeaseEnd]()
    for _ in range(2):
        pusher.when_over("a", answers.append)
    assert answers == [LeaseEnd(known=False, clean=True)] * 2
