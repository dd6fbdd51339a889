"""MasterSupervisor: runs mooncake_master as a child that dies with this process, and starts it again when it dies."""

import asyncio
import contextlib
import functools
import logging
import os
import shutil
import sys
from pathlib import Path

from baton.cluster.machine import die_with_parent
from baton.config import KVStoreConfig, etcd_endpoints
from baton.errors import ConfigError
from baton.kv.mooncake import LEASE_S

logger = logging.getLogger(__name__)
_MIN_BACKOFF_S, _MAX_BACKOFF_S = 0.2, 5.0
_HOT_WINDOW_S = 10


class MasterSupervisor:
    def __init__(self, config: KVStoreConfig) -> None:
        """With `ha` this is one of several masters. One leads; with `oplog`, what it does is written to etcd, where the others read it, so
        that the next one knows the keys. Raises ConfigError where mooncake_master is not installed."""
        beside = Path(sys.executable).parent / "mooncake_master"
        program = str(beside) if beside.is_file() else shutil.which("mooncake_master")
        if program is None:
            raise ConfigError("mooncake_master is not installed; install baton[mooncake]")
        self._command = (
            program,
            f"--rpc_address={config.server.host}",
            f"--rpc_port={config.master_port}",
            f"--metrics_host={config.server.host}",
            f"--metrics_port={config.master_metrics_port}",
            f"--client_ttl={config.client_ttl_s}",
            "--enable_http_metadata_server=false",
            f"--default_kv_lease_ttl={LEASE_S}s",
            "--enable_offload=true",  # to disks, where nodes have one
            "--logtostderr=true",
            "--minloglevel=1",
        )
        if config.hot_reads:
            per_second = (config.hot_reads - 0.5) / _HOT_WINDOW_S  # Mooncake rounds what it multiplies up
            self._command += (
                "--dynamic_replication_mode=enforce",
                f"--dynamic_replication_heat_window_seconds={_HOT_WINDOW_S}",
                f"--dynamic_replication_admission_qps_threshold={per_second}",
            )
        if config.ha:
            self._command += (
                "--enable_ha=true",
                f"--enable_oplog={str(config.oplog).lower()}",
                f"--etcd_endpoints={etcd_endpoints(config.cluster)}",
                f"--cluster_id={config.cluster.name}",
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
            try:
                how = f"ended with code {await self._one()}"
            except OSError as error:  # no more processes for now, or its file is being replaced
                how = f"cannot be started ({error.strerror})"
            backoff = _MIN_BACKOFF_S if loop.time() - started > 10 else min(backoff * 2, _MAX_BACKOFF_S)
            logger.warning("mooncake_master %s; starting it again in %.1f s", how, backoff)
            self.num_restarts += 1
            await asyncio.sleep(backoff)

    async def _one(self) -> int:
        """Its exit code. Raises OSError."""
        process = await asyncio.create_subprocess_exec(*self._command, preexec_fn=functools.partial(die_with_parent, os.getpid()))
        self.pid = process.pid
        try:
            return await process.wait()
        finally:
            if process.returncode is None:
                process.terminate()
                try:
                    await asyncio.wait_for(process.wait(), 3.0)
                except TimeoutError:
                    process.kill()
