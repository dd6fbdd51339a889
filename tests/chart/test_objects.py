"""What Helm 3 and 4 make of every example: the same objects, each of which its API server would take."""

import pytest

from tests.chart.rendering import CHART, CUSTOM, NAMES, VERSIONS, by_key, example, helm3, invalid, render4, rendered

pytestmark = pytest.mark.chart
names = pytest.mark.parametrize("name", NAMES)


@names
def test_helm_3_has_nothing_to_complain_of(name: str) -> None:
    assert "[ERROR]" not in helm3("lint", "--strict", str(CHART), "-f", str(example(name)))


@names
def test_helm_4_renders_the_same_objects(name: str) -> None:
    objects, complaints = render4(example(name))
    assert not complaints
    assert by_key(objects) == by_key(rendered(name))


@names
def test_every_object_would_be_taken(name: str) -> None:
    assert invalid(rendered(name)) == []


def test_the_examples_have_an_object_of_each_other_kind() -> None:
    assert {thing["kind"] for name in NAMES for thing in rendered(name)} >= CUSTOM


def test_what_is_wrong_is_found() -> None:
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": {"portz": []}}
    assert len(invalid([service])) == len(VERSIONS)
    route = by_key(rendered("tls"))["HTTPRoute", "rel-qwen3-8b-router"]
    assert invalid([{**route, "spec": {**route["spec"], "hostnamez": []}}]) == [
        "HTTPRoute rel-qwen3-8b-router: there is no /spec/hostnamez"
    ]
    assert len(invalid([{**route, "spec": {**route["spec"], "hostnames": "llm.example.com"}}])) == 1
