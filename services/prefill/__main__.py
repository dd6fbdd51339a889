"""The prefill worker's process."""

import asyncio

from baton.config import WorkerConfig, member_id
from baton.hosting.process import certificates_of, run_service
from baton.hosting.server import Host
from baton.hosting.worker import Intake, host_worker
from baton.rpc.v1 import prefill_pb2, prefill_pb2_grpc
from baton.runtime.build import build_worker
from baton.tracing import make_tracer
from baton.types import Role
from services.prefill.servicer import PrefillServicer


async def serve(config: WorkerConfig) -> None:
    certificates = certificates_of(config.security)
    name = member_id(config.server, Role.PREFILL)
    tracer = make_tracer(config.tracing, "prefill", name)  # what it lacks is told before weights are loaded
    built = build_worker(config.model_copy(update={"role": Role.PREFILL}), name)

    def add_services(host: Host, intake: Intake) -> list[str]:
        servicer = PrefillServicer(
            intake,
            built.member.fingerprint,
            built.metrics,
            heartbeat_s=config.cluster.lease_s / 4,
            instance=built.member.instance,
            can_push=built.can_push,
            pool_available=built.pool_available,
            tensor_parallel_size=built.member.tensor_parallel_size,
            tracer=tracer,
            block_bytes=built.block_bytes,
        )
        prefill_pb2_grpc.add_PrefillServicer_to_server(servicer, host.grpc)
        return [prefill_pb2.DESCRIPTOR.services_by_name["Prefill"].full_name]

    try:
        await host_worker(config, built.engine, built.member, built.metrics, add_services, certificates)
    finally:
        await asyncio.to_thread(tracer.close)


if __name__ == "__main__":
    run_service("prefill", WorkerConfig, serve)
