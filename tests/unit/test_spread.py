"""What moves KV on two ranks at once, when one of them fails or says nothing: real Transfer Engines, both ranks in this process."""

import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from baton.errors import BatonError, InternalError, StoreError, TransferError
from baton.kv.direct import DirectReceiver, DirectSender
from baton.kv.layout import KVLayout
from baton.kv.mooncake_push import MooncakeReceiver, MooncakeSender
from baton.kv.pool import KVPool
from baton.kv.push import PushResult, PushStatus
from baton.kv.shards import Share, ShareSender
from baton.kv.transfer import KVTransfer
from baton.kv.transfer_engine import describe
from baton.parallel.link import Listener
from baton.runtime.crew import Solo
from baton.runtime.launch import TOKEN, start_rank
from baton.runtime.rank_kv import RankKV
from baton.runtime.spread import Handlers, TeamReceiver, TeamSender, TeamTier
from baton.types import PushTarget
from tests.unit.test_transfer import Answers, BreakableStore

LAYOUT = KVLayout(num_layers=2, num_kv_heads=4, head_dim=2, block_size=4, dtype="float32")
LIMIT_S = 10.0


class Ranks(Solo):
    """Rank 1, whose answers can be kept back, as those of a stopped process are."""

    others = range(1, 2)  # type: ignore[assignment]

    def __init__(self, kv: RankKV) -> None:
        self._handlers, self.stopped, self.within_s = Handlers(kv), False, 0.0  # of the last question
        self._kept: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def call(self, rank: int, name: str, arguments: Mapping[str, Any], heard: Callable[[Any, BatonError | None], None]) -> None:
        def answer(value: Any, last: bool = True) -> None:
            failed = isinstance(value, BatonError)
            self._kept.put(lambda: heard(None if failed else value, value if failed else None))
            if not self.stopped:
                self.go_on()

        self._handlers.serve(name, json.loads(json.dumps(arguments)), answer)

    def ask(self, name: str, *, within_s: float = 10.0, **arguments: Any) -> list[Any]:
        self.within_s = within_s
        answers: queue.SimpleQueue[tuple[Any, BatonError | None]] = queue.SimpleQueue()
        self.call(1, name, arguments, lambda value, error: answers.put((value, error)))
        try:
            value, error = answers.get(timeout=0 if self.stopped else within_s)  # nobody need wait here for what will not come
        except queue.Empty:
            raise InternalError("rank 1 has not answered") from None
        if error is not None:
            raise error
        return [value]

    def go_on(self) -> None:
        while not self._kept.empty():
            self._kept.get()()


def kv(rank: int, *, sends: bool) -> RankKV:
    share = Share(rank, 2)
    pool = KVPool(LAYOUT.share(2), 4, torch.device("cpu"))
    sender = receiver = None
    if sends:
        direct = DirectSender({"tcp": MooncakeSender(pool.region, host="127.0.0.1", protocol="tcp", limit_s=LIMIT_S)})
        sender = ShareSender(direct, LAYOUT, share, pool.buffer)
    else:
        receiver = DirectReceiver({"tcp": MooncakeReceiver(pool.region, host="127.0.0.1", protocol="tcp")})
    return RankKV(pool=pool, layout=LAYOUT, share=share, prefix=f"f/{rank}of2/", sender=sender, receiver=receiver, tiers=())


@contextmanager
def receiving() -> Iterator[tuple[TeamReceiver, list[RankKV]]]:
    ranks = [kv(rank, sends=False) for rank in range(2)]
    made = TeamReceiver(ranks[0], Ranks(ranks[1]))
    try:
        yield made, ranks
    finally:
        made.close()


def tiered(rank: int) -> RankKV:
    transfer = KVTransfer(BreakableStore())
    pool = KVPool(LAYOUT.share(2), 4, torch.device("cpu"))
    share = Share(rank, 2)
    return RankKV(pool=pool, layout=LAYOUT, share=share, prefix=f"f/{rank}of2/", sender=None, receiver=None, tiers=(transfer,))


def test_what_is_queued_is_saved_on_every_rank() -> None:
    ranks = [tiered(rank) for rank in range(2)]
    theirs = ranks[1].tiers[0]._store
    assert isinstance(theirs, BreakableStore)
    theirs.gate.clear()
    team, saved = TeamTier(0, ranks[0], Ranks(ranks[1])), Answers()
    team.save([bytes(16).hex()], [ranks[0].pool.buffer(1)], saved)
    opens = threading.Timer(0.2, theirs.gate.set)
    opens.start()
    team.flush(10)
    assert saved.values == [[True]]
    assert theirs.contains([ranks[1].key(bytes(16))]) == [True]
    opens.join()
    team.close()


