"""What benchmarks/router.py puts behind a router, or behind nginx: workers that compute nothing and answer at once.

    python -m benchmarks.router_worker grpc ETCD_PORT --workers 100 --blocks 10000
    python -m benchmarks.router_worker sse

Both give each request its first token when it comes, and one more at each step, of so many milliseconds. `grpc` is any number of unified
workers in one process, each with a port of its own: they speak Baton's protocol as real ones do, a message a step for all of a router's
sequences, and a load every 20 ms while they have any. `sse` streams OpenAI's chunks over HTTP by itself.

On stdin, a line each: `step MS`; `times`, which answers with one line of JSON: the second (CLOCK_MONOTONIC) at which each token of each
request was given away, by the client's x-request-id, and forgets them; `end`.
"""

import argparse
import asyncio
import dataclasses
import json
import random
import re
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import aetcd
import grpc.aio

from baton.rpc import convert
from baton.rpc.channel import server_options
from baton.rpc.v1 import decode_pb2
from baton.types import (
    BlocksStored,
    CacheReport,
    FinishReason,
    GenerateOutput,
    Load,
    Member,
    MemberState,
    OutputToken,
    Pace,
    Role,
    StateUpdate,
)

TOKENS = (93, 1098, 1131, 1466, 1508, 1873, 1979)  # of the demo model, each with one z in it: who counts them counts tokens
PIECES = ("z", "iz", " z", "ize", " size", "az", "uz")
LOAD_S, IDLE_S = 0.02, 1.0
PACE = Pace(base_s=0.01, token_s=1e-5, pair_s=1e-10, row_s=1e-5, context_s=1e-9, push_token_s=1e-6)


