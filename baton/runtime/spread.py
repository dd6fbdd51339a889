"""What moves KV, on all ranks of a worker at once: a push, a fence or a load has happened when every rank has done its part.

Each class here has rank 0's own part, and calls the other ranks, whose side of the calls is `Handlers`.
"""

import itertools
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from baton.errors import BatonError
from baton.kv.push import Door, PushResult, PushStatus
from baton.kv.shards import Joint, ShareSender
from baton.kv.store import Buffer
from baton.kv.transfer import DOUBT_S, KVTransfer
from baton.runtime.crew import Team
from baton.runtime.rank_kv import RankKV
from baton.types import PushShard, PushTarget

Answer = Callable[..., None]
"""(value, last=True)"""
_ANSWER_S = 1.0  # that a rank has to tell of a push, or a flush, beyond its own limit


class _Part:
    """One rank's part of a push: it ends once, and settles after that. Thread-safe."""

    def __init__(self, rank: int, joint: Joint) -> None:
        self._rank, self._joint, self._start = rank, joint, time.monotonic()
        self._lock, self._ended = threading.Lock(), False

    def done(self, result: PushResult) -> None:
        with self._lock:
            if not self._ended:
                self._ended = True
                self._joint.done(result)

    def settled(self) -> None:
        with self._lock:
            self._joint.settled()

    def give_up(self) -> None:
        """It has said nothing in its time. What it sends may still arrive; its sources are taken until it says so, or ends."""
        seconds = time.monotonic() - self._start
        self.done(PushResult(PushStatus.UNKNOWN, 0, seconds, f"rank {self._rank} has not answered for {seconds:.1f} s", lands_late=True))


class _Patience:
    """Gives up what has not ended `limit_s` after it was handed over. One thread, since all have the same time."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s, self._closed = limit_s, threading.Event()
        self._parts: queue.SimpleQueue[tuple[float, _Part] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="patience", daemon=True)
        self._thread.start()

    def add(self, part: _Part) -> None:
        self._parts.put((time.monotonic() + self._limit_s, part))

    def close(self) -> None:
        """Gives up what is left at once."""
        self._closed.set()
        self._parts.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._parts.get()) is not None:
            deadline, part = item
            self._closed.wait(max(deadline - time.monotonic(), 0.0))
            part.give_up()


class TeamSender:
    """See `pushing.Sender`."""

    def __init__(self, own: ShareSender, team: Team, limit_s: float) -> None:
        """`limit_s`: see `MooncakeSender`. What another rank has not told of within it, and a second, is UNKNOWN."""
        self._own, self._team = own, team
        self._theirs: dict[int, Mapping[str, float]] = {}  # what other ranks have counted
        self._patience = _Patience(limit_s + _ANSWER_S)

    @property
    def values(self) -> dict[str, float]:
        """All ranks' together."""
        each = [self._own.direct.values, *self._theirs.values()]
        return {name: sum(values[name] for values in each) for name in self._own.direct.values}

    def reaches(self, target: PushTarget) -> bool:
        """Whether there is a direct path there."""
        return bool(target.shards) and all(self._own.direct.path(shard).protocol for shard in target.shards)

    def push(
        self, target: PushTarget, first: int, block_ids: Sequence[int], done: Callable[[PushResult], None], settled: Callable[[], None]
    ) -> None:
        joint = Joint(1 + len(self._team.others), done, settled)
        last = first + len(block_ids)
        shards = [PushShard(shard.machine, shard.sessions, shard.addresses[first:last]) for shard in target.shards]
        arguments = {"shards": [_shard_to_json(shard) for shard in shards], "block_ids": list(block_ids)}
        for rank in self._team.others:
            part = _Part(rank, joint)
            self._patience.add(part)
            self._team.call(rank, "push", arguments, lambda value, error, rank=rank, part=part: self._heard(rank, part, value))
        self._own.push(shards, block_ids, joint.done, joint.settled)

    def close(self) -> None:
        try:
            self._team.ask("close_sender")
        finally:
            self._patience.close()
            self._own.close()

    def _heard(self, rank: int, part: _Part, value: Any) -> None:
        if value is None:
            part.settled()
            return
        self._theirs[rank] = value["values"]
        status, nbytes, seconds, reason, lands_late = value["result"]
        part.done(PushResult(PushStatus(status), nbytes, seconds, reason and f"rank {rank}: {reason}", lands_late))


