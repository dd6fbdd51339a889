"""Direct push over loopback TCP beside a plain socket copy of the same bytes between the same two processes, and Mooncake's waiting call.

    python benchmarks/push.py [--seconds 3]
    python -m benchmarks.push --device cuda          two GPUs, NVLink, beside a plain peer copy: benchmarks/push_peer.py

The ways take turns of half a GiB. A round is timed from the call until the sender knows that all has arrived, and a turn counts by its
median round. Bandwidth is the median turn's; "of plain" the median of each turn's ratio to the plain one just before it, for a shared
machine changes its speed from second to second; CPU seconds per GiB are of all rounds of a way, in either process.
"""

import argparse
import ctypes
import json
import mmap
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from baton.kv.mooncake_push import MooncakeReceiver, MooncakeSender
from baton.kv.push import Copy, PushResult, PushStatus
from baton.kv.store import Buffer
from baton.kv.transfer_engine import Engine

HOST = "127.0.0.1"
MEMORY = 64 << 20
TURN = 512 << 20
CASES = {
    "64 × 1 MiB, neighbours": (64, 1 << 20, False),
    "64 × 1 MiB, scattered": (64, 1 << 20, True),
    "16 × 128 KiB, neighbours": (16, 128 << 10, False),
    "16 × 128 KiB, scattered": (16, 128 << 10, True),
}


def memory() -> tuple[memoryview, Buffer]:
    """Touched, so that no page fault is measured."""
    area = mmap.mmap(-1, MEMORY)
    region = Buffer(ctypes.addressof(ctypes.c_char.from_buffer(area)), MEMORY)
    ctypes.memset(region.address, 1, MEMORY)
    return memoryview(area), region


def receive() -> None:
    """The other process: registered memory, and a plain socket that is read into it."""
    view, region = memory()
    receiver = MooncakeReceiver(region, host=HOST, protocol="tcp")
    with socket.create_server((HOST, 0)) as server:
        print(json.dumps([receiver.session, region.address, server.getsockname()[1]]), flush=True)
        connection, _ = server.accept()
    with connection:
        while size := connection.recv(8, socket.MSG_WAITALL):
            order = json.loads(connection.recv(int(size), socket.MSG_WAITALL))
            for target, nbytes in order:
                start, end = target, target + nbytes
                while start < end:
                    start += connection.recv_into(view[start:end])
            connection.sendall(b"!")
    receiver.close()


@dataclass
class Way:
    run: Callable[[], None]
    rounds: int = 0
    turns: list[float] = field(default_factory=list)  # seconds of the median round of each
    cpu: list[float] = field(default_factory=lambda: [0.0, 0.0])  # sender, receiver


def measure(ways: dict[str, Way], nbytes: int, seconds: float, processes: list[psutil.Process]) -> None:
    rounds = TURN // nbytes
    for way in ways.values():
        way.run()
    end = time.monotonic() + seconds * len(ways)
    while time.monotonic() < end:
        for way in ways.values():
            before = [sum(process.cpu_times()[:2]) for process in processes]
            times: list[float] = []
            for _ in range(rounds):
                start = time.perf_counter()
                way.run()
                times.append(time.perf_counter() - start)
            way.turns.append(statistics.median(times))
            way.rounds += rounds
            for i, process in enumerate(processes):
                way.cpu[i] += sum(process.cpu_times()[:2]) - before[i]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=3.0, help="for each way of a case")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments, rest = parser.parse_known_args()
    if arguments.device == "cuda":
        from benchmarks import push_peer

        return push_peer.main(rest)
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    seconds = arguments.seconds
    peer = subprocess.Popen([sys.executable, sys.argv[0], "receive"], stdout=subprocess.PIPE, text=True)
    assert peer.stdout is not None
    session, base, port = json.loads(peer.stdout.readline())
    view, region = memory()
    sender = MooncakeSender(region, host=HOST, protocol="tcp")
    engine = Engine(HOST, "tcp", [region])
    plain = socket.create_connection((HOST, port))
    processes = [psutil.Process(), psutil.Process(peer.pid)]
    print("| blocks | way | GiB/s | of plain | CPU s/GiB, sender | receiver |\n|---|---|---|---|---|---|")
    for case, (count, size, scattered) in CASES.items():
        places = list(range(count))
        if scattered:
            random.Random(1).shuffle(places)
        offsets = [(i * size, place * size) for i, place in enumerate(places)]
        copies = [Copy(region.address + source, base + target, size) for source, target in offsets]
        order = json.dumps([(target, size) for _, target in offsets]).encode()
        order = b"%8d%s" % (len(order), order)

        def copy_plainly(offsets: list[tuple[int, int]] = offsets, size: int = size, order: bytes = order) -> None:
            plain.sendall(order)
            for source, _ in offsets:
                plain.sendall(view[source : source + size])
            assert plain.recv(1) == b"!"

        def push(copies: list[Copy] = copies) -> None:
            results: list[PushResult] = []
            settled = threading.Event()
            sender.push(session, lambda: copies, results.append, settled.set)
            settled.wait()
            assert results[0].status is PushStatus.GOOD

        def wait_in_mooncake(copies: list[Copy] = copies) -> None:
            sources, targets, sizes = (list(column) for column in zip(*copies, strict=True))
            assert engine._engine.batch_transfer_sync_write(session, sources, targets, sizes) == 0

        ways = {"plain socket": Way(copy_plainly), "push": Way(push), "Mooncake's waiting call": Way(wait_in_mooncake)}
        measure(ways, count * size, seconds, processes)
        for name, way in ways.items():
            ratio = statistics.median(mine / theirs for mine, theirs in zip(ways["plain socket"].turns, way.turns, strict=True))
            gib = count * size * way.rounds / 2**30
            figures = [
                f"{count * size / statistics.median(way.turns) / 2**30:.2f}",
                f"{ratio:.2f}",
                *(f"{cpu / gib:.2f}" for cpu in way.cpu),
            ]
            print(f"| {case} | {name} | {' | '.join(figures)} |", flush=True)
    plain.close()
    sender.close()
    engine.close()
    peer.wait()


if __name__ == "__main__":
    receive() if "receive" in sys.argv else main()
