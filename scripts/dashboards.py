"""Writes the chart's Grafana dashboards and Prometheus rules from deploy/monitoring, and from what the processes export. `--check` only
says whether they are up to date.

A page `overview` is put together by hand; `metrics` has a panel for every metric there is. A metric that does not exist is an error.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from baton.errors import InvalidRequest, ModelNotFound, PromptTooLong, RequestCancelled, TooLarge
from baton.metrics import catalogue

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
SOURCES, TARGET = DEPLOY / "monitoring", DEPLOY / "helm/baton/files"
Tree = dict[str, Any]
OF_PODS = {
    "POOL": "app_kubernetes_io_component",
    "RELEASE": "app_kubernetes_io_instance",
    "MODEL": "baton_model",
}  # by the chart's PodMonitor
CLIENTS_FAULT = "|".join(
    [
        *(error.code for error in (InvalidRequest, PromptTooLong, ModelNotFound, TooLarge, RequestCancelled)),
        "not_found",
        "method_not_allowed",
        "http_error",
    ]
)  # the last two: paths that are not there
_SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
_METRIC = re.compile(r"(baton:\w+)(?:\{([^}]*)\})?")
_WIDTH, _HEIGHT, _ACROSS = 8, 7, 3


def exported() -> dict[str, str]:
    """Sample names, and the type of each."""
    families = [family for group in catalogue().values() for family in group]
    return {family.name + suffix: family.type for family in families for suffix in _SUFFIXES[family.type]}


def unknown(text: str) -> set[str]:
    """Names of ours that nobody exports."""
    return {match[1] for match in _METRIC.finditer(text)} - exported().keys()


def quantiles(name: str) -> dict[str, str]:
    buckets = f"sum by (le) (rate(baton:{name}_bucket[$__rate_interval]))"
    return {f"p{share * 100:.0f}": f"histogram_quantile({share}, {buckets})" for share in (0.5, 0.9, 0.99)}


def panel(title: str, unit: str, lines: Mapping[str, str], description: str = "") -> Tree:
    source = {"type": "prometheus", "uid": "${datasource}"}
    targets = [
        {"refId": chr(65 + i), "expr": _here(expression), "legendFormat": _labelled(legend), "datasource": source}
        for i, (legend, expression) in enumerate(lines.items())
    ]
    return {
        "type": "timeseries",
        "title": title,
        "description": description,
        "datasource": source,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0, "custom": {"fillOpacity": 10, "showPoints": "never"}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": targets,
    }


def _here(expression: str) -> str:
    """Of the chosen namespaces."""
    return _METRIC.sub(lambda m: f'{m[1]}{{{m[2] + "," if m[2] else ""}namespace=~"$namespace"}}', _labelled(expression))


def _labelled(text: str) -> str:
    """With labels for what stands for them."""
    return re.sub(rf"\b({'|'.join(OF_PODS)})\b", lambda match: OF_PODS[match[1]], text)


def overview() -> Iterator[tuple[str, list[Tree]]]:
    for row, panels in yaml.safe_load((SOURCES / "overview.yaml").read_text()).items():
        yield row, [panel(each["title"], each["unit"], each.get("lines") or quantiles(each["quantiles"])) for each in panels]


def every_metric() -> Iterator[tuple[str, list[Tree]]]:
    for kind, families in catalogue().items():
        panels = []
        for family in families:
            name = family.name.removeprefix("baton:")
            unit = "bytes" if "bytes" in name else "s" if name.endswith("seconds") else "short"
            if family.type == "histogram":
                lines = quantiles(name)
            elif family.type == "counter":
                lines = {"{{worker}}": f"sum by (worker) (rate(baton:{name}_total[$__rate_interval]))"}
            else:
                lines = {"{{worker}}": f"sum by (worker) (baton:{name})"}
            panels.append(panel(name, unit, lines, family.documentation))
        yield f"Of each {kind}", panels


def dashboard(uid: str, title: str, rows: Iterator[tuple[str, list[Tree]]]) -> Tree:
    panels: list[Tree] = []
    y = 0
    for name, row in rows:
        panels.append({"type": "row", "title": name, "collapsed": False, "panels": [], "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}})
        for i, each in enumerate(row):
            place = {"x": _WIDTH * (i % _ACROSS), "y": y + 1 + _HEIGHT * (i // _ACROSS), "w": _WIDTH, "h": _HEIGHT}
            panels.append({**each, "gridPos": place})
        y += 1 + _HEIGHT * -(-len(row) // _ACROSS)
    return {
        "uid": uid,
        "title": title,
        "tags": ["baton"],
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": [{**each, "id": i + 1} for i, each in enumerate(panels)],
    }


def _variables() -> Sequence[Tree]:
    namespace = {
        "name": "namespace",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": "label_values(baton:num_requests_running, namespace)", "refId": "namespace"},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }
    return [{"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}, namespace]


def rules() -> Tree:
    text = _labelled((SOURCES / "alerts.yaml").read_text()).replace("CLIENTS_FAULT", CLIENTS_FAULT)
    made = [
        {
            "alert": each["alert"],
            "expr": each["expr"],
            "for": each["for"],
            "labels": {"severity": each["severity"]},
            "annotations": {"summary": each["summary"]},
        }
        for each in yaml.safe_load(text)
    ]
    return {"groups": [{"name": "baton", "rules": made}]}


def build() -> dict[str, str]:
    """File names and contents. Raises SystemExit for a metric that does not exist."""
    trees = {
        "overview.json": dashboard("baton-overview", "Baton", overview()),
        "metrics.json": dashboard("baton-metrics", "Baton: every metric", every_metric()),
        "rules.json": rules(),
    }
    texts = {name: json.dumps(tree, indent=1) + "\n" for name, tree in trees.items()}
    for name, text in texts.items():
        if missing := unknown(text):
            raise SystemExit(f"{name} names metrics that no process exports: {', '.join(sorted(missing))}")
    return texts


def main() -> None:
    for name, text in build().items():
        path = TARGET / name
        if "--check" not in sys.argv:
            path.write_text(text)
        elif not path.is_file() or path.read_text() != text:
            raise SystemExit(f"{path} is out of date: run `python scripts/dashboards.py`")


if __name__ == "__main__":
    main()
