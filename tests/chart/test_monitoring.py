"""Dashboards, rules and autoscaling: each metric that they name is exported, each expression is one that Prometheus understands."""

import json
import re
from typing import Any

import pytest
import yaml

from scripts.dashboards import OF_PODS, build, exported, unknown
from scripts.dashboards import main as write_dashboards
from tests.chart.rendering import CHART, ROOT, by_key, example, in_tools, render, rendered, workloads

OF_THE_SCRAPE = {"namespace", *OF_PODS.values()}
LABELS = OF_THE_SCRAPE | {"model_name", "worker", "way", "finished_reason", "code", "tier", "reason", "tenant", "le"}
STATES = ("num_requests_queued", "degraded", "breakers_open")  # of a router that serves, and not as it should


def expressions() -> list[str]:
    texts = build()
    panels = [panel for name in ("overview.json", "metrics.json") for panel in json.loads(texts[name])["panels"]]
    found = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    return found + [rule["expr"] for group in json.loads(texts["rules.json"])["groups"] for rule in group["rules"]]


def test_what_the_chart_has_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["dashboards.py", "--check"])
    write_dashboards()


def test_a_metric_that_does_not_exist_is_found() -> None:
    assert unknown("rate(baton:prompt_tokens_total[5m]) / baton:promt_tokens") == {"baton:promt_tokens"}
    assert unknown("baton:prompt_tokens") == {"baton:prompt_tokens"}, "a counter is exported with _total"


def test_every_metric_has_a_panel() -> None:
    named = {name for text in expressions() for name in re.findall(r"baton:\w+", text)}
    missing = {name for name in exported() if not name.endswith(("_sum", "_count"))} - named
    assert not missing


@pytest.mark.parametrize("name", STATES)
def test_a_router_in_trouble_is_seen_and_told(name: str) -> None:
    texts = build()
    assert f"baton:{name}" in texts["overview.json"]
    assert f"baton:{name}" in texts["rules.json"]


def test_labels_are_those_that_there_are() -> None:
    for text in expressions():
        grouped = [label.strip() for labels in re.findall(r"by \(([^)]*)\)", text) for label in labels.split(",")]
        matched = re.findall(r"(\w+)(?:=~|!~|=|!=)\"", text)
        assert set(grouped + matched) <= LABELS, text


def test_a_pool_that_is_away_is_told_beside_one_that_is_there() -> None:
    pools = [text for text in expressions() if re.search(r"max by .*baton:kvstore_", text)]
    assert {"kvstore_up) == 0", "kvstore_leader) == 0"} <= {text.partition("baton:")[2] for text in pools}
    for text in pools:
        assert {OF_PODS["RELEASE"], OF_PODS["MODEL"]} < set(re.findall(r"\w+", text.partition("by (")[2].partition(")")[0])), text


def test_pools_are_scaled_by_gauges_that_there_are() -> None:
    values: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    for role in ("prefill", "decode", "unified"):
        assert exported()[f"baton:{values[role]['autoscaling']['metric']}"] == "gauge"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_pages_name_no_other_metric(page: Any) -> None:
    named = {name.rstrip("_") for name in re.findall(r"baton:[a-z]\w*", page.read_text())}
    assert not {name for name in named if not any(known.startswith(name) for known in exported())}


@pytest.mark.chart
def test_prometheus_understands_every_expression() -> None:
    assert in_tools("promql.py", expressions()) == []
    assert in_tools("promql.py", ["sum(rate(x)"]) != []


@pytest.mark.chart
def test_the_chart_brings_them() -> None:
    objects = by_key(rendered("rdma-fleet"))
    pages = objects["ConfigMap", "rel-dashboards"]["data"]
    assert {json.loads(text)["title"] for text in pages.values()} == {"Baton", "Baton: every metric"}
    monitor = objects["PodMonitor", "rel"]["spec"]
    copied = {re.sub(r"\W", "_", label) for label in monitor["podTargetLabels"]}
    assert copied >= set(OF_PODS.values())
    labels = workloads(list(objects.values()))["rel-qwen3-32b-kvstore-node"]["spec"]["template"]["metadata"]["labels"]
    assert set(monitor["podTargetLabels"]) - {"baton/version"} <= labels.keys()
    assert monitor["podMetricsEndpoints"] == [{"port": "metrics", "interval": "15s"}]
    (group,) = objects["PrometheusRule", "rel"]["spec"]["groups"]
    assert next(rule["expr"] for rule in group["rules"] if rule["alert"] == "BatonFirstTokenSlow").endswith("> 2")
    (key,) = [key for key in by_key(render(example("cpu-demo"), "monitoring.rules.enabled=true")) if key[0] == "PrometheusRule"]
    assert key[1] == "rel"
