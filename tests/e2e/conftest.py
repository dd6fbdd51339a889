"""One cluster for the suite: 1 prefill, 1 decode, 1 kvstore, etcd, router, with the demo model."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import RunningCluster, running_cluster


@pytest.fixture(scope="session")
def cluster(demo_model: Path) -> Iterator[RunningCluster]:
    with running_cluster(model=demo_model, prefill=1, decode=1, kvstore=1) as running:
        yield running
