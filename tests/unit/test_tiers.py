"""Fetching against computing, and the ways of blocks between tiers."""

import functools
import random
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.config import FilesConfig, HostConfig, WorkerConfig, load_config
from baton.errors import ConfigError
from baton.hashing import block_hashes
from baton.kv.files import FileStore
from baton.kv.holdings import Holdings
from baton.kv.host import HostStore
from baton.kv.layout import block_key
from baton.kv.memory import CpuMemory
from baton.scheduling import fetching
from baton.scheduling.fetching import Rate, num_to_fetch
from baton.types import BlocksRemoved, BlocksStored, OutputToken, Pace, PushTarget, Tier
from services.router.index import PrefixIndex
from tests.properties.test_engine_machine import BUDGET_S, EngineMachine
from tests.properties.toy import BLOCK_SIZE, ToyTransfer, reference
from tests.unit.test_files import Slot

BLOCK = 4096


# -- fetch or compute

seconds = st.floats(0, 10)


@given(st.lists(st.tuples(seconds, seconds), max_size=20), seconds)
def test_the_cut_is_the_best_of_all(blocks: list[tuple[float, float]], wait_s: float) -> None:
    fetch_s, compute_s = [fetch for fetch, _ in blocks], [compute for _, compute in blocks]

    def total(count: int) -> float:
        return max(sum(fetch_s[:count]), wait_s) + sum(compute_s[count:])

    chosen = num_to_fetch(fetch_s, compute_s, wait_s)
    assert total(chosen) <= min(map(total, range(len(blocks) + 1))) + 1e-9


def test_what_the_cut_means() -> None:
    assert num_to_fetch([0.0] * 5, [1.0] * 5, 0.0) == 5  # nothing is known of the tier: it is tried
    assert num_to_fetch([1.0] * 5, [1.0] * 5, 0.0) == 5
    assert num_to_fetch([2.0] * 5, [1.0] * 5, 0.0) == 0
    assert num_to_fetch([0.1] * 3 + [2.0] * 5, [1.0] * 8, 0.0) == 3  # what the host has, not what the slow disk has
    assert num_to_fetch([2.0] * 5, [1.0] * 5, 6.0) == 3  # the engine is busy meanwhile
    assert num_to_fetch([9.0, 0.1, 0.1], [4.0] * 3, 0.0) == 3  # a queue, once
    assert num_to_fetch([2.0] * 4, [1.0, 2.0, 3.0, 4.0], 0.0) == 4  # the further back, the more there is to attend to


