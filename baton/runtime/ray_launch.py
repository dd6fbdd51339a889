"""RayLauncher: ranks on the nodes of a Ray cluster, for a worker that outgrows one machine. The only importer of `ray`.

    rank 0: the worker's process, a driver of Ray's            a node of its cluster
    placement group: a bundle for each rank ────────────────▶  in bundle i a task (`keep`), which starts `runtime.rank` as a process, waits
                                                               for its end, and dies with the driver, as the process does with it

Ray places, watches and cleans up; it carries no step and no KV: ranks say all that to each other over connections of their own. Bundle 0 is
on this machine, so that what rank 0 uses here is taken from nobody. A node needs Baton, the model under the same path, and no more.
"""

import logging
import os
import signal
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from baton.errors import EXIT_SOFTWARE, ConfigError
from baton.runtime.launch import END_S, INTERFACES, TOKEN, start_rank

logger = logging.getLogger(__name__)
_TOLD = ("BATON_", "NCCL_", "GLOO_", "TORCH_", "MC_", "OMP_")  # of this process's environment, where a node's own lacks it
_PROBE_S, _PACKED_S = 3.0, 5.0
_GIVEN = 0.001  # of a node's own resource `node:ADDRESS`, of which it has one: asked for to be on that node


class RayRank:
    def __init__(self, ray: Any, ended: Any) -> None:
        """`ended`: a reference to what `keep` will return."""
        self._ray, self._ended = ray, ended

    def exit_code(self) -> int | None:
        done, _ = self._ray.wait([self._ended], timeout=0)
        return self._code() if done else None

    def end(self) -> None:
        done, _ = self._ray.wait([self._ended], timeout=END_S)
        if not done:
            self._ray.cancel(self._ended, force=True)

    def _code(self) -> int:
        try:
            return self._ray.get(self._ended)
        except self._ray.exceptions.RayError as error:
            logger.error("Ray could not keep a rank running: %s", error)
            return EXIT_SOFTWARE


class RayLauncher:
    def __init__(self, size: int, *, cuda: bool, cores: int, address: str, wait_s: float) -> None:
        """Joins the cluster at `address` and reserves `cores`, and a GPU if `cuda`, for each of `size` ranks. This process's GPU is the one
        that Ray has reserved. Raises ConfigError where there is no Ray, no cluster, or within `wait_s` no room."""
        try:
            import ray
        except ImportError as error:
            raise ConfigError(
                f"parallel.launcher=ray needs Ray, which cannot be loaded ({error}); install baton[ray] here and on the cluster's nodes, "
                "or use parallel.launcher=local"
            ) from error
        self._ray: Any = ray
        self._closed = False
        _join(ray, address)
        self.host = ray.util.get_node_ip_address()
        each: dict[str, float] = {"CPU": cores, **({"GPU": 1} if cuda else {})}
        self._group = self._reserve([{**each, f"node:{self.host}": _GIVEN}, *([each] * (size - 1))], wait_s)
        self._each = {"num_cpus": cores, "num_gpus": int(cuda)}
        self.apart = len(set(ray.util.placement_group_table(self._group)["bundles_to_node_id"].values())) > 1
        os.environ.update({name: value for name, value in _interfaces(self.host).items() if name not in os.environ})
        if cuda:
            os.environ["CUDA_VISIBLE_DEVICES"] = ray.get(self._in_bundle(0, visible_gpus).remote())

    def start(self, rank: int, address: str, token: str) -> RayRank:
        told = {name: value for name, value in os.environ.items() if name.startswith(_TOLD) and name not in INTERFACES}
        return RayRank(self._ray, self._in_bundle(rank, keep).remote(rank, address, token, self.host, told))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._ray.util.remove_placement_group(self._group)
            self._ray.shutdown()

    def _in_bundle(self, number: int, function: Any) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        place = PlacementGroupSchedulingStrategy(placement_group=self._group, placement_group_bundle_index=number)
        return self._ray.remote(function).options(**self._each, scheduling_strategy=place, max_retries=0)

    def _reserve(self, bundles: Sequence[Mapping[str, float]], wait_s: float) -> Any:
        """On one machine if it has so much, else on as few as there must be."""
        ray = self._ray
        nodes = {node["NodeManagerAddress"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        here = nodes.get(self.host, {})
        whole = {name: sum(bundle.get(name, 0) for bundle in bundles) for name in bundles[0]}
        fits = all(here.get(name, 0) >= amount for name, amount in whole.items())
        packed_s = min(wait_s / 2, _PACKED_S) if fits else 0.0
        for strategy, seconds in (("STRICT_PACK", packed_s), ("PACK", wait_s - packed_s)):
            if seconds:
                group = ray.util.placement_group([dict(bundle) for bundle in bundles], strategy=strategy)
                if group.wait(timeout_seconds=seconds):
                    return group
                ray.util.remove_placement_group(group)
        there = "; ".join(f"{address} has {_words(resources)}" for address, resources in sorted(nodes.items()))
        raise ConfigError(
            f"for {wait_s:g} s Ray had no room for {len(bundles)} ranks of {_words(bundles[-1])} each, the first of them on {self.host}; "
            f"{there}; free in all: {_words(ray.available_resources())}; add nodes, end what uses them, or wait longer (parallel.wait_s)"
        )


def keep(rank: int, address: str, token: str, leader: str, told: Mapping[str, str]) -> int:
    """On a node: runs a rank until its end; its exit code. `leader`: rank 0's host."""
    import ray

    host = ray.util.get_node_ip_address()
    environment = {**told, **_interfaces(host), **os.environ, TOKEN: token}
    return start_rank(rank, address, environment, "" if host == leader else host).wait()


def visible_gpus() -> str:
    """On a node: those of this task, as CUDA_VISIBLE_DEVICES names them."""
    return os.environ["CUDA_VISIBLE_DEVICES"]


def _join(ray: Any, address: str) -> None:
    advice = f"no Ray cluster can be joined at parallel.ray_address={address}"
    host, colon, port = address.rpartition(":")
    if colon:
        try:
            socket.create_connection((host, int(port)), _PROBE_S).close()  # Ray itself tries for minutes
        except (OSError, ValueError) as error:
            raise ConfigError(f"{advice} ({error}); it is host:port of `ray start --head`") from error
    on_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, configure_logging=False, log_to_driver=True)
    except Exception as error:  # of many kinds: none there, another version, a token that is wrong, a machine that is no node
        raise ConfigError(f"{advice} ({str(error).strip()}); this machine must be a node of it: `ray start --address=HOST:PORT`") from error
    finally:
        if on_main:
            signal.signal(signal.SIGTERM, handler)  # which Ray replaces


def _interfaces(address: str) -> dict[str, str]:
    """Environment by which gloo and NCCL use the network interface that has this address: by themselves they may take one that others don't
    reach."""
    found = next((name for name, each in psutil.net_if_addrs().items() if any(one.address == address for one in each)), None)
    return dict.fromkeys(INTERFACES, found) if found else {}


def _words(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {resources.get(name, 0):g}" for name in ("CPU", "GPU") if name == "CPU" or name in resources)
