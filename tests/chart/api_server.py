"""As much of a Kubernetes API as `helm install`, `upgrade` and `rollback` ask: objects, that are kept and patched."""

import copy
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.chart.rendering import Object, workloads
from tests.kubernetes_api import serving

_RESOURCES = {  # by group and version: plurals and kinds
    "v1": {"services": "Service", "configmaps": "ConfigMap", "secrets": "Secret", "serviceaccounts": "ServiceAccount"},
    "apps/v1": {"deployments": "Deployment", "statefulsets": "StatefulSet"},
    "networking.k8s.io/v1": {"networkpolicies": "NetworkPolicy"},
    "policy/v1": {"poddisruptionbudgets": "PodDisruptionBudget"},
    "autoscaling/v2": {"horizontalpodautoscalers": "HorizontalPodAutoscaler"},
}


class ApiServer:
    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}  # by path
        self._lock = threading.Lock()

    def workload(self, name: str) -> Object:
        return workloads(list(self.objects.values()))[name]

    def answer(self, method: str, url: str, body: Any) -> tuple[int, Object]:
        path, query = urlsplit(url).path, parse_qs(urlsplit(url).query)
        with self._lock:
            if found := _discovery(path):
                return 200, found
            if path == "/version":
                return 200, {"major": "1", "minor": "31", "gitVersion": "v1.31.0"}
            if method == "POST":
                path = f"{path}/{body['metadata']['name']}"
                if path in self.objects:
                    return 409, _status(409, "AlreadyExists")
                self.objects[path] = _defaulted(body)
                return 201, body
            if method == "GET" and path not in self.objects and path.endswith("/secrets"):
                return 200, {"kind": "SecretList", "apiVersion": "v1", "items": self._secrets(query.get("labelSelector", [""])[0])}
            if path not in self.objects:
                return 404, _status(404, "NotFound")
            if method == "PATCH":
                self.objects[path] = _defaulted(_patched(self.objects[path], body))
            elif method == "PUT":
                self.objects[path] = body
            elif method == "DELETE":
                del self.objects[path]
                return 200, _status(200, "")
            return 200, self.objects[path]

    def _secrets(self, selector: str) -> list[Object]:
        wanted = dict(each.split("=") for each in selector.split(",") if each)
        return [
            thing for path, thing in self.objects.items() if "/secrets/" in path and wanted.items() <= thing["metadata"]["labels"].items()
        ]


def _discovery(path: str) -> Object | None:
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        groups = [version.split("/") for version in _RESOURCES if "/" in version]
        told = [{"groupVersion": f"{group}/{version}", "version": version} for group, version in groups]
        return {
            "kind": "APIGroupList",
            "apiVersion": "v1",
            "groups": [
                {"name": group, "versions": [each], "preferredVersion": each} for (group, _), each in zip(groups, told, strict=True)
            ],
        }
    version = path.removeprefix("/apis/").removeprefix("/api/")
    if version not in _RESOURCES:
        return None
    verbs = ["create", "delete", "get", "list", "patch", "update"]
    resources = [{"name": name, "kind": kind, "namespaced": True, "verbs": verbs} for name, kind in _RESOURCES[version].items()]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}


def _patched(live: Any, patch: Any) -> Any:
    """By a merge patch; the strategic one of lists is not needed for what is looked at here."""
    if not isinstance(patch, dict) or not isinstance(live, dict):
        return copy.deepcopy(patch)
    kept = {key: value for key, value in live.items() if key not in patch}
    return kept | {key: _patched(live.get(key), value) for key, value in patch.items() if value is not None}


def _defaulted(thing: Object) -> Object:
    if thing["kind"] in ("Deployment", "StatefulSet"):
        thing["spec"].setdefault("replicas", 1)
    return thing


def _status(code: int, reason: str) -> Object:
    return {"kind": "Status", "apiVersion": "v1", "status": "Success" if code == 200 else "Failure", "reason": reason, "code": code}


@contextmanager
def served(api: ApiServer) -> Iterator[str]:
    """Its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            length = int(self.headers["content-length"] or 0)
            code, found = api.answer(self.command, self.path, json.loads(self.rfile.read(length)) if length else None)
            text = json.dumps(found).encode()
            self.send_response(code)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    with serving(server):
        yield f"http://127.0.0.1:{server.server_port}"