def test_a_rank_whose_store_fails_says_nothing_of_what_is_there() -> None:
    """Else routers were told that its blocks are gone."""
    ranks = [tiered(rank) for rank in range(2)]
    theirs, key = ranks[1].tiers[0]._store, bytes(16).hex()
    assert isinstance(theirs, BreakableStore)
    team, found = TeamTier(0, ranks[0], Ranks(ranks[1])), Answers()
    team.lookup([key], found)
    found.wait(1)
    assert (found.values, team.doubtful) == ([[False]], False)
    theirs.failing = StoreError("the master does not answer")
    team.lookup([key], found)
    found.wait(2)
    assert (found.values[-1], team.doubtful) == ([False], True)
    team.close()


def test_a_rank_goes_on_when_its_whole_unit_is_told_to_end() -> None:
    listener = Listener("127.0.0.1")
    rank = start_rank(1, listener.address, {**os.environ, TOKEN: listener.token})
    try:
        links = listener.accept({(1, "steps"), (1, "calls")}, lambda: None, 100)
        for number in (signal.SIGTERM, signal.SIGINT):
            rank.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            rank.wait(1)
        for link in links.values():
            link.close()
    finally:
        rank.kill()
        rank.wait()
        listener.close()


def test_a_rank_that_says_nothing_of_a_flush_costs_its_own_part_alone() -> None:
    ranks = [tiered(rank) for rank in range(2)]
    own, others = ranks[0].tiers[0]._store, Ranks(ranks[1])
    assert isinstance(own, BreakableStore)
    own.gate.clear()
    team = TeamTier(0, ranks[0], others)
    team.save([bytes(16).hex()], [ranks[0].pool.buffer(1)], Answers())
    others.stopped = True
    opens = threading.Timer(0.2, own.gate.set)
    opens.start()
    with pytest.raises(InternalError, match="rank 1"):
        team.flush(10)
    assert others.within_s < 11  # what rank 0 has left of its time, and a second
    assert own.contains([ranks[0].key(bytes(16))]) == [True]
    opens.join()
    others.stopped = False
    team.close()


def open_sessions(receiver: TeamReceiver) -> list[str]:
    return [session for door in receiver.doors for _, session in door.sessions if _is_open(session)]


def _is_open(session: str) -> bool:
    try:
        return bool(describe(session, 10))
    except TransferError:
        return False


@pytest.mark.parametrize("failing", [0, 1])
def test_a_fence_that_has_failed_part_way_is_tried_again_for_the_same_generation(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one rank would be a generation ahead, and doors that are open on the other would look like old ones."""
    with receiving() as (receiver, ranks):
        first = receiver.doors
        own = ranks[failing].receiver
        assert own is not None

        def fail() -> None:
            raise InternalError("not certain")

        receiver.advance()
        second = receiver.doors
        assert all(new.sessions != old.sessions for new, old in zip(second, first, strict=True))
        with monkeypatch.context() as patch:
            patch.setattr(own, "fence", fail)
            with pytest.raises(InternalError):
                receiver.fence()
        receiver.advance()
        receiver.fence()
        assert receiver.doors == second
        assert len(open_sessions(receiver)) == 2
        assert not any(_is_open(session) for door in first for _, session in door.sessions)
        receiver.advance()  # the next fence is one of its own
        assert all(new.sessions != old.sessions for new, old in zip(receiver.doors, second, strict=True))
        receiver.fence()


@pytest.mark.parametrize("stopped", [False, True])
def test_a_push_of_which_a_rank_says_nothing_ends_all_the_same(stopped: bool) -> None:
    """And settles when the rank goes on: until then it may read the sources."""
    told: queue.SimpleQueue[PushResult | str] = queue.SimpleQueue()
    ranks = [kv(rank, sends=True) for rank in range(2)]
    team = Ranks(ranks[1])
    assert ranks[0].sender is not None
    sender = TeamSender(ranks[0].sender, team, 0.5 if stopped else LIMIT_S)
    try:
        with receiving() as (receiver, theirs):
            team.stopped = stopped
            shards = tuple(door.shard([1, 2]) for door in receiver.doors)
            for number, rank in enumerate(ranks):
                rank.pool.tensor[:2] = number + 1
            sender.push(PushTarget(lease="a", first_block=0, shards=shards), 0, [0, 1], told.put, lambda: told.put("settled"))
            result = told.get(timeout=30)
            assert isinstance(result, PushResult)
            if stopped:
                assert (result.status, result.lands_late) == (PushStatus.UNKNOWN, True)
                assert "rank 1 has not answered" in result.reason
                with pytest.raises(queue.Empty):
                    told.get(timeout=0.2)
            else:
                assert result.status is PushStatus.GOOD
                assert [rank.pool.tensor[1:3].unique().tolist() for rank in theirs] == [[1], [2]]
            team.stopped = False
            team.go_on()
            assert told.get(timeout=30) == "settled"
            assert sender.values["push_bytes"] == 2 * LAYOUT.block_bytes
    finally:
        sender.close()
    assert told.empty()
