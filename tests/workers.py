"""Prefill and decode services over real gRPC and real engines with a toy model, in this process; and prefill workers by script."""

import asyncio
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from baton.errors import BatonError
from baton.hosting.worker import SERVICE_NAME, Intake, WorkerServicer, abort
from baton.kv.store import Buffer
from baton.metrics import WorkerMetrics
from baton.rpc import convert
from baton.rpc.channel import Channels, server_options
from baton.rpc.v1 import common_pb2, decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, worker_pb2_grpc
from baton.runtime.engine import Engine
from baton.runtime.validation import Limits
from baton.scheduling.cache import KVCache
from baton.scheduling.plan import StepPlan, StepResult
from baton.scheduling.scheduler import Scheduler
from baton.tracing import OFF, Tracer
from baton.types import GenerateOutput, GenerateRequest, Member, Role, SamplingParams
from services.decode.servicer import DecodeServicer
from services.prefill.servicer import PrefillServicer
from tests.properties.toy import BLOCK_SIZE, VOCAB, ToyRunner, ToyTransfer, reference

LEASE_S = 1.0  # heartbeats come four times as often
PATIENT_S = 10.0  # a lease for where nobody falls silent: this process may be kept from running for a while, both ends of a stream with it
NUM_BLOCKS = 200
BLOCK_BYTES = 1000  # as spans tell it
Pool = dict[str, tuple[int | None, ...]]
Script = Callable[[GenerateRequest], AsyncIterator[GenerateOutput]]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


class SlowRunner(ToyRunner):
    step_s = 0.0
    num_steps = 0  # begun

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.going = threading.Event()
        self.going.set()

    def submit(self, plan: StepPlan) -> Callable[[], StepResult]:
        self.num_steps += 1
        self.going.wait()
        time.sleep(self.step_s)
        return super().submit(plan)


class PromptTransfer(ToyTransfer):
    """Answers every call at once."""

    def lookup(self, *call: Any) -> None:
        super().lookup(*call)
        self.answer_one(True)

    def load(self, *call: Any) -> None:
        super().load(*call)
        self.answer_one(True)

    def save(self, *call: Any) -> None:
        super().save(*call)
        self.answer_one(True)


@dataclass
class Worker:
    address: str
    engine: Engine
    intake: Intake
    runner: SlowRunner
    channel: grpc.aio.Channel
    server: grpc.aio.Server
    fingerprint: str = "f"

    async def is_idle(self, within_s: float = 30) -> None:
        """Soon no request is inside, every block is free, and each is accounted for."""
        deadline = time.monotonic() + within_s
        while self.engine._entries or self.intake._inside or self.engine.load.blocks_free < NUM_BLOCKS:
            assert time.monotonic() < deadline, f"still taken: {self.engine.load}, {list(self.intake._inside)}"
            await asyncio.sleep(0.01)
        assert await self.engine.check_integrity() == []


@contextmanager
def standing(*workers: Worker) -> Iterator[Callable[[Worker], None]]:
    """Their engines stand still in their next step until they are let go, each by itself, or all at the end."""
    for each in workers:
        each.runner.going.clear()
    try:
        yield lambda each: each.runner.going.set()
    finally:
        for each in workers:
            each.runner.going.set()


