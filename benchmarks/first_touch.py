"""How fast the first puts into a node's memory are: into fresh memory, and into memory that the node has touched, as it does when it joins.

python benchmarks/first_touch.py [--rounds 3]
"""

import argparse
import ctypes
import socket
import statistics
import subprocess
import sys
import time

from baton.kv.mooncake import MooncakeStore
from baton.kv.store import Buffer

SEGMENT, BLOCK, COUNT = 512 << 20, 1 << 20, 256
NODE = """
import asyncio, sys
from baton.kv.mooncake import MooncakeStore
from services.kvstore.admin import MasterAdmin
from services.kvstore.node import LentMemory

async def main():
    store, admin = MooncakeStore(sys.argv[1], host="127.0.0.1", segment=int(sys.argv[3])), MasterAdmin(sys.argv[2])
    if sys.argv[4] == "touched":
        await LentMemory(store, admin, int(sys.argv[3])).join()
    else:
        store.connect()
    print("ready", flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def first_puts(way: str) -> float:
    """GiB/s of the first 256 MiB."""
    rpc, metrics = free_port(), free_port()
    settings = [f"master_port={rpc}", f"master_metrics_port={metrics}", f"server.metrics_port={free_port()}"]
    master = subprocess.Popen([sys.executable, "-m", "services.kvstore", "mode=master", *settings], stderr=subprocess.DEVNULL)
    address = f"127.0.0.1:{rpc}"
    memory = ctypes.create_string_buffer(COUNT * BLOCK)
    ctypes.memset(memory, 1, len(memory))
    blocks = [Buffer(ctypes.addressof(memory) + i * BLOCK, BLOCK) for i in range(COUNT)]
    node = None
    try:
        while not listening(rpc):
            time.sleep(0.1)
        command = [sys.executable, "-c", NODE, address, f"127.0.0.1:{metrics}", str(SEGMENT), way]
        node = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert node.stdout is not None
        assert node.stdout.readline().strip() == "ready"
        store = MooncakeStore(address, host="127.0.0.1")
        store.register(Buffer(ctypes.addressof(memory), len(memory)))
        store.connect()
        started = time.monotonic()
        assert all(store.put([f"k{i}" for i in range(COUNT)], blocks))
        seconds = time.monotonic() - started
        store.close()
        return COUNT * BLOCK / seconds / 2**30
    finally:
        for process in (node, master):
            if process is not None:
                process.terminate()
                process.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    rates = {way: [first_puts(way) for _ in range(rounds)] for way in ("fresh", "touched")}
    for way, values in rates.items():
        print(f"{way}: {statistics.median(values):.2f} GiB/s ({', '.join(f'{value:.2f}' for value in values)})")


if __name__ == "__main__":
    main()
