"""Which membership a configuration asks for, and how a static one asks an address who it is."""

from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from baton.cluster.etcd import EtcdMembership
from baton.cluster.membership import Membership
from baton.cluster.static import StaticMembership
from baton.config import ClusterConfig
from baton.rpc import convert
from baton.rpc.certificates import Certificates, check_files
from baton.rpc.channel import Channels
from baton.rpc.v1 import worker_pb2, worker_pb2_grpc
from baton.types import Member


def make_membership(cluster: ClusterConfig, certificates: Certificates | None = None) -> Membership:
    """etcd where `cluster.etcd` is set, else the fixed list `cluster.workers`. Raises ConfigError."""
    if cluster.etcd:
        access = cluster.etcd_access
        files = {"cert": access.cert, "key": access.key, "authority": access.authority}
        check_files("cluster.etcd_access", {name: Path(path) for name, path in files.items() if path})
        return EtcdMembership(cluster.etcd, cluster.name, lease_s=cluster.lease_s, access=access)
    channels = Channels(cluster.lease_s, certificates)

    async def probe(address: str) -> Member:
        try:
            stub: Any = worker_pb2_grpc.WorkerStub(channels.get(address))
            return convert.member_from_proto(await stub.GetMember(worker_pb2.GetMemberRequest(), timeout=cluster.lease_s / 2))
        except grpc.aio.AioRpcError as error:
            raise convert.error_from_rpc(error, address) from error

    return StaticMembership(cluster.workers, probe, lease_s=cluster.lease_s)
