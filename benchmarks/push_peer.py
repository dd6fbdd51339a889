"""A prompt's KV from one GPU to another, each with a process of its own, by the code that the engine pushes with, beside torch's plain peer
copy (one process that sees both) of the same bytes in the same rounds. `python -m benchmarks.push --device cuda` runs it; on any machine:

    python -m benchmarks.push_peer --devices cpu cpu --protocol tcp --blocks 16 --block-bytes 1048576

The ways take turns. A round is timed from the call until the sender knows that all has arrived; the median round counts, and "of plain"
is the median of each round's ratio to the plain copy in one piece just before it. Once for each way the receiver's memory is filled with
something else, and compared afterwards, block by block.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

import torch

from baton.cluster.machine import this_machine
from baton.config import PushConfig
from baton.kv.connect import connect_push
from baton.kv.push import Copy, PushResult, PushStatus
from baton.kv.store import Buffer
from baton.kv.transfer_engine import Engine
from baton.types import PushShard, Role

HOST = "127.0.0.1"
PATIENCE_S = 60


def options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs=2, default=["cuda:0", "cuda:1"], help="of the sender, of the receiver")
    parser.add_argument("--protocol", default="nvlink_intra")
    parser.add_argument("--blocks", type=int, default=128, help="8,192 tokens of Llama-3.1-8B are 128 blocks of 8 MiB")
    parser.add_argument("--block-bytes", type=int, default=8 << 20)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--receive", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(given)


def blocks_of(device: str, count: int, nbytes: int) -> torch.Tensor:
    """[count, nbytes], on a page of its own."""
    area = torch.zeros(count * nbytes + 4096, dtype=torch.uint8, device=device)
    start = -area.data_ptr() % 4096
    return area[start : start + count * nbytes].view(count, nbytes)


def fingerprints(blocks: torch.Tensor) -> list[int]:
    """Of each block; a word that changes, or changes its place, changes it."""
    words = blocks.view(torch.int32)
    weights = torch.arange(1, words.shape[1] + 1, device=words.device, dtype=torch.int64) * 2654435761
    return [int((row.to(torch.int64) * weights).sum()) for row in words]


def synchronize(*devices: str) -> None:
    for device in devices:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)


def receive(arguments: argparse.Namespace) -> None:
    """The other process: "fill" and "sum" are what it is asked for."""
    device = arguments.devices[1]
    if device.startswith("cuda"):
        device = "cuda:0"  # its own comes first among those that it sees
        torch.cuda.set_device(0)
    blocks = blocks_of(device, arguments.blocks, arguments.block_bytes)
    region = Buffer(blocks.data_ptr(), blocks.numel())
    config = PushConfig(protocols=(arguments.protocol,), host=HOST)
    _, receiver = connect_push(config, Role.DECODE, region, cuda=blocks.is_cuda)
    assert receiver is not None
    print(json.dumps([receiver.sessions, blocks.data_ptr()]), flush=True)
    for order in sys.stdin:
        if order == "fill\n":
            blocks.fill_(0xA5)
        synchronize(device)
        print(json.dumps(fingerprints(blocks) if order == "sum\n" else None), flush=True)
    receiver.close()


class Peer:
    def __init__(self, given: Sequence[str], sender: str, receiver: str) -> None:
        environment = dict(os.environ)
        if receiver.startswith("cuda") and sender != receiver:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(
                swapped(environment.get("CUDA_VISIBLE_DEVICES"), int(receiver.rpartition(":")[2]))
            )
        command = [sys.executable, "-m", "benchmarks.push_peer", *given, "--receive"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.sessions, self.base = self._answer()

    def ask(self, what: str) -> list[int]:
        stdin: IO[str] | None = self._process.stdin
        assert stdin is not None
        print(what, file=stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(PATIENCE_S)
        finally:
            self._process.kill()

    def _answer(self) -> Any:
        watch = threading.Timer(PATIENCE_S, self._process.kill)
        watch.start()
        try:
            assert self._process.stdout is not None
            line = self._process.stdout.readline()
        finally:
            watch.cancel()
        if not line:
            raise SystemExit(f"the receiver has ended (code {self._process.wait()}); what it said is above")
        return json.loads(line)


def swapped(visible: str | None, own: int) -> list[str]:
    """All devices, that one first: NVLink maps the memory of the others, so `baton up` shows each worker all of them."""
    names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return names[own:] + names[:own]


def main(given: Sequence[str]) -> None:
    arguments = options(given)
    if arguments.receive:
        return receive(arguments)
    source_device, target_device = arguments.devices
    count, nbytes = arguments.blocks, arguments.block_bytes
    if source_device.startswith("cuda"):
        torch.cuda.set_device(source_device)
        print(f"<!-- {torch.cuda.get_device_name()} × {torch.cuda.device_count()}, torch {torch.__version__}, peer access "
              f"{source_device == target_device or torch.cuda.can_device_access_peer(0, 1)} -->", flush=True)  # fmt: skip
    peer = Peer(given, source_device, target_device)
    source, target = blocks_of(source_device, count, nbytes), blocks_of(target_device, count, nbytes)
    source.view(torch.int32).random_(-(2**31), 2**31 - 1)
    synchronize(source_device, target_device)
    expected = fingerprints(source)
    region = Buffer(source.data_ptr(), source.numel())
    sender, _ = connect_push(PushConfig(protocols=(arguments.protocol,), host=HOST), Role.PREFILL, region, cuda=source.is_cuda)
    assert sender is not None
    engine = Engine(HOST, arguments.protocol, [region])
    session = dict(map(tuple, peer.sessions))[arguments.protocol]
    engine.open(session, 5.0)
    places = random.Random(1).sample(range(count), count)
    whole = PushShard(machine=this_machine(), sessions=tuple(map(tuple, peer.sessions)), addresses=())

    def copies(order: Sequence[int]) -> list[Copy]:
        return [Copy(region.address + i * nbytes, peer.base + place * nbytes, nbytes) for i, place in enumerate(order)]

    def push(order: Sequence[int]) -> Callable[[], None]:
        each = copies(order)

        def run() -> None:
            results: list[PushResult] = []
            told = threading.Event()

            def done(result: PushResult) -> None:
                results.append(result)
                told.set()

            sender.push(whole, lambda: each, done, lambda: None)
            assert told.wait(PATIENCE_S), "no answer"
            assert results[0].status is PushStatus.GOOD, results[0]

        return run

    def waiting_calls(order: Sequence[int], threads: int) -> Callable[[], None]:
        pool = ThreadPoolExecutor(threads)

        def one(part: list[Copy]) -> int:
            sources, targets, sizes = (list(column) for column in zip(*part, strict=True))
            return engine._engine.batch_transfer_sync_write(session, sources, targets, sizes)

        def run() -> None:
            assert set(pool.map(one, [copies(order)[i::threads] for i in range(threads)])) == {0}

        return run

    def plain(order: Sequence[int] | None) -> Callable[[], None]:
        def run() -> None:
            if order is None:
                target.copy_(source, non_blocking=True)
            else:
                for i, place in enumerate(order):
                    target[place].copy_(source[i], non_blocking=True)
            synchronize(source_device, target_device)

        return run

    neighbours = range(count)
    ways: dict[str, tuple[Sequence[int], Callable[[], None]]] = {
        "plain copy, one piece": ((), plain(None)),
        "plain copy, block by block": ((), plain(places)),
        "push, neighbours": (neighbours, push(neighbours)),
        "push, scattered": (places, push(places)),
        "Mooncake's waiting call, scattered": (places, waiting_calls(places, 1)),
        "the same from two threads": (places, waiting_calls(places, 2)),
        "the same from four": (places, waiting_calls(places, 4)),
    }
    times: dict[str, list[float]] = {}
    right: dict[str, str] = {}
    for name, (order, run) in list(ways.items()):
        try:
            if order:
                peer.ask("fill")
            run()
            if order:
                found = peer.ask("sum")
                good = all(found[place] == expected[i] for i, place in enumerate(order))
                right[name] = "yes" if good else "NO"
            for _ in range(3):
                run()
            times[name] = []
        except Exception:  # the other ways are still worth knowing
            traceback.print_exc()
            print(f"<!-- {name}: failed, above -->", flush=True)
            del ways[name]
    for _ in range(arguments.rounds):
        for name, (_, run) in ways.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    total = count * nbytes
    print(f"\n{count} blocks of {nbytes:,} bytes, {source_device} to {target_device}, {arguments.protocol}\n")
    print("| way | ms: median (best, worst) | GB/s | of plain, one piece | block by block | bytes right |\n|---|---|---|---|---|---|")
    for name, mine in times.items():
        ratios = [
            statistics.median(other / own for other, own in zip(times[base], mine, strict=True)) if base in times else float("nan")
            for base in ("plain copy, one piece", "plain copy, block by block")
        ]
        median = statistics.median(mine)
        print(
            f"| {name} | {median * 1e3:.2f} ({min(mine) * 1e3:.2f}, {max(mine) * 1e3:.2f}) | {total / median / 1e9:.1f} | "
            f"{ratios[0]:.3f} | {ratios[1]:.3f} | {right.get(name, '')} |",
            flush=True,
        )
    sender.close()
    engine.close()
    peer.close()


if __name__ == "__main__":
    main(sys.argv[1:])
