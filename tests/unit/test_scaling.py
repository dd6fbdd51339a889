"""What the planner does with a Deployment: beside Kubernetes' API, played over real HTTPS."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from baton.errors import ConfigError, Unavailable
from baton.types import Role
from services.planner.kubernetes import Kubernetes
from services.planner.scaling import deployment_name, scale
from tests.certificates import certificate
from tests.kubernetes_api import COST, TOKEN, Api, served
from tests.unit.test_planner import worker


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return certificate(tmp_path_factory.mktemp("tls"))


class Pods:
    """A Deployment `d` behind a real HTTPS server, and what its workers hold."""

    def __init__(self, api: Api, url: str, token: Path, authority: Path) -> None:
        self.api, self._url, self._token, self._authority = api, url, token, authority
        self.holds = dict.fromkeys(api.pods, 0)
        self.draining: set[str] = set()

    async def _drain(self, pod: Mapping[str, Any]) -> int:
        self.draining.add(pod["id"])
        return self.holds[pod["id"]]

    async def scale(self, wanted: int, at_most: int = 8) -> str:
        known = [
            worker(name, Role.DECODE, "draining" if name in self.draining else "ready", running=self.holds[name])
            for name in self.api.pods
            if name in self.holds
        ]
        kubernetes = Kubernetes(self._url, "prod", token=self._token, authority=self._authority)
        try:
            return await scale(kubernetes, self._drain, "d", known, wanted, at_most)
        finally:
            await kubernetes.close()


@pytest.fixture
def pods(keys: tuple[Path, Path], tmp_path: Path) -> Iterator[Pods]:
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    api = Api({"d": ["a", "b", "c"]})
    with served(api, keys) as url:
        yield Pods(api, url, token, keys[0])


async def test_scaling_out_is_one_patch_of_the_scale(pods: Pods) -> None:
    assert await pods.scale(5) == "scaled out from 3 to 5"
    path = "/apis/apps/v1/namespaces/prod/deployments/d/scale"
    assert pods.api.patches == [(path, {"metadata": {"resourceVersion": "1"}, "spec": {"replicas": 5}})]
    assert await pods.scale(5) == ""
    assert len(pods.api.patches) == 1, "those that are starting count"


async def test_a_worker_with_streams_is_drained_and_goes_when_it_is_empty(pods: Pods) -> None:
    pods.holds |= {"a": 4, "b": 2, "c": 3}
    assert await pods.scale(2) == "b drains, 2 requests to go"
    assert await pods.scale(2) == "b drains, 2 requests to go"
    assert pods.draining == {"b"}, "one is enough"
    assert not pods.api.patches
    pods.holds["b"] = 0
    assert await pods.scale(2) == "scaled in from 3 to 2: b, empty"
    assert pods.api.of("d") == ["a", "c"], "the empty one, not any"
    assert pods.api.pods["b"]["metadata"]["annotations"] == {COST: "-1000"}
    assert await pods.scale(2) == ""


async def test_an_idle_worker_goes_at_once_and_workers_that_nobody_marked_stay(pods: Pods) -> None:
    pods.holds |= {"a": 4, "c": 3}
    assert await pods.scale(1) == "scaled in from 3 to 2: b, empty"
    assert pods.draining == {"b", "c"}
    assert pods.api.of("d") == ["a", "c"]


async def test_who_is_needed_again_is_started_anew(pods: Pods) -> None:
    pods.holds |= {"a": 4, "b": 2, "c": 3}
    await pods.scale(2)
    assert await pods.scale(3) == "scaled out from 3 to 4", "b still drains"
    pods.api.start()
    pods.holds |= {"new-1": 0, "b": 0}
    assert await pods.scale(3) == "scaled in from 4 to 3: b, empty"
    assert pods.api.of("d") == ["a", "c", "new-1"]


async def test_no_more_than_the_most_also_while_some_drain(pods: Pods) -> None:
    pods.holds |= {"a": 4, "b": 2, "c": 3}
    await pods.scale(2, at_most=3)
    assert "3 are the most" in await pods.scale(3, at_most=3)
    assert not pods.api.patches


async def test_who_is_empty_makes_room_for_who_is_needed(pods: Pods) -> None:
    """Also where no more pods may be there, or no GPU is free for another one."""
    pods.holds |= {"a": 4, "b": 2, "c": 3}
    await pods.scale(2, at_most=3)
    pods.holds["b"] = 0
    assert await pods.scale(3, at_most=3) == "b, empty: others are started in their place"
    assert (pods.api.of("d"), pods.api.replicas) == (["a", "c", "new-1"], {"d": 3})
    assert await pods.scale(3, at_most=3) == ""


async def test_who_waits_for_room_gets_it_and_is_the_first_to_go_when_fewer_are_needed(pods: Pods) -> None:
    pods.holds |= {"a": 4, "b": 2, "c": 3}
    await pods.scale(2)
    assert await pods.scale(3) == "scaled out from 3 to 4"  # new-1 is pending for what b holds
    pods.holds["b"] = 0
    assert await pods.scale(3) == "b, empty: others are started in their place"
    pods.api.pods["new-1"]["status"]["conditions"][0]["status"] = "True"
    pods.holds["new-1"] = 0
    assert pods.api.of("d") == ["a", "c", "new-1", "new-2"]
    assert await pods.scale(3) == "scaled in from 4 to 3: new-2, not there yet"
    assert pods.api.of("d") == ["a", "c", "new-1"]


async def test_nobody_is_taken_away_while_kubernetes_would_choose_others(pods: Pods) -> None:
    pods.api.pods["a"]["status"]["conditions"][0]["status"] = "False"
    assert await pods.scale(2) == "not all pods are ready: none is taken away"
    pods.api.start()
    pods.api.pods["a"]["metadata"]["labels"]["pod-template-hash"] = "b"
    assert await pods.scale(2) == "a rollout is under way: none is taken away"
    assert not pods.draining
    assert await pods.scale(4) == "scaled out from 3 to 4"


async def test_a_change_by_somebody_else_is_not_overwritten(pods: Pods) -> None:
    pods.api.before_patch = lambda: pods.api.versions.update(d=7)
    with pytest.raises(Unavailable, match="409"):
        await pods.scale(5)
    assert pods.api.replicas["d"] == 3


async def test_refusals_say_what_to_do(pods: Pods, tmp_path: Path) -> None:
    pods.api.allowed = False
    with pytest.raises(ConfigError, match="install the chart's Role"):
        await pods.scale(5)
    pods._token.write_text("another")
    with pytest.raises(ConfigError, match="token is not accepted"):
        await pods.scale(5)
    pods._token.unlink()
    with pytest.raises(ConfigError, match="--kubernetes-token"):
        await pods.scale(5)
    with pytest.raises(ConfigError, match="--kubernetes-ca"):
        Kubernetes("https://x", "prod", token=tmp_path, authority=tmp_path / "nothing")


async def test_an_api_that_somebody_else_plays_is_not_asked(pods: Pods) -> None:
    kubernetes = Kubernetes(pods._url, "prod", token=pods._token, authority=None)
    with pytest.raises(Unavailable, match="certificate"):
        await kubernetes.scale("d")
    await kubernetes.close()


async def test_a_deployment_that_is_not_there(pods: Pods) -> None:
    kubernetes = Kubernetes(pods._url, "prod", token=pods._token, authority=pods._authority)
    with pytest.raises(ConfigError, match="--decode-deployment"):
        await kubernetes.scale("nobody")
    await kubernetes.close()


def test_only_deployments() -> None:
    assert deployment_name("deployment/x") == deployment_name("x") == "x"
    for wrong in ("statefulset/x", "", "/x"):
        with pytest.raises(ConfigError, match="StatefulSet"):
            deployment_name(wrong)
