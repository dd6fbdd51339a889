"""The router's own cost on one core, in front of workers that compute nothing; beside nginx in front of one that speaks HTTP itself.

    python -m benchmarks.router [--workers 1 100 1000] [--blocks 1000000] [--seconds 4] [--out benchmarks/results/router-cpu.md]

Router and nginx are bound to core 0; workers, etcd and the clients to core 1. What is asked: streams of `TOKENS` tokens, each chunk of
which is read as it comes; and requests of one token, not streamed. A token's added time is from when the worker gave it away to when the
client had it; a request's is all it took. Seconds of a core are the process's own (nginx: its worker process).
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from baton import __version__

MODEL = Path(__file__).parent.parent / "examples" / "demo-model"
TOKENS = 128  # of a stream
PROMPT = "Tell me about queues. " * 8
PROXIED, OTHERS = "0", "1"  # cores
PATIENCE_S = 60.0


@dataclass
class Point:
    """One measurement."""

    what: str
    requests_s: float
    tokens_s: float
    chunks_s: float
    cpu: float  # seconds of the proxy's core a second
    us_per_token: float  # of the proxy's core
    request_ms: tuple[float, float]  # p50, p99
    token_ms: tuple[float, float] | None
    rss_mb: float


@dataclass
class Stream:
    """A connection that asks again whenever it has its answer."""

    sock: socket.socket
    body: bytes
    stream: bool
    name: str = ""
    sent: float = 0.0
    tail: bytes = b""
    arrivals: list[tuple[float, int]] = field(default_factory=list)  # when, how many tokens


class Clients:
    """Closed loops over keep-alive connections, on one thread and one epoll."""

    def __init__(self, port: int, count: int, *, stream: bool, tokens: int) -> None:
        self._port, self._stream = port, stream
        self.done: list[tuple[str, float, float, list[tuple[float, int]]]] = []  # name, sent, ended, arrivals
        self._poll, self._number, self.chunks = select.epoll(), 0, 0
        body = {"model": "demo-model", "prompt": PROMPT, "max_tokens": tokens, "stream": stream, "temperature": 0}
        self._body = json.dumps(body).encode()
        self._streams: dict[int, Stream] = {}
        for _ in range(count):
            sock = socket.create_connection(("127.0.0.1", port))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._streams[sock.fileno()] = Stream(sock, self._body, stream)
            self._poll.register(sock, select.EPOLLIN)

    def close(self) -> None:
        for stream in self._streams.values():
            stream.sock.close()
        self._poll.close()

    def run(self, seconds: float) -> float:
        """The seconds it took: nothing is asked once they are over, and what was asked is waited for."""
        began = time.monotonic()
        for stream in self._streams.values():
            self._ask(stream)
        left = len(self._streams)
        while left:
            ready = self._poll.poll(PATIENCE_S)
            if not ready:
                raise RuntimeError(f"{left} requests of port {self._port} got nothing for {PATIENCE_S:g} s")
            for fd, _ in ready:
                stream = self._streams[fd]
                if self._read(stream):
                    if time.monotonic() - began < seconds:
                        self._ask(stream)
                    else:
                        left -= 1
        return time.monotonic() - began

    def _ask(self, stream: Stream) -> None:
        self._number += 1
        stream.name, stream.arrivals, stream.tail = f"r{self._number}-{id(self):x}", [], b""
        head = f"POST /v1/completions HTTP/1.1\r\nhost: b\r\ncontent-type: application/json\r\nx-request-id: {stream.name}\r\n"
        stream.sent = time.monotonic()
        stream.sock.sendall(f"{head}content-length: {len(stream.body)}\r\n\r\n".encode() + stream.body)

    def _read(self, stream: Stream) -> bool:
        """Whether the answer is whole."""
        data = stream.sock.recv(1 << 18)
        now = time.monotonic()
        if not data:
            raise RuntimeError(f"port {self._port} closed the connection of {stream.name}: {stream.tail!r}")
        if stream.stream:
            told = data.partition(b'"baton"')[0]  # what a last chunk tells of its route counts for nothing
            tokens, chunks = told.count(b"z"), data.count(b"data: ")
            self.chunks += chunks
            if tokens:
                stream.arrivals.append((now, tokens))
            stream.tail = (stream.tail + data)[-32:]
            ended = stream.tail.endswith(b"0\r\n\r\n")
        else:
            stream.tail += data
            head, end, body = stream.tail.partition(b"\r\n\r\n")
            if end and not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"port {self._port} answered {head[:40]!r}: {body[:200]!r}")
            ended = bool(end) and len(body) == int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        if ended:
            self.done.append((stream.name, stream.sent, now, stream.arrivals))
        return ended


class Process:
    """A child that is told lines and answers with lines of JSON."""

    def __init__(self, arguments: Sequence[str], core: str) -> None:
        command = ["taskset", "-c", core, sys.executable, "-m", *arguments]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready: dict[str, Any] = self.answer()

    def ask(self, line: str) -> dict[str, Any]:
        assert self.child.stdin is not None
        print(line, file=self.child.stdin, flush=True)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.child.args} ended: {self.child.wait()}")
        return json.loads(line)


@contextlib.contextmanager
def child(command: Sequence[str], **more: Any) -> Iterator[subprocess.Popen[Any]]:
    process = subprocess.Popen(command, **more)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def workers(*arguments: str) -> Iterator[Process]:
    process = Process(["benchmarks.router_worker", *arguments], OTHERS)
    try:
        yield process
    finally:
        process.child.kill()
        process.child.wait()


@contextlib.contextmanager
def router(folder: Path, count: int, blocks: int) -> Iterator[tuple[int, psutil.Process, Process]]:
    """Its port, its process, and the workers behind it; once it knows all of them and what they hold."""
    etcd_port, peer_port, port = free_port(), free_port(), free_port()
    urls = {"client": f"http://127.0.0.1:{etcd_port}", "peer": f"http://127.0.0.1:{peer_port}"}
    etcd = ["taskset", "-c", OTHERS, "etcd", "--data-dir", str(folder / f"etcd-{etcd_port}"), "--log-level", "error"]
    for kind, url in urls.items():
        etcd += [f"--listen-{kind}-urls", url, "--advertise-client-urls" if kind == "client" else "--initial-advertise-peer-urls", url]
    with child([*etcd, "--initial-cluster", f"default={urls['peer']}"], stderr=subprocess.DEVNULL):
        wait_for(lambda: get(etcd_port, "/health") is not None, "etcd")
        with workers("grpc", str(etcd_port), "--workers", str(count), "--blocks", str(blocks)) as behind:
            settings = [f"model={MODEL}", f"http_port={port}", "cluster.name=bench", f"cluster.etcd={urls['client']}"]
            log = (folder / f"router-{port}.log").open("wb")
            with child(["taskset", "-c", PROXIED, sys.executable, "-m", "services.router", *settings], stderr=log) as process:
                wait_for(lambda: _knows(port, count, blocks // count * count), "the router")
                yield port, psutil.Process(process.pid), behind


def _knows(port: int, count: int, blocks: int) -> bool:
    told = get(port, "/cluster")
    return told is not None and sum(w["state"] == "ready" for w in told["workers"]) == count and told["blocks_indexed"] == blocks


@contextlib.contextmanager
def nginx(folder: Path) -> Iterator[tuple[int, psutil.Process, Process]]:
    """As `router`, with nginx."""
    port = free_port()
    with workers("sse") as behind:
        config = folder / "nginx.conf"
        config.write_text(
            f"daemon off; worker_processes 1; worker_cpu_affinity 01; pid {folder}/nginx.pid; error_log {folder}/nginx.log;\n"
            "events { worker_connections 4096; }\n"
            "http { access_log off; keepalive_requests 1000000; client_body_temp_path /tmp; proxy_temp_path /tmp;\n"
            f"  upstream behind {{ server 127.0.0.1:{behind.ready['port']}; keepalive 512; keepalive_requests 1000000; }}\n"
            f"  server {{ listen 127.0.0.1:{port}; tcp_nodelay on;\n"
            '    location / { proxy_pass http://behind; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; }\n'
            "  } }\n"
        )
        with child([shutil.which("nginx") or "/usr/sbin/nginx", "-c", str(config)], stderr=subprocess.DEVNULL) as process:
            wait_for(lambda: psutil.Process(process.pid).children() and _listens(port), "nginx")
            yield port, psutil.Process(process.pid).children()[0], behind


def measure(
    what: str, port: int, proxy: psutil.Process, behind: Process, *, clients: int, step_ms: float, seconds: float, stream: bool
) -> Point:
    behind.ask(f"step {step_ms}")
    behind.ask("times")
    asking = Clients(port, clients, stream=stream, tokens=TOKENS if stream else 1)
    try:
        before = proxy.cpu_times()
        took = asking.run(seconds)
        after, rss = proxy.cpu_times(), proxy.memory_info().rss
    finally:
        asking.close()
    given = behind.ask("times")
    cpu = after.user + after.system - before.user - before.system
    tokens, added = 0, []
    for name, _, _, arrivals in asking.done:
        times, place = given[name], 0
        for at, count in arrivals:
            added += [at - times[i] for i in range(place, place + count)]
            place += count
        if stream and place != TOKENS:
            raise RuntimeError(f"{name} had {place} tokens, not {TOKENS}")
        tokens += place or 1
    return Point(
        what=what,
        requests_s=len(asking.done) / took,
        tokens_s=tokens / took,
        chunks_s=asking.chunks / took,
        cpu=cpu / took,
        us_per_token=cpu / tokens * 1e6,
        request_ms=percentiles([ended - sent for _, sent, ended, _ in asking.done]),
        token_ms=percentiles(added) if added else None,
        rss_mb=rss / 2**20,
    )


def percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    """p50 and p99, in ms."""
    cuts = statistics.quantiles(seconds, n=100)
    return cuts[49] * 1e3, cuts[98] * 1e3


def points(name: str, port: int, proxy: psutil.Process, behind: Process, seconds: float, only: str) -> Iterator[Point]:
    with contextlib.suppress(RuntimeError):
        measure("warm", port, proxy, behind, clients=16, step_ms=2, seconds=1, stream=True)
    for what, clients, step_ms, stream in (
        ("one-token requests, 32 at a time", 32, 0, False),
        ("64 streams, a token each 20 ms", 64, 20, True),
        ("200 streams, a token each 20 ms", 200, 20, True),
        ("400 streams, a token each 20 ms", 400, 20, True),
        ("128 streams, as fast as they are taken", 128, 1, True),
    ):
        if only not in what:
            continue
        point = measure(f"{name}: {what}", port, proxy, behind, clients=clients, step_ms=step_ms, seconds=seconds, stream=stream)
        print(row(point), flush=True)
        yield point


def row(point: Point) -> str:
    token = "" if point.token_ms is None else f"{point.token_ms[0]:.2f} / {point.token_ms[1]:.2f}"
    request = f"{point.request_ms[0]:.1f} / {point.request_ms[1]:.1f}"
    return (
        f"| {point.what} | {point.requests_s:,.0f} | {point.tokens_s:,.0f} | {point.chunks_s:,.0f} | {point.cpu:.0%} | "
        f"{point.us_per_token:.1f} | {request} | {token} | {point.rss_mb:,.0f} |"
    )


def report(found: Sequence[Point], command: Sequence[str]) -> str:
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    return (
        f"`python -m benchmarks.router {' '.join(command)}`, {datetime.date.today()}, {machine()}, Python {platform.python_version()}, "
        f"baton {__version__}; load average at the end {load}.\n\n"
        "| what | requests/s | tokens/s | chunks/s | core | µs of it a token | request, p50 / p99, ms | token added, p50 / p99, ms | MB |\n"
        "|---|---|---|---|---|---|---|---|---|\n" + "\n".join(map(row, found)) + "\n"
    )


def machine() -> str:
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{os.cpu_count()} cores ({names[0] if names else platform.machine()})"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def get(port: int, path: str) -> Any:
    import httpx

    try:
        return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=10).json()
    except (httpx.HTTPError, ValueError):
        return None


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def wait_for(done: Any, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} is not ready after {PATIENCE_S:g} s")
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 100, 1000])
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--no-nginx", action="store_true")
    parser.add_argument("--only", default="", help="points with this in their name")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {int(OTHERS)})
    found: list[Point] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in arguments.workers:
            with router(folder, count, arguments.blocks) as (port, proxy, behind):
                found += points(f"router, {count} workers", port, proxy, behind, arguments.seconds, arguments.only)
        if not arguments.no_nginx:
            with nginx(folder) as (port, proxy, behind):
                found += points("nginx", port, proxy, behind, arguments.seconds, arguments.only)
    if arguments.out:
        Path(arguments.out).write_text(report(found, sys.argv[1:]))


if __name__ == "__main__":
    main()
