"""A pod as a process of this machine: in namespaces of its own, behind a root that cannot be written to, as the user and with the rights,
environment, volumes and files that the chart has rendered. Its image is this checkout and its virtual environment."""

import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from tests.chart.network import Network
from tests.chart.rendering import NAMESPACE, ROOT

Object = dict[str, Any]
_PROGRAMS = {"baton": f"{sys.prefix}/bin/baton", "/usr/local/bin/etcd": shutil.which("etcd") or "etcd", "sleep": "/usr/bin/sleep"}
_SEEN = ("/usr", sys.base_prefix, str(Path(sys.prefix).resolve()), str(ROOT))  # of this machine, read-only
_LINKS = {"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64"}
_FILES = ("passwd", "group", "nsswitch.conf", "ld.so.cache", "ld.so.conf", "localtime")


class Pod:
    """`images` says which folders of the image lie where on this machine, `shared` which volumes are the same in all pods."""

    def __init__(
        self,
        name: str,
        template: Object,
        files: Mapping[str, Mapping[str, str]],
        network: Network,
        folder: Path,
        images: Mapping[str, Path],
        shared: Mapping[str, Path],
    ) -> None:
        self.name, self.labels, self.spec = name, template["metadata"]["labels"], template["spec"]
        (self.container,) = self.spec["containers"]
        self.ready = self.ending = False
        self._network, self._images, self._shared = network, images, shared
        self._folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder))
        self.log = folder / f"{name}.log"
        self._netns, self.address = network.add()
        self.process = self._start(files)

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container["ports"]}

    def environment(self) -> dict[str, str]:
        found = {}
        cores = str(self.container["resources"]["requests"]["cpu"])
        threads = -(-int(cores.removesuffix("m")) // (1000 if cores.endswith("m") else 1))  # rounded up
        facts = {"metadata.name": self.name, "status.podIP": self.address, "requests.cpu": str(threads)}
        for entry in self.container.get("env", []):
            found[entry["name"]] = entry["value"] if "value" in entry else facts[_path(entry["valueFrom"])]
        return found

    def command(self) -> list[str]:
        """As Kubernetes puts it together: $(NAME) is filled in."""
        environment = self.environment()
        words = [*self.container.get("command", entrypoint()), *self.container.get("args", [])]
        words = [re.sub(r"\$\((\w+)\)", lambda match: environment[match[1]], word) for word in words]
        return [_PROGRAMS.get(words[0], words[0]), *words[1:]]

    def pre_stop(self) -> None:
        hook = self.container.get("lifecycle", {}).get("preStop")
        if hook:
            command = hook["exec"]["command"]
            subprocess.run([_PROGRAMS[command[0]], *command[1:]], check=True, timeout=60)

    def terminate(self) -> int:
        """As the kubelet does; the exit code. Raises TimeoutExpired when the grace is over."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(self.spec["terminationGracePeriodSeconds"])

    def run(self, *command: str) -> str:
        """In the pod's network, on its loopback too, as `kubectl port-forward` is. What it prints."""
        words = ["nsenter", f"--net=/run/netns/{self._netns}", *command]
        return subprocess.run(words, check=True, timeout=60, capture_output=True, text=True).stdout

    def processes(self) -> list[psutil.Process]:
        try:
            main = psutil.Process(self.process.pid)
            return [main, *main.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def close(self) -> None:
        everybody = self.processes()
        for process in everybody:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        self.process.wait()
        psutil.wait_procs(everybody, timeout=5)
        self._network.remove(self._netns)

    def tail(self, lines: int = 15) -> str:
        return f"--- {self.name}\n" + "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    # -- starting

    def _start(self, files: Mapping[str, Mapping[str, str]]) -> subprocess.Popen[bytes]:
        root = self._folder / "root"
        root.mkdir()
        lines = ["set -e", f"hostname {self.name}", f"mount -t tmpfs -o mode=755 tmpfs {root}", f"cd {root}", "mkdir etc proc dev sys"]
        lines += [f"ln -s {target} {link}" for link, target in _LINKS.items()]
        lines += [f"cp -r /etc/{name} etc/" for name in _FILES]
        resolver = (
            f"nameserver {self._network.host}\nsearch {NAMESPACE}.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n"
        )
        lines += [f"printf %s {shlex.quote(resolver)} > etc/resolv.conf", f"echo {self.address} {self.name} > etc/hosts"]
        lines += [f"mount --rbind /{name} {name}" for name in ("proc", "dev", "sys")]
        for inside, outside in [*((path, Path(path)) for path in _SEEN), *self._images.items()]:
            lines += _bind(outside, inside, read_only=True)
        for mount in self.container["volumeMounts"]:
            lines += _bind(self._volume(mount["name"], files), mount["mountPath"], read_only=mount.get("readOnly", False))
        pod, container = self.spec["securityContext"], self.container["securityContext"]
        assert container["readOnlyRootFilesystem"]
        assert container["capabilities"] == {"drop": ["ALL"]}
        lines.append(f"mount -o remount,ro {root}")
        rights = f"--reuid={pod['runAsUser']} --regid={pod['runAsGroup']} --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all"
        environment = {
            "PATH": f"{sys.prefix}/bin:/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        environment |= {"PYTHONUNBUFFERED": "1", **self.environment()}
        words = [f"{key}={value}" for key, value in environment.items()]
        lines.append(f"exec chroot . env -i {shlex.join(words)} setpriv {rights} -- {shlex.join(self.command())}")
        script = self._folder / "start.sh"
        script.write_text("\n".join(lines) + "\n")
        with self.log.open("ab") as log:
            return subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{self._netns}", "unshare", "--mount", "--uts", "--ipc", "sh", str(script)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def _volume(self, name: str, files: Mapping[str, Mapping[str, str]]) -> Path:
        if name in self._shared:
            return self._shared[name]
        found = [volume for volume in self.spec["volumes"] if volume["name"] == name]
        folder = self._folder / name if found else self._folder.parent / f"claim-{self.name}-{name}"
        folder.mkdir(exist_ok=not found)  # a claim of a StatefulSet outlives its pod
        folder.chmod(0o777)
        for volume in found:
            assert {"configMap", "secret", "emptyDir"} & volume.keys(), volume
            source = volume.get("configMap", {}).get("name") or volume.get("secret", {}).get("secretName")
            for file, text in files[source].items() if source else ():
                (folder / file).write_text(text)
        return folder


def entrypoint() -> list[str]:
    """Of the images, without tini, which this machine need not have: here nobody is process 1."""
    files = [path.read_text() for path in (ROOT / "deploy/images").glob("*.Dockerfile")]
    (line,) = {match[1] for text in files for match in re.finditer(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)}
    words = [word.strip(' "') for word in line.strip("[]").split(",")]
    assert words[:2] == ["tini", "--"]
    return words[2:]


def _path(source: Object) -> str:
    return source["fieldRef"]["fieldPath"] if "fieldRef" in source else source["resourceFieldRef"]["resource"]


def _bind(outside: Path, inside: str, *, read_only: bool) -> list[str]:
    lines = [f"mkdir -p .{inside}", f"mount --bind {outside} .{inside}"]
    return [*lines, f"mount -o remount,ro,bind .{inside}"] if read_only else lines
