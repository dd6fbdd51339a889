"""The simulator: the same seed gives the same, its workers are the real scheduler, runs of steps are steps, and what it is told wrongly."""

import asyncio
import dataclasses
import json
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from baton.cli.bench import Promise, Sample, columns
from baton.cli.trace import TRACE_BLOCK, Scaling, play, read_trace
from baton.errors import ConfigError, InternalError
from baton.hashing import block_hashes
from baton.runtime.engine import Engine
from baton.runtime.pace import PaceLearner
from baton.runtime.validation import Limits
from baton.scheduling.cache import KVCache
from baton.scheduling.plan import ScheduledRequest, StepPlan
from baton.scheduling.request import Request
from baton.scheduling.scheduler import Scheduler
from baton.types import FinishReason, GenerateRequest, Pace, Role, SamplingParams
from services.router.policies import POLICIES
from services.router.simulation.__main__ import by_role, parse_paces, run
from services.router.simulation.clock import Clock
from services.router.simulation.cluster import Plan, SimulatedCluster, everybodys
from services.router.simulation.engine import Shape, SimulatedEngine, step_seconds
from services.router.simulation.workload import Agents, Ask, agents, asks_of
from tests.properties.toy import VOCAB, ToyRunner

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
BLOCKS, SIZE = 24, 4
PACE = Pace(base_s=0.01, token_s=1e-4, pair_s=1e-8, row_s=1e-3, context_s=1e-6, push_token_s=1e-5)
SMALL = Agents(rate=2.0, seconds=8.0, turns=(3, 5), think_s=1.0, num_tools=4, tool_tokens=(100, 400), plan_tokens=(50, 150), burst=0.2)
LAYOUTS = [{"prefill": 2, "decode": 2}, {"unified": 3}]


def small(layout: dict[str, int], **changes: Any) -> Plan:
    shape = Shape(num_blocks=600, block_size=16, max_num_batched_tokens=256, max_num_seqs=16)
    return Plan(**{"shape": shape, "paces": everybodys(PACE), "ttft_slo_s": 0.5, "itl_slo_s": 0.1, **layout, **changes})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_seed_gives_the_same_and_another_one_gives_another(policy: str, layout: dict[str, int]) -> None:
    first, again, other = (
        {k: v for k, v in run(small(layout), policy, agents(SMALL, 16, seed), seed).items() if k != "took_s"} for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other
    assert first["requests"] > 20
    assert 0 < first["hit_rate"] < 1


@pytest.mark.parametrize("routers", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [{}, {"num_blocks": 120}, {"max_num_seqs": 3}])
def test_in_the_end_everything_was_answered_and_nothing_is_left(layout: dict[str, int], shape: dict[str, int], routers: int) -> None:
    settings = {"num_blocks": 600, "block_size": 16, "max_num_batched_tokens": 256, "max_num_seqs": 16, **shape}
    cluster = SimulatedCluster(small(layout, shape=Shape(**settings), routers=routers, news_s=0.05 * (routers - 1)), POLICIES["predicted"])
    asks = agents(SMALL, 16, 1)
    for ask, sample in zip(asks, cluster.run(asks), strict=True):
        if ask.num_prompt_tokens + ask.num_output_tokens > settings["num_blocks"] * 16:
            assert sample.error
        elif sample.error is None:
            assert sample.output_tokens == ask.num_output_tokens
            assert 0 < sample.ttft_s <= sample.e2e_s
        else:
            assert sample.error.startswith("refused")
    for name, engine in cluster.engines.items():
        assert engine.scheduler.cache.pool.check_integrity([]) == []
        for fleet in cluster.fleets:
            held = fleet.index.blocks(name)
            assert held == set(engine.scheduler.cache.pool.hashes())  # what the router believes in the end is so
            worker = fleet.workers[name]
            assert (worker.load.num_running, worker.load.num_waiting, worker.load.num_waiting_tokens, worker.routed) == (0, 0, 0, {})


def test_a_request_that_is_never_answered_does_not_count_as_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimulatedEngine, "submit", lambda self, request: None)
    with pytest.raises(InternalError, match=r"1 simulated requests were never answered, among them 0 \(100 tokens\)"):
        SimulatedCluster(small({"unified": 1}), POLICIES["predicted"]).run([Ask(0.0, 100, 4, block_hashes(range(104), 16))])


