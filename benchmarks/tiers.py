"""Time to the first token of a long prompt, alone, by where its KV lies: on the device, in host memory, in files, in the pool, or nowhere
(computed again). One engine in this process for each; the pool is a kvstore master and a node, in processes of their own.

    baton model new /tmp/m --hidden-size 512 --num-layers 8 --num-heads 8 --num-kv-heads 4 --max-len 8448 --dtype bfloat16
    python -m benchmarks.tiers /tmp/m [--length 8192] [--rounds 5] [--folder /tmp/kv]
    python -m benchmarks.tiers --shape llama-3.1-8b --ways device host pool       # a GPU; random weights
"""

import argparse
import asyncio
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from baton.config import EngineConfig, FilesConfig, HostConfig, PoolConfig
from baton.kv.tiers import connect_tiers
from baton.kv.transfer import KVTransfer
from baton.runtime.build import build_engine
from baton.runtime.engine import Engine
from baton.runtime.loaded import LoadedModel, load
from baton.types import GenerateRequest, SamplingParams
from benchmarks.engine import MODELS, write_config

BUDGET = 2**30
WARM_UP = 2  # rounds
WAYS = ["device", "host", "files", "pool"]


async def first_token(engine: Engine, prompt: tuple[int, ...], name: str) -> tuple[float, int]:
    """Seconds, and how many tokens of the prompt were not computed."""
    request = GenerateRequest(request_id=name, prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=1, temperature=0))
    started = time.perf_counter()
    async for output in engine.submit(request):
        if output.tokens:
            seconds = time.perf_counter() - started
            assert output.cache is not None
            return seconds, output.cache.num_cached_tokens
    raise AssertionError("no token came")


async def forget(engine: Engine) -> None:
    """The device's prefix cache is empty afterwards."""
    done, loop = asyncio.Event(), asyncio.get_running_loop()

    def run() -> None:
        pool = engine.scheduler.cache.pool
        pool.release(pool.take(pool.num_free))
        loop.call_soon_threadsafe(done.set)

    engine._post(run)
    await done.wait()


