"""The chart's planner: off unless asked for, and with no more rights than it needs."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from services.planner.__main__ import app
from tests.chart.rendering import Object, Refused, by_key, container_of, example, invalid, pod_of, render, render4
from tests.chart.test_chart import changed

pytestmark = pytest.mark.chart
NAME = "rel-qwen3-32b-planner"
APPLY = ("planner.enabled=true", "planner.apply=true", "prefill.autoscaling.by=external", "decode.autoscaling.by=external")


def planned(*sets: str) -> dict[tuple[str, str], Object]:
    return by_key(render(example("rdma-fleet"), *sets))


def test_it_is_off_and_changes_nothing_else() -> None:
    assert ("Deployment", NAME) not in planned()
    difference = changed(render(example("rdma-fleet")), render(example("rdma-fleet"), "planner.enabled=true"))
    assert all(before is None for before, _ in difference.values())
    assert set(difference) == {("Deployment", NAME), ("NetworkPolicy", NAME), ("NetworkPolicy", f"{NAME}-reads")}


def test_one_that_only_tells_may_ask_nobody() -> None:
    pod = pod_of(planned("planner.enabled=true")["Deployment", NAME])
    assert pod["automountServiceAccountToken"] is False
    assert "--apply" not in pod["containers"][0]["args"]


def test_one_that_scales_has_the_rights_for_that_alone() -> None:
    objects = planned(*APPLY)
    assert objects["Role", NAME]["rules"] == [
        {
            "apiGroups": ["apps"],
            "resources": ["deployments/scale"],
            "resourceNames": ["rel-qwen3-32b-prefill", "rel-qwen3-32b-decode"],
            "verbs": ["get", "patch"],
        },
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "patch", "delete"]},
    ]
    (subject,) = objects["RoleBinding", NAME]["subjects"]
    assert subject == {"kind": "ServiceAccount", "name": NAME, "namespace": "prod"}
    pod = pod_of(objects["Deployment", NAME])
    assert (pod["serviceAccountName"], pod["automountServiceAccountToken"]) == (NAME, True)
    others = [pod_of(thing) for (kind, name), thing in objects.items() if kind in ("Deployment", "StatefulSet") and name != NAME]
    assert not any(each["automountServiceAccountToken"] or each["serviceAccountName"] == NAME for each in others)
    security = pod["containers"][0]["securityContext"]
    assert security == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert "replicas" not in objects["Deployment", "rel-qwen3-32b-decode"]["spec"]


def test_kubernetes_would_take_it() -> None:
    assert invalid(list(planned(*APPLY).values())) == []


def test_helm_4_renders_the_same(tmp_path: Path) -> None:
    external = {"autoscaling": {"by": "external"}}
    values = yaml.safe_load(example("cpu-demo").read_text())
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(values | {"planner": {"enabled": True, "apply": True}, "prefill": external, "decode": external}))
    objects, complaints = render4(path)
    assert not complaints
    assert by_key(objects) == by_key(render(path))
    assert ("Role", "rel-demo-planner") in by_key(objects)


def test_the_command_takes_its_arguments() -> None:
    """All but the router, which is not there."""
    container = container_of(planned("planner.enabled=true", "decode.autoscaling.max=9")["Deployment", NAME])
    assert container["command"] == ["tini", "--", "baton", "planner"]
    arguments = container["args"]
    assert arguments[0] == "--router=http://rel-qwen3-32b-router:8000"
    assert {"--decode=1-9", "--decode-deployment=rel-qwen3-32b-decode", "--prefill-deployment=rel-qwen3-32b-prefill"} <= set(arguments)
    once = [each for each in arguments if not each.startswith(("--every", "--router"))]
    result = CliRunner().invoke(app, [*once, "--router=http://127.0.0.1:1"])
    assert "does not answer" in str(getattr(result.exception, "message", "")), result.output


@pytest.mark.parametrize(
    ("name", "sets", "said"),
    [
        ("rdma-fleet", ("planner.enabled=true", "planner.apply=true"), "autoscaling.by to external"),
        ("rdma-fleet", ("planner.enabled=true", "unified.enabled=true"), "one prefill and one decode pool"),
        ("rdma-fleet", ("planner.slo.ttftSeconds=0",), "ttftSeconds"),
        ("rdma-fleet", ("planner.sloo=1",), "sloo"),
    ],
)
def test_what_is_wrong_is_refused(name: str, sets: tuple[str, ...], said: str) -> None:
    with pytest.raises(Refused, match=said):
        render(example(name), *sets)
