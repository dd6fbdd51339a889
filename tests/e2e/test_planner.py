"""The planner beside a real cluster: it takes a worker away, and no stream with it. Kubernetes' API is played (tests/kubernetes_api.py)."""

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from baton.errors import Draining, Unavailable
from baton.models.create import create_model
from baton.types import Role
from services.planner.scaling import Drains
from tests.certificates import certificate
from tests.cluster import running_cluster
from tests.e2e.test_up import BATON
from tests.kubernetes_api import TOKEN, Api, served
from tests.workers import call, failure, prompt, worker

TOKENS = 7000  # of a stream: it must last until the planner has looked twice


def ask(url: str, tokens: int, ended: dict[str, tuple[int, float]] | None = None) -> None:
    """`ended` gets, by the decode worker, how many tokens came and when the last one did."""
    body = {
        "prompt": list(range(20, 60)),
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    count = 0
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        answer.raise_for_status()
        worker = answer.headers["x-baton-route"].split("decode=")[1].split(";")[0]
        for line in answer.iter_lines():
            if line.startswith("data: {") and (usage := json.loads(line.removeprefix("data: ")).get("usage")):
                count = usage["completion_tokens"]
    if ended is not None:
        ended[worker] = (count, time.monotonic())


def until(true: Callable[[], bool], log: Path, action: Callable[[], None] = lambda: None) -> None:
    deadline = time.monotonic() + 90
    while not true():
        assert time.monotonic() < deadline, log.read_text()
        action()
        time.sleep(0.1)


def test_what_is_told_of_a_cluster_that_nobody_scales(tiny_model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running_cluster(model=tiny_model, prefill=2, decode=1, kvstore=0, etcd="none") as cluster:
        ask(cluster.url, 5)
        command = [*BATON, "planner", "--router", cluster.url, "--slo-ttft", "9", "--slo-itl", "1", "--decode", "2-3"]
        planner = subprocess.Popen([*command, "--window", "2"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while planner.poll() is None:
            ask(cluster.url, 5)
        said = " ".join(planner.communicate()[0].replace("│", " ").split())
        assert planner.returncode == 0, said
        assert "prefill 2 1 " in said
        assert "for now" not in said, "it does not look again"
        assert "decode 1 2 " in said
        assert "of first tokens come within 9 s" in said
        assert "2 are the fewest allowed" in said
        with log.open("wb") as output:
            planner = subprocess.Popen([*command, "--every", "1", "--scale-in-after", "77"], stdout=output, stderr=output)
        try:
            told = "→ 2 for now: fewer when fewer have been enough for 77 s (--scale-in-after)"
            until(lambda: told in " ".join(log.read_text().replace("│", " ").split()), log, lambda: ask(cluster.url, 5))
        finally:
            planner.terminate()
            assert planner.wait(20) == 0


async def test_a_worker_that_drains_says_what_it_holds() -> None:
    drains = Drains()
    try:
        async with worker(Role.UNIFIED, {}) as made:
            made.runner.step_s = 0.02
            seen = {"id": "w", "address": made.address, "state": "ready"}
            with pytest.raises(Unavailable, match="w answers"):
                await drains({**seen, "id": "another"})
            stream = aiter(call(made, prompt(20, max_tokens=100)))
            await anext(stream)
            assert await drains(seen) == 1
            assert isinstance(await failure(call(made, prompt(20, name="new"))), Draining)
            assert [message async for message in stream], "it goes on"
            await made.is_idle(5)
            assert await drains({**seen, "state": "draining"}) == 0
        with pytest.raises(Unavailable, match="cannot be told to drain"):
            await drains(seen)
    finally:
        await drains.close()


@pytest.mark.slow
def test_a_worker_goes_when_its_stream_has_ended(tmp_path: Path) -> None:
    create_model(tmp_path / "model", "llama", hidden_size=256, num_layers=4, max_len=8192)
    cert, key = certificate(tmp_path)
    (tmp_path / "token").write_text(TOKEN)
    log = tmp_path / "log"
    log.touch()
    ended: dict[str, tuple[int, float]] = {}
    deleted: dict[str, float] = {}
    with running_cluster(model=tmp_path / "model", prefill=1, decode=2, kvstore=0, options=["--policy", "least_load"]) as cluster:

        def delete(name: str) -> None:
            deleted[name] = time.monotonic()
            cluster.signal(name, signal.SIGTERM)

        def running() -> int:
            return sum(worker["running"] for worker in cluster.workers() if worker["role"] == "decode")

        streams = [threading.Thread(target=ask, args=(cluster.url, TOKENS, ended)) for _ in range(2)]
        for number, stream in enumerate(streams, 1):
            stream.start()
            until(lambda number=number: running() == number, log)
        api = Api({"p": ["prefill-0"], "d": ["decode-0", "decode-1"]}, delete)
        with served(api, (cert, key)) as kubernetes, log.open("wb") as output:
            command = [*BATON, "planner", "--router", cluster.url, "--every", "1"]
            command += ["--slo-ttft", "30", "--slo-itl", "10", "--scale-in-after", "0", "--apply", "--namespace", "prod"]
            command += ["--prefill-deployment", "p", "--decode-deployment", "d", "--kubernetes", kubernetes]
            command += ["--kubernetes-token", str(tmp_path / "token"), "--kubernetes-ca", str(cert)]
            planner = subprocess.Popen(command, stdout=output, stderr=output)
            try:
                until(lambda: bool(deleted), log, lambda: ask(cluster.url, 5))  # a load that one worker is enough for
                for stream in streams:
                    stream.join(60)
            finally:
                planner.terminate()
                code = planner.wait(20)
        said = log.read_text()
        assert code == 0, said
        assert sorted(ended) == ["decode-0", "decode-1"], "a stream on each"
        assert {count for count, _ in ended.values()} == {TOKENS}
        ((gone, at),) = deleted.items()
        assert f"decode: {gone} drains, 1 requests to go" in said
        assert at > ended[gone][1], "it was there until its stream had ended"
        assert api.replicas == {"p": 1, "d": 1}
        cluster.wait_ready()  # `baton up` has started it again
        cluster.assert_clean()
