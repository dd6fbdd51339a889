"""Writes deploy/helm/baton/values.schema.json: what the chart takes, and nothing else. `--check` only says whether it is up to date.

What may stand under `settings` comes from baton/config.py, so a setting that is misspelt is refused before anything is installed. Settings
that the chart itself makes (addresses, ports, cluster, model) are left out there: they follow from other values. So is `tls`: in a cluster
HTTPS ends at an Ingress or a Gateway, which take a certificate's successor without a restart, as a router does not.
"""

import json
import sys
from pathlib import Path
from typing import Any

from baton.config import KVStoreConfig, RouterConfig, Strict, WorkerConfig

TARGET = Path(__file__).resolve().parents[1] / "deploy/helm/baton/values.schema.json"
Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
MAPPING: Schema = {"type": "object"}  # Kubernetes' own; its API server checks it
LIST: Schema = {"type": "array", "items": {"type": "object"}}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
QUANTITY: Schema = {"type": "string", "pattern": "^[0-9]+(Mi|Gi|Ti)$"}
SIZE: Schema = {"type": "string", "pattern": "^([0-9]+(Mi|Gi|Ti))?$"}  # or nothing
NAME: Schema = {"pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}
EVERYWHERE = {"server", "cluster", "security", "drain_grace_s"}
OWNED = {  # by the chart
    "router": EVERYWHERE | {"model", "served_model_name", "http_port", "tls"},
    "worker": EVERYWHERE | {"role", "model", "served_model_name", "files", "parallel"},
    "master": EVERYWHERE | {"mode", "pool", "memory", "disk", "ha", "masters", "master_port", "master_metrics_port"},
    "node": EVERYWHERE
    | {"mode", "memory", "disk", "ha", "oplog", "masters", "master_port", "master_metrics_port", "hot_reads", "client_ttl_s"},
}
OWNED_INSIDE = {"PoolConfig": {"master", "host", "protocol", "devices"}, "PushConfig": {"host"}}


def closed(**properties: Schema) -> Schema:
    return {"type": "object", "additionalProperties": False, "properties": properties}


SECRET = closed(name=TEXT, key=TEXT)


def choice(*values: str) -> Schema:
    return {"enum": list(values)}


def settings(config: type[Strict], owned: set[str]) -> Schema:
    tree = config.model_json_schema()
    sections = tree.get("$defs", {})

    def plain(node: Any) -> Any:
        if isinstance(node, list):
            return [plain(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            name = node["$ref"].rpartition("/")[2]
            section = sections[name]
            if "enum" in section:
                return {"enum": section["enum"]}
            return whole(section, OWNED_INSIDE.get(name, set()))
        return {key: plain(value) for key, value in node.items() if key not in ("title", "default", "description")}

    def whole(section: Schema, without: set[str]) -> Schema:
        needed = [key for key in section.get("required", []) if key not in without]
        found = closed(**{key: plain(value) for key, value in section["properties"].items() if key not in without})
        return {**found, "required": needed} if needed else found

    return whole(tree, owned)


POD = {
    "replicas": COUNT,
    "image": TEXT,
    "resources": closed(requests=MAPPING, limits=MAPPING),
    "settings": closed(),  # none is common to all
    "drainSeconds": COUNT,
    "startupSeconds": {"type": "integer", "minimum": 1},
    "strategy": closed(maxSurge={"type": ["integer", "string"]}, maxUnavailable={"type": ["integer", "string"]}),
    "autoscaling": closed(
        by=choice("none", "hpa", "keda", "external"), min=COUNT, max=COUNT, metric=TEXT, target=TEXT, behavior=MAPPING, triggers=LIST
    ),
    "disruptionBudget": {
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": {"maxUnavailable": {"type": ["integer", "string"]}, "minAvailable": {"type": ["integer", "string"]}},
    },
    "topologySpread": {
        "type": "array",
        "items": closed(
            topologyKey=TEXT, maxSkew={"type": "integer", "minimum": 1}, whenUnsatisfiable=choice("ScheduleAnyway", "DoNotSchedule")
        ),
    },
    "env": LIST,
    "nodeSelector": TEXTS,
    "tolerations": LIST,
    "affinity": MAPPING,
    "priorityClassName": TEXT,
    "runtimeClassName": TEXT,
    "annotations": TEXTS,
    "labels": TEXTS,
    "volumes": LIST,
    "volumeMounts": LIST,
}
STORAGE = closed(size=SIZE, storageClass=TEXT)
RDMA = closed(resource=TEXT, count={"type": "integer", "minimum": 1}, devices=TEXT, root=FLAG)
ROUTER = {
    **POD,
    "settings": settings(RouterConfig, OWNED["router"]),
    "testKeySecret": SECRET,
    "service": closed(type=choice("ClusterIP", "NodePort", "LoadBalancer"), port=PORT, grpcPort=PORT, annotations=TEXTS),
    "ingress": closed(enabled=FLAG, className=TEXT, host=TEXT, tlsSecret=TEXT, annotations=TEXTS),
    "httpRoute": closed(enabled=FLAG, parentRefs=LIST, hostnames={"type": "array", "items": TEXT}, annotations=TEXTS),
}
WORKER = {
    **POD,
    "settings": settings(WorkerConfig, OWNED["worker"]),
    "gpus": COUNT,
    "gpuResource": TEXT,
    "rdma": RDMA,
    "fileTier": closed(bytes=SIZE, shared=FLAG, volume=MAPPING, storageClass=TEXT),
    "shm": SIZE,
}
ROLE = {**WORKER, "enabled": FLAG}
KVSTORE = closed(
    enabled=FLAG,
    master=closed(**{**POD, "replicas": {"type": "integer", "minimum": 1}, "settings": settings(KVStoreConfig, OWNED["master"])}),
    node=closed(**POD | {"settings": settings(KVStoreConfig, OWNED["node"]), "memory": QUANTITY, "storage": STORAGE, "rdma": RDMA}),
)
FETCH = {**closed(repository=TEXT, revision=TEXT, tokenSecret=SECRET), "required": ["repository"]}
VERSION = {
    **closed(
        path={"type": "string", "pattern": "^/"},
        fetch=FETCH,
        **{name: {"$ref": f"#/definitions/{name}"} for name in ("worker", "prefill", "decode", "unified")},
    ),
    "required": ["path"],
}
MODEL = closed(
    path={"type": "string", "pattern": "^(/|$)"},
    servedName={"anyOf": [TEXT, {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}]},
    leaseSeconds={"type": "number", "exclusiveMinimum": 0},
    volume=MAPPING,
    mountPath={"type": "string", "pattern": "^/"},
    claim={**closed(size=QUANTITY, storageClass=TEXT, accessMode=TEXT), "required": ["size"]},
    fetch=FETCH,
    versions={"type": "object", "propertyNames": NAME, "additionalProperties": VERSION},
    **{name: {"$ref": f"#/definitions/{name}"} for name in ("router", "worker", "prefill", "decode", "unified", "kvstore")},
)
ETCD = closed(
    **{key: value for key, value in POD.items() if key not in ("settings", "strategy", "autoscaling")},
    endpoints={
        "anyOf": [{"type": "array", "items": {"type": "string", "pattern": f"^{scheme}://[^,/]+$"}} for scheme in ("http", "https")]
    },
    access=closed(authoritySecret=SECRET, name=TEXT, certificateSecret=TEXT, user=TEXT, passwordSecret=SECRET),
    quota=QUANTITY,
    storage=STORAGE,
)
ETCD["properties"]["replicas"] = {"enum": [1, 3]}
ABOVE_ZERO: Schema = {"type": "number", "exclusiveMinimum": 0}
PLANNER = closed(
    enabled=FLAG,
    apply=FLAG,
    slo=closed(ttftSeconds=ABOVE_ZERO, itlSeconds=ABOVE_ZERO, share={"type": "number", "minimum": 0.5, "exclusiveMaximum": 1}),
    everySeconds={"type": "number", "minimum": 1},
    startupSeconds={"type": "number", "minimum": 0},
    scaleInAfterSeconds={"type": "number", "minimum": 0},
    resources=closed(requests=MAPPING, limits=MAPPING),
)


def build() -> Schema:
    refs = {name: {"$ref": f"#/definitions/{name}"} for name in ("router", "worker", "prefill", "decode", "unified", "kvstore")}
    root = closed(
        models={"type": "object", "propertyNames": NAME, "additionalProperties": MODEL},
        image=closed(registry=TEXT, tag=TEXT, pullPolicy=choice("Always", "IfNotPresent", "Never"), pullSecrets=LIST),
        pod=closed(**POD),
        etcd=ETCD,
        planner=PLANNER,
        logFormat=choice("text", "json"),
        serviceAccount=closed(create=FLAG, name=TEXT, annotations=TEXTS),
        networkPolicy=closed(enabled=FLAG, clients=LIST, monitoring=LIST),
        security=closed(
            runAsUser={"type": "integer", "minimum": 1},
            insecure=FLAG,
            tls=closed(secret=TEXT, name={"type": "string", "minLength": 1}, etcd=FLAG),
        ),
        monitoring=closed(
            podMonitor=closed(enabled=FLAG, interval=TEXT, labels=TEXTS),
            rules=closed(enabled=FLAG, labels=TEXTS, ttftSeconds={"type": "number", "exclusiveMinimum": 0}),
            dashboards=closed(enabled=FLAG, labels=TEXTS),
            prometheus=TEXT,
        ),
        **refs,
    )
    root["properties"]["global"] = MAPPING  # Helm's own
    role = closed(**ROLE)
    definitions = {"router": closed(**ROUTER), "worker": closed(**WORKER), "kvstore": KVSTORE}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of Baton's chart (made by scripts/chart_schema.py)",
        **root,
        "definitions": {**definitions, **dict.fromkeys(("prefill", "decode", "unified"), role)},
    }


def main() -> None:
    text = json.dumps(build(), indent=1) + "\n"
    if "--check" not in sys.argv:
        TARGET.write_text(text)
    elif not TARGET.is_file() or TARGET.read_text() != text:
        raise SystemExit(f"{TARGET} is not what baton/config.py and scripts/chart_schema.py say: run `python scripts/chart_schema.py`")


if __name__ == "__main__":
    main()
