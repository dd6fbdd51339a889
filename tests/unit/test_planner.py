"""The planner's mathematics, and what it reads."""

import dataclasses
import math
import random
from collections.abc import Mapping
from heapq import heapify, heapreplace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from baton.errors import ConfigError, Unavailable
from baton.metrics import RouterMetrics
from baton.types import Pace, Role
from services.planner.__main__ import app
from services.planner.observe import History, Seen, check_pools, counters_of, rates_of
from services.planner.plan import Bounds, Load, Pool, Rates, Slo, erlang_c, plan, waits_longer
from services.planner.steady import Steady

PACE = Pace(base_s=0.02, token_s=1e-4, pair_s=2e-9, row_s=5e-5, context_s=3e-8)
RATES = Rates(prefill=PACE, decode=PACE, batched_tokens=8192, kv_tokens=1 << 20)
SLO = Slo(ttft_s=5.0, itl_s=0.1)
LOAD = Load(rate=2.0, prompts=((0.7, 4000.0), (0.3, 16000.0)), cached=0.2, output_tokens=300.0)
BOUNDS = {Role.PREFILL: Bounds(), Role.DECODE: Bounds()}


def planned(load: Load = LOAD, rates: Rates = RATES, slo: Slo = SLO, **bounds: Bounds) -> tuple[Pool, Pool]:
    found = plan(load, rates, slo, BOUNDS | {Role(name): each for name, each in bounds.items()})
    return found[Role.PREFILL], found[Role.DECODE]


def workers(load: Load = LOAD, rates: Rates = RATES, slo: Slo = SLO) -> tuple[int, int]:
    prefill, decode = planned(load, rates, slo)
    assert prefill.workers is not None, prefill
    assert decode.workers is not None, decode
    return prefill.workers, decode.workers


def test_erlang_c() -> None:
    assert erlang_c(1, 0.6) == pytest.approx(0.6), "of one worker it is its utilisation"
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)  # the textbook's
    assert 0 < erlang_c(1000, 990) < 1


@pytest.mark.parametrize(("count", "busy"), [(1, 0.7), (4, 3.0), (12, 10.0)])
def test_the_tail_of_waiting_is_that_of_a_simulated_queue(count: int, busy: float) -> None:
    """Lengths as different as a trace's: hyperexponential, V² = 3."""
    rng, square = random.Random(1), 4.0
    chance = 0.5 * (1 + math.sqrt(0.5))
    free, now = [0.0] * count, 0.0
    heapify(free)
    waits: list[float] = []
    for _ in range(200_000):
        now += rng.expovariate(busy)
        begun = max(now, free[0])
        mean = 0.5 / chance if rng.random() < chance else 0.5 / (1 - chance)
        heapreplace(free, begun + rng.expovariate(1 / mean))
        waits.append(begun - now)
    for seconds in (1.0, 4.0, 8.0):
        found = sum(wait > seconds for wait in waits) / len(waits)
        assert waits_longer(seconds, count, busy, 1.0, square) == pytest.approx(found, abs=0.08)


def test_a_pool_is_larger_than_its_work_and_what_is_promised_decides_by_how_much() -> None:
    load = dataclasses.replace(LOAD, rate=40.0)
    work = load.rate * sum(share * PACE.prompt_s(0.8 * n, 0.2 * n) for share, n in LOAD.prompts)
    loose, usual, strict = (workers(load, slo=Slo(ttft_s=s, itl_s=0.1, share=share))[0] for s, share in ((60, 0.9), (3, 0.95), (2, 0.999)))
    assert work < loose < usual < strict


def test_twice_the_load_needs_less_than_twice_the_workers() -> None:
    small, large = workers()[0], workers(dataclasses.replace(LOAD, rate=16.0))[0]
    assert small < large < 8 * small


def test_what_is_cached_is_not_computed() -> None:
    assert workers(dataclasses.replace(LOAD, cached=0.8))[0] < workers()[0]


def test_requests_that_wait_already_count() -> None:
    late = dataclasses.replace(LOAD, waiting_tokens=600_000.0)
    assert workers(late)[0] > workers()[0]
    assert "wait already" in planned(late)[0].reason
    assert workers(dataclasses.replace(LOAD, num_queued=100.0))[0] > workers()[0], "also in the routers"


