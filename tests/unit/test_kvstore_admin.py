"""MasterAdmin: how often masters are asked, and which."""

import asyncio

import httpx
import pytest

from baton.config import KVStoreConfig
from baton.errors import StoreError
from services.kvstore.admin import MasterAdmin
from services.kvstore.master import MasterSupervisor

SEGMENT = {"segment_name": "s", "te_endpoint": "e", "status": "OK", "base_address": "0x10"} | {
    "allocator_capacity_bytes": 8,
    "allocator_used_bytes": 4,
}


class Masters:
    def __init__(self, leading: str) -> None:
        self.leading = leading
        self.asked: list[str] = []

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(f"{request.url.host}{request.url.path}")
        if request.url.path == "/health":
            return httpx.Response(200, json={"role": "leader" if request.url.host == self.leading else "standby", "service_ready": True})
        assert request.url.host == self.leading
        if request.url.path == "/metrics":
            return httpx.Response(200, text="master_key_count 7\n")
        return httpx.Response(200, json={"segments": [SEGMENT]})

    def admin(self, *addresses: str) -> MasterAdmin:
        made = MasterAdmin(*addresses)
        made._client = httpx.AsyncClient(transport=httpx.MockTransport(self.answer))
        return made


@pytest.mark.parametrize("addresses", [("a",), ("a", "b"), ("b", "a")])
def test_the_state_asks_once_who_leads(addresses: tuple[str, ...]) -> None:
    masters = Masters("a")

    async def run() -> None:
        admin = masters.admin(*addresses)
        for _ in range(2):  # the second time it is known who did
            masters.asked.clear()
            state = await admin.state()
            assert (state.leads, state.num_keys, state.segments) == (True, 7, (("s", 4, 8),))
        await admin.close()

    asyncio.run(run())
    assert masters.asked == ["a/health", "a/metrics", "a/get_segments_detail"]


@pytest.mark.parametrize("lost", ["status", "job"])
def test_a_drain_goes_on_after_an_answer_that_did_not_come(lost: str) -> None:
    masters, states = Masters("a"), iter(["OK", "DRAINING", "DRAINING", "DRAINED"])
    jobs = list[bytes]()

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            jobs.append(request.content)
            if lost == "job":
                raise httpx.ReadTimeout("late")
            return httpx.Response(200, json={})
        if lost == "status" and len(jobs) == 1 and not masters.asked:
            masters.asked.append("late")
            raise httpx.ReadTimeout("late")
        other = {**SEGMENT, "segment_name": "t", "te_endpoint": "f"}
        return httpx.Response(200, json={"segments": [{**SEGMENT, "status": next(states)}, other]})

    async def run() -> bool:
        admin = MasterAdmin("a")
        admin._client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
        try:
            return await admin.drain_segment("s", 20)
        finally:
            await admin.close()

    assert asyncio.run(run())
    assert len(jobs) == 1


async def test_a_master_that_cannot_be_started_is_tried_again() -> None:
    supervisor = MasterSupervisor(KVStoreConfig(mode="master"))
    supervisor._command = ("/nowhere/mooncake_master",)
    supervisor.start()
    try:
        async with asyncio.timeout(20):
            while supervisor.num_restarts < 2:
                await asyncio.sleep(0.05)
    finally:
        await supervisor.stop()


def test_nobody_leads() -> None:
    masters = Masters("")

    async def run() -> None:
        alone, several = masters.admin("a"), masters.admin("a", "b")
        state = await alone.state()
        assert (state.up, state.leads) == (True, False)
        with pytest.raises(StoreError, match="none of the masters at a, b leads"):
            await several.state()
        await alone.close()
        await several.close()

    asyncio.run(run())