class Clock:
    """Steps, for all who wait for one; and when each request's tokens were given away."""

    def __init__(self) -> None:
        self.step_s = 0.0
        self.times: dict[str, list[float]] = {}
        self._next: asyncio.Future[None] | None = None

    async def step(self) -> None:
        """Until the next step ends."""
        if self.step_s <= 0:
            await asyncio.sleep(0)
            return
        if self._next is None:
            loop = asyncio.get_running_loop()
            self._next = future = loop.create_future()
            loop.call_at((loop.time() // self.step_s + 1) * self.step_s, self._end, future)
        await self._next

    def _end(self, future: "asyncio.Future[None]") -> None:
        self._next = None
        future.set_result(None)

    def given(self, request_id: str) -> list[float]:
        return self.times.setdefault(request_id, [])


async def obey(clock: Clock) -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while (line := (await reader.readline()).decode().split()) and line[0] != "end":
        if line[0] == "step":
            clock.step_s = float(line[1]) / 1000
            print("{}", flush=True)
        else:
            times, clock.times = clock.times, {}
            print(json.dumps(times), flush=True)


# -- Baton's protocol


def _event(call: int, output: GenerateOutput) -> bytes:
    """One event of a SessionEvents, as it stands on the wire: such a message is its events, one after another."""
    response = decode_pb2.GenerateResponse(output=convert.output_to_proto(output))
    return decode_pb2.SessionEvents(events=[decode_pb2.SessionEvent(call=call, response=response)]).SerializeToString()


class Call:
    """One sequence: its events, made when it starts, so that giving them away costs next to nothing."""

    def __init__(self, number: int, request: decode_pb2.GenerateRequest, clock: Clock) -> None:
        sequence = request.sequence
        prompt, self._left = len(sequence.prompt_token_ids), sequence.sampling.max_tokens
        last = OutputToken(TOKENS[(self._left - 1) % len(TOKENS)])
        cache = CacheReport(num_prompt_tokens=prompt)
        end = FinishReason.LENGTH
        self._first = _event(
            number, GenerateOutput(tokens=(OutputToken(TOKENS[0]),), cache=cache, finish_reason=end if self._left == 1 else None)
        )
        self._last = _event(number, GenerateOutput(tokens=(last,), cache=cache, finish_reason=end))
        self._events = [_event(number, GenerateOutput(tokens=(OutputToken(token),))) for token in TOKENS]
        self._place = 0
        self._times = clock.given(re.sub(r"-\d+-\d+-[0-9a-f]{8}(~\w+)*$", "", sequence.request_id))  # moved or not

    def step(self, now: float) -> bytes:
        self._times.append(now)
        place, self._place, self._left = self._place, self._place + 1, self._left - 1
        return self._first if not place else self._events[place % len(TOKENS)] if self._left else self._last

    @property
    def ended(self) -> bool:
        return not self._left


class Session:
    """A router's stream to one worker: a request's first token goes at once, the others with the steps. As with a real worker, what comes
    while a message is on its way waits, and is the next one."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._calls = clock, dict[int, Call]()
        self._busy, self._filled, self._events = asyncio.Event(), asyncio.Event(), list[bytes]()

    def __len__(self) -> int:
        return len(self._calls)

    async def run(self, requests: AsyncIterator[decode_pb2.SessionRequest], context: Any) -> None:
        tasks = [asyncio.create_task(self._step()), asyncio.create_task(self._write(context))]
        try:
            async for request in requests:
                if not request.HasField("start"):
                    self._calls.pop(request.call, None)
                    continue
                call = Call(request.call, request.start, self._clock)
                self._put([call.step(time.monotonic())])
                if not call.ended:
                    self._calls[request.call] = call
                    self._busy.set()
        finally:
            for task in tasks:
                task.cancel()

    def _put(self, events: list[bytes]) -> None:
        self._events += events
        self._filled.set()

    async def _write(self, context: Any) -> None:
        while True:
            await self._filled.wait()
            self._filled.clear()
            events, self._events = self._events, []
            await context.write(b"".join(events))

    async def _step(self) -> None:
        while True:
            if not self._calls:
                self._busy.clear()
                await self._busy.wait()
            await self._clock.step()
            now = time.monotonic()
            self._put([call.step(now) for call in self._calls.values()])
            for number in [number for number, call in self._calls.items() if call.ended]:
                del self._calls[number]


class Worker:
    """One identity, with a server and a port of its own."""

    def __init__(self, name: str, clock: Clock, blocks: int) -> None:
        self._clock, self._blocks, self._sessions = clock, blocks, set[Session]()
        self._server: Any = grpc.aio.server(options=server_options(5.0))
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.member = Member(
            id=name,
            role=Role.UNIFIED,
            address=f"127.0.0.1:{port}",
            instance=name,
            machine=name,
            model="demo-model",
            fingerprint="f",
            block_size=16,
            num_blocks=max(blocks, 1) * 2,
            max_model_len=4096,
            max_num_batched_tokens=512,
        )
        worker = {"GetMember": grpc.unary_unary_rpc_method_handler(self._get_member)}
        worker["WatchState"] = grpc.unary_stream_rpc_method_handler(self._watch_state)
        session = grpc.stream_stream_rpc_method_handler(self._session, decode_pb2.SessionRequest.FromString)
        services = (("baton.rpc.v1.Worker", worker), ("baton.rpc.v1.Decode", {"Session": session}))
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(name, methods) for name, methods in services])

    async def start(self) -> None:
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(0)

    async def _get_member(self, request: bytes, context: Any) -> bytes:
        return convert.member_to_proto(self.member).SerializeToString()

    async def _session(self, requests: AsyncIterator[decode_pb2.SessionRequest], context: Any) -> None:
        session = Session(self._clock)
        self._sessions.add(session)
        try:
            await session.run(requests, context)
        finally:
            self._sessions.discard(session)

    async def _watch_state(self, request: bytes, context: Any) -> None:
        draw = random.Random(self.member.id)
        events = (BlocksStored(tuple(draw.randbytes(16) for _ in range(self._blocks))),)
        sequence, last = 0, 0.0
        while True:
            running = sum(map(len, self._sessions))
            if running or time.monotonic() - last >= IDLE_S:
                load = Load(
                    num_running=running,
                    num_context_tokens=running * 64 + sequence % 2,
                    blocks_total=self.member.num_blocks,
                    blocks_free=self.member.num_blocks - self._blocks,
                    blocks_cached=self._blocks,
                    pace=PACE,
                )
                update = StateUpdate(sequence=sequence, state=MemberState.READY, load=load, events=events, snapshot=not sequence)
                await context.write(convert.state_to_proto(update).SerializeToString())
                sequence, events, last = sequence + 1, (), time.monotonic()
            await asyncio.sleep(LOAD_S)


async def serve_grpc(clock: Clock, etcd_port: int, workers: int, blocks: int) -> None:
    made = [Worker(f"w{i}", clock, blocks // workers) for i in range(workers)]
    for worker in made:
        await worker.start()
    async with aetcd.Client(port=etcd_port, timeout=5) as client:
        for worker in made:
            await client.put(f"/baton/bench/members/{worker.member.id}".encode(), json.dumps(dataclasses.asdict(worker.member)).encode())
    print("{}", flush=True)
    await obey(clock)


# -- HTTP


class Stream(asyncio.Protocol):
    """A keep-alive connection; each POST is answered with a stream of chunks as OpenAI's, or with one token where it asks for no stream."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._data, self._task = clock, b"", None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, end, body = self._data.partition(b"\r\n\r\n")
        if end and len(body) >= int((re.search(rb"content-length: *(\d+)", head, re.I) or [b"", b"0"])[1]):
            self._data = b""
            name = (re.search(rb"x-request-id: *(\S+)", head, re.I) or [b"", b""])[1].decode()
            asked = json.loads(body)
            self._task = asyncio.ensure_future(self._answer(name, asked["max_tokens"], asked.get("stream", False)))

    async def _answer(self, name: str, tokens: int, stream: bool) -> None:
        times = self._clock.given(name)
        frame = (
            f'{{"id":"{name}","object":"text_completion","created":1800000000,"model":"demo-model","choices":[{{"index":0,"finish_reason":'
        )
        if not stream:
            times.append(time.monotonic())
            body = f'{frame}"length","text":"z","logprobs":null}}]}}'.encode()
            self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            return
        self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        chunks = [_chunk(f'data: {frame}null,"text":"{piece}","logprobs":null}}]}}\n\n'.encode()) for piece in PIECES]
        for place in range(tokens):
            if place:
                await self._clock.step()
            times.append(time.monotonic())
            self._transport.write(chunks[place % len(chunks)])
        self._transport.write(_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def serve_sse(clock: Clock) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Stream(clock), "127.0.0.1", 0)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    await obey(clock)


def main() -> None:
    parser = argparse.ArgumentParser(description="workers that answer at once")
    kinds = parser.add_subparsers(dest="kind", required=True)
    protocol = kinds.add_parser("grpc")
    protocol.add_argument("etcd_port", type=int)
    protocol.add_argument("--workers", type=int, default=1)
    protocol.add_argument("--blocks", type=int, default=0, help="that all of them hold together")
    kinds.add_parser("sse")
    arguments, clock = parser.parse_args(), Clock()
    if arguments.kind == "sse":
        asyncio.run(serve_sse(clock))
    else:
        asyncio.run(serve_grpc(clock, arguments.etcd_port, arguments.workers, arguments.blocks))


if __name__ == "__main__":
    main()
