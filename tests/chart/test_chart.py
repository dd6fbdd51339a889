"""The chart: whether what Helm makes of the examples is what it should be."""

import subprocess
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from baton.config import KVStoreConfig, RouterConfig, ServerConfig, Strict, WorkerConfig, load_config
from tests.chart.rendering import (
    EXAMPLES,
    NAMES,
    Object,
    Refused,
    both,
    by_key,
    config_of,
    container_of,
    example,
    pod_of,
    render,
    rendered,
    workloads,
)  # fmt: skip

pytestmark = pytest.mark.chart
CONFIGS: dict[str, type[Strict]] = {"router": RouterConfig, "prefill": WorkerConfig, "decode": WorkerConfig, "kvstore": KVStoreConfig}
names = pytest.mark.parametrize("name", NAMES)


@names
def test_each_process_takes_its_configuration(name: str, tmp_path: Path) -> None:
    for key, workload in workloads(rendered(name)).items():
        container = container_of(workload)
        if container["name"] == "etcd":
            continue
        path = tmp_path / f"{key}.yaml"
        path.write_text(yaml.safe_dump(config_of(rendered(name), key)))
        given = [entry["name"] for entry in container["env"] if "valueFrom" in entry]
        environment = {name: "3" if "NUM_THREADS" in name else "10.1.2.3" for name in given}
        assert container["args"][1:] == ["--config", "/etc/baton/config.yaml"]
        config = load_config(CONFIGS[container["args"][0]], path, environ=environment)
        server: ServerConfig = config.server  # type: ignore[attr-defined]
        assert server.id == "10.1.2.3"
        if container["name"] == "router":
            assert (server.host, server.advertise) == ("0.0.0.0", "10.1.2.3"), "kubectl port-forward asks the loopback"
        else:
            assert (server.host, server.advertise) == ("10.1.2.3", "")


@names
def test_pods_have_no_rights_that_they_do_not_need(name: str) -> None:
    for thing in rendered(name):
        if thing["kind"] not in ("Deployment", "StatefulSet", "Job", "Pod"):
            continue
        pod = thing["spec"] if thing["kind"] == "Pod" else pod_of(thing)
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        rdma = any(key.startswith("rdma/") for container in pod["containers"] for key in container["resources"].get("limits", {}))
        assert pod["securityContext"]["runAsNonRoot"] is not rdma, "only who locks memory for RDMA is root"
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"], **({"add": ["IPC_LOCK"]} if rdma else {})}


def test_nobody_may_ask_the_kubernetes_api() -> None:
    kinds = {thing["kind"] for path in EXAMPLES for thing in render(path)}
    assert not kinds & {"Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding", "Secret"}


@names
def test_selectors_fit_pods_and_no_two_workloads_share_a_pod(name: str) -> None:
    objects = rendered(name)
    labels = {key: workload["spec"]["template"]["metadata"]["labels"] for key, workload in workloads(objects).items()}

    def fits(selector: dict[str, str]) -> list[str]:
        return [key for key, own in labels.items() if selector.items() <= own.items()]

    for key, workload in workloads(objects).items():
        assert fits(workload["spec"]["selector"]["matchLabels"]) == [key]
    for thing in objects:
        if thing["kind"] == "Service":
            assert len(fits(thing["spec"]["selector"])) == 1, thing["metadata"]["name"]
            ports = {port["name"] for port in container_of(workloads(objects)[fits(thing["spec"]["selector"])[0]])["ports"]}
            assert {port["targetPort"] for port in thing["spec"]["ports"]} <= ports
        elif thing["kind"] in ("PodDisruptionBudget", "NetworkPolicy"):
            spec = thing["spec"]
            selector = (spec["selector"] if thing["kind"] == "PodDisruptionBudget" else spec["podSelector"])["matchLabels"]
            assert fits(selector) == [thing["metadata"]["name"]]