class Stepwise(SimulatedEngine):
    def _decode_run(self) -> None:
        return None


@pytest.mark.parametrize("num_blocks", [400, 60])
def test_a_run_of_steps_is_its_steps(num_blocks: int) -> None:
    """Also where memory is short, and requests are preempted."""
    ends: list[list[tuple[str, float]]] = []
    for kind in (SimulatedEngine, Stepwise):
        clock, rng, ended = Clock(), random.Random(5), list[tuple[str, float]]()
        shape = Shape(num_blocks=num_blocks, block_size=SIZE, max_num_batched_tokens=32, max_num_seqs=8)
        engine = kind(clock, shape, PACE, lambda update: None)
        engine.on_token = lambda request, ended=ended, clock=clock: ended.append((request.request_id, clock.now))
        at = 0.0
        for number in range(60):
            at += rng.expovariate(40.0)
            tokens, output = [rng.randrange(9) for _ in range(rng.randrange(1, 60))], rng.randrange(1, 40)
            request = made(str(number), tokens, tokens + [number] * output, output)
            clock.at(at, lambda request=request, engine=engine: engine.submit(request))
        clock.run()
        assert engine.scheduler.cache.pool.check_integrity([]) == []
        if num_blocks == 60:
            assert engine.scheduler.num_preemptions
        ends.append(ended)
    assert [name for name, _ in ends[0]] == [name for name, _ in ends[1]]
    assert [at for _, at in ends[0]] == pytest.approx([at for _, at in ends[1]])


def made(name: str, prompt: list[int], whole: list[int], output: int) -> Request:
    return Request(
        request_id=name,
        token_ids=list(prompt),
        num_prompt_tokens=len(prompt),
        sampling=SamplingParams(max_tokens=output),
        eos_token_ids=frozenset(),
        max_model_len=1 << 30,
        block_hashes=block_hashes(whole, SIZE),
    )


async def test_its_cache_is_the_real_engines() -> None:
    """The same requests, in rounds that come at once, through an engine with a toy model: the same hits, and the same blocks left."""
    rng = random.Random(2)
    prompts: list[list[int]] = [[rng.randrange(VOCAB) for _ in range(20)] for _ in range(3)]
    rounds = [
        [rng.choice(prompts)[: rng.randrange(4, 21)] + [rng.randrange(VOCAB)] * rng.randrange(9) for _ in range(3)] for _ in range(12)
    ]
    engine = Engine(
        Scheduler(KVCache(BLOCKS, SIZE), max_num_batched_tokens=16, max_num_seqs=2),
        ToyRunner(BLOCKS),
        (),
        key=bytes.hex,
        buffer=lambda block_id: (_ for _ in ()).throw(AssertionError),
        limits=Limits(vocab_size=VOCAB, max_model_len=BLOCKS * SIZE),
        eos_token_ids=frozenset(),
        budget_s=1.0,
    )
    clock = Clock()
    twin = SimulatedEngine(
        clock, Shape(num_blocks=BLOCKS, block_size=SIZE, max_num_batched_tokens=16, max_num_seqs=2), PACE, lambda update: None
    )
    hits: dict[str, int] = {}

    def seen(plan: StepPlan) -> None:
        for item in plan.scheduled:
            hits.setdefault(item.request.request_id, item.start)

    twin.on_step = seen
    engine.start()
    real: dict[str, int] = {}
    for number, prompts in enumerate(rounds):
        async with asyncio.timeout(20):
            gate = asyncio.Event()
            loop = asyncio.get_running_loop()
            engine._post(lambda gate=gate, loop=loop: asyncio.run_coroutine_threadsafe(gate.wait(), loop).result())  # all come at once
            names = [f"{number}-{place}" for place in range(len(prompts))]
            sampling = SamplingParams(max_tokens=5, temperature=0)
            sequences = [
                engine.submit(GenerateRequest(request_id=name, prompt_token_ids=tuple(prompt), sampling=sampling))
                for name, prompt in zip(names, prompts, strict=True)
            ]
            gate.set()
            requests: list[Request] = []
            for name, prompt, sequence in zip(names, prompts, sequences, strict=True):
                output: list[int] = []
                async for item in sequence:
                    output += [token.token_id for token in item.tokens]
                    real[name] = item.cache.num_local_tokens if item.cache else real.get(name, 0)
                assert item.finish_reason is FinishReason.LENGTH
                requests.append(made(name, prompt, prompt + output, 5))
        twin.post(lambda requests=requests: [twin.submit(request) for request in requests])  # type: ignore[func-returns-value]
        clock.run()
    await engine.stop()
    assert hits == real
    assert sum(hits.values())
    assert set(twin.scheduler.cache.pool.hashes()) == set(engine.scheduler.cache.pool.hashes())
    assert twin.scheduler.cache.pool.num_cached == BLOCKS  # full: some were evicted


