"""KVStore: lookup, statistics and removal, for operators and other services."""

import asyncio

from baton.errors import InvalidRequest, StoreError
from baton.hosting.worker import Context, guarded
from baton.kv.layout import block_key
from baton.kv.mooncake import MooncakeStore
from baton.rpc.v1 import kvstore_pb2 as pb
from baton.rpc.v1 import kvstore_pb2_grpc
from services.kvstore.admin import MasterAdmin


class KVStoreServicer(kvstore_pb2_grpc.KVStoreServicer):
    def __init__(self, store: MooncakeStore, admin: MasterAdmin) -> None:
        self._store, self._admin = store, admin

    async def Lookup(self, request: pb.LookupRequest, context: Context) -> pb.LookupResponse:
        """Raises UNAVAILABLE when the pool does not answer."""
        found: list[bool] = []
        async with guarded(context):
            keys = [block_key(request.fingerprint, key, request.tp_rank, request.tp_size or 1) for key in request.block_hashes]
            found = await asyncio.to_thread(self._store.holds, keys) if keys else []
        return pb.LookupResponse(found=found)

    async def GetStats(self, request: pb.GetStatsRequest, context: Context) -> pb.GetStatsResponse:
        try:
            state = await self._admin.state()
        except StoreError as error:
            return pb.GetStatsResponse(available=False, problem=error.message)
        if not state.leads:
            return pb.GetStatsResponse(available=False, problem="this master stands by; ask the one that leads, or a node")
        return pb.GetStatsResponse(
            available=True,
            capacity_bytes=state.capacity_bytes,
            used_bytes=state.used_bytes,
            num_keys=state.num_keys,
            segments=[pb.Segment(name=name, used_bytes=used, capacity_bytes=capacity) for name, used, capacity in state.segments],
        )

    async def Remove(self, request: pb.RemoveRequest, context: Context) -> pb.RemoveResponse:
        count = 0
        async with guarded(context):
            if not request.prefix and not request.all:
                raise InvalidRequest("say what to remove: a key prefix (a fingerprint, say), or all", param="what")
            count = await asyncio.to_thread(self._store.remove, request.prefix)
        return pb.RemoveResponse(num_removed=count)
