"""The kvstore's process: `master` supervises mooncake_master, `node` lends memory to the pool."""

import asyncio
import logging
import os
from typing import Any, cast

from baton.cluster.machine import is_loopback
from baton.config import KVStoreConfig, member_id, pool_master
from baton.errors import ConfigError, StoreError
from baton.hosting.process import certificates_of, run_service
from baton.hosting.server import Host
from baton.kv.mooncake import MooncakeStore, Spill
from baton.kv.neighbours import Lender, SharedMemory, meeting_place, pool_name
from baton.metrics import KVStoreMetrics
from baton.rpc.v1 import kvstore_pb2, kvstore_pb2_grpc
from baton.types import Member, PoolState, Role
from services.kvstore.admin import MasterAdmin
from services.kvstore.disk import Disk
from services.kvstore.master import MasterSupervisor
from services.kvstore.node import LentMemory
from services.kvstore.servicer import KVStoreServicer

logger = logging.getLogger(__name__)
_POLL_S = 2.0
_MARGIN_S = 2.0


async def serve(config: KVStoreConfig) -> None:
    is_master = config.mode == "master"
    pool, lent = config.pool, 0 if is_master else config.memory
    address, admins = _addresses(config)
    place = meeting_place(pool.near) if lent else None
    shared = SharedMemory(lent) if place is not None else None
    disk = Disk(config.disk.path) if config.disk.path and not is_master else None
    admin = MasterAdmin(*admins)
    store = MooncakeStore(
        address,
        host=pool.host,
        cluster=config.cluster.name,
        protocol=pool.protocol,
        devices=pool.devices,
        local_buffer=pool.local_buffer,
        segment=lent,
        segment_path=shared.path if shared is not None else "",
        spill=Spill(disk.path, config.disk.bytes, config.disk.buffer) if disk is not None else None,
    )
    lender = Lender(shared, place, pool_name(address, config.cluster.name)) if shared is not None and place is not None else None
    # Blocks that the master still believes to be on this node's former self are not taken, and forgotten with that.
    wait_s = config.client_ttl_s + _MARGIN_S if disk is not None and disk.abandoned else 0.0
    memory = LentMemory(store, admin, lent, lender, wait_s=wait_s)
    name = member_id(config.server, Role.KVSTORE)
    metrics = KVStoreMetrics(name)
    member = Member(id=name, role=Role.KVSTORE, address="")
    host = Host(config.server, config.cluster, member, metrics, certificates=certificates_of(config.security))
    cast(Any, kvstore_pb2_grpc).add_KVStoreServicer_to_server(KVStoreServicer(store, admin), host.grpc)
    tasks = [asyncio.create_task(memory.join(), name="join"), asyncio.create_task(_poll(admin, metrics), name="poll")]
    supervisor = None
    if is_master:
        if config.security.cert and not is_loopback(config.server.host):
            ports = f"{config.server.host}:{config.master_port} and {config.master_metrics_port}"
            logger.warning("mooncake_master at %s asks nobody for a certificate: keep others out (docs/security.md)", ports)
        supervisor = MasterSupervisor(config)
        metrics.totals(lambda: {"master_restarts": supervisor.num_restarts})
        supervisor.start()
    served = False
    try:
        await host.run([kvstore_pb2.DESCRIPTOR.services_by_name["KVStore"].full_name], lambda: memory.drain(config.drain_grace_s))
        served = True
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        memory.close()
        if served and not is_master:  # else it ends with its error, and the master forgets it; or the master ends with it
            left = await _leave(store, admin)
            if disk is not None:
                await asyncio.to_thread(disk.close, orderly=left)
        await admin.close()
        if supervisor is not None:
            await supervisor.stop()


def _addresses(config: KVStoreConfig) -> tuple[str, tuple[str, ...]]:
    """Where the pool is asked for, and where masters are asked about it. Raises ConfigError."""
    host = config.server.host
    if config.mode == "master":
        if config.ha and not config.cluster.etcd:
            raise ConfigError("ha=true needs cluster.etcd: that is where masters agree on who leads")
        if config.ha and host in ("0.0.0.0", "::"):
            raise ConfigError(f"ha=true tells others server.host={host} as this master's address: give the address that they reach it at")
        address = f"{host}:{config.master_port}"
        if config.ha:
            address = pool_master(config.pool.model_copy(update={"master": "etcd"}), config.cluster)
        return address, (f"{host}:{config.master_metrics_port}",)
    address = pool_master(config.pool, config.cluster)
    if not address:
        raise ConfigError("pool.master is not set: give host:port of mooncake_master, or etcd where there are several")
    if config.pool.master == "etcd" and not config.masters:
        raise ConfigError("pool.master=etcd: give a node masters=[host:port, …] too, the master_metrics_port of each master")
    return address, config.masters or (f"{address.rpartition(':')[0]}:{config.master_metrics_port}",)


async def _poll(admin: MasterAdmin, metrics: KVStoreMetrics) -> None:
    while True:
        try:
            metrics.state = await admin.state()
        except Exception as error:
            if not isinstance(error, StoreError):
                logger.exception("the pool's state cannot be read")
            counters = ("num_evicted", "bytes_evicted", "num_refused", "num_replicated")
            metrics.state = PoolState(**{name: getattr(metrics.state, name) for name in counters})  # they stay
        await asyncio.sleep(_POLL_S)


async def _leave(store: MooncakeStore, admin: MasterAdmin) -> bool:
    """Whether the pool let go of this node's disk. Without a master Mooncake would try for 17 s to say goodbye, holding the interpreter:
    this process just ends then."""
    try:
        await admin.segments()
    except StoreError as error:
        logger.warning("left the pool without saying goodbye: %s", error)
        logging.shutdown()
        os._exit(0)
    left = await asyncio.to_thread(store.release_disk)
    await asyncio.to_thread(store.close)
    return left


if __name__ == "__main__":
    run_service("kvstore", KVStoreConfig, serve)