@names
def test_each_workload_has_a_policy_a_budget_probes_and_time_to_drain(name: str) -> None:
    objects = by_key(rendered(name))
    for key, workload in workloads(rendered(name)).items():
        assert ("NetworkPolicy", key) in objects
        assert ("PodDisruptionBudget", key) in objects
        container, pod = container_of(workload), pod_of(workload)
        assert all(container[probe] for probe in ("startupProbe", "readinessProbe", "livenessProbe"))
        if container["name"] != "etcd":
            drain = config_of(rendered(name), key)["drain_grace_s"]
            waits = int(container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["", 0])[1])
            assert pod["terminationGracePeriodSeconds"] > drain + waits


def test_a_router_is_ready_when_it_can_serve_and_a_worker_may_load_for_long() -> None:
    found = workloads(rendered("rdma-fleet"))
    router, worker = container_of(found["rel-qwen3-32b-router"]), container_of(found["rel-qwen3-32b-decode"])
    assert router["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert router["livenessProbe"]["httpGet"]["path"] == "/health", "a router without workers is alive"
    paths = {probe: worker[f"{probe}Probe"]["httpGet"]["path"] for probe in ("readiness", "liveness")}
    assert paths == {"readiness": "/ready", "liveness": "/health"}, "a worker that etcd refuses is alive, and a rollout waits for it"
    assert worker["startupProbe"]["periodSeconds"] * worker["startupProbe"]["failureThreshold"] >= 1800


def changed(before: Sequence[Object], after: Sequence[Object]) -> dict[tuple[str, str], tuple[Any, Any]]:
    old, new = by_key(before), by_key(after)
    return {key: (old.get(key), new.get(key)) for key in old.keys() | new.keys() if old.get(key) != new.get(key)}


@pytest.mark.parametrize("pool", ["prefill", "decode"])
def test_scaling_one_pool_touches_its_workload_alone(pool: str) -> None:
    difference = changed(rendered("rdma-fleet"), render(example("rdma-fleet"), f"{pool}.replicas=17"))
    ((key, (before, after)),) = difference.items()
    assert key == ("Deployment", f"rel-qwen3-32b-{pool}")
    before = {**before, "spec": {**before["spec"], "replicas": 17}}
    assert before == after, "nothing but the number"


def test_a_setting_of_one_pool_restarts_that_pool_alone() -> None:
    difference = changed(rendered("rdma-fleet"), render(example("rdma-fleet"), "prefill.settings.engine.max_num_seqs=32"))
    assert set(difference) == {("ConfigMap", "rel-qwen3-32b-prefill"), ("Deployment", "rel-qwen3-32b-prefill")}
    before, after = difference["Deployment", "rel-qwen3-32b-prefill"]
    assert before["spec"]["template"]["metadata"]["annotations"] != after["spec"]["template"]["metadata"]["annotations"]


def test_another_version_beside_the_first_leaves_the_first_as_it_is() -> None:
    more = render(example("cpu-demo"), "models.demo.versions.v2.path=/opt/baton/demo-model-2")
    difference = changed(rendered("cpu-demo"), more)
    assert all(before is None for before, _ in difference.values())
    assert {name for kind, name in difference if kind == "Deployment"} == {"rel-demo-v2-prefill", "rel-demo-v2-decode"}
    assert config_of(more, "rel-demo-v2-decode")["cluster"] == config_of(more, "rel-demo-router")["cluster"]


def test_models_are_clusters_of_their_own() -> None:
    objects = rendered("multi-model")
    small, large = config_of(objects, "rel-small-router"), config_of(objects, "rel-large-router")
    assert small["cluster"]["name"] != large["cluster"]["name"]
    assert small["cluster"]["etcd"] == large["cluster"]["etcd"]
    policy = by_key(objects)["NetworkPolicy", "rel-large-v1-decode"]["spec"]["ingress"]
    peers = [peer["podSelector"]["matchLabels"]["baton/model"] for rule in policy for peer in rule.get("from", [])]
    assert set(peers) == {"large"}


def test_mooncakes_ports_are_for_its_peers_alone() -> None:
    objects = by_key(rendered("rdma-fleet"))
    for component in ("prefill", "decode", "kvstore-master", "kvstore-node"):
        rules = objects["NetworkPolicy", f"rel-qwen3-32b-{component}"]["spec"]["ingress"]
        open_to_all = [rule for rule in rules if "ports" not in rule]
        ((peer,),) = [rule["from"] for rule in open_to_all]
        (expression,) = peer["podSelector"]["matchExpressions"]
        assert "router" not in expression["values"]
        assert "etcd" not in expression["values"]
        assert "namespaceSelector" not in peer
        for rule in rules:
            assert rule.get("from"), "who may read metrics is said in this example"


def test_a_worker_on_the_cpu_has_as_many_threads_as_it_asks_for_cores() -> None:
    def threads(objects: Sequence[Object], name: str) -> list[Object]:
        environment = container_of(workloads(objects)[name])["env"]
        return [entry["valueFrom"] for entry in environment if entry["name"] == "BATON_ENGINE__NUM_THREADS"]

    assert threads(rendered("cpu-demo"), "rel-demo-decode") == [{"resourceFieldRef": {"resource": "requests.cpu", "divisor": "1"}}]
    assert not threads(render(example("cpu-demo"), "worker.settings.engine.num_threads=3"), "rel-demo-decode")
    assert not threads(rendered("rdma-fleet"), "rel-qwen3-32b-decode")


def test_a_worker_of_several_gpus_has_a_rank_on_each() -> None:
    objects = render(example("rdma-fleet"), "decode.gpus=4")
    assert container_of(workloads(objects)["rel-qwen3-32b-decode"])["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert config_of(objects, "rel-qwen3-32b-decode")["engine"] == {"tensor_parallel_size": 4}
    assert "engine" not in config_of(objects, "rel-qwen3-32b-prefill")


def test_ranks_have_shared_memory_for_nccl() -> None:
    def shm(*sets: str) -> list[Object]:
        pod = pod_of(workloads(render(example("one-gpu-node"), *sets))["rel-qwen3-8b-decode"])
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        found = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm"]
        assert mounts.get("shm") == ("/dev/shm" if found else None)
        return found

    assert shm("worker.gpus=2") == [{"medium": "Memory", "sizeLimit": "2Gi"}]
    assert shm("worker.gpus=2", "worker.shm=16Gi") == [{"medium": "Memory", "sizeLimit": "16Gi"}]
    assert not shm(), "one GPU needs none"


def test_several_masters_are_found_by_etcd_and_one_by_its_service() -> None:
    one, several = rendered("cpu-demo"), rendered("rdma-fleet")
    assert config_of(one, "rel-demo-decode")["pool"]["master"] == "rel-demo-kvstore:50051"
    assert ("Service", "rel-demo-kvstore") in by_key(one)
    assert config_of(several, "rel-qwen3-32b-decode")["pool"]["master"] == "etcd"
    assert config_of(several, "rel-qwen3-32b-kvstore-master")["ha"] is True
    assert len(config_of(several, "rel-qwen3-32b-kvstore-node")["masters"]) == 2


def test_rdma_is_a_resource_a_capability_and_a_protocol() -> None:
    objects = rendered("rdma-fleet")
    for component in ("prefill", "decode", "kvstore-node"):
        name = f"rel-qwen3-32b-{component}"
        assert container_of(workloads(objects)[name])["resources"]["limits"]["rdma/hca_shared_devices_a"] == 1
        assert config_of(objects, name)["pool"]["protocol"] == "rdma"
    assert config_of(objects, "rel-qwen3-32b-decode")["push"] == {"protocols": ["rdma", "tcp"], "devices": "mlx5_0,mlx5_1"}


def test_rdma_without_root_where_memory_may_be_locked() -> None:
    objects = render(example("rdma-fleet"), "worker.rdma.root=false")
    decode = workloads(objects)["rel-qwen3-32b-decode"]
    assert pod_of(decode)["securityContext"]["runAsNonRoot"] is True
    assert container_of(decode)["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container_of(decode)["resources"]["limits"]["rdma/hca_shared_devices_a"] == 1


@pytest.mark.parametrize(("given", "names"), [("a", ["a"]), ("{a,b}", ["a", "b"]), ("", ["qwen3-8b"])])
def test_routers_and_workers_call_a_model_by_the_same_names(given: str, names: list[str]) -> None:
    objects = render(example("keda"), f"models.qwen3-8b.servedName={given}")
    found = [config_of(objects, f"rel-qwen3-8b-{part}")["served_model_name"] for part in ("router", "prefill", "decode")]
    assert found == [names] * 3
    (trigger,) = by_key(objects)["ScaledObject", "rel-qwen3-8b-prefill"]["spec"]["triggers"]
    assert f'model_name="{names[0]}"' in trigger["metadata"]["query"]


def test_everybody_logs_in_the_same_form() -> None:
    objects = render(example("cpu-demo"), "logFormat=json")
    names = [thing["metadata"]["name"] for thing in objects if thing["kind"] == "ConfigMap"]
    assert {config_of(objects, name)["server"]["log_format"] for name in names} == {"json"}


def test_https_for_clients() -> None:
    objects = by_key(rendered("tls"))
    ingress = objects["Ingress", "rel-qwen3-8b-router"]["spec"]
    assert ingress["tls"] == [{"hosts": ["llm.example.com"], "secretName": "llm-example-com"}]
    route = objects["HTTPRoute", "rel-qwen3-8b-router"]["spec"]
    assert route["rules"][0]["backendRefs"] == [{"name": "rel-qwen3-8b-router", "port": 8000}]
    service = objects["Service", "rel-qwen3-8b-router"]["spec"]["ports"]
    assert {"name": "http", "port": 8000, "targetPort": "http", "appProtocol": "http"} in service


def ask(environment: dict[str, str], status: int) -> tuple[int, str, str | None]:
    """The test's pod against a router that answers `status`: its exit code, what it says, and who it says that it is."""
    (pod,) = [thing for thing in rendered("keys") if thing["kind"] == "Pod"]
    (container,) = pod["spec"]["containers"]
    seen: list[str | None] = []

    class Router(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.headers["Authorization"])
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Router) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        command = [sys.executable, *container["command"][1:3], f"127.0.0.1:{server.server_port}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        thread.join()
    return done.returncode, done.stderr, seen[0]


def test_the_test_shows_a_key() -> None:
    (pod,) = [thing for thing in rendered("keys") if thing["kind"] == "Pod"]
    (entry,) = pod["spec"]["containers"][0]["env"]
    assert entry == {"name": "KEYS", "valueFrom": {"secretKeyRef": {"name": "baton-keys", "key": "product"}}}
    assert ask({"KEYS": "# rotated in May\nnew\nold\n"}, 200) == (0, "", "Bearer new")
    code, said, shown = ask({}, 401)
    assert (code, shown) == (1, None)
    assert "router.testKeySecret" in said


def test_keys_come_from_a_secret_that_is_named() -> None:
    objects = rendered("keys")
    router = workloads(objects)["rel-qwen3-8b-router"]
    (mount,) = [mount for mount in container_of(router)["volumeMounts"] if mount["name"] == "keys"]
    (volume,) = [volume for volume in pod_of(router)["volumes"] if volume["name"] == "keys"]
    assert volume["secret"]["secretName"] == "baton-keys"
    files = [tenant["key_file"] for tenant in config_of(objects, "rel-qwen3-8b-router")["tenants"]]
    assert files == [f"{mount['mountPath']}/product", f"{mount['mountPath']}/batch"]


def test_services_show_certificates_where_there_are_some_and_are_told_to_do_without_elsewhere() -> None:
    objects = rendered("mtls")
    for name, workload in workloads(objects).items():
        (mount,) = [mount for mount in container_of(workload)["volumeMounts"] if mount["name"] == "certificates"]
        (volume,) = [volume for volume in pod_of(workload)["volumes"] if volume["name"] == "certificates"]
        assert (mount["readOnly"], volume["secret"]) == (True, {"secretName": "baton-services", "defaultMode": 0o440})
        if container_of(workload)["name"] != "etcd":
            security = config_of(objects, name)["security"]
            assert {security[file] for file in ("cert", "key", "authority")} == {
                f"{mount['mountPath']}/{file}" for file in ("tls.crt", "tls.key", "ca.crt")
            }
    configs = [thing["metadata"]["name"] for thing in rendered("cpu-demo") if thing["kind"] == "ConfigMap"]
    assert all(config_of(rendered("cpu-demo"), name)["security"] == {"insecure": True} for name in configs)


def test_the_planner_shows_a_certificate_to_workers_that_it_drains() -> None:
    told = ("planner.enabled=true", "planner.apply=true", "prefill.autoscaling.by=external", "decode.autoscaling.by=external")
    container = container_of(workloads(render(example("mtls"), *told))["rel-qwen3-8b-planner"])
    assert container["volumeMounts"] == [{"name": "certificates", "mountPath": "/etc/baton-tls", "readOnly": True}]
    assert {"--cert=/etc/baton-tls/tls.crt", "--key=/etc/baton-tls/tls.key", "--authority=/etc/baton-tls/ca.crt"} < set(container["args"])
    assert "volumeMounts" not in container_of(workloads(render(example("one-gpu-node"), *told))["rel-qwen3-8b-planner"])


def test_a_node_with_a_disk_has_a_claim_that_goes_with_it() -> None:
    name = "rel-qwen3-32b-kvstore-node"
    objects = rendered("rdma-fleet")
    node = workloads(objects)[name]
    (claim,) = node["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["resources"] == {"requests": {"storage": "3Ti"}}
    assert claim["spec"]["storageClassName"] == "local-nvme"
    assert node["spec"]["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Delete", "whenScaled": "Delete"}
    (path,) = [mount["mountPath"] for mount in container_of(node)["volumeMounts"] if mount["name"] == claim["metadata"]["name"]]
    disk = KVStoreConfig.model_validate({"disk": config_of(objects, name)["disk"]}).disk
    assert (disk.path, disk.bytes) == (path, 3 * 2**40 * 85 // 100 >> 20 << 20)
    assert container_of(node)["resources"]["limits"]["memory"] == f"{256 * 1024 + 1536 + 3 * 2**20 // 700}Mi"
    liveness = container_of(node)["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 900, "Mooncake looks through the disk"
    none = workloads(rendered("cpu-demo"))["rel-demo-kvstore-node"]
    assert container_of(none)["livenessProbe"]["failureThreshold"] == 6
    assert "volumeClaimTemplates" not in none["spec"]
    assert container_of(none)["resources"]["limits"]["memory"] == "1536Mi"
    etcd = workloads(objects)["rel-etcd"]["spec"]
    assert etcd["volumeClaimTemplates"]
    assert "persistentVolumeClaimRetentionPolicy" not in etcd, "its members' data stay"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("decode.replcas=3", "replcas"),
        ("models.demo.decode.settings.engine.blocksize=32", "blocksize"),
        ("worker.settings.server.host=0.0.0.0", "server"),
        ("worker.settings.pool.master=elsewhere", "master"),
        ("kvstore.node.settings.disk.path=/elsewhere", "disk"),
        ("etcd.replicas=2", "etcd.replicas"),
        ("etcd.replicas=3", "give etcd.storage.size"),
        ("security.tls.secret=certs,kvstore.master.replicas=2", "one master, or an etcd that asks for neither"),
        ("networkPolicy.enabled=false", "security.insecure=true"),
        ("networkPolicy.enabled=false,security.tls.secret=certs", "by Mooncake's ports"),
        ("etcd.endpoints={https://a:1}", "etcd.access.authoritySecret"),
        ("etcd.endpoints={https://a:1,http://b:1}", "etcd.endpoints"),
        ("etcd.endpoints={http://a:1},etcd.access.user=u", "user and passwordSecret"),
        ("etcd.access.user=u", "give etcd.endpoints"),
        ("etcd.access.certificateSecret=c", "give etcd.endpoints"),
        ("etcd.endpoints={http://a:1},etcd.access.certificateSecret=c", "at https:// alone"),
        ("worker.settings.security.insecure=true", "security"),
        ("router.settings.tls.cert=/tls/tls.crt", "tls"),
        ("router.settings.tenants[0].key_file=/keys/a", "name"),
        ("models.Demo.path=/x", "Demo"),
        ("kvstore.node.memory=lots", "memory"),
        ("prefill.enabled=false", "enable prefill and decode, or unified"),
        ("decode.settings.engine.block_size=32", "block_size"),
        ("decode.gpus=1", "set worker.settings.engine.block_size"),
        ("kvstore.node.rdma.resource=rdma/hca", "give both rdma.resource"),
        ("worker.settings.pool.near=/x,kvstore.node.settings.pool.near=/x,worker.rdma.resource=rdma/hca", "the same user"),
        ("decode.fileTier.bytes=10Gi,decode.fileTier.shared=true", "fileTier.volume"),
        ("kvstore.node.autoscaling.by=hpa", "cannot be scaled by itself"),
        ("models.demo.fetch.repository=a/b", "a place to write to"),
        ("models.other.servedName=x", "give it a path"),
        ("models.a-name-that-nobody-would-like-to-type-on-any-evening.path=/x", "52 characters"),
    ],
)
def test_what_is_wrong_is_refused_with_its_name(setting: str, said: str) -> None:
    with pytest.raises(Refused, match=said):
        render(example("cpu-demo"), setting)


def test_a_layer_can_take_a_budget_a_resource_and_a_setting_away(tmp_path: Path) -> None:
    router = {"disruptionBudget": None, "topologySpread": [], "resources": {"limits": {"memory": None}}}
    decode = {"settings": {"engine": {"max_num_seqs": None}}}
    worker = {"settings": {"engine": {"max_num_seqs": 8}}}
    for objects in both(tmp_path, {"models": {"a": {"path": "/x", "router": router, "decode": decode}}, "worker": worker}):
        assert ("PodDisruptionBudget", "rel-a-router") not in objects
        assert ("PodDisruptionBudget", "rel-a-decode") in objects
        assert "topologySpreadConstraints" not in pod_of(objects["Deployment", "rel-a-router"])
        assert container_of(objects["Deployment", "rel-a-router"])["resources"]["limits"] == {}
        configs = {name: yaml.safe_load(thing["data"]["config.yaml"]) for (kind, name), thing in objects.items() if kind == "ConfigMap"}
        assert configs["rel-a-prefill"]["engine"] == {"max_num_seqs": 8}
        assert configs["rel-a-decode"]["engine"] == {}


def test_nothing_else_can_be_taken_away() -> None:
    with pytest.raises(Refused, match="drainSeconds"):
        render(example("cpu-demo"), "models.demo.decode.drainSeconds=null")


def test_a_budget_says_one_thing(tmp_path: Path) -> None:
    for objects in both(tmp_path, {"models": {"a": {"path": "/x"}}, "decode": {"disruptionBudget": {"minAvailable": "50%"}}}):
        budgets = {name: thing["spec"] for (kind, name), thing in objects.items() if kind == "PodDisruptionBudget"}
        assert budgets["rel-a-decode"]["minAvailable"] == "50%"
        assert "maxUnavailable" not in budgets["rel-a-decode"], "Kubernetes refuses both"
        assert budgets["rel-a-prefill"]["maxUnavailable"] == 1
