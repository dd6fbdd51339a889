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


def forbidden(cluster: Kubernetes, *, without_mooncake: bool = False) -> set[tuple[str, str, int]]:
    """Connections that the policies do not let through; or would not, if they closed Mooncake's ports to its peers too."""
    pods = {pod.name: pod for pod in cluster.everybody()}
    policies = [thing["spec"] for thing in cluster.objects if thing["kind"] == "NetworkPolicy"]
    if without_mooncake:
        policies = [{**policy, "ingress": [rule for rule in policy["ingress"] if "ports" in rule]} for policy in policies]
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
    """Local and remote end, and state, of each socket in the pod's namespace."""
    texts = [Path(f"/proc/{pod.process.pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    rows = [line.split() for text in texts for line in text.splitlines()[1:]]
    return [(_address(row[1]), _address(row[2]), row[3]) for row in rows]


def _address(text: str) -> tuple[str, int]:
    """An IPv4 address in the form of IPv6 is told as what it is; so is "every interface"."""
    address, _, port = text.partition(":")
    words = struct.pack(f"<{len(address) // 8}I", *(int(address[i : i + 8], 16) for i in range(0, len(address), 8)))
    return socket.inet_ntoa(words[-4:]), int(port, 16)