def test_a_step_takes_what_a_pace_learned_from_such_steps_says() -> None:
    learner, rng = PaceLearner(interval_s=0.0), random.Random(1)
    for _ in range(400):
        items = [planned(rng.randrange(500), rng.choice([1, 1, 1, 200])) for _ in range(rng.randrange(1, 8))]
        plan = StepPlan(tuple(items))
        learner.observe(plan, step_seconds(PACE, plan))
    for name in ("base_s", "token_s", "pair_s", "row_s", "context_s"):
        assert getattr(learner.pace, name) == pytest.approx(getattr(PACE, name), rel=0.02)


def test_each_role_has_its_own_pace_and_what_it_has_not_met_from_the_others() -> None:
    prefill, decode = Pace(base_s=0.03, token_s=1e-3, push_token_s=1e-5), Pace(base_s=0.01, row_s=2e-3)
    slow = dataclasses.replace(decode, base_s=0.015, crowded=1.0)
    paces = by_role([(Role.PREFILL, prefill), (Role.DECODE, decode), (Role.DECODE, slow)])
    assert paces[Role.PREFILL] == dataclasses.replace(prefill, row_s=pytest.approx(3e-3))
    assert paces[Role.DECODE] == Pace(base_s=pytest.approx(0.02), token_s=1e-3, row_s=pytest.approx(3e-3), push_token_s=1e-5)
    assert paces[Role.UNIFIED].row_s == pytest.approx(3e-3)  # there is none


def test_the_time_between_tokens_is_by_token_also_where_a_chunk_brings_several() -> None:
    merged = Sample(ttft_s=1.0, e2e_s=1.8, itl_s=[0.4, 0.4], output_tokens=9)
    assert columns([merged, Sample(ttft_s=1.0, e2e_s=1.0, output_tokens=1)], 1.0, Promise(itl_ms=150))["itl_mean_ms"] == pytest.approx(100)
    assert Promise(itl_ms=150).kept(merged)


def planned(start: int, count: int) -> ScheduledRequest:
    return ScheduledRequest(made("x", [0], [0], 1), start, count, samples=True, block_ids=[])


# -- workloads

LINE = {"timestamp": 0, "input_length": 1100, "output_length": 7, "hash_ids": [4, 5, 6]}


def written(folder: Path, *lines: Any) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_a_traces_blocks_keep_their_names_at_any_scale(tmp_path: Path) -> None:
    lines = read_trace(written(tmp_path, LINE, {**LINE, "timestamp": 3000, "hash_ids": [4, 9, 8]}))
    scaling = Scaling(length=0.125)
    first, second = asks_of(play(lines, scaling, 0), scaling.block(), 16)
    assert scaling.block() == 64
    assert (first.num_prompt_tokens, first.num_output_tokens) == (2 * 64 + round(76 / 8), 1)
    assert first.hashes[:4] == second.hashes[:4]
    assert not set(first.hashes[4:]) & set(second.hashes[4:])
    assert len(first.hashes) == 8
    copied = asks_of(play(lines, Scaling(copies=2), 0), 512, 512)
    assert len({ask.hashes[0] for ask in copied}) == 2  # two conversations, of two turns each


def test_agents_share_what_they_say_they_share() -> None:
    asks = agents(Agents(seconds=30.0, burst=1.0), 64, 0)
    assert [ask.at for ask in asks] == sorted(ask.at for ask in asks)
    near = [(a, b) for a, b in pairwise(asks) if b.at - a.at < 0.01 and a.hashes[0] == b.hashes[0]]
    shared = [next(i for i, (x, y) in enumerate(zip(a.hashes, b.hashes, strict=False)) if x != y) * 64 for a, b in near]
    assert max(shared) > 3000  # a tool prompt and a plan