def test_a_rate_is_a_median_and_ages(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(fetching.time, "monotonic", lambda: now)
    rate = Rate()
    assert rate.seconds(100) == 0.0
    for _ in range(5):
        rate.add(100, 1.0)
    rate.add(100, 50.0)  # a hiccup
    rate.add(1, 5.0)  # a tiny call
    rate.add(0, 5.0)
    assert rate.seconds(200) == 2.0
    now += fetching.HALF_LIFE_S
    assert rate.seconds(200) == pytest.approx(1.0)
    for _ in range(fetching.NUM_SAMPLES):
        rate.add(100, 50.0)  # not a hiccup
    assert rate.seconds(200) == 100.0


# -- the way of blocks

PROMPT = [0, 1, 2, 3, 3, 2, 1, 0, 1, 1, 2, 2, 3]
NUM_FULL = len(PROMPT) // BLOCK_SIZE


class Tiers:
    """An engine with a host tier, a pool and files, all by hand."""

    def __init__(self) -> None:
        self.machine = EngineMachine()
        self.machine.start(num_blocks=20, budget=30, seqs=4, caching=True, depth=0, around=True)
        self.host, self.pool, self.files = self.machine.tiers

    def fill(self, tier: ToyTransfer, *numbers: int) -> None:
        for number, key in enumerate(block_hashes(PROMPT, BLOCK_SIZE)):
            if number in numbers:
                tier.pool[key.hex()] = tuple(PROMPT[number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE])

    def submit(self, *, hold: bool = False, await_saves: bool = False) -> str:
        self.machine.submit(prompt=PROMPT, max_tokens=3, cut=0, hold=hold, await_saves=await_saves, push=False)
        return f"r{self.machine.count}"

    def computing_takes(self, token_s: float) -> None:
        self.machine.engine.loader._pace = lambda: Pace(token_s=token_s)

    def answer(self, *tiers: ToyTransfer, works: bool = True) -> None:
        while any([tier.answer_one(works) for tier in tiers or self.machine.tiers]):  # noqa: C419
            self.machine.run_inbox()

    def end(self, name: str) -> int:
        """How many prompt tokens were not computed."""
        sink, request = self.machine.sinks[name]
        cache = None
        entry = self.machine.entries[name]
        for _ in range(50):
            self.answer()
            self.machine.step()
            cache = cache or entry.request.cache
        assert sink.tokens == reference(request)
        self.machine.teardown()
        assert cache is not None
        return cache.num_local_tokens + cache.num_pool_tokens


@pytest.fixture
def tiers() -> Tiers:
    return Tiers()


def test_each_block_comes_from_the_fastest_tier_and_goes_to_faster_ones(tiers: Tiers) -> None:
    tiers.fill(tiers.files, 0, 1, 2)
    tiers.fill(tiers.pool, 1)
    tiers.fill(tiers.host, 0)
    name = tiers.submit()
    assert tiers.end(name) == 3 * BLOCK_SIZE
    assert len(tiers.host.pool) == 3
    assert len(tiers.pool.pool) == 2  # its own, and what came from the files


def test_only_shared_tiers_count_as_saved(tiers: Tiers) -> None:
    name = tiers.submit(await_saves=True)
    tiers.answer()
    tiers.machine.step()
    entry = tiers.machine.entries[name]
    tiers.answer(tiers.host, tiers.files)
    assert len(tiers.host.pool) == NUM_FULL
    assert (entry.feed.num_saved_blocks, entry.feed.saves_ended) == (0, False)
    tiers.answer(tiers.pool)
    assert (entry.feed.num_saved_blocks, entry.feed.saves_ended) == (NUM_FULL, True)
    tiers.end(name)


def test_what_only_a_private_tier_has_is_saved_to_the_pool_for_a_prefill(tiers: Tiers) -> None:
    tiers.fill(tiers.host, 0, 1)
    tiers.fill(tiers.pool, 0)
    name = tiers.submit(await_saves=True)
    tiers.answer()
    assert tiers.machine.entries[name].feed.num_saved_blocks == 1
    tiers.machine.step()
    tiers.answer()
    assert len(tiers.pool.pool) == NUM_FULL
    tiers.end(name)


def test_nobody_waits_for_a_tier_when_faster_ones_have_everything(tiers: Tiers) -> None:
    tiers.fill(tiers.host, 0, 1, 2)
    name = tiers.submit()
    tiers.answer(tiers.host)
    assert tiers.machine.entries[name].feed.ready
    assert tiers.end(name) == 3 * BLOCK_SIZE


def test_a_tier_that_does_not_answer_costs_its_own_blocks_alone(tiers: Tiers) -> None:
    tiers.fill(tiers.host, 0, 1)
    tiers.fill(tiers.files, 0, 1, 2)
    name = tiers.submit()
    tiers.answer(tiers.host, tiers.pool)
    assert not tiers.machine.entries[name].feed.looked_up
    tiers.machine.engine.loader.tick(time.monotonic() + BUDGET_S)
    tiers.answer(tiers.host)
    assert tiers.machine.entries[name].feed.ready
    assert tiers.end(name) == 2 * BLOCK_SIZE


def test_tiers_that_last_hear_of_what_the_device_has(tiers: Tiers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they would drop first what is used most."""
    asked: list[tuple[str, list[str]]] = []
    tiers.submit()
    for _ in range(10):
        tiers.answer()
        tiers.machine.step()
    for tier in tiers.machine.tiers:
        lookup = tier.lookup
        heard = lambda keys, done, name=tier.name, lookup=lookup: (asked.append((name, keys)), lookup(keys, done))  # noqa: E731
        monkeypatch.setattr(tier, "lookup", heard)
    prefix = [key.hex() for key in block_hashes(PROMPT, BLOCK_SIZE)[:NUM_FULL]]
    names = [tiers.submit() for _ in range(2)]  # but not all the time
    assert asked == [("pool", prefix), ("files", prefix)]
    assert tiers.end(names[1]) == len(PROMPT) - 1


@pytest.mark.parametrize("how", ["misses", "hangs"])
def test_what_one_tier_does_not_give_another_does(tiers: Tiers, how: str) -> None:
    tiers.fill(tiers.pool, 0, 1, 2)
    tiers.fill(tiers.files, 0, 1, 2)
    name = tiers.submit()
    for tier in tiers.machine.tiers:
        tier.answer_one(True)
    tiers.machine.run_inbox()
    assert tiers.machine.entries[name].feed.source == 1
    if how == "misses":
        tiers.pool.answer_one(False)
        tiers.machine.run_inbox()
    else:
        tiers.machine.engine.loader.tick(time.monotonic() + BUDGET_S)
    assert tiers.machine.entries[name].feed.source == 2
    assert tiers.end(name) == 3 * BLOCK_SIZE


def test_what_the_pool_has_lost_is_loaded_once_a_prefill_worker_has_saved_it_again(tiers: Tiers) -> None:
    tiers.fill(tiers.host, 0, 1, 2)
    name = tiers.submit(hold=True)
    for tier in tiers.machine.tiers:
        tier.answer_one(True)
    tiers.machine.run_inbox()
    tiers.host.answer_one(False)
    tiers.machine.run_inbox()
    entry = tiers.machine.entries[name]
    assert (entry.feed.num_loaded, entry.feed.in_flight) == (0, [])
    tiers.fill(tiers.pool, 0, 1, 2)
    tiers.machine.engine.loader.offer(entry.feed, 3)
    tiers.answer()
    assert entry.feed.num_loaded == 3
    tiers.machine.engine.loader.release(entry.feed)
    assert tiers.end(name) == 3 * BLOCK_SIZE


def test_what_is_slower_than_computing_is_computed_and_counted(tiers: Tiers) -> None:
    tiers.fill(tiers.host, 0)
    tiers.fill(tiers.files, 0, 1, 2)
    tiers.computing_takes(1.0)
    tiers.files.block_s = 1000.0
    name = tiers.submit()
    assert tiers.end(name) == BLOCK_SIZE
    assert (tiers.host.num_declined, tiers.files.num_declined) == (0, 2)


def test_a_tier_that_turns_out_slow_is_dropped_on_the_way(tiers: Tiers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.runtime.loading.MAX_BLOCKS_PER_LOAD", 1)
    tiers.fill(tiers.files, 0, 1, 2)
    tiers.computing_takes(1.0)
    name = tiers.submit()
    for tier in tiers.machine.tiers:
        tier.answer_one(True)
    tiers.machine.run_inbox()
    tiers.files.block_s = 1000.0  # as the first call tells
    assert tiers.end(name) == BLOCK_SIZE
    assert tiers.files.num_declined == 2


def test_a_request_fetches_what_it_gets_room_for_while_others_compute(tiers: Tiers) -> None:
    machine = tiers.machine
    tiers.fill(tiers.files, 0, 1, 2)
    machine.submit(prompt=[2] * 26, max_tokens=1, cut=0, hold=False, await_saves=False, push=False)
    tiers.answer()
    pool = machine.engine.scheduler.cache.pool
    taken = pool.take(pool.num_free)
    name = tiers.submit()
    tiers.answer()
    feed = machine.entries[name].feed
    assert (feed.ready, feed.num_loaded) == (False, 0)
    assert machine.engine.loader.next_deadline == 0.0
    pool.release(taken[:2])
    machine.engine.loader.tick(time.monotonic())
    tiers.answer(tiers.files)
    assert (feed.ready, feed.num_loaded) == (False, 2)
    pool.release(taken[2:])
    machine.engine.loader.tick(time.monotonic())
    assert tiers.end(name) == 3 * BLOCK_SIZE


def test_nobody_waits_for_room_that_nobody_gives(tiers: Tiers) -> None:
    tiers.fill(tiers.files, 0, 1, 2)
    pool = tiers.machine.engine.scheduler.cache.pool
    taken = pool.take(pool.num_free)
    name = tiers.submit()
    tiers.answer()
    assert tiers.machine.entries[name].feed.ready
    pool.release(taken)
    assert tiers.end(name) == 3 * BLOCK_SIZE  # once it has its own


def test_others_count_on_what_a_held_request_said_it_would_fetch(tiers: Tiers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.runtime.loading.MAX_BLOCKS_PER_LOAD", 1)
    tiers.fill(tiers.files, 0, 1, 2)
    tiers.computing_takes(1.0)
    name = tiers.submit(hold=True)
    for tier in tiers.machine.tiers:
        tier.answer_one(True)
    tiers.machine.run_inbox()
    tiers.files.block_s = 1000.0
    tiers.answer()
    assert tiers.machine.entries[name].feed.num_loaded == 3
    tiers.machine.engine.loader.release(tiers.machine.entries[name].feed)
    assert tiers.end(name) == 3 * BLOCK_SIZE


def test_blocks_that_were_pushed_here_go_to_private_tiers(tiers: Tiers) -> None:
    machine = tiers.machine
    name = tiers.submit(hold=True)
    tiers.answer()
    answers: list = []
    machine.engine.reservations.reserve(machine.entries[name].feed, answers.append)
    (target,) = answers
    for number, address in enumerate(target.shards[0].addresses):
        token_ids = PROMPT[number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE]
        machine.runner.entries[address][:] = token_ids + [777] * (BLOCK_SIZE - len(token_ids))
    machine.engine.reservations.arrived(target.lease, target.num_blocks)
    machine.engine.push(machine.entries[name], OutputToken(reference(machine.sinks[name][1])[0]))
    machine.engine.reservations.settle(target.lease)
    machine.engine.loader.release(machine.entries[name].feed)
    tiers.end(name)
    assert len(tiers.host.pool) == len(tiers.files.pool) == NUM_FULL
    assert len(tiers.pool.pool) == 0  # the prefill worker sees to that


def test_a_tier_that_is_behind_with_its_saves_is_passed_over_alone(tiers: Tiers) -> None:
    machine = tiers.machine
    for i in range(6):
        machine.submit(prompt=[i % 4, i // 4] * 6, max_tokens=1, cut=0, hold=False, await_saves=False, push=False)
        tiers.answer(tiers.host)
        for tier in (tiers.pool, tiers.files):
            tier.answer_one(True) if i == 0 else None
        machine.run_inbox()
        machine.engine.loader.tick(time.monotonic() + BUDGET_S)
        machine.step()
    assert [tier.num_left_out for tier in machine.tiers].count(0) == 1
    machine.teardown()
    assert len(tiers.host.pool) > len(tiers.files.pool) > 0


# -- configuration


def test_settings_that_make_no_sense_are_explained() -> None:
    config = load_config(WorkerConfig, None, ["host.bytes=1GiB", "files.path=/kv", "files.bytes=2GiB"], {})
    assert (config.host, config.files) == (HostConfig(bytes=2**30), FilesConfig(path="/kv", bytes=2**31))
    with pytest.raises(ConfigError, match=r"files.path needs a budget: give files.bytes"):
        load_config(WorkerConfig, None, ["files.path=/kv"], {})
    with pytest.raises(ConfigError, match=r"say nothing without files.path"):
        load_config(WorkerConfig, None, ["files.bytes=1GiB"], {})


def test_blocks_are_reserved_once_it_is_known_what_is_missing(tiers: Tiers) -> None:
    machine, answers = tiers.machine, dict[int, PushTarget | None]()
    name = tiers.submit(hold=True)
    for beyond in (0, len(PROMPT)):
        machine.engine.reserve(name, beyond, functools.partial(answers.__setitem__, beyond))
    machine.run_inbox()
    assert not answers
    tiers.answer()
    assert answers[len(PROMPT)] is None
    target = answers[0]
    assert target is not None
    assert (target.first_block, target.num_blocks) == (0, -(-len(PROMPT) // BLOCK_SIZE))
    machine.engine.reservations.settle(target.lease)
    machine.engine.loader.release(machine.entries[name].feed)
    assert tiers.end(name) == 0


def test_who_ends_before_it_was_looked_up_reserves_nothing(tiers: Tiers) -> None:
    machine, answers = tiers.machine, list[PushTarget | None]()
    name = tiers.submit(hold=True)
    machine.engine.reserve(name, 0, answers.append)
    machine.run_inbox()
    assert not answers
    machine.engine.abort(machine.entries[name])
    assert answers == [None]
    tiers.answer()
    assert machine.engine._check_integrity() == []


# -- what the routers are told


def test_the_pool_is_told_of_by_who_saves_and_by_who_does_not_find(tiers: Tiers) -> None:
    hashes = block_hashes(PROMPT, BLOCK_SIZE)
    news = tiers.machine.engine._tiers
    tiers.fill(tiers.pool, 0)
    name = tiers.submit()
    tiers.answer()
    assert news.take_news() == [BlocksRemoved((hashes[1],), Tier.POOL)]  # where the prefix ends
    tiers.machine.step()
    tiers.answer()
    assert news.take_news() == [BlocksStored(tuple(hashes[1:NUM_FULL]), Tier.POOL)]
    tiers.end(name)


def test_a_pool_that_does_not_answer_is_not_said_to_hold_nothing(tiers: Tiers) -> None:
    tiers.pool.available = False
    name = tiers.submit()
    tiers.answer(works=False)
    news = tiers.machine.engine._tiers
    assert news.take_news() == []
    tiers.host.block_s, tiers.files.block_s = 4.0, 0.0
    assert [tier for tier, _ in news.fetch_token_s()] == [Tier.HOST, Tier.FILES]
    told = dict(news.fetch_token_s())
    assert told[Tier.HOST] == pytest.approx(1.0, rel=0.2)  # in steps, so that ageing is not told all the time
    assert told[Tier.FILES] == 0
    tiers.pool.available = True
    tiers.end(name)


@pytest.mark.parametrize("kind", [Tier.HOST, Tier.FILES])
def test_what_the_routers_are_told_of_a_tier_is_what_it_holds(kind: Tier, tmp_path: Path) -> None:
    """Through evictions, and for files through the next process; others' blocks are nobody's news."""
    size, rng = 4096, random.Random(0)
    keys = [block_key("f" * 32, bytes([number] * 16)) for number in range(60)]

    def make() -> tuple[HostStore | FileStore, Holdings]:
        holdings = Holdings(kind, block_key("f" * 32, b""))
        if kind is Tier.HOST:
            return HostStore(10 * size, size, CpuMemory(), holdings), holdings
        return FileStore(tmp_path / "kv", 10 * (size + 36), holdings), holdings

    store, holdings = make()
    index, slot = PrefixIndex(), Slot(bytes(size))
    for round_ in range(40):
        store.put([block_key("another", bytes(16))], [slot.buffer])
        some = rng.sample(keys, 3)
        (store.put if round_ % 3 else store.get)(some, [slot.buffer] * 3)
        if round_ == 20:  # a router comes, while not all is told
            event, digest = holdings.snapshot()
            index.apply("w", [event], snapshot=True)
            assert index.agrees("w", [digest])
        if round_ % 4 == 0:
            events, digest = holdings.drain()
            index.apply("w", events)
            assert index.agrees("w", [digest])
            held = {key for key, here in zip(keys, [store.contains([key])[0] for key in keys], strict=True) if here}
            assert {block_key("f" * 32, key) for key in index.blocks("w", kind)} == held
            assert len(held) > 3 or round_ < 8
    if kind is Tier.FILES:
        _, again = make()
        assert again.snapshot()[1] == holdings.snapshot()[1]


def test_files_of_another_naming_are_removed(tmp_path: Path) -> None:
    FileStore(tmp_path, 1 << 20)
    (tmp_path / "3f").mkdir()
    (tmp_path / "3f" / "3fa8").write_bytes(b"x")
    assert FileStore(tmp_path, 1 << 20).usage().used_bytes == 0
    assert not (tmp_path / "3f" / "3fa8").exists()
