"""LentMemory: this process's part of the pool.

    join (again and again until there is a master) ─▶ touch every page ─▶ share with workers here ─▶ … ─▶ drain: its blocks move away

It joins after `wait_s`. Remounting after a restart of the master is Mooncake's own business. In a process that lends nothing there is
nothing to touch or drain.
"""

import asyncio
import ctypes
import logging
import os

from baton.errors import StoreError
from baton.kv.mooncake import MooncakeStore
from baton.kv.neighbours import Lender
from services.kvstore.admin import MasterAdmin, Segment

logger = logging.getLogger(__name__)
_MIN_RETRY_S, _MAX_RETRY_S = 0.1, 1.0
_PATIENCE = 8  # attempts, in five seconds at least, before somebody is told
_TOUCH_BYTES = 64 << 20  # at a time: the process's other page faults wait meanwhile
_MADV_POPULATE_WRITE = 23


class LentMemory:
    def __init__(self, store: MooncakeStore, admin: MasterAdmin, nbytes: int, lender: Lender | None = None, *, wait_s: float = 0.0) -> None:
        self._store, self._admin, self._nbytes, self._lender, self._wait_s = store, admin, nbytes, lender, wait_s
        self._joined = False

    async def join(self) -> None:
        attempts = 0
        await asyncio.sleep(self._wait_s)
        while not self._joined:
            try:
                await asyncio.to_thread(self._store.connect)
                if self._nbytes:
                    segments = await self._segments()
                    for segment in segments:
                        await asyncio.to_thread(_populate, segment.address, segment.capacity_bytes)
                    self._share(segments[0].endpoint)
                self._joined = True
                logger.info("joined the pool, lending %d bytes", self._nbytes)
            except Exception as error:
                if not isinstance(error, StoreError):
                    logger.exception("joining the pool failed in a way that is not known here")
                attempts += 1
                if attempts == _PATIENCE:
                    logger.warning("%s; trying on", error)
                await asyncio.sleep(min(_MIN_RETRY_S * 2**attempts, _MAX_RETRY_S))

    async def drain(self, grace_s: float) -> None:
        if not self._joined or not self._nbytes:
            return
        try:
            name = await asyncio.to_thread(lambda: self._store.segment_name)
            moved = await self._admin.drain_segment(name, grace_s)
        except StoreError as error:
            logger.warning("the blocks of this node cannot be moved: %s", error)
            return
        logger.info("blocks of %s %s", name, "moved to the other nodes" if moved else "are lost to the pool")

    def close(self) -> None:
        if self._lender is not None:
            self._lender.close()

    def _share(self, endpoint: str) -> None:
        if self._lender is None:
            return
        try:
            self._lender.open(endpoint)
        except OSError as error:
            logger.warning("workers on this machine read by the network: %s (pool.near)", error)

    async def _segments(self) -> list[Segment]:
        """What this process lends."""
        name = await asyncio.to_thread(lambda: self._store.segment_name)
        mine = [segment for segment in await self._admin.segments() if segment.name == name]
        if not mine:
            raise StoreError(f"the master does not know {name} yet")
        return mine


def _populate(address: int, nbytes: int) -> None:
    """Has the kernel back every page now: the first write to a fresh page is many times slower than the next. Contents stay as they
    are (Linux 5.14; elsewhere nothing happens). Memory that is not mapped is refused by the kernel."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for offset in range(0, nbytes, _TOUCH_BYTES):
        if madvise(address + offset, min(_TOUCH_BYTES, nbytes - offset), _MADV_POPULATE_WRITE) != 0:
            logger.info("memory is not touched in advance: %s", os.strerror(ctypes.get_errno()))
            return