def test_the_shipped_trace_is_what_its_script_makes_and_fits_the_demo_model() -> None:
    made = subprocess.run([sys.executable, EXAMPLES / "make_trace.py"], capture_output=True, text=True, timeout=60, check=True)
    assert (EXAMPLES / "trace.jsonl").read_text() == made.stdout
    rows = [json.loads(row) for row in made.stdout.splitlines()]
    assert all(len(row["hash_ids"]) == -(-row["input_length"] // TRACE_BLOCK) for row in rows)  # as in Mooncake's
    lines = play(read_trace(EXAMPLES / "trace.jsonl"), Scaling(length=0.125), 0)
    context = json.loads((EXAMPLES / "demo-model/config.json").read_text())["max_position_embeddings"]
    assert max(line.num_prompt_tokens + line.num_output_tokens for line in lines) <= context
    ids = [each for line in lines for each in line.ids]
    assert len(set(ids)) < 0.2 * len(ids)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", r"line 2: not a request of a trace \(JSONDecodeError"),
        ({"timestamp": 0}, r"line 2: not a request of a trace \(KeyError: 'input_length'"),
        ({**LINE, "hash_ids": [1]}, "line 2: input_length 1100 and 1 hash_ids"),
        ({**LINE, "hash_ids": "x"}, "line 2: not a request"),
    ],
)
def test_a_broken_trace_is_told_with_its_line(tmp_path: Path, line: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_trace(written(tmp_path, LINE, line))


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the trace"):
        read_trace(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="is empty"):
        read_trace(written(tmp_path))
    with pytest.raises(ConfigError, match=r"--block-size 24: .*\(512 × --length-scale\): choose a divisor of 64"):
        asks_of([], 64, 24)
    with pytest.raises(ConfigError, match="makes no whole blocks"):
        Scaling(length=0.3).block()
    with pytest.raises(ConfigError, match="there is no token; there are base_s"):
        parse_paces("token=1")
    with pytest.raises(ConfigError, match="must look like"):
        parse_paces("fast")
    assert parse_paces("token_s=1e-3,base_s=2") == everybodys(Pace(token_s=1e-3, base_s=2))


def test_a_request_that_never_fits_is_refused_alone() -> None:
    asks = [Ask(0.0, 10_000, 5, ()), Ask(0.1, 10, 5, ())]
    samples = SimulatedCluster(small(LAYOUTS[1]), POLICIES["predicted"]).run(asks)
    assert samples[0].error == "longer than a worker's KV cache"
    assert samples[1].error is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--policy", "dynmo"], "there is no policy 'dynmo'; did you mean dynamo?; there are predicted, prefix_aware"),
        (["--prefill", "3"], "a cluster needs prefill and decode workers, or unified ones"),
        (["--load", "0"], "--load must be above 0"),
        (["--trace", "nowhere.jsonl"], "cannot read the trace nowhere.jsonl"),
        (["--trace", "nowhere.jsonl", "--length-scale", "0.3"], "--length-scale 0.3 makes no whole blocks"),
    ],
)
def test_the_command_line_says_what_is_wrong(arguments: list[str], says: str) -> None:
    command = [sys.executable, "-c", "from baton.cli import main; main()", "simulate", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_command_line_writes_its_rows(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, "-c", "from baton.cli import main; main()", "simulate", "--policy", "predicted", "--policy", "random"]
    command += ["--seconds", "20", "--unified", "2", "--ttft-slo-ms", "500", "--json", str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["policy"] for row in rows] == ["predicted", "random"]
    assert all(0 < row["ttft_mean_s"] <= row["ttft_p95_s"] for row in rows)
    assert "goodput/s" in ended.stdout


def test_a_scaled_trace_has_blocks_that_fit_and_nothing_is_met_where_nothing_was_promised() -> None:
    command = [sys.executable, "-c", "from baton.cli import main; main()", "simulate", "--unified", "1", "--policy", "predicted"]
    command += ["--trace", str(EXAMPLES / "trace.jsonl"), "--length-scale", "0.125", "--seconds", "60"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "TTFT mean" in ended.stdout
    assert "goodput" not in ended.stdout
    assert " met " not in ended.stdout
