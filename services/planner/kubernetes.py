"""Kubernetes: the few calls that the planner makes to its API: a Deployment's scale, its pods, and what a pod costs to delete.

The token is read for each call, since the kubelet replaces it. Every change of scale names the version that it was decided on: if somebody
else was faster, it is refused (409) and the next round looks again.
"""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from baton.errors import ConfigError, Unavailable

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
COST = "controller.kubernetes.io/pod-deletion-cost"  # of a ReplicaSet's pods, the cheapest goes first
FIRST_TO_GO = "-1000"
_MERGE = "application/merge-patch+json"
_REFUSED = {
    401: "the token is not accepted: is the ServiceAccount's token mounted?",
    403: "the planner's ServiceAccount may not do that: install the chart's Role (planner.enabled)",
    404: "there is no such thing: give --namespace, --prefill-deployment and --decode-deployment as `kubectl get deployments` shows them",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    replicas: int
    selector: str
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    name: str
    ready: bool
    template: str  # changes with a rollout
    cost: str = ""


class Kubernetes:
    def __init__(self, url: str, namespace: str, *, token: Path, authority: Path | None) -> None:
        """`authority`: PEM file that the server's certificate is checked with; None: the system's. Raises ConfigError."""
        self._token, self._namespace = token, namespace
        try:
            verify = ssl.create_default_context(cafile=None if authority is None else str(authority))
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"{authority} holds no certificates ({error}): outside of a cluster, give --kubernetes-ca") from error
        self._http = httpx.AsyncClient(base_url=url, timeout=10.0, verify=verify)

    async def close(self) -> None:
        await self._http.aclose()

    async def scale(self, deployment: str) -> Scale:
        found = await self._call("GET", f"/apis/apps/v1/namespaces/{self._namespace}/deployments/{deployment}/scale")
        return Scale(
            replicas=found["spec"].get("replicas", 0),
            selector=found["status"].get("selector", ""),
            version=found["metadata"]["resourceVersion"],
        )

    async def set_scale(self, deployment: str, replicas: int, version: str) -> None:
        body = {"metadata": {"resourceVersion": version}, "spec": {"replicas": replicas}}
        await self._call("PATCH", f"/apis/apps/v1/namespaces/{self._namespace}/deployments/{deployment}/scale", body)

    async def pods(self, selector: str) -> list[Pod]:
        """Without those that are being deleted, or have ended: they are no replicas any more."""
        found = await self._call("GET", f"/api/v1/namespaces/{self._namespace}/pods", selector=selector)
        return [
            Pod(
                name=pod["metadata"]["name"],
                ready=any(each["type"] == "Ready" and each["status"] == "True" for each in pod["status"].get("conditions", ())),
                template=pod["metadata"].get("labels", {}).get("pod-template-hash", ""),
                cost=pod["metadata"].get("annotations", {}).get(COST, ""),
            )
            for pod in found["items"]
            if "deletionTimestamp" not in pod["metadata"] and pod["status"].get("phase") not in ("Succeeded", "Failed")
        ]

    async def first_to_go(self, pod: str) -> None:
        body = {"metadata": {"annotations": {COST: FIRST_TO_GO}}}
        await self._call("PATCH", f"/api/v1/namespaces/{self._namespace}/pods/{pod}", body)

    async def delete(self, pod: str) -> None:
        """Its Deployment starts another in its place."""
        await self._call("DELETE", f"/api/v1/namespaces/{self._namespace}/pods/{pod}")

    async def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None, *, selector: str = "") -> dict[str, Any]:
        """Raises ConfigError where a person must do something, Unavailable where another try may help."""
        try:
            headers = {"authorization": f"Bearer {self._token.read_text().strip()}"}
        except OSError as error:
            raise ConfigError(f"cannot read {self._token} ({error.strerror}): outside of a cluster, give --kubernetes-token") from error
        if body is not None:
            headers["content-type"] = _MERGE
        params = {"labelSelector": selector} if selector else None
        try:
            answer = await self._http.request(method, path, json=body, headers=headers, params=params)
            if answer.status_code < 300:
                return answer.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise Unavailable(f"the Kubernetes API does not answer {method} {path}: {error or type(error).__name__}") from error
        said = f"the Kubernetes API answers {answer.status_code} to {method} {path}"
        if answer.status_code in _REFUSED:
            raise ConfigError(f"{said}: {_REFUSED[answer.status_code]}")
        raise Unavailable(f"{said}: {answer.text[:300]}")