async def measure(
    loaded: LoadedModel,
    prompt: tuple[int, ...],
    rounds: int,
    host: HostConfig,
    pool: PoolConfig,
    files: FilesConfig,
    before: Callable[[], None],
) -> tuple[list[float], int, list[float], float]:
    """Seconds to the first token where the one tier has the prompt, and the tokens that it gave; seconds where nobody has it; MB/s."""
    tiers = connect_tiers(host, pool, files, loaded.pool.tensor, loaded.pool.layout.block_bytes)
    engine = build_engine(loaded, tiers, budget_s=30)
    engine.start()
    try:
        other = tuple(reversed(prompt))
        computed = list[float]()
        await first_token(engine, tuple(token + 1 for token in prompt[:100]), "warms up")
        size = engine.scheduler.cache.block_size
        for i, each in enumerate((prompt, other)):
            computed.append((await first_token(engine, each, f"computed {i}"))[0])
            async with asyncio.timeout(60):
                while any(tier.stats.blocks_saved < 100 // size + (i + 1) * (len(prompt) // size) for tier in tiers):
                    await asyncio.sleep(0.05)
        times, cached, loaded_before = list[float](), 0, (0, 0.0)
        for i in range(WARM_UP + rounds):
            if tiers:
                await forget(engine)
                before()
            if i == WARM_UP:
                loaded_before = loading(tiers)
            seconds, cached = await first_token(engine, prompt if tiers else other, f"again {i}")
            times += [seconds] if i >= WARM_UP else []
            if pool.master and pool.near and i < WARM_UP:
                await asyncio.sleep(2)  # the node's memory is being mapped
        assert await engine.check_integrity() == []
        nbytes, spent = (after - then for after, then in zip(loading(tiers), loaded_before, strict=True))
        if pool.master:
            print(f"<!-- pool: {tiers[0].stats.blocks_near} of {tiers[0].stats.blocks_loaded} blocks copied from the node's memory -->")
        return times, cached, computed, nbytes / max(spent, 1e-9) / 1e6
    finally:
        await engine.stop()


def loading(tiers: Sequence[KVTransfer]) -> tuple[int, float]:
    """Bytes and seconds so far."""
    return sum(tier.stats.bytes_loaded for tier in tiers), sum(tier.stats.seconds_loading for tier in tiers)


def drop_pages(folder: Path) -> None:
    """The files are read from the disk next."""
    for path in folder.glob("??/*"):
        file = os.open(path, os.O_RDONLY)
        os.fdatasync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


@contextmanager
def kvstore(budget: int, near: str) -> Iterator[PoolConfig]:
    ports = [_free_port() for _ in range(2)]
    pool = PoolConfig(master=f"127.0.0.1:{ports[0]}", near=near)
    common = [f"pool.master={pool.master}", f"pool.near='{near}'", f"master_port={ports[0]}", f"master_metrics_port={ports[1]}"]
    modes = (["mode=master"], ["mode=node", f"memory={budget}"])
    processes = [subprocess.Popen([sys.executable, "-m", "services.kvstore", *common, *mode], stderr=subprocess.DEVNULL) for mode in modes]
    try:
        time.sleep(8)  # until the node has joined
        yield pool
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--shape", choices=MODELS, help="random weights instead of a model")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where the file tier's directory is made")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--near", default="auto", help="pool.near; empty: the pool is read over TCP")
    parser.add_argument("--num-blocks", type=int, help="on the device; else enough for four prompts")
    arguments = parser.parse_args()
    if (arguments.model is None) == (arguments.shape is None):
        parser.error("give a model's folder, or --shape")
    rng = random.Random(0)
    prompt = tuple(rng.randrange(4, 250) for _ in range(arguments.length))
    block_size = 64 if torch.cuda.is_available() else 16
    settings = EngineConfig(
        num_blocks=arguments.num_blocks or 4 * arguments.length // block_size + 64,
        load_format="dummy" if arguments.shape else "safetensors",
    )
    started = time.perf_counter()
    loaded = load(arguments.model or write_config(arguments.shape), settings)
    prompt_bytes = arguments.length // loaded.pool.layout.block_size * loaded.pool.layout.block_bytes
    budget = max(BUDGET, 4 * prompt_bytes)
    print(f"<!-- loaded after {time.perf_counter() - started:.0f} s -->", flush=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.folder, prefix="baton-kv-")))
        files, warm, cold = FilesConfig(), folder / "warm", folder / "cold"
        none = PoolConfig()
        pool = stack.enter_context(kvstore(budget, arguments.near)) if "pool" in arguments.ways else none
        every: dict[str, tuple[HostConfig, PoolConfig, FilesConfig, Callable[[], None]]] = {
            "device": (HostConfig(), none, files, lambda: None),
            "host": (HostConfig(bytes=budget), none, files, lambda: None),
            "files, in the page cache": (HostConfig(), none, FilesConfig(path=str(warm), bytes=budget), lambda: None),
            "files, read from the disk": (HostConfig(), none, FilesConfig(path=str(cold), bytes=budget), lambda: drop_pages(cold)),
            "pool": (HostConfig(), pool, files, lambda: None),
        }
        found: dict[str, tuple[list[float], int, list[float], float]] = {}
        for way, parts in every.items():
            if way.partition(",")[0] not in arguments.ways:
                continue
            try:
                found[way] = asyncio.run(measure(loaded, prompt, arguments.rounds, *parts))
            except Exception:  # the other ways are still worth knowing
                traceback.print_exc()
                print(f"<!-- {way}: failed -->", flush=True)
    computed = statistics.median(seconds for _, _, again, _ in found.values() for seconds in again)
    print(f"\n{arguments.length} tokens, {prompt_bytes / 1e6:.0f} MB of KV\n")
    print("| the prompt's KV is | tokens not computed | TTFT, ms: median (worst) | ÷ computing | MB/s loaded |\n|---|---|---|---|---|")
    for way, (times, cached, _, speed) in found.items():
        median = statistics.median(times)
        speed_text = f"{speed:,.0f}" if speed else ""
        print(f"| {way} | {cached:,} | {median * 1e3:.0f} ({max(times) * 1e3:.0f}) | {median / computed:.3f} | {speed_text} |")
    print(f"| nowhere | 0 | {computed * 1e3:.0f} | 1 | |", flush=True)


if __name__ == "__main__":
    main()