def test_prompts_that_nobody_could_compute_in_time_do_not_count_and_are_told() -> None:
    some = dataclasses.replace(LOAD, prompts=((0.9, 4000.0), (0.1, 200_000.0)), rate=0.5)
    prefill, _ = planned(some)
    assert prefill.workers is not None
    assert "10.0% of the prompts take longer by themselves" in prefill.reason
    nobody, _ = planned(dataclasses.replace(LOAD, prompts=((1.0, 200_000.0),)))
    assert nobody.workers is None
    assert "promise more time" in nobody.reason


def test_decode_workers_are_as_many_as_the_time_between_tokens_asks_for() -> None:
    load = dataclasses.replace(LOAD, rate=20.0, prompts=((1.0, 1000.0),))
    rates = dataclasses.replace(RATES, kv_tokens=0)
    usual, strict = workers(load, rates)[1], workers(load, rates, Slo(ttft_s=5, itl_s=0.025))[1]
    assert usual < strict
    nobody = planned(load, rates, Slo(ttft_s=5, itl_s=0.02))[1]
    assert nobody.workers is None
    assert "cannot be kept" in nobody.reason


def test_decode_workers_have_room_for_what_is_on_its_way() -> None:
    small = dataclasses.replace(RATES, kv_tokens=1 << 17)
    assert workers(rates=small)[1] > workers()[1]
    waiting = dataclasses.replace(LOAD, waiting_tokens=150_000.0, num_prefilling=2)
    assert workers(waiting, small)[1] > workers(rates=small)[1], "a prompt that waits holds its room"


def test_prompts_that_decode_workers_compute_are_seen_by_slow_tokens() -> None:
    slow = dataclasses.replace(LOAD, num_decoding=2, itl_s=0.2)
    assert workers(slow)[1] > workers()[1]
    assert "prompts take" in planned(slow)[1].reason
    most = LOAD.rate * sum(share * PACE.prompt_s(0.8 * n, 0.2 * n) for share, n in LOAD.prompts)
    assert workers(dataclasses.replace(slow, num_decoding=50))[1] < 50 > most, "no more than there are prompts"


def test_nothing_asked_for_needs_the_fewest_and_nothing_learned_changes_nothing() -> None:
    assert [pool.workers for pool in planned(Load(), Rates())] == [1, 1]
    assert [pool.workers for pool in planned(Load(), prefill=Bounds(2, 4))] == [2, 1]
    assert [pool.workers for pool in planned(rates=Rates())] == [None, None]
    assert planned(dataclasses.replace(LOAD, output_tokens=0.0))[1].workers is None


def test_bounds_are_kept_and_told() -> None:
    prefill, _ = planned(dataclasses.replace(LOAD, rate=50.0), prefill=Bounds(1, 3))
    assert prefill.workers == 3
    assert "NOT ENOUGH" in prefill.reason
    prefill, _ = planned(prefill=Bounds(9, 9))
    assert prefill.workers == 9
    assert "the fewest allowed" in prefill.reason


