"""Tiers of real workers: what a file tier keeps over a restart, and a shared directory between prefill and decode."""

import contextlib
import signal
import time
from pathlib import Path

import httpx

from tests.cluster import RunningCluster, running_cluster, until
from tests.e2e.test_up import restarts_after

PROMPT = "All that a worker has computed of this prompt is there again when it comes back. " * 4


def complete(cluster: RunningCluster, prompt: str = PROMPT) -> tuple[str, int]:
    """The text, and how many tokens of the prompt were cached."""
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60).raise_for_status().json()
    return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def metrics_of(cluster: RunningCluster, worker: str) -> str:
    """The router may know for a while where the process before was, then nobody, until it has asked the new one."""
    for _ in range(100):
        for each in cluster.workers():
            if each["id"] == worker:
                with contextlib.suppress(httpx.ConnectError):
                    return httpx.get(f"http://{each['metrics']}/metrics").text
        time.sleep(0.1)
    raise AssertionError(f"{worker} has no metrics")


def metric(cluster: RunningCluster, worker: str, name: str, tier: str) -> float:
    for line in metrics_of(cluster, worker).splitlines():
        if line.startswith(f"baton:kv_tier_{name}{{") and f'tier="{tier}"' in line:
            return float(line.rpartition(" ")[2])
    raise AssertionError(f"{name} of {tier} is not exported")


def test_a_worker_that_was_killed_has_its_cached_tokens_again(tiny_model: Path, tmp_path: Path) -> None:
    settings = ("--set", "unified.host.bytes=8MiB", "--set", f"unified.files.path={tmp_path}", "--set", "unified.files.bytes=64MiB")
    with running_cluster(model=tiny_model, unified=1, kvstore=0, etcd="none", options=settings) as cluster:
        text, cached = complete(cluster)
        assert cached == 0
        full = (len(PROMPT) - 1) // 16  # bytes are tokens
        until(lambda: metric(cluster, "unified-0", "blocks_saved_total", "files") >= full)
        assert metric(cluster, "unified-0", "used_bytes", "files") <= 64 * 2**20
        restarts_after(cluster, "unified-0", signal.SIGKILL)
        cluster.wait_ready()
        assert complete(cluster) == (text, full * 16)
        assert metric(cluster, "unified-0", "blocks_loaded_total", "files") == full
        assert metric(cluster, "unified-0", "blocks_declined_total", "files") == 0
        assert metric(cluster, "unified-0", "failures_total", "files") == 0
        until(lambda: metric(cluster, "unified-0", "blocks_saved_total", "host") >= full)  # promoted
        cluster.assert_clean()


def test_a_shared_directory_is_a_way_from_prefill_to_decode(tiny_model: Path, tmp_path: Path) -> None:
    settings = ("all.push.protocols=[]", f"all.files.path={tmp_path}", "all.files.bytes=64MiB", "all.files.shared=true")
    options = [part for role in ("prefill", "decode") for each in settings for part in ("--set", each.replace("all", role, 1))]
    with running_cluster(model=tiny_model, prefill=1, decode=1, kvstore=0, options=options) as cluster:
        text, _ = complete(cluster)
        full = (len(PROMPT) - 1) // 16
        assert metric(cluster, "decode-0", "blocks_loaded_total", "files") >= full
        with running_cluster(model=tiny_model, unified=1, kvstore=0, etcd="none") as alone:
            assert complete(alone) == (text, 0)
        cluster.assert_clean()


def test_a_decode_worker_keeps_in_its_host_what_was_pushed_to_it(tiny_model: Path) -> None:
    settings = ("--set", "decode.host.bytes=8MiB", "--set", "decode.engine.num_blocks=66", "--set", "decode.max_local_prefill_tokens=8")
    with running_cluster(model=tiny_model, prefill=1, decode=1, kvstore=0, options=(*settings, "--policy", "prefix_aware")) as cluster:
        text, cached = complete(cluster)
        assert cached == 0
        full = (len(PROMPT) - 1) // 16
        until(lambda: metric(cluster, "decode-0", "blocks_saved_total", "host") >= full)
        complete(cluster, "Something else, which takes nearly the whole device. " * 18)
        assert metric(cluster, "decode-0", "blocks_loaded_total", "host") == 0
        assert complete(cluster) == (text, full * 16)
        assert metric(cluster, "decode-0", "blocks_loaded_total", "host") >= full // 2
        cluster.assert_clean()