class TeamReceiver:
    """See `pushing.Receiver`. A generation is one when all ranks have it."""

    def __init__(self, kv: RankKV, team: Team) -> None:
        assert kv.receiver is not None
        self._kv, self._own, self._team = kv, kv.receiver, team
        self._advanced = False
        self.doors = self._doors()

    @property
    def revocable(self) -> bool:
        return self._own.revocable

    def advance(self) -> None:
        """Nothing, if the generation before is not fenced on every rank yet: some would have one more than others, and doors of which a
        part is still open would look old."""
        if not self._advanced:
            self._team.ask("advance")
            self._own.advance()
            self.doors, self._advanced = self._doors(), True

    def fence(self) -> None:
        self._team.ask("fence")
        self._own.fence()
        self._advanced = False

    def close(self) -> None:
        try:
            self._team.ask("close_receiver")
        finally:
            self._own.close()

    def _doors(self) -> tuple[Door, ...]:
        return (self._kv.door(), *(_door_from_json(door) for door in self._team.ask("door")))


class TeamTier:
    """See `loading.Tier`. Keys are block hashes in hex: each rank names its own share. Counts and speed are those of rank 0's part."""

    def __init__(self, number: int, kv: RankKV, team: Team) -> None:
        """`number`: among the tiers of each rank."""
        self._number, self._kv, self._team = number, kv, team
        self._own: KVTransfer = kv.tiers[number]
        self._numbers, self._asked = itertools.count(), dict[int, float]()  # lookups in hand: when they began
        self._certain = dict.fromkeys(team.others, True)  # whether another rank's last answer was its store's
        self.name, self.shared, self.direct = self._own.name, self._own.shared, self._own.direct

    def seconds(self, nbytes: int) -> float:
        return self._own.seconds(nbytes)

    @property
    def available(self) -> bool:
        return self._own.available

    @property
    def doubtful(self) -> bool:
        asked = list(self._asked.values())
        late = bool(asked) and time.monotonic() - asked[0] > DOUBT_S
        return self._own.doubtful or late or not all(self._certain.values())

    def decline(self, num_blocks: int) -> None:
        self._own.decline(num_blocks)

    def leave_out(self, num_blocks: int) -> None:
        self._own.leave_out(num_blocks)

    def lookup(self, keys: Sequence[str], done: Callable[[list[bool]], None]) -> None:
        number = next(self._numbers)
        self._asked[number] = time.monotonic()

        def answered(flags: list[bool]) -> None:
            self._asked.pop(number, None)
            done(flags)

        together = self._on_all("lookup", keys, [], answered)
        self._own.lookup(self._keys(keys), together)

    def load(self, keys: Sequence[str], buffers: Sequence[Buffer], done: Callable[[list[bool]], None]) -> None:
        together = self._on_all("load", keys, buffers, done)
        self._own.load(self._keys(keys), buffers, together)

    def save(self, keys: Sequence[str], buffers: Sequence[Buffer], done: Callable[[list[bool]], None]) -> None:
        together = self._on_all("save", keys, buffers, done)
        self._own.save(self._keys(keys), buffers, together)

    def flush(self, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        self._own.flush(limit_s)  # the other ranks' saves go on beside ours
        left_s = max(deadline - time.monotonic(), 0.0)
        self._team.ask("flush_tier", within_s=left_s + _ANSWER_S, tier=self._number, limit_s=left_s)

    def close(self) -> None:
        try:
            self._team.ask("close_tier", tier=self._number)
        finally:
            self._own.close()

    def _keys(self, keys: Sequence[str]) -> list[str]:
        return [self._kv.key(bytes.fromhex(key)) for key in keys]

    def _on_all(
        self, what: str, keys: Sequence[str], buffers: Sequence[Buffer], done: Callable[[list[bool]], None]
    ) -> Callable[[list[bool]], None]:
        """Calls the other ranks. What is given back takes rank 0's own flags; `done` gets those true everywhere, when all have answered."""
        joint = _Flags(1 + len(self._team.others), done)
        block_ids = [(buffer.address - self._kv.pool.region.address) // buffer.nbytes for buffer in buffers]
        arguments = {"tier": self._number, "what": what, "keys": list(keys), "block_ids": block_ids}

        def heard(rank: int, value: Any, error: BatonError | None) -> None:
            flags, self._certain[rank] = ([False] * len(keys), False) if error is not None else value
            joint.add(flags)

        for rank in self._team.others:
            self._team.call(rank, "tier", arguments, partial(heard, rank))
        return joint.add


class _Flags:
    def __init__(self, count: int, done: Callable[[list[bool]], None]) -> None:
        self._left, self._done, self._answers = count, done, list[list[bool]]()
        self._lock = threading.Lock()

    def add(self, flags: list[bool]) -> None:
        with self._lock:
            self._answers.append(flags)
            last = len(self._answers) == self._left
        if last:
            self._done([all(each) for each in zip(*self._answers, strict=True)])


class TeamChecksums:
    """See `pushing.Checksums`."""

    def __init__(self, kv: RankKV, team: Team) -> None:
        self._kv, self._team = kv, team

    def __call__(self, block_ids: Sequence[int]) -> list[int]:
        parts = [self._kv.checksums(block_ids), *self._team.ask("checksums", block_ids=list(block_ids))]
        return [sum(sums) % 2**32 for sums in zip(*parts, strict=True)]


class Handlers:
    """Another rank's side: what rank 0 calls, by name. What takes long has a thread of its own."""

    def __init__(self, kv: RankKV) -> None:
        self._kv = kv
        self._slow = ThreadPoolExecutor(1, thread_name_prefix="calls")

    def serve(self, name: str, arguments: Mapping[str, Any], answer: Answer) -> None:
        """`answer` may be called later, on any thread, as (value, last=True), or with a BatonError as its value."""
        kv = self._kv
        if name == "push":
            self._push(answer, **arguments)
        elif name == "tier":
            self._tier(answer, **arguments)
        elif name == "checksums":
            answer(kv.checksums(arguments["block_ids"]))
        elif name == "door":
            answer(_door_to_json(kv.door()))
        elif name == "close_tier":
            self._slowly(kv.tiers[arguments["tier"]].close, answer)
        elif name == "flush_tier":
            self._slowly(partial(kv.tiers[arguments["tier"]].flush, arguments["limit_s"]), answer)
        elif name == "close_sender" and kv.sender is not None:
            self._slowly(kv.sender.close, answer)
        else:
            assert kv.receiver is not None
            calls = {"advance": kv.receiver.advance, "fence": kv.receiver.fence, "close_receiver": kv.receiver.close}
            self._slowly(calls[name], answer)

    def _slowly(self, call: Callable[[], None], answer: Answer) -> None:
        def run() -> None:
            try:
                call()
            except BatonError as error:
                answer(error)
            else:
                answer(None)

        self._slow.submit(run)

    def _push(self, answer: Answer, shards: Sequence[Any], block_ids: Sequence[int]) -> None:
        sender = self._kv.sender
        assert sender is not None

        def done(result: PushResult) -> None:
            told = [result.status.value, result.nbytes, result.seconds, result.reason, result.lands_late]
            answer({"result": told, "values": sender.direct.values}, last=False)

        sender.push([_shard_from_json(shard) for shard in shards], block_ids, done, lambda: answer(None))

    def _tier(self, answer: Answer, tier: int, what: str, keys: Sequence[str], block_ids: Sequence[int]) -> None:
        transfer, names = self._kv.tiers[tier], [self._kv.key(bytes.fromhex(key)) for key in keys]

        def done(flags: list[bool]) -> None:
            answer([flags, transfer.available and not transfer.doubtful])

        if what == "lookup":
            transfer.lookup(names, done)
        else:
            call = transfer.load if what == "load" else transfer.save
            call(names, [self._kv.pool.buffer(block_id) for block_id in block_ids], done)


def _shard_to_json(shard: PushShard) -> list[Any]:
    return [shard.machine, shard.sessions, shard.addresses]


def _shard_from_json(value: Sequence[Any]) -> PushShard:
    machine, sessions, addresses = value
    return PushShard(machine, tuple((protocol, session) for protocol, session in sessions), tuple(addresses))


def _door_to_json(door: Door) -> list[Any]:
    return [door.machine, door.sessions, door.base, door.block_bytes]


def _door_from_json(value: Sequence[Any]) -> Door:
    machine, sessions, base, block_bytes = value
    return Door(machine, tuple((protocol, session) for protocol, session in sessions), base, block_bytes)