@asynccontextmanager
async def worker(
    role: Role,
    pool: Pool,
    *,
    fingerprint: str = "f",
    pool_available: bool = True,
    name: str = "w",
    port: int = 0,
    tracer: Tracer = OFF,
    lease_s: float = LEASE_S,
) -> AsyncIterator[Worker]:
    """`lease_s`: how long it waits for who is silent."""
    runner = SlowRunner(NUM_BLOCKS)
    engine = Engine(
        Scheduler(KVCache(NUM_BLOCKS, BLOCK_SIZE), max_num_batched_tokens=16, max_num_seqs=8),
        runner,
        (PromptTransfer(runner, pool),),
        key=bytes.hex,
        buffer=lambda block_id: Buffer(block_id, 1),
        limits=Limits(vocab_size=VOCAB, max_model_len=NUM_BLOCKS * BLOCK_SIZE),
        eos_token_ids=frozenset(),
        budget_s=1.0,
    )
    intake, channels = Intake(engine), Channels(lease_s)
    metrics = WorkerMetrics("toy", str(role), lambda: engine.load, dict)
    server = grpc.aio.server(options=server_options(lease_s))
    address = f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
    member = Member(
        id=name, role=role, address=address, fingerprint=fingerprint, block_size=BLOCK_SIZE, max_model_len=NUM_BLOCKS * BLOCK_SIZE
    )
    worker_pb2_grpc.add_WorkerServicer_to_server(WorkerServicer(intake, lambda: member, lease_s=LEASE_S), server)
    if role is Role.PREFILL:
        own = {"instance": name, "can_push": lambda target: False, "pool_available": lambda: True}
        prefill_pb2_grpc.add_PrefillServicer_to_server(
            PrefillServicer(intake, fingerprint, metrics, heartbeat_s=LEASE_S / 4, tracer=tracer, **own), server
        )
    else:
        servicer = DecodeServicer(
            intake,
            fingerprint,
            channels,
            metrics,
            lease_s=lease_s,
            max_local_prefill_tokens=8,
            unified=role is Role.UNIFIED,
            pool_available=lambda: pool_available,
            leases=None,
            tracer=tracer,
            block_bytes=BLOCK_BYTES,
        )
        decode_pb2_grpc.add_DecodeServicer_to_server(servicer, server)
    engine.start()
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        try:
            yield Worker(address, engine, intake, runner, channel, server, fingerprint)
        finally:
            await server.stop(0)
            await channels.close()
            await engine.stop()


@dataclass
class Scripted(prefill_pb2_grpc.PrefillServicer):
    """A prefill worker that does what a script says, and counts."""

    script: Script
    address: str = ""
    called: int = 0
    cancelled: int = 0

    async def Prefill(self, request: prefill_pb2.PrefillRequest, context: Any) -> AsyncIterator[common_pb2.SequenceOutput]:
        self.called += 1
        try:
            async for output in self.script(convert.request_from_proto(request.sequence)):
                yield convert.output_to_proto(output)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        except BatonError as error:
            await abort(context, error)
        except ConnectionError:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")


@asynccontextmanager
async def scripted(script: Script) -> AsyncIterator[Scripted]:
    server, servicer = grpc.aio.server(options=server_options(LEASE_S)), Scripted(script)
    servicer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    prefill_pb2_grpc.add_PrefillServicer_to_server(servicer, server)
    await server.start()
    try:
        yield servicer
    finally:
        await server.stop(0)


def prompt(length: int = 60, *, name: str = "r", max_tokens: int = 12, output: int = 0) -> GenerateRequest:
    whole = GenerateRequest(
        request_id=name,
        prompt_token_ids=tuple((7 * i + length) % VOCAB for i in range(length)),
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0),
    )
    return dataclasses.replace(whole, output_token_ids=tuple(reference(whole)[:output]))


def call(decode: Worker, request: GenerateRequest, *prefill: str) -> Any:
    candidates = [decode_pb2.PrefillCandidate(id=f"prefill-{i}", address=address) for i, address in enumerate(prefill)]
    message = decode_pb2.GenerateRequest(sequence=convert.request_to_proto(request), prefill_candidates=candidates)
    return decode_pb2_grpc.DecodeStub(decode.channel).Generate(message)


@dataclass
class Answer:
    tokens: list[int]
    decisions: list[tuple[str, str]]
    last: GenerateOutput
    first_token_s: float


async def generate(decode: Worker, request: GenerateRequest, *prefill: str) -> Answer:
    started, first = time.monotonic(), 0.0
    tokens: list[int] = []
    decisions: list[tuple[str, str]] = []
    last = GenerateOutput()
    async for message in call(decode, request, *prefill):
        if message.HasField("prefill"):
            decisions.append((message.prefill.prefill_id, message.prefill.reason))
        if message.HasField("output"):
            last = convert.output_from_proto(message.output)
            tokens += [token.token_id for token in last.tokens]
            first = first or (time.monotonic() - started if tokens else 0.0)
    return Answer(tokens, decisions, last, first)


async def drained(stream: Any) -> list[Any]:
    return [message async for message in stream]


async def failure(stream: Any) -> BatonError:
    """The error of our tree that a call ends with."""
    try:
        await drained(stream)
    except grpc.aio.AioRpcError as error:
        return convert.error_from_rpc(error, SERVICE_NAME)
    raise AssertionError("the call did not fail")
