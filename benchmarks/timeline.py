"""Where a lone request's time to the first token goes, hop by hop, in a router and a pair of workers, beside a unified worker.

    python -m benchmarks.timeline [--length 8192] [--rounds 20] [--layouts unified 1P1D]

A model of one layer, so that the prompt's step is short. The processes are those of `baton up`; functions named in `HOPS` tell the clock
(which is one for all processes of a machine) when they begin or end: Python imports `sitecustomize` at its start, and that is ours here.
Microseconds of each hop since the one before.
"""

import argparse
import functools
import importlib.abc
import importlib.machinery
import inspect
import itertools
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

HOPS = (
    ("router", "services.router.app", "read_body", "end", "the body is read"),
    ("router", "services.router.placer", "Placer.decide", "begin", "checked and let in"),
    ("router", "services.router.sessions", "_Session.start", "begin", "hashed, placed, a message"),
    ("decode", "baton.rpc.convert", "request_from_proto", "begin", "has it"),
    ("decode", "baton.runtime.engine", "Engine.submit", "end", "unpacked, hashed, submitted"),
    ("decode", "baton.runtime.engine", "Engine._admit", "begin", "its engine's thread has it"),
    ("decode", "baton.runtime.pushing", "Reservations.reserve", "begin", "looked up; to reserve blocks"),
    ("decode", "baton.rpc.v1.prefill_pb2_grpc", "PrefillStub.__init__", "begin", "reserved, a message"),
    ("prefill", "baton.rpc.convert", "request_from_proto", "begin", "has it"),
    ("prefill", "baton.runtime.engine", "Engine.submit", "end", "unpacked, hashed, submitted"),
    ("prefill", "baton.runtime.steps", "Steps._submit", "begin", "the step begins"),
    ("prefill", "baton.runtime.engine", "Engine._computed", "begin", "the step has ended"),
    ("prefill", "baton.rpc.convert", "output_to_proto", "begin", "the event loop has the token"),
    ("decode", "baton.rpc.convert", "output_from_proto", "begin", "has the token"),
    ("decode", "baton.rpc.convert", "output_to_proto", "begin", "tells the router"),
    ("router", "baton.rpc.convert", "output_from_proto", "begin", "has the token"),
    ("router", "services.router.answers", "Answers.line", "begin", "tells the client"),
)
UNIFIED_HOPS = tuple(
    ("decode", *hop[1:]) if hop[0] == "prefill" else hop
    for hop in HOPS
    if hop[2] not in ("Reservations.reserve", "PrefillStub.__init__") and (hop[0], hop[2]) not in (
        ("prefill", "request_from_proto"), ("prefill", "Engine.submit"), ("prefill", "output_to_proto"), ("decode", "output_from_proto"),
    )
)  # fmt: skip


WRITTEN_S = 0.25
WARM_UP = 3  # requests
STEP_ENDS = ("Engine._computed", "begin")


# -- in the processes that are watched


def watch(folder: str) -> None:
    """Makes this process, one of `services`, write a line for each beginning or end: its time and the function."""
    argv = sys.orig_argv
    service = next((argv[at + 1] for at, word in enumerate(argv[:-1]) if word == "-m"), "")
    role = service.removeprefix("services.")
    if role == service:
        return
    told: list[tuple[int, str]] = []
    threading.Thread(target=_write, args=(told, Path(folder) / f"{role}-{os.getpid()}"), daemon=True).start()
    wanted: dict[str, list[tuple[str, str]]] = {}
    for process, module, name, edge, _ in dict.fromkeys(HOPS + UNIFIED_HOPS):
        if process == role:
            wanted.setdefault(module, []).append((name, edge))

    def patch(module: ModuleType) -> None:
        for name, edge in wanted[module.__name__]:
            *outer, last = name.split(".")
            owner: Any = functools.reduce(getattr, outer, module)
            setattr(owner, last, _telling(getattr(owner, last), told, f"{role} {name} {edge}"))

    sys.meta_path.insert(0, _Finder(wanted, patch))


def _write(told: list[tuple[int, str]], file: Path) -> None:
    """Now and then, since a write lets other threads go first."""
    while True:
        time.sleep(WRITTEN_S)
        count = len(told)
        if count:
            with file.open("a") as out:
                out.writelines(f"{at} {label}\n" for at, label in told[:count])
            del told[:count]


