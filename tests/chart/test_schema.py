"""The schema of the chart's values is made from the services' own settings."""

import json

import pytest

from baton.config import KVStoreConfig, RouterConfig, WorkerConfig
from scripts.chart_schema import OWNED, TARGET
from scripts.chart_schema import main as write_schema


def test_it_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["chart_schema.py", "--check"])
    write_schema()


def test_every_setting_is_the_charts_or_the_users() -> None:
    definitions = json.loads(TARGET.read_text())["definitions"]
    kvstore = definitions["kvstore"]["properties"]
    blocks = {"router": definitions["router"], "worker": definitions["decode"], "master": kvstore["master"], "node": kvstore["node"]}
    configs = {"router": RouterConfig, "worker": WorkerConfig, "master": KVStoreConfig, "node": KVStoreConfig}
    for name, config in configs.items():
        users = set(blocks[name]["properties"]["settings"]["properties"])
        assert users | OWNED[name] == set(config.model_fields)
        assert not users & OWNED[name]
