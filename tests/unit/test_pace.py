"""What a worker learns of its own steps."""

import os
import random
import subprocess
import sys
import time

import pytest

from baton.cluster.machine import these_cores
from baton.runtime.pace import PaceLearner, Stopwatch
from baton.scheduling.plan import ScheduledRequest, StepPlan
from baton.types import Pace

TRUE = Pace(base_s=0.008, token_s=0.0006, pair_s=2e-8, row_s=0.0004, context_s=1e-7)


def step(prompts: list[tuple[int, int]], contexts: list[int]) -> StepPlan:
    """`prompts`: start and tokens of each; `contexts`: of each request that decodes."""
    items = [(start, count) for start, count in prompts] + [(context, 1) for context in contexts]
    return StepPlan(tuple(ScheduledRequest(None, start, count, True, []) for start, count in items))  # type: ignore[arg-type]


def seconds(pace: Pace, plan: StepPlan) -> float:
    long = [item for item in plan.scheduled if item.num_new_tokens > 1]
    short = [item.start for item in plan.scheduled if item.num_new_tokens == 1]
    return pace.base_s + sum(pace.prompt_s(item.num_new_tokens, item.start) for item in long) + pace.decode_s(len(short), sum(short))


def random_step(rng: random.Random, *, prompts: bool) -> StepPlan:
    contexts = [rng.randrange(1, 3000) for _ in range(rng.randrange(0 if prompts else 1, 32))]
    return step([(rng.randrange(0, 4000), rng.randrange(2, 512))] if prompts else [], contexts)


def teach(learner: PaceLearner, pace: Pace, rng: random.Random, count: int, *, share: float, noise: float = 0.05) -> None:
    for _ in range(count):
        plan = random_step(rng, prompts=rng.random() < share)
        learner.observe(plan, seconds(pace, plan) * rng.uniform(1 - noise, 1 + noise))


def worst_error(learner: PaceLearner, pace: Pace, rng: random.Random) -> float:
    plans = [random_step(rng, prompts=prompts) for prompts in (True, False) for _ in range(50)]
    return max(abs(seconds(learner.pace, plan) / seconds(pace, plan) - 1) for plan in plans)


def test_it_learns_what_steps_take() -> None:
    rng, learner = random.Random(1), PaceLearner(interval_s=0.0)
    assert learner.pace == Pace()
    teach(learner, TRUE, rng, 200, share=0.5)
    assert worst_error(learner, TRUE, rng) < 0.15


def test_an_hour_of_decoding_does_not_wash_out_prompts() -> None:
    rng, learner = random.Random(2), PaceLearner(interval_s=0.0)
    teach(learner, TRUE, rng, 200, share=0.5)
    teach(learner, TRUE, rng, 20_000, share=0.0)
    assert worst_error(learner, TRUE, rng) < 0.2


def test_it_follows_a_drift() -> None:
    rng, learner = random.Random(3), PaceLearner(interval_s=0.0)
    teach(learner, TRUE, rng, 300, share=0.5)
    slower = Pace(base_s=0.016, token_s=0.0012, pair_s=4e-8, row_s=0.0008, context_s=2e-7)
    for _ in range(30):
        learner.pace  # noqa: B018 (published now and then)
        teach(learner, slower, rng, 10, share=0.5)
    assert worst_error(learner, slower, rng) < 0.2


def test_a_process_that_was_stopped_learns_nothing_wrong() -> None:
    rng, learner = random.Random(4), PaceLearner(interval_s=0.0)
    teach(learner, TRUE, rng, 200, share=0.5)
    assert learner.pace.token_s
    plan = step([(0, 512)], [])
    learner.observe(plan, 60.0)
    assert seconds(learner.pace, plan) < 1.5 * seconds(TRUE, plan)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_steps_that_are_all_alike_are_predicted_all_the_same(count: int) -> None:
    """Base and token cannot be told apart then; their sum can."""
    learner, plan = PaceLearner(interval_s=0.0), step([(0, 512)], [])
    for _ in range(count + 1):
        learner.observe(plan, 0.3)
    assert seconds(learner.pace, plan) == pytest.approx(0.3, rel=0.01)
    pace = learner.pace
    assert min(pace.base_s, pace.token_s, pace.pair_s, pace.row_s, pace.context_s) >= 0


