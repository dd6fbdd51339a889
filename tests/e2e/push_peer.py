"""The other process of test_push.py: a sender or a receiver, whose memory the test sees too. Takes orders on stdin, a line of JSON each."""

import ctypes
import json
import mmap
import queue
import sys
from functools import partial
from typing import Any

from baton.kv.mooncake_push import MooncakeReceiver, MooncakeSender
from baton.kv.push import Copy, PushResult
from baton.kv.store import Buffer


class Memory:
    """Of this process alone, or (`fd`, from memfd_create) of two."""

    def __init__(self, nbytes: int, byte: int | None = None, fd: int = -1) -> None:
        self.map = mmap.mmap(fd, nbytes)
        self.region = Buffer(ctypes.addressof(ctypes.c_char.from_buffer(self.map)), nbytes)
        if byte is not None:
            self.fill(byte)

    def fill(self, byte: int, start: int = 0, end: int | None = None) -> None:
        ctypes.memset(self.region.address + start, byte, (self.region.nbytes if end is None else end) - start)

    def bytes_found(self) -> set[int]:
        found: set[int] = set()
        for start in range(0, self.region.nbytes, 4096):
            page = self.map[start : start + 4096]
            found |= {page[0]} if page == page[:1] * len(page) else set(page)
        return found


def main() -> None:
    role, fd, nbytes, limit_s = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    memory = Memory(nbytes, fd=fd)
    if role == "receiver":
        receiver = MooncakeReceiver(memory.region, host="127.0.0.1", protocol="tcp")
        answer(memory.region.address, receiver.session)
        sys.stdin.read()
        receiver.close()
        return
    sender = MooncakeSender(memory.region, host="127.0.0.1", protocol="tcp", limit_s=limit_s)
    events: queue.Queue[Any] = queue.Queue()
    answer(memory.region.address, "")

    def done(result: PushResult) -> None:
        events.put([result.status.value, result.reason])

    for line in sys.stdin:
        if line == "result\n":
            answer(*events.get(timeout=30), events.get(timeout=30))
        else:
            session, *copy = json.loads(line)
            sender.push(session, partial(list, [Copy(*copy)]), done, lambda: events.put("settled"))
    sender.close()


def answer(*values: object) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
