"""The simulator beside a real router and real workers whose model only sleeps: a step takes what a pace says, so that what is compared is
everything but the kernels: scheduler, caches, loads and KV events over gRPC, the policy, the way of a request and its tokens.

    python -m benchmarks.simulation_paced --trace conversation_trace.jsonl [--loads 0.4 0.8] [--policies predicted cache_aware]

All in one process, unified workers. Sleeping needs no cores: it can be run beside other work, which adds what it adds to each message.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any, cast

import grpc.aio

from baton.cli.bench import Promise, Sample, columns
from baton.cli.replay import prompt_of
from baton.cli.trace import Line, Scaling, play, read_trace
from baton.cluster.membership import InMemoryMembership
from baton.hosting.worker import Intake, WorkerServicer
from baton.kv.store import Buffer
from baton.metrics import WorkerMetrics
from baton.rpc.channel import Channels, server_options
from baton.rpc.v1 import decode_pb2_grpc, worker_pb2_grpc
from baton.runtime.engine import Engine
from baton.runtime.validation import Limits
from baton.scheduling.cache import KVCache
from baton.scheduling.plan import StepPlan, StepResult
from baton.scheduling.scheduler import Scheduler
from baton.types import GenerateRequest, Member, OutputToken, Pace, Role, SamplingParams
from benchmarks.simulation import HEAD, compared
from services.decode.servicer import DecodeServicer
from services.router.dispatch import Dispatcher
from services.router.policies import POLICIES
from services.router.simulation.cluster import Plan, SimulatedCluster, everybodys
from services.router.simulation.engine import Shape, step_seconds
from services.router.simulation.workload import asks_of
from services.router.workers import Workers

PACE = Pace(base_s=0.05, token_s=2.5e-3, pair_s=5e-7, row_s=2.5e-3, context_s=5e-6)  # slow beside what messages take
SHAPE = Shape(num_blocks=4096, block_size=16, max_num_batched_tokens=512, max_num_seqs=64)
VOCAB, LEASE_S = 1000, 5.0
PROMISE = Promise(ttft_ms=2000, itl_ms=200)


class Sleeper:
    """A runner whose steps take what the pace says."""

    depth = 0

    def submit(self, plan: StepPlan) -> Callable[[], StepResult]:
        time.sleep(step_seconds(PACE, plan))
        result = StepResult({item.request.request_id: OutputToken(0) for item in plan.scheduled if item.samples})
        return lambda: result


async def worker(stack: AsyncExitStack, name: str) -> Member:
    cache = KVCache(SHAPE.num_blocks, SHAPE.block_size)
    engine = Engine(
        Scheduler(cache, max_num_batched_tokens=SHAPE.max_num_batched_tokens, max_num_seqs=SHAPE.max_num_seqs),
        Sleeper(),
        (),
        key=bytes.hex,
        buffer=lambda block_id: Buffer(block_id, 1),
        limits=Limits(vocab_size=VOCAB, max_model_len=SHAPE.num_blocks * SHAPE.block_size),
        eos_token_ids=frozenset(),
        budget_s=2.0,
    )
    engine.start()
    intake, channels = Intake(engine), Channels(LEASE_S)
    server = grpc.aio.server(options=server_options(LEASE_S))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    member = Member(id=name, role=Role.UNIFIED, address=address, fingerprint="f", block_size=SHAPE.block_size, max_num_batched_tokens=512)
    servicer = DecodeServicer(
        intake,
        "f",
        channels,
        WorkerMetrics("paced", name, lambda: engine.load, dict),
        lease_s=LEASE_S,
        max_local_prefill_tokens=64,
        unified=True,
        pool_available=lambda: False,
        leases=None,
    )
    cast(Any, decode_pb2_grpc).add_DecodeServicer_to_server(servicer, server)
    cast(Any, worker_pb2_grpc).add_WorkerServicer_to_server(WorkerServicer(intake, lambda: member, lease_s=LEASE_S), server)
    await server.start()
    stack.push_async_callback(channels.close)
    stack.push_async_callback(engine.stop)
    stack.push_async_callback(server.stop, 0)
    return member


async def real(policy: str, count: int, lines: Sequence[Line], block: int) -> list[Sample]:
    async with AsyncExitStack() as stack:
        members = [await worker(stack, f"unified-{number:04}") for number in range(count)]
        channels = Channels(LEASE_S)
        stack.push_async_callback(channels.close)
        workers = Workers(InMemoryMembership({member.id: member for member in members}), channels, lease_s=LEASE_S)
        workers.start()
        stack.push_async_callback(workers.close)
        dispatcher = Dispatcher(workers, channels, policy, POLICIES[cast(Any, policy)], lease_s=LEASE_S, max_migrations=0)
        while sum(each.usable for each in workers.all()) < count:
            await asyncio.sleep(0.01)

        async def ask(name: str, prompt: list[int], output: int, sample: Sample) -> None:
            sampling = SamplingParams(max_tokens=output, temperature=0, ignore_eos=True)
            request = GenerateRequest(request_id=name, prompt_token_ids=tuple(prompt), sampling=sampling)
            begun = last = time.monotonic()
            async with aclosing(dispatcher.generate(request, dispatcher.route())) as items:
                async for item in items:
                    if item.tokens:
                        last = time.monotonic()
                        sample.ttft_s = sample.ttft_s or last - begun
                        sample.output_tokens += len(item.tokens)
                    sample.cached_tokens = item.cache.num_cached_tokens if item.cache else sample.cached_tokens
            sample.prompt_tokens, sample.e2e_s = len(prompt), last - begun

        for each in range(2 * count):  # each learns its pace
            await ask(f"first-{each}", [each + 10] * 600, 12, Sample())
        samples = [Sample() for _ in lines]
        prompts = [prompt_of(line, block, VOCAB, str(number)) for number, line in enumerate(lines)]
        begun = time.monotonic()

        async def later(number: int) -> None:
            await asyncio.sleep(max(begun + lines[number].at - time.monotonic(), 0.0))
            await ask(str(number), prompts[number], lines[number].num_output_tokens, samples[number])

        await asyncio.gather(*(later(number) for number in range(len(lines))))
        return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--loads", type=float, nargs="*", default=[0.4, 0.8])
    parser.add_argument("--policies", nargs="*", default=["predicted", "cache_aware"], choices=list(POLICIES))
    parser.add_argument("--seconds", type=float, default=30.0, help="of real time at each load")
    arguments = parser.parse_args()
    print(f"`python -m benchmarks.simulation_paced {' '.join(sys.argv[1:])}`\n")
    print("\n".join(HEAD))
    trace = read_trace(arguments.trace)
    for policy in arguments.policies:
        for load in arguments.loads:
            scaling = Scaling(length=0.03125, seconds=arguments.seconds * load, speed=load, longest=2000)
            lines = play(trace, scaling, 0)
            runs = [asyncio.run(real(policy, arguments.workers, lines, scaling.block())) for _ in range(2)]
            found = [columns(samples, lines[-1].at, PROMISE) for samples in runs]
            plan = Plan(unified=arguments.workers, shape=SHAPE, paces=everybodys(PACE))
            samples = SimulatedCluster(plan, POLICIES[policy]).run(asks_of(lines, scaling.block(), SHAPE.block_size))
            print("\n".join(compared(f"{policy}, {load:g}", found, columns(samples, lines[-1].at, PROMISE))), flush=True)


if __name__ == "__main__":
    main()
