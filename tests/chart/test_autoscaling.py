"""Pools whose number is somebody else's: a HorizontalPodAutoscaler's, KEDA's, the planner's."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chart.api_server import ApiServer, served
from tests.chart.rendering import CHART, NAMESPACE, RELEASE, Object, Refused, both, by_key, container_of, example, helm3, render, rendered

pytestmark = pytest.mark.chart


def test_a_pool_that_somebody_else_scales_has_no_number_of_its_own() -> None:
    for by, kind in (("hpa", "HorizontalPodAutoscaler"), ("keda", "ScaledObject"), ("external", None)):
        objects = by_key(render(example("cpu-demo"), f"decode.autoscaling.by={by}", "monitoring.podMonitor.enabled=true"))
        assert "replicas" not in objects["Deployment", "rel-demo-decode"]["spec"]
        assert objects["Deployment", "rel-demo-prefill"]["spec"]["replicas"] == 1
        assert kind is None or objects[kind, "rel-demo-decode"]["spec"]["scaleTargetRef"]["name"] == "rel-demo-decode"


def test_keda_asks_for_the_pods_of_one_pool() -> None:
    objects = by_key(rendered("keda"))
    (trigger,) = objects["ScaledObject", "rel-qwen3-8b-prefill"]["spec"]["triggers"]
    assert trigger["metadata"]["query"] == 'sum(baton:num_requests_waiting{namespace="prod",worker=~"rel-qwen3-8b-prefill-.*"} or ' + (
        'baton:num_requests_queued{namespace="prod",model_name="qwen3-8b"})'
    ), "a router that holds requests back leaves none waiting at the workers"
    assert trigger["metadata"]["threshold"] == "2"
    (trigger,) = objects["ScaledObject", "rel-qwen3-8b-decode"]["spec"]["triggers"]
    assert trigger["metadata"]["query"] == 'sum(baton:kv_cache_usage_perc{namespace="prod",worker=~"rel-qwen3-8b-decode-.*"})'


class Release:
    """One of Helm 3's, of an API server."""

    def __init__(self, url: str, api: ApiServer) -> None:
        self._url, self._api = url, api

    @property
    def decode(self) -> Object:
        return self._api.workload("rel-demo-decode")["spec"]

    def scale(self, replicas: int) -> None:
        """As somebody else does."""
        self.decode["replicas"] = replicas

    def upgrade(self, *sets: str) -> int:
        """Or installs; the replicas of decode."""
        options = [word for one in ("kvstore.enabled=false", *sets) for word in ("--set", one)]
        self._helm("upgrade", RELEASE, str(CHART), "--install", "--disable-openapi-validation", "-f", str(example("cpu-demo")), *options)
        return self.decode["replicas"]

    def rollback(self, revision: int) -> int:
        self._helm("rollback", RELEASE, str(revision))
        return self.decode["replicas"]

    def _helm(self, *words: str) -> None:
        helm3(*words, "-n", NAMESPACE, "--kube-apiserver", self._url, "--kube-token", "x")


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Release]:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    api = ApiServer()
    with served(api) as url:
        yield Release(url, api)


@pytest.mark.parametrize("by", ["external", "hpa"])
def test_a_pool_that_is_handed_over_keeps_the_number_that_it_has(by: str, release: Release) -> None:
    assert release.upgrade("decode.replicas=10") == 10
    assert release.upgrade(f"decode.autoscaling.by={by}") == 10
    release.scale(12)
    assert release.upgrade(f"decode.autoscaling.by={by}", "decode.drainSeconds=7") == 12
    release.scale(0)
    assert release.upgrade(f"decode.autoscaling.by={by}") == 0
    assert release.upgrade("decode.replicas=3") == 3


def test_a_pool_that_never_was_the_charts_is_not_scaled_by_an_upgrade_or_a_rollback(release: Release) -> None:
    release.upgrade("decode.autoscaling.by=external", "decode.drainSeconds=5")
    release.scale(12)
    assert release.upgrade("decode.autoscaling.by=external", "decode.drainSeconds=6") == 12
    assert release.rollback(1) == 12
    assert release.decode["template"]["spec"]["terminationGracePeriodSeconds"] == 25, "it was rolled back"


TRIGGER = {"type": "cron", "metadata": {"timezone": "UTC", "start": "0 8 * * *", "end": "0 18 * * *", "desiredReplicas": "4"}}


@pytest.mark.parametrize("scaling", [{"by": "hpa"}, {"by": "keda"}, {"by": "external"}, {"by": "hpa", "triggers": [TRIGGER]}])
def test_nothing_scales_from_none_by_metrics_of_pods(scaling: Object, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"rel-a-decode: autoscaling\.min is at least 1"):
        both(tmp_path, {"models": {"a": {"path": "/x"}}, "decode": {"autoscaling": {"min": 0, **scaling}}})


def test_keda_may_with_triggers_of_its_own(tmp_path: Path) -> None:
    scaling = {"by": "keda", "min": 0, "triggers": [TRIGGER]}
    values = {"models": {"a": {"path": "/x"}}, "decode": {"autoscaling": scaling}, "planner": {"enabled": True}}
    for objects in both(tmp_path, values):
        assert objects["ScaledObject", "rel-a-decode"]["spec"]["minReplicaCount"] == 0
        assert "--decode=1-4" in container_of(objects["Deployment", "rel-a-planner"])["args"], "the planner takes no less"