def test_what_is_met_no_more_fades_without_harm() -> None:
    """A prefill worker: prompts, one of whose last chunks had a single token, and then never again."""
    learner = PaceLearner(interval_s=0.0)
    plans = [step([(0, 512)], []), step([(0, 511)], [512])]
    for plan in plans:
        learner.observe(plan, seconds(TRUE, plan))
    for number in range(50_000):
        learner.observe(plans[0], seconds(TRUE, plans[0]))
        if number % 5000 == 0:
            assert learner.pace.token_s > 0
    assert seconds(learner.pace, plans[0]) == pytest.approx(seconds(TRUE, plans[0]), rel=0.01)


def test_one_stray_step_does_not_outweigh_the_others() -> None:
    """Long contexts only, so that nothing of a step's base is known; then short ones, which take many times what was expected."""
    learner = PaceLearner(interval_s=0.0)
    for _ in range(50):
        learner.observe(step([], [100_000]), 0.1)
    short = step([], [10])
    for _ in range(60):
        learner.observe(short, 0.004)
        learner.pace  # noqa: B018
    assert seconds(learner.pace, short) > 0.5 * 0.004


def test_what_others_take_of_the_cores_is_learned_apart() -> None:
    """Beside a busy process steps take twice as long by the clock, and as long as ever of the cores."""
    rng, learner = random.Random(5), PaceLearner(interval_s=0.0)
    teach(learner, TRUE, rng, 200, share=0.5)
    assert learner.pace.crowded == 0
    for _ in range(300):
        plan = random_step(rng, prompts=rng.random() < 0.5)
        learner.observe(plan, seconds(TRUE, plan), 2 * seconds(TRUE, plan))
        learner.pace  # noqa: B018
    assert learner.pace.crowded == pytest.approx(1.0, rel=0.05)
    assert worst_error(learner, TRUE, rng) < 0.15
    plan = step([(0, 512)], [100])
    assert seconds(learner.pace.by_the_clock(), plan) == pytest.approx(2 * seconds(learner.pace, plan), rel=0.05)


def test_a_process_that_was_stopped_was_not_crowded_for_so_long() -> None:
    learner, plan = PaceLearner(interval_s=0.0), step([(0, 512)], [])
    for _ in range(50):
        learner.observe(plan, 0.3)
        learner.pace  # noqa: B018
    learner.observe(plan, 0.3, 60.0)
    assert learner.pace.crowded < 0.1


def test_a_stopwatch_leaves_out_what_the_cores_did_for_others() -> None:
    watch = Stopwatch(cores=1)
    watch.start()
    time.sleep(0.05)
    elapsed_s, own_s = watch.lap()
    assert 0 <= own_s < elapsed_s >= 0.05
    began = time.process_time()
    while time.process_time() < began + 0.02:
        pass
    assert watch.lap()[1] >= 0.02
    alone = Stopwatch(cores=0)  # the device does not belong to this process
    alone.start()
    elapsed_s, own_s = alone.lap()
    assert elapsed_s == own_s


def test_what_one_thread_computes_alone_is_no_waiting_for_others() -> None:
    """However many cores are idle meanwhile."""
    watch = Stopwatch(cores=64)
    watch.start()
    began = time.thread_time()
    while time.thread_time() < began + 0.02:
        pass
    assert watch.lap()[1] >= 0.02


def test_workers_share_cores_where_they_may_use_the_same_ones_and_use_all_of_them() -> None:
    code = "import os; from baton.cluster.machine import these_cores as t; os.sched_setaffinity(0, {0}); print([t(1), t(2)])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "['0', '0']"
    cores = len(os.sched_getaffinity(0))
    assert these_cores(cores).count(",") == cores - 1
    assert these_cores(cores - 1) == ""
