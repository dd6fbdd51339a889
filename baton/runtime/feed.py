"""Feed: what one request gets from the tiers of KV and gives to them. `runtime.loading` and `runtime.saving` keep it."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from baton.scheduling.request import Request, RequestStatus
from baton.types import Fetch


@dataclass(slots=True, eq=False)
class Feed:
    """Tiers are numbers, the fastest first; blocks are numbers in the prompt."""

    request: Request
    hold: bool
    await_saves: bool
    num_tokens: int = 0  # known at the start
    num_blocks: int = 0  # full blocks of them
    num_matched: int = 0  # leading blocks of the own prefix cache at the start
    num_found: int = 0  # leading blocks that are here, or were in a tier at the start and worth fetching
    num_available: int = 0  # leading blocks that are here, or in a tier by now and worth fetching
    num_loaded: int = 0  # leading blocks that are here
    looked_up: bool = False
    ready: bool = False  # there is nothing to wait for
    closed: bool = False
    next_refetch: int = 0  # how often it must have been preempted to be looked up again; 0: it has not been yet
    deadline: float | None = None  # of the calls in flight

    asked: range = range(0)  # blocks of the lookup
    answered: set[int] = field(default_factory=set[int])  # tiers, or those not waited for
    sources: dict[int, list[int]] = field(default_factory=dict[int, list[int]])  # of a block: tiers to try, in order
    failed: set[int] = field(default_factory=set[int])  # tiers that took too long
    assumed_s: dict[int, float] = field(default_factory=dict[int, float])  # for a block, by tier, when it was decided what to fetch
    decides: bool = False  # anew while it loads; not where others count on what was said
    source: int = -1  # tier of the load in flight
    room_deadline: float | None = None  # until when it waits for free blocks
    in_flight: list[int] = field(default_factory=list[int])
    begun: float = 0.0  # time.time, of the load in flight
    fetches: list[Fetch] = field(default_factory=list[Fetch])  # not told yet

    kept: defaultdict[int, set[int]] = field(default_factory=lambda: defaultdict[int, set[int]](set))  # blocks that a tier has
    shared: set[int] = field(default_factory=set[int])  # blocks that other workers can read
    num_saved_blocks: int = 0  # leading run of `shared`
    num_saving: int = 0  # calls to shared tiers
    saves_given_up: bool = False

    def take_fetches(self) -> tuple[Fetch, ...]:
        taken, self.fetches = tuple(self.fetches), []
        return taken

    def keep(self, number: int, block: int, *, shared: bool) -> None:
        """A tier has the block; others can read that tier if it is `shared`."""
        self.kept[number].add(block)
        if shared:
            self.shared.add(block)

    def count_saved(self) -> None:
        while self.num_saved_blocks in self.shared and self.num_saved_blocks < self.num_blocks:
            self.num_saved_blocks += 1

    def num_missing(self, block_size: int) -> int:
        """Tokens that were nowhere to be found when the request was looked up."""
        return self.num_tokens - self.num_found * block_size

    @property
    def saves_ended(self) -> bool:
        return self.num_saving == 0 or self.saves_given_up or self.num_saved_blocks >= self.num_blocks

    @property
    def is_awaited(self) -> bool:
        """The scheduler has not seen the request yet."""
        return not self.closed and self.request.status is RequestStatus.LOADING

    @property
    def has_own_room(self) -> bool:
        """It is loaded into the request's own blocks."""
        return self.next_refetch > 0

    def source_of(self, block: int) -> int | None:
        """The fastest tier that may give it."""
        return next((tier for tier in self.sources.get(block, ()) if tier not in self.failed), None)

    def sources_of(self, blocks: Iterable[int]) -> Iterator[int]:
        """Of each, up to the first that no tier may give."""
        for block in blocks:
            number = self.source_of(block)
            if number is None:
                return
            yield number
