"""MasterSupervisor: runs mooncake_master as a child, starts it again when it dies, and asks it how the pool is."""

import asyncio
import contextlib
import functools
import logging
import os
import re
import shutil
import sys
from pathlib import Path

import httpx

from baton.errors import ConfigError, StoreError
from baton.hosting.process import die_with_parent
from baton.types import PoolState

logger = logging.getLogger(__name__)
_MIN_BACKOFF_S, _MAX_BACKOFF_S = 0.2, 5.0
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{[^}]*\})? ([-+.eE\d]+)$", re.MULTILINE)


class MasterAdmin:
    """The master's HTTP side. Raises StoreError when it does not answer."""

    def __init__(self, address: str) -> None:
        self._client = httpx.AsyncClient(base_url=f"http://{address}", timeout=2.0)

    async def state(self) -> PoolState:
        values = {name: float(value) for name, value in _SAMPLE.findall(await self._get("/metrics"))}
        segments: list[tuple[str, int, int]] = []
        for name in (await self._get("/get_all_segments")).split():
            detail = await self._get(f"/query_segment?segment={name}")
            numbers = [int(number) for number in re.findall(r":\s*(\d+)", detail)]
            segments.append((name, numbers[0], numbers[1]) if len(numbers) >= 2 else (name, 0, 0))
        return PoolState(
            capacity_bytes=int(values.get("master_total_capacity_bytes", 0)),
            used_bytes=int(values.get("master_allocated_bytes", 0)),
            num_keys=int(values.get("master_key_count", 0)),
            num_evicted=int(values.get("master_evicted_key_count", 0)),
            segments=tuple(segments),
        )

    async def drain_segment(self, name: str, grace_s: float) -> bool:
        """Has a segment's objects moved to the other nodes; False if that did not end in time."""
        deadline = asyncio.get_running_loop().time() + grace_s
        try:
            answer = await self._client.post("/api/v1/drain_jobs", json={"segments": [name]})
            while answer.status_code < 300 and asyncio.get_running_loop().time() < deadline:
                status = await self._client.get("/api/v1/segments/status", params={"segment": name})
                if "DRAINED" in status.text:
                    return True
                await asyncio.sleep(0.1)
        except httpx.HTTPError as error:
            logger.warning("the segment cannot be drained: %r", error)
        return False

    async def close(self) -> None:
        await self._client.aclose()

    async def _get(self, path: str) -> str:
        try:
            answer = await self._client.get(path)
        except httpx.HTTPError as error:
            raise StoreError(f"mooncake_master does not answer ({type(error).__name__})") from error
        return answer.text if answer.status_code == 200 else ""


class MasterSupervisor:
    def __init__(self, host: str, port: int, metrics_port: int, client_ttl_s: int) -> None:
        """Raises ConfigError where mooncake_master is not installed."""
        beside = Path(sys.executable).parent / "mooncake_master"
        program = str(beside) if beside.is_file() else shutil.which("mooncake_master")
        if program is None:
            raise ConfigError("mooncake_master is not installed; install baton[mooncake]")
        self._command = (
            program,
            f"--rpc_address={host}",
            f"--rpc_port={port}",
            f"--metrics_host={host}",
            f"--metrics_port={metrics_port}",
            f"--client_ttl={client_ttl_s}",
            "--enable_http_metadata_server=false",
            "--logtostderr=true",
            "--minloglevel=1",
        )
        self._task: asyncio.Task[None] | None = None
        self.num_restarts = 0
        self.pid = 0

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="mooncake-master")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        backoff = _MIN_BACKOFF_S
        while True:
            loop = asyncio.get_running_loop()
            started = loop.time()
            process = await asyncio.create_subprocess_exec(*self._command, preexec_fn=functools.partial(die_with_parent, os.getpid()))
            self.pid = process.pid
            try:
                code = await process.wait()
            finally:
                if process.returncode is None:
                    process.terminate()
                    try:
                        await asyncio.wait_for(process.wait(), 3.0)
                    except TimeoutError:
                        process.kill()
            backoff = _MIN_BACKOFF_S if loop.time() - started > 10 else min(backoff * 2, _MAX_BACKOFF_S)
            logger.warning("mooncake_master ended with code %s; starting it again in %.1f s", code, backoff)
            self.num_restarts += 1
            await asyncio.sleep(backoff)