def _telling(function: Callable[..., Any], told: list[tuple[int, str]], label: str) -> Callable[..., Any]:
    def tell() -> None:
        told.append((time.monotonic_ns(), label))

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def later(*args: Any, **more: Any) -> Any:
            value = await function(*args, **more)
            tell()
            return value

        return later

    @functools.wraps(function)
    def now(*args: Any, **more: Any) -> Any:
        if label.endswith("begin"):
            tell()
            return function(*args, **more)
        value = function(*args, **more)
        tell()
        return value

    return now


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, wanted: dict[str, Any], patch: Callable[[ModuleType], None]) -> None:
        self._wanted, self._patch = wanted, patch

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._wanted:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        assert spec is not None
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            execute(module)
            self._patch(module)

        loader.exec_module = execute_and_patch
        return spec


# -- the client


def lines(folder: Path) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    for file in folder.iterdir():
        for line in file.read_text().splitlines():
            at, _, label = line.partition(" ")
            found.append((int(at), label))
    return sorted(found)


def one(url: str, length: int) -> tuple[int, int]:
    """Monotonic nanoseconds of sending a prompt and of its first token."""
    import httpx

    prompt = [random.randrange(4, 2000) for _ in range(length)]
    body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True, "stream": True}
    with httpx.Client(timeout=60) as client:
        content = json.dumps(body)
        begun, first = time.monotonic_ns(), 0
        with client.stream("POST", f"{url}/v1/completions", content=content) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith("data: {") and not first:
                    first = time.monotonic_ns()
    return begun, first


def timeline(
    layout: Sequence[str], hops: Sequence[tuple[str, ...]], length: int, rounds: int, options: Sequence[str]
) -> list[tuple[float, ...]]:
    """Of each round: microseconds of each hop since the one before, the client's in the end."""
    from benchmarks.serving import cluster

    with tempfile.TemporaryDirectory() as folder:
        hooks, told = Path(folder) / "hooks", Path(folder) / "told"
        hooks.mkdir()
        told.mkdir()
        (hooks / "sitecustomize.py").write_text(f"from benchmarks.timeline import watch\nwatch({str(told)!r})\n")
        before = os.environ.get("PYTHONPATH", "")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(hooks), str(Path(__file__).parents[1]), before]))
        found: list[tuple[float, ...]] = []
        try:
            with cluster(["--etcd", "none", "--kvstore", "0", *layout, *options]) as url:
                for number in range(rounds + WARM_UP):
                    begun, first = one(url, length)
                    time.sleep(2 * WRITTEN_S)
                    seen: dict[str, int] = {}
                    for at, label in lines(told):
                        if begun <= at <= first:
                            seen.setdefault(label, at)
                    times = [begun, *(seen[f"{role} {name} {edge}"] for role, _, name, edge, _ in hops), first]
                    if number >= WARM_UP:
                        found.append(tuple((later - earlier) / 1e3 for earlier, later in itertools.pairwise(times)))
        finally:
            os.environ["PYTHONPATH"] = before
    return found


def model(length: int) -> Iterator[Path]:
    demo = Path(__file__).parents[1] / "examples" / "demo-model"
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder) / "model"
        shutil.copytree(demo, there, ignore=shutil.ignore_patterns("*.safetensors"))
        config = json.loads((there / "config.json").read_text())
        config |= {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 2 * length}
        (there / "config.json").write_text(json.dumps(config))
        yield there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--layouts", nargs="+", default=["unified", "1P1D"], choices=["unified", "1P1D"])
    arguments = parser.parse_args()
    layouts = {"unified": (["--unified", "1"], UNIFIED_HOPS), "1P1D": (["--prefill", "1", "--decode", "1"], HOPS)}
    for there in model(arguments.length):
        options = ["--model", str(there)]
        for role in ("prefill", "decode"):
            for setting in ("load_format=dummy", "block_size=64", f"max_num_batched_tokens={arguments.length}"):
                options += ["--set", f"{role}.engine.{setting}"]
        for name in arguments.layouts:
            layout, hops = layouts[name]
            found = timeline(layout, hops, arguments.length, arguments.rounds, options)
            step = next(place for place, hop in enumerate(hops) if hop[2:4] == STEP_ENDS)
            print(f"\n| {name} | | µs, median | fastest quarter |\n|---|---|---|---|")
            for (role, *_, what), values in zip([*hops, ("client", "has the token")], zip(*found, strict=True), strict=True):
                print(f"| {role} | {what} | {told(values)} |", flush=True)
            parts = (("before the step", slice(step)), ("after it", slice(step + 1, None)))
            for what, part in parts:
                print(f"| all | {what} | {told([sum(values[part]) for values in found])} |", flush=True)


def told(values: Sequence[float]) -> str:
    return f"{statistics.median(values):,.0f} | {statistics.quantiles(values, n=4)[0]:,.0f}"


if __name__ == "__main__":
    main()
