"""Fleet: what a router knows of its workers, without the network: who they are, their latest loads, what was just sent to them, and which
blocks they hold. `workers.Workers` keeps it up to date over gRPC, a simulation by function calls; a policy sees it as a `View`.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from baton.types import Load, Member, MemberState, StateUpdate
from services.router.index import FETCHED, Depths, PrefixIndex
from services.router.view import LOAD_COLUMNS, PACE_COLUMNS, Layout, View

_NEVER = 1e9  # seconds of a token, from a tier that does not answer
_SINCE = LOAD_COLUMNS.index("computing_s")  # in the fleet's own table: since when


@dataclasses.dataclass(slots=True, eq=False)
class Worker:
    member: Member
    state: MemberState | None = None  # None: its stream does not speak
    load: Load = dataclasses.field(default_factory=Load)
    routed: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict[str, tuple[int, int]])
    """Requests sent there that its load does not count yet: tokens and pairs to compute."""
    gone: bool = False  # no member any more
    sequence: int = -1  # of the latest update
    snapshots: int = 0  # taken in
    gaps: int = 0  # updates that did not come, and were noticed by the next one's number
    mismatches: int = 0  # updates after which its digests were not those of the index
    row: int = -1  # in the fleet's table
    since: float = 0.0  # when it told of another step, or got something to do
    settling: list[str] = dataclasses.field(default_factory=list[str])  # requests whose blocks the next update will name

    @property
    def usable(self) -> bool:
        return not self.gone and self.state is MemberState.READY and self.member.state is MemberState.READY

    @property
    def drains(self) -> bool:
        """It speaks, and has said that it leaves."""
        return self.state is not None and MemberState.DRAINING in (self.state, self.member.state)

    @property
    def has_work(self) -> bool:
        return bool(self.load.num_waiting_tokens) or any(tokens for tokens, _ in self.routed.values())


class Fleet:
    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """`now`: seconds of any clock."""
        self._now = now
        self.index = PrefixIndex()
        self.workers: dict[str, Worker] = {}
        self._stale = True  # who is usable may have changed
        self._shortest: int | None = None  # of the members' limits; None: to be looked up
        self._layout = self._laid_out(())
        self._table: NDArray[np.float64] = np.zeros((len(LOAD_COLUMNS) + len(PACE_COLUMNS), 0))
        self._places: NDArray[np.intp] = self.index.places(())
        self._fetch: NDArray[np.float64] = np.zeros((len(FETCHED), 0))  # seconds of a token, by row

    def add(self, member: Member) -> Worker:
        worker = self.workers[member.id] = Worker(member)
        self.index.reads(member.id, (member.fingerprint, member.tensor_parallel_size))
        self._stale, self._shortest = True, None
        return worker

    def remove(self, worker: Worker) -> None:
        del self.workers[worker.member.id]
        self.index.remove(worker.member.id)
        self._stale, self._shortest = True, None

    def is_member(self, worker: Worker, member: Member | None) -> None:
        """What the membership says of it now; None: nothing."""
        worker.gone = member is None
        worker.member = member or worker.member
        self._stale, self._shortest = True, None

    @property
    def max_model_len(self) -> int:
        """Tokens of a request that all members take; 0: none has said. Asked for each request, so looked up once for each change."""
        if self._shortest is None:
            members = [worker.member for worker in self.workers.values() if not worker.gone]
            self._shortest = min((each.max_model_len for each in members if each.max_model_len), default=0)
        return self._shortest

    def silent(self, worker: Worker) -> None:
        """It is not used until it speaks again."""
        if worker.state is not None:
            worker.state = None
            self._stale = True

    def update(self, worker: Worker, update: StateUpdate) -> bool:
        """Takes in what it says of itself; whether its state has changed."""
        name, changed = worker.member.id, worker.state is not update.state
        moved = changed or [tier for tier, _ in worker.load.fetch_token_s] != [tier for tier, _ in update.load.fetch_token_s]
        if self.workers.get(name) is not worker:  # it has a successor
            return False
        self.index.apply(name, update.events, snapshot=update.snapshot)
        if not worker.has_work or update.load.num_steps != worker.load.num_steps:
            worker.since = self._now()
        worker.sequence, worker.snapshots = update.sequence, worker.snapshots + update.snapshot
        worker.state, worker.load = update.state, update.load
        for request_id in update.arrived:
            worker.routed.pop(request_id, None)
        for request_id in worker.settling:
            worker.routed.pop(request_id, None)
            self.index.settle(name, request_id)
        worker.settling.clear()
        self._stale |= moved
        self._write(worker)
        return changed

    def routed(self, worker_id: str, request_id: str, tokens: int, pairs: int, expected: Sequence[bytes] = ()) -> None:
        """A request is on its way there; counted until the worker's own load has it, so that a burst spreads, or `unrouted`. `expected`:
        blocks that it will compute there for it."""
        worker = self.workers.get(worker_id)
        if worker is not None:
            if not worker.has_work:
                worker.since = self._now()
            worker.routed[request_id] = tokens, pairs
            if expected:
                self.index.expect(worker_id, request_id, expected)
            self._write(worker)

    def unrouted(self, worker_id: str, request_id: str, *, silent: bool = False) -> None:
        """It has come to its first token there, or will not be computed there at all. `silent`: because nothing came from there; it counts
        until the worker speaks, lest one that hangs seem to have nothing to do."""
        worker = self.workers.get(worker_id)
        if worker is not None:
            worker.settling.append(request_id)
            if not silent and worker.routed.pop(request_id, None) is not None:
                self._write(worker)

    def view(self, hashes: Callable[[int], Sequence[bytes]], exclude: Sequence[str] = ()) -> View:
        """Usable workers as they are now, with how much of a prompt each one holds. `hashes`: of the prompt's blocks that may be found in
        caches (`hashing.num_matchable_blocks`), of so many tokens each."""
        if self._stale:
            self._lay_out()
        layout, table, places, fetch = self._layout, self._table, self._places, self._fetch
        if exclude:
            layout, rows = layout.without(frozenset(exclude))
            table, places, fetch = table[:, rows], places[rows], fetch[:, rows]
        found = np.zeros((4, len(places)))
        for size in layout.block_sizes:
            some = _found(self.index.reaches(hashes(size), places), fetch)
            some *= size
            if len(layout.block_sizes) == 1:
                found = some
            else:
                np.copyto(found, some, where=layout.block_size == size)
        table = table if exclude else table.copy()
        table[_SINCE] = self._now() - table[_SINCE]
        return View(layout, table[: len(LOAD_COLUMNS)], table[len(LOAD_COLUMNS) :], found)

    def _lay_out(self) -> None:
        usable = sorted((worker for worker in self.workers.values() if worker.usable), key=lambda worker: worker.member.id)
        for worker in self.workers.values():
            worker.row = -1
        self._layout, self._places = self._laid_out(usable), self.index.places(worker.member.id for worker in usable)
        self._table = np.zeros((len(LOAD_COLUMNS) + len(PACE_COLUMNS), len(usable)))
        self._fetch = np.full((len(FETCHED), len(usable)), _NEVER)
        for row, worker in enumerate(usable):
            worker.row = row
            self._write(worker)
        self._stale = False

    def _laid_out(self, workers: Sequence[Worker]) -> Layout:
        members = [worker.member for worker in workers]
        prints, sizes = [m.fingerprint for m in members], [m.block_size for m in members]
        devices = [m.device and f"{m.machine}/{m.device}" for m in members]
        return Layout([m.id for m in members], [m.role for m in members], prints, sizes, devices)

    def _write(self, worker: Worker) -> None:
        if worker.row < 0:
            return
        load, pace = worker.load, worker.load.pace
        for tier, seconds in load.fetch_token_s:
            if tier in FETCHED:
                self._fetch[FETCHED.index(tier), worker.row] = seconds
        tokens = pairs = 0
        for some_tokens, some_pairs in worker.routed.values():
            tokens += some_tokens
            pairs += some_pairs
        waiting = load.num_waiting + len(worker.routed)
        self._table[:, worker.row] = (
            load.num_running + waiting,
            load.num_waiting_tokens + tokens,
            load.num_waiting_pairs + pairs,
            waiting,
            load.num_held,
            load.num_context_tokens,
            1 - load.blocks_free / load.blocks_total if load.blocks_total else 0.0,
            load.blocks_total * worker.member.block_size,
            worker.member.max_num_batched_tokens,
            worker.since,
            pace.base_s,
            pace.token_s,
            pace.pair_s,
            pace.row_s,
            pace.context_s,
            pace.push_token_s,
            pace.crowded,
        )


def _found(reaches: Depths, token_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """The leading blocks that each worker holds, will hold, and can have, and the seconds of fetching what it will not hold, by the seconds
    of a token each. What a tier adds to the run counts at its own rate, and ends the run where that tier does not answer."""
    found = np.empty((4, reaches.shape[1]))
    found[:2], found[2] = reaches[:2], reaches[-1]
    if (found[2] == found[1]).all():
        found[3] = 0.0
        return found
    fetched = reaches[2:] - reaches[1:-1]
    seconds = fetched * token_s
    if seconds.max(initial=0.0) >= _NEVER:
        beyond = np.logical_or.accumulate(seconds >= _NEVER)
        fetched[beyond] = seconds[beyond] = 0.0
        np.add(found[1], fetched.sum(axis=0), out=found[2])
    np.add(seconds[0], seconds[1], out=found[3])
    found[3] += seconds[2]
    return found
