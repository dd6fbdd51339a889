"""MasterAdmin: what mooncake_master tells and does over HTTP. Knows its paths and forms, which nobody else does."""

import asyncio
import contextlib
import logging
import re
from dataclasses import dataclass
from typing import Any

import httpx

from baton.errors import StoreError
from baton.types import PoolState

logger = logging.getLogger(__name__)
_POLL_S = 0.1
_SILENCE_S = 3.0  # of the masters, after which a drain is given up
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{[^}]*\})? ([-+.eE\d]+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Segment:
    """Memory that a node lends. `address` is where it lies in that node's process."""

    name: str
    endpoint: str  # in the addresses of replicas
    status: str  # OK, DRAINING, DRAINED, …
    address: int
    capacity_bytes: int
    used_bytes: int


class MasterAdmin:
    """Every call raises StoreError when the master does not answer, or not as expected. Of several, the one that leads is asked."""

    def __init__(self, *addresses: str) -> None:
        self._client = httpx.AsyncClient(timeout=2.0)
        self._addresses = list(addresses)  # the one that led last comes first

    async def segments(self) -> list[Segment]:
        return await self._segments(await self._leader())

    async def _segments(self, address: str) -> list[Segment]:
        answer = await self._request(address, "GET", "/get_segments_detail")
        try:
            return [_segment(entry) for entry in answer.json()["segments"]]
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"mooncake_master describes its segments in a form that is not known here ({error!r})") from error

    async def state(self) -> PoolState:
        leader = await self._leader()
        if len(self._addresses) == 1 and not await self._leads(leader):
            return PoolState(up=True)
        values = {name: float(value) for name, value in _SAMPLE.findall((await self._request(leader, "GET", "/metrics")).text)}
        segments = await self._segments(leader)
        return PoolState(
            up=True,
            leads=True,
            capacity_bytes=int(values.get("master_total_capacity_bytes", 0)),
            used_bytes=int(values.get("master_allocated_bytes", 0)),
            num_keys=int(values.get("master_key_count", 0)),
            num_evicted=int(values.get("master_evicted_key_count", 0)),
            bytes_evicted=int(values.get("master_evicted_size_bytes", 0)),
            num_refused=int(values.get("master_put_start_alloc_failures_total", 0)),
            num_replicated=int(values.get("master_copy_end_requests_total", 0)),
            segments=tuple((each.name, each.used_bytes, each.capacity_bytes) for each in segments),
        )

    async def drain_segment(self, name: str, grace_s: float) -> bool:
        """Has a segment's objects moved to the other nodes; False if nobody can take them, or not in time. A master that does not answer
        may do so yet, for a while. Raises StoreError where none does."""
        clock = asyncio.get_running_loop().time
        deadline, answered = clock() + grace_s, clock()
        started = False
        while clock() < deadline:
            try:
                states = {each.name: each.status for each in await self.segments()}
                mine = states.pop(name, "gone")
                if mine == "DRAINED":
                    return True
                if mine == "gone" or "OK" not in states.values():
                    return False
                if not started and mine == "OK":  # else it was heard, though its answer was not
                    await self._request(await self._leader(), "POST", "/api/v1/drain_jobs", {"segments": [name]})
                    started = True
                answered = clock()
            except StoreError:
                if clock() - answered > _SILENCE_S:
                    raise
            await asyncio.sleep(_POLL_S)
        return False

    async def _leader(self) -> str:
        """Its address, which comes to the front. The only one is taken to lead."""
        if len(self._addresses) == 1:
            return self._addresses[0]
        for address in self._addresses:
            with contextlib.suppress(StoreError):
                if await self._leads(address):
                    self._addresses.sort(key=lambda other: other != address)
                    return address
        raise StoreError(f"none of the masters at {', '.join(self._addresses)} leads")

    async def _leads(self, address: str) -> bool:
        """Whether it leads, and knows its keys by now."""
        try:
            answer = (await self._client.get(f"http://{address}/health")).json()
            return answer["role"] == "leader" and answer["service_ready"]
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise StoreError(f"mooncake_master does not answer ({type(error).__name__})") from error

    async def close(self) -> None:
        await self._client.aclose()

    async def _request(self, address: str, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        try:
            answer = await self._client.request(method, f"http://{address}{path}", json=body)
        except httpx.HTTPError as error:
            raise StoreError(f"mooncake_master does not answer ({type(error).__name__})") from error
        if answer.status_code >= 300:
            raise StoreError(f"mooncake_master answers {path} with {answer.status_code}: {answer.text[:200]}")
        return answer


def _segment(entry: dict[str, Any]) -> Segment:
    return Segment(
        name=entry["segment_name"],
        endpoint=entry["te_endpoint"],
        status=entry["status"],
        address=int(entry["base_address"], 16),
        capacity_bytes=int(entry["allocator_capacity_bytes"]),
        used_bytes=int(entry["allocator_used_bytes"]),
    )
