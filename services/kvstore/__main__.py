"""The kvstore's process: `master` supervises mooncake_master, `node` lends memory to the pool."""

import asyncio
import contextlib
import dataclasses
import logging
from typing import Any, cast

from baton.config import KVStoreConfig, member_id
from baton.errors import ConfigError, StoreError
from baton.hosting.process import run_service
from baton.hosting.server import Host
from baton.kv.mooncake import MooncakeStore
from baton.metrics import KVStoreMetrics
from baton.rpc.v1 import kvstore_pb2, kvstore_pb2_grpc
from baton.types import Member, Role
from services.kvstore.master import MasterAdmin, MasterSupervisor
from services.kvstore.servicer import KVStoreServicer

logger = logging.getLogger(__name__)
_RETRY_S = 1.0
_POLL_S = 2.0


async def serve(config: KVStoreConfig) -> None:
    is_master = config.mode == "master"
    address = f"{config.server.host}:{config.master_port}" if is_master else config.pool.master
    if not address:
        raise ConfigError("pool.master is not set: give host:port of mooncake_master")
    admin = MasterAdmin(f"{address.rpartition(':')[0]}:{config.master_metrics_port}")
    segment = 0 if is_master else config.memory
    pool = config.pool
    store = MooncakeStore(
        address, host=pool.host, protocol=pool.protocol, devices=pool.devices, local_buffer=pool.local_buffer, segment=segment
    )
    name = member_id(config.server, Role.KVSTORE)
    metrics = KVStoreMetrics(name)
    host = Host(config.server, config.cluster, Member(id=name, role=Role.KVSTORE, address=""), metrics)
    cast(Any, kvstore_pb2_grpc).add_KVStoreServicer_to_server(KVStoreServicer(store, admin), host.grpc)
    supervisor = (
        MasterSupervisor(config.server.host, config.master_port, config.master_metrics_port, config.client_ttl_s) if is_master else None
    )
    if supervisor is not None:
        supervisor.start()
    mounting = asyncio.create_task(_mount(store, config.memory if not is_master else 0), name="mount")
    polling = asyncio.create_task(_poll(admin, metrics), name="poll")

    async def drain() -> None:
        mounting.cancel()
        if not is_master and len(metrics.state.segments) > 1 and mounting.done() and not mounting.cancelled():
            segment_name = await asyncio.to_thread(lambda: store.segment_name)
            moved = await admin.drain_segment(segment_name, config.drain_grace_s)
            logger.info("blocks of %s %s", segment_name, "moved to the other nodes" if moved else "are lost to the pool")

    try:
        await host.run([kvstore_pb2.DESCRIPTOR.services_by_name["KVStore"].full_name], drain)
    finally:
        for task in (mounting, polling):
            task.cancel()
        await asyncio.gather(mounting, polling, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.to_thread(store.close), 5.0)
        await admin.close()
        if supervisor is not None:
            await supervisor.stop()


async def _mount(store: MooncakeStore, lent: int) -> None:
    """Joins the pool as soon as there is a master. Mooncake itself comes back after a restart of the master."""
    while True:
        try:
            await asyncio.to_thread(store.connect)
            logger.info("joined the pool, lending %d bytes", lent)
            return
        except StoreError as error:
            logger.debug("%s", error)
            await asyncio.sleep(_RETRY_S)


async def _poll(admin: MasterAdmin, metrics: KVStoreMetrics) -> None:
    while True:
        try:
            metrics.state = await admin.state()
        except StoreError:
            metrics.state = dataclasses.replace(metrics.state, capacity_bytes=0, used_bytes=0, num_keys=0, segments=())
        await asyncio.sleep(_POLL_S)


if __name__ == "__main__":
    run_service("kvstore", KVStoreConfig, serve)
