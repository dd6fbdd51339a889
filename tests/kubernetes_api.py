"""As much of the Kubernetes API as the planner asks, as its reference has it: the scale subresource of Deployments, and pods. Real HTTPS.

Pods go and come as a Deployment's do: those that are not ready go first, then the cheapest; new ones are not ready until `start`.
"""

import json
import re
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

COST = "controller.kubernetes.io/pod-deletion-cost"
TOKEN = "the-token"


class Api:
    def __init__(self, pods: dict[str, Sequence[str]], on_delete: Callable[[str], None] = lambda name: None) -> None:
        """`pods`: of each Deployment."""
        self.replicas = {name: len(own) for name, own in pods.items()}
        self.versions = dict.fromkeys(pods, 1)
        self.pods = {pod: self._pod(name, pod, ready=True) for name, own in pods.items() for pod in own}
        self.patches: list[tuple[str, Any]] = []  # paths and bodies
        self.on_delete = on_delete
        self.allowed = True
        self.before_patch: Callable[[], None] = lambda: None
        self._lock, self._number = threading.Lock(), 0

    @staticmethod
    def _pod(deployment: str, name: str, *, ready: bool) -> dict[str, Any]:
        return {
            "metadata": {"name": name, "labels": {"app": deployment, "pod-template-hash": "a"}},
            "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True" if ready else "False"}]},
        }

    def of(self, deployment: str) -> list[str]:
        """Pods that are not being deleted."""
        return [name for name, pod in self.pods.items() if self._own(deployment, pod)]

    def start(self) -> None:
        for pod in self.pods.values():
            pod["status"]["conditions"][0]["status"] = "True"

    def answer(self, method: str, url: str, headers: Any, body: Any) -> tuple[int, Any]:
        with self._lock:
            path, query = urlsplit(url).path, parse_qs(urlsplit(url).query)
            if headers["authorization"] != f"Bearer {TOKEN}":
                return 401, {"message": "Unauthorized"}
            if not self.allowed:
                return 403, {"message": "forbidden"}
            if method == "PATCH":
                assert headers["content-type"] == "application/merge-patch+json"
                self.patches.append((path, body))
            if found := re.fullmatch(r"/apis/apps/v1/namespaces/prod/deployments/([^/]+)/scale", path):
                return self._scale(method, found[1], body)
            if path == "/api/v1/namespaces/prod/pods":
                return 200, {
                    "items": [pod for pod in self.pods.values() if f"app={pod['metadata']['labels']['app']}" in query["labelSelector"]]
                }
            if (found := re.fullmatch(r"/api/v1/namespaces/prod/pods/([^/]+)", path)) and found[1] in self.pods:
                if method == "DELETE":
                    self._delete(found[1])
                    self._fit(self.pods[found[1]]["metadata"]["labels"]["app"])
                    return 200, self.pods[found[1]]
                self.pods[found[1]]["metadata"].setdefault("annotations", {}).update(body["metadata"]["annotations"])
                return 200, self.pods[found[1]]
            return 404, {"message": "not found"}

    def _scale(self, method: str, name: str, body: Any) -> tuple[int, Any]:
        if name not in self.replicas:
            return 404, {"message": "not found"}
        if method == "PATCH":
            self.before_patch()
            if body["metadata"]["resourceVersion"] != str(self.versions[name]):
                return 409, {"message": "the object has been modified"}
            self.versions[name] += 1
            self.replicas[name] = body["spec"]["replicas"]
            self._fit(name)
        status = {"replicas": len(self.of(name)), "selector": f"app={name}"}
        metadata = {"name": name, "resourceVersion": str(self.versions[name])}
        return 200, {"kind": "Scale", "metadata": metadata, "spec": {"replicas": self.replicas[name]}, "status": status}

    def _own(self, deployment: str, pod: dict[str, Any]) -> bool:
        return pod["metadata"]["labels"]["app"] == deployment and "deletionTimestamp" not in pod["metadata"]

    def _delete(self, name: str) -> None:
        self.pods[name]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        self.on_delete(name)

    def _fit(self, deployment: str) -> None:
        def rank(name: str) -> tuple[bool, int]:
            pod = self.pods[name]
            return pod["status"]["conditions"][0]["status"] == "True", int(pod["metadata"].get("annotations", {}).get(COST, 0))

        own = sorted(self.of(deployment), key=rank)
        for name in own[: max(len(own) - self.replicas[deployment], 0)]:
            self._delete(name)
        for _ in range(self.replicas[deployment] - len(own)):
            self._number += 1
            self.pods[f"new-{self._number}"] = self._pod(deployment, f"new-{self._number}", ready=False)


@contextmanager
def served(api: Api, certificate: tuple[Path, Path]) -> Iterator[str]:
    """Its URL, under a certificate and its key."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            length = int(self.headers["content-length"] or 0)
            status, found = api.answer(self.command, self.path, self.headers, json.loads(self.rfile.read(length)) if length else None)
            text = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_PATCH = do_DELETE = _answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    with serving(server):
        yield f"https://127.0.0.1:{server.server_port}"


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
