"""The decode worker's process; with role `unified`, the worker that does both."""

import asyncio

from baton.config import WorkerConfig, member_id
from baton.errors import ConfigError
from baton.hosting.process import certificates_of, run_service
from baton.hosting.server import Host
from baton.hosting.worker import Intake, host_worker
from baton.rpc.channel import Channels
from baton.rpc.v1 import decode_pb2, decode_pb2_grpc
from baton.runtime.build import build_worker
from baton.tracing import make_tracer
from baton.types import Role
from services.decode.leases import Leases
from services.decode.servicer import DecodeServicer


async def serve(config: WorkerConfig) -> None:
    if config.role not in (Role.DECODE, Role.UNIFIED):
        raise ConfigError(f"role={config.role} is not for this service; use decode or unified")
    certificates = certificates_of(config.security)
    name = member_id(config.server, config.role)
    tracer = make_tracer(config.tracing, str(config.role), name)  # what it lacks is told before weights are loaded
    built = build_worker(config, name)
    channels = Channels(config.cluster.lease_s, certificates)
    leases = Leases(built.engine.leases, channels, lease_s=config.cluster.lease_s)

    def add_services(host: Host, intake: Intake) -> list[str]:
        servicer = DecodeServicer(
            intake,
            built.member.fingerprint,
            channels,
            built.metrics,
            lease_s=config.cluster.lease_s,
            max_local_prefill_tokens=config.max_local_prefill_tokens,
            unified=config.role is Role.UNIFIED,
            pool_available=built.pool_available,
            leases=leases if built.receives else None,
            tensor_parallel_size=built.member.tensor_parallel_size,
            tracer=tracer,
            block_bytes=built.block_bytes,
        )
        decode_pb2_grpc.add_DecodeServicer_to_server(servicer, host.grpc)
        return [decode_pb2.DESCRIPTOR.services_by_name["Decode"].full_name]

    try:
        await host_worker(config, built.engine, built.member, built.metrics, add_services, certificates)
    finally:
        await leases.close()
        await channels.close()
        await asyncio.to_thread(tracer.close)


if __name__ == "__main__":
    run_service("decode", WorkerConfig, serve)