def test_wrong_promises_and_bounds_are_refused() -> None:
    for wrong in ((0.1, 0.2), (1, 0), (math.inf, 1), (math.nan, 1)):
        with pytest.raises(ConfigError, match="--slo-ttft"):
            Slo(ttft_s=wrong[0], itl_s=wrong[1])
    with pytest.raises(ConfigError, match="endless"):
        Slo(ttft_s=1, itl_s=0.1, share=1.0)
    for low, high in ((0, 3), (4, 3)):
        with pytest.raises(ConfigError, match="one at least"):
            Bounds(low, high)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--slo-ttft", "1", "--slo-itl", "2"], "--slo-itl"),
        (["--slo-ttft", "1", "--slo-itl", "0.1", "--prefill", "some"], "--prefill 'some' must look like"),
        (["--slo-ttft", "1", "--slo-itl", "0.1", "--apply"], "--apply needs"),
        (["--slo-ttft", "1", "--slo-itl", "0.1", "--router", "http://127.0.0.1:1", "--window", "1"], "does not answer"),
        (["--slo-ttft", "1", "--slo-itl", "0.1", "--router", "nonsense"], "does not answer"),
    ],
)
def test_the_command_says_what_is_wrong(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert said in str(getattr(result.exception, "message", "")), result.output


# -- steadiness


def test_more_at_once_and_fewer_after_the_window() -> None:
    steady = Steady(300)
    needs = {0: 2, 15: 5, 30: 3, 45: 3, 200: 4, 315: 3, 330: 3, 520: 2}
    found = {now: steady.advise(now, Role.DECODE, 2, needed) for now, needed in needs.items()}
    assert found == {0: 2, 15: 5, 30: 5, 45: 5, 200: 5, 315: 4, 330: 4, 520: 3}


def test_a_new_planner_takes_nothing_away_before_it_has_seen_a_window() -> None:
    steady = Steady(300)
    assert steady.advise(0, Role.PREFILL, 8, 2) == 8
    assert steady.advise(290, Role.PREFILL, 8, 2) == 8
    assert steady.advise(310, Role.PREFILL, 8, 2) == 2


@pytest.mark.parametrize("blind_s", [310, 3600])
def test_who_has_seen_nothing_for_a_window_takes_nothing_away_before_another(blind_s: float) -> None:
    steady = Steady(300, every_s=15)
    assert [steady.advise(15.0 * i, Role.DECODE, 10, 10) for i in range(3)] == [10] * 3
    back = 30 + blind_s
    assert [steady.advise(back + now, Role.DECODE, 10, 1) for now in (0, 15, 299)] == [10] * 3
    assert steady.advise(back + 301, Role.DECODE, 10, 1) == 1


def test_a_window_that_is_shorter_than_a_round_is_none() -> None:
    steady = Steady(30, every_s=60)
    assert [steady.advise(60.0 * i, Role.DECODE, 10, 1) for i in range(3)] == [10, 1, 1]


def test_a_load_that_swings_does_not_make_the_pool_swing() -> None:
    steady, rng = Steady(300), random.Random(0)
    found = [steady.advise(15.0 * i, Role.DECODE, 5, rng.choice((4, 5, 6))) for i in range(400)]
    assert set(found[20:]) == {6}


# -- what is read


def metrics_of(prompts: Mapping[int, int], *, finished: int = 0, cached: int = 0, generated: int = 0) -> RouterMetrics:
    metrics = RouterMetrics("m")
    for tokens, count in prompts.items():
        for _ in range(count):
            metrics.arrived_prompt_tokens.observe(tokens)
    for _ in range(finished):
        metrics.prompt_tokens.inc(1000)
        metrics.success("stop")
    metrics.cached_tokens.inc(cached)
    metrics.generation_tokens.inc(generated)
    return metrics


def worker(name: str, role: Role, state: str = "ready", **more: Any) -> dict[str, Any]:
    return {
        "id": name, "role": str(role), "state": state, "address": "", "running": 0, "waiting": 0, "waiting_tokens": 0, "waiting_pairs": 0,
        "blocks_total": 100, "blocks_cached": 0, "block_size": 64, "max_num_batched_tokens": 2048, "pace": dataclasses.asdict(PACE),
        "fingerprint": "f",
    } | more  # fmt: skip


def seen(at: float, *workers: dict[str, Any], **routers: RouterMetrics) -> Seen:
    read = {name: counters_of(metrics.exposition().decode(), name) for name, metrics in routers.items()}
    return Seen(
        at=at,
        counters={name: counters for name, (counters, _) in read.items()},
        num_queued=sum(queued for _, queued in read.values()),
        cluster={"workers": list(workers)},
    )


def test_the_load_is_read_from_every_routers_metrics() -> None:
    history = History(0.0)
    a, b = metrics_of({900: 100}), metrics_of({})
    b.queued = lambda: 7
    history.add(seen(0, a=a, b=b))
    for metrics in (a, b):
        for tokens in (900, 1100, 6000):
            for _ in range(30):
                metrics.arrived_prompt_tokens.observe(tokens)
        metrics.prompt_tokens.inc(1000)
        metrics.cached_tokens.inc(250)
        metrics.generation_tokens.inc(120)
        metrics.success("stop")
        for _ in range(4):
            metrics.inter_token_latency.observe(0.03)
    busy = worker("d", Role.DECODE, running=3)
    history.add(seen(60, worker("p", Role.PREFILL, waiting_tokens=500, waiting_pairs=9), busy, worker("e", Role.DECODE), a=a, b=b))
    load = history.load()
    assert load.rate == pytest.approx(3.0)
    assert load.mean(lambda tokens: tokens) == pytest.approx((900 + 1100 + 6000) / 3)
    assert sum(share for share, _ in load.prompts) == pytest.approx(1)
    assert (load.cached, load.output_tokens, load.num_queued) == (0.25, 120, 7)
    assert (load.waiting_tokens, load.waiting_pairs, load.num_running, load.num_decoding, load.num_prefilling) == (500, 9, 3, 1, 1)
    assert load.itl_s == pytest.approx(0.03)


def test_routers_come_go_and_start_again() -> None:
    history = History(0.0)
    history.add(seen(0, a=metrics_of({1000: 500})))
    history.add(seen(30, a=metrics_of({1000: 560}), b=metrics_of({1000: 9000})))  # b was there before, unseen
    assert history.load().rate == pytest.approx(2.0)
    history.add(seen(60, b=metrics_of({1000: 9060})))
    assert history.load().rate == pytest.approx(2.0)
    history.add(seen(90, a=metrics_of({1000: 30}), b=metrics_of({1000: 9090})))  # a has started again
    assert history.load().rate == pytest.approx(2.0)


def test_what_came_while_nobody_looked_is_no_rate() -> None:
    history = History(0.0)
    for at, count in [(0, 0), (30, 60), (60, 120), (420, 130), (435, 160)]:
        history.add(seen(at, a=metrics_of({1000: count})))
    assert history.load().rate == pytest.approx(2.0), "not of the ten that came within six minutes"


def test_a_load_that_grows_is_looked_at_ahead_and_chance_is_no_growth() -> None:
    def at_the_end(counts: list[int]) -> float:
        history, total = History(60.0), 0
        history.add(seen(0, a=metrics_of({1000: 0})))
        for step, count in enumerate(counts, 1):
            total += count
            history.add(seen(30.0 * step, a=metrics_of({1000: total})))
        return history.load().rate

    assert at_the_end([60, 60, 120, 120]) == pytest.approx(4 + 2 / 60 * 90)
    assert at_the_end([60, 60, 62, 62]) == pytest.approx(124 / 60)
    assert at_the_end([120, 120, 60, 60]) == pytest.approx(2.0), "a falling load is taken as it is"
    assert at_the_end([60, 120]) == pytest.approx(3.0), "too short to know of growth"


def test_what_is_no_router_is_told() -> None:
    with pytest.raises(ConfigError, match="is it a router"):
        counters_of("# HELP x y\n# TYPE x gauge\nx 1\n", "http://here")
    with pytest.raises(ConfigError, match="one version"):
        counters_of('baton:arrived_prompt_tokens_bucket{le="3"} 1\n', "http://here")
    with pytest.raises(ConfigError, match="cannot be understood"):
        counters_of("<html>\n", "http://here")


def test_rates_are_those_of_workers_that_have_learned() -> None:
    slow = dataclasses.asdict(dataclasses.replace(PACE, token_s=3e-4, crowded=1.0))
    nothing = dataclasses.asdict(Pace())
    cluster = {
        "workers": [
            worker("p0", Role.PREFILL),
            worker("p1", Role.PREFILL, pace=nothing),
            worker("p2", Role.PREFILL, "lost", pace=slow),
            worker("d0", Role.DECODE, pace=slow),
        ]
    }
    rates = rates_of(cluster)
    assert rates.prefill.token_s == pytest.approx(1e-4)
    assert rates.decode.token_s == pytest.approx(6e-4), "by the clock"
    assert (rates.batched_tokens, rates.kv_tokens) == (2048, 6400)
    cluster["workers"][0]["pace"] = nothing
    assert rates_of(cluster).prefill.token_s == pytest.approx(6e-4), "of the other pool, which has met prompts"


def test_pools_that_are_not_planned_for() -> None:
    with pytest.raises(ConfigError, match="unified"):
        check_pools({"workers": [worker("u", Role.UNIFIED)]})
    with pytest.raises(Unavailable, match="two versions"):
        check_pools({"workers": [worker("a", Role.DECODE), worker("b", Role.DECODE, fingerprint="g")]})


def test_counters_are_of_their_buckets() -> None:
    counters, _ = counters_of(metrics_of({100: 2, 10**7: 1}).exposition().decode(), "x")
    assert counters[7:].sum() == 3
    assert counters[-1] == 1
    assert np.all(counters >= 0)
