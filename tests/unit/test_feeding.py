"""How a decode worker has a prompt computed, where that needs no other process."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from baton.metrics import WorkerMetrics
from baton.rpc import convert
from baton.rpc.v1 import decode_pb2
from baton.types import CacheReport, FinishReason, GenerateOutput, GenerateRequest, SamplingParams
from services.decode.servicer import DecodeServicer


class CrowdedSequence:
    """Has no room for what would be pushed."""

    def __init__(self) -> None:
        self.num_waits = 0
        self._released = asyncio.Event()

    async def matched(self) -> tuple[int, int]:
        return 0, 0

    async def reserve(self, **_: Any) -> None:
        self.num_waits += 1

    def release(self) -> None:
        self._released.set()

    async def __aiter__(self) -> AsyncIterator[GenerateOutput]:
        await self._released.wait()
        yield GenerateOutput(finish_reason=FinishReason.LENGTH, cache=CacheReport(num_prompt_tokens=40))


class CrowdedIntake:
    def __init__(self) -> None:
        self.sequence = CrowdedSequence()

    def submit(self, request: GenerateRequest, *, hold: bool) -> CrowdedSequence:
        return self.sequence

    def done(self, request_id: str) -> None:
        pass


def test_room_is_waited_for_once_however_many_workers_have_other_shares() -> None:
    async def run() -> tuple[int, list[str]]:
        intake: Any = CrowdedIntake()
        nothing: Any = object()
        servicer = DecodeServicer(
            intake,
            "f",
            nothing,  # nobody is called
            WorkerMetrics("toy", "decode", lambda: nothing, dict),
            lease_s=1.0,
            max_local_prefill_tokens=8,
            unified=False,
            pool_available=lambda: True,
            leases=nothing,
            tensor_parallel_size=1,
        )
        candidates = [decode_pb2.PrefillCandidate(id=f"p{i}", address="127.0.0.1:1", tensor_parallel_size=2) for i in range(4)]
        request = GenerateRequest(request_id="r", prompt_token_ids=tuple(range(40)), sampling=SamplingParams(max_tokens=1))
        message = decode_pb2.GenerateRequest(sequence=convert.request_to_proto(request), prefill_candidates=candidates)
        reasons = [response.prefill.reason async for response in servicer._generate(message)]
        return intake.sequence.num_waits, reasons

    waits, reasons = asyncio.run(run())
    assert waits == 1
    assert reasons == ["no room to have it pushed here, and other shares in the pool, computed here"]
