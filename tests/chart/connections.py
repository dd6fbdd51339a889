"""Who is connected to whom, and whether the rendered policies let that through."""

import socket
import struct
from pathlib import Path
from typing import Any

from tests.chart.kubernetes import Kubernetes
from tests.chart.pods import Pod

_ESTABLISHED, _LISTEN = "01", "0A"
Object = dict[str, Any]


def listeners(pod: Pod) -> set[tuple[str, int]]:
    return {local for local, _, state in _table(pod) if state == _LISTEN}


def connections(cluster: Kubernetes) -> set[tuple[str, str, int]]:
    """Client, server, port of the server; pods by their names."""
    pods = {pod.address: pod for pod in cluster.everybody()}
    found = set()
    for pod in pods.values():
        listening = {port for _, port in listeners(pod)}
        for (_, port), (peer, _), state in _table(pod):
            if state == _ESTABLISHED and port in listening and peer in pods and peer != pod.address:
                found.add((pods[peer].name, pod.name, port))
    return found


def forbidden(cluster: Kubernetes) -> set[tuple[str, str, int]]:
    pods = {pod.name: pod for pod in cluster.everybody()}
    policies = [thing["spec"] for thing in cluster.objects if thing["kind"] == "NetworkPolicy"]
    return {
        (client, server, port) for client, server, port in connections(cluster) if not _allowed(pods[client], pods[server], port, policies)
    }


def _allowed(client: Pod, server: Pod, port: int, policies: list[Object]) -> bool:
    mine = [policy for policy in policies if _selects(policy["podSelector"], server)]
    assert mine, f"no policy selects {server.name}"
    for rule in (rule for policy in mine for rule in policy["ingress"]):
        ports = {server.ports[each["port"]] for each in rule.get("ports", [])}
        if ports and port not in ports:
            continue
        if "from" not in rule or any(_selects(peer["podSelector"], client) for peer in rule["from"] if "podSelector" in peer):
            return True
    return False


def _selects(selector: Object, pod: Pod) -> bool:
    fits = selector.get("matchLabels", {}).items() <= pod.labels.items()
    return fits and all(pod.labels.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", []))


def _table(pod: Pod) -> list[tuple[tuple[str, int], tuple[str, int], str]]:
    lines = Path(f"/proc/{pod.process.pid}/net/tcp").read_text().splitlines()[1:]
    return [(_address(fields[1]), _address(fields[2]), fields[3]) for fields in map(str.split, lines)]


def _address(text: str) -> tuple[str, int]:
    address, port = text.split(":")
    return socket.inet_ntoa(struct.pack("<I", int(address, 16))), int(port, 16)
