"""Who can speak to whom (docs/security.md): a cluster whose services and etcd ask for certificates and a password; what listens where."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import aetcd.rpc as etcd_rpc
import grpc
import grpc.aio
import httpx
import psutil
import pytest

from baton.cluster.etcd import EtcdMembership
from baton.config import EtcdAccessConfig
from baton.errors import ConfigError, Unavailable
from baton.rpc.channel import Channels
from baton.rpc.v1 import common_pb2, router_pb2, router_pb2_grpc
from services.planner.scaling import Drains
from tests.certificates import Authority, settings
from tests.cluster import RunningCluster, running_cluster, until
from tests.e2e.test_kvstore import free_port
from tests.e2e.test_membership import Etcd, member
from tests.e2e.test_up import baton
from tests.unit.test_certificates import asked, of

NAME = (("grpc.ssl_target_name_override", "baton.internal"),)
MOONCAKES = range(12_000, 17_001)  # the ports that it draws, on every interface (docs/security.md)
PASSWORD = "correct horse"
PATIENT_S = 20.0  # a lease: who joins has half of it, to agree on keys and to have its password hashed
OTHERS = {"router", "kvstore-0", "kvstore-master"}


@dataclass(frozen=True)
class Guarded:
    """An etcd that asks for a certificate and a password; `folder` has ours, and `password` the user's."""

    etcd: Etcd
    authority: Authority
    folder: Path
    password: Path

    def access(self, **other: str) -> EtcdAccessConfig:
        files = {"authority": "ca.crt", "cert": "tls.crt", "key": "tls.key"}
        mine = {setting: str(self.folder / file) for setting, file in files.items()}
        return EtcdAccessConfig(**{**mine, "name": "baton.internal", "user": "baton", "password_file": str(self.password), **other})


async def close_to_strangers(etcd: Etcd, folder: Path) -> None:
    """But for root, and a user who may see and change what belongs to clusters whose names are before "u"."""
    files = [(folder / name).read_bytes() for name in ("ca.crt", "tls.key", "tls.crt")]
    address = etcd.url.removeprefix("https://")
    async with grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(*files), options=NAME) as channel:
        auth: Any = etcd_rpc.AuthStub(channel)
        for user, role in (("root", "root"), ("baton", "members")):
            await auth.UserAdd(etcd_rpc.AuthUserAddRequest(name=user, password=PASSWORD))
            await auth.RoleAdd(etcd_rpc.AuthRoleAddRequest(name=role))
            await auth.UserGrantRole(etcd_rpc.AuthUserGrantRoleRequest(user=user, role=role))
        rights = etcd_rpc.Permission(permType=etcd_rpc.Permission.READWRITE, key=b"/baton/", range_end=b"/baton/u")
        await auth.RoleGrantPermission(etcd_rpc.AuthRoleGrantPermissionRequest(name="members", perm=rights))
        await auth.AuthEnable(etcd_rpc.AuthEnableRequest())


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    authority = Authority(folder)
    ours = authority.sign(folder / "ours")
    password = folder / "password"
    password.write_text(PASSWORD + "\n")
    etcd = Etcd(folder / "etcd", ours)
    try:
        asyncio.run(close_to_strangers(etcd, ours))
        yield Guarded(etcd, authority, ours, password)
    finally:
        etcd.kill()


@pytest.fixture(scope="module")
def locked(guarded: Guarded, tiny_model: Path) -> Iterator[RunningCluster]:
    access = guarded.access().model_dump(exclude_defaults=True)
    told = [*settings(guarded.folder), *(f"cluster.etcd_access.{key}={value}" for key, value in access.items())]
    options = [part for setting in told for part in ("--set", f"all.{setting}")]
    with running_cluster(model=tiny_model, prefill=1, decode=1, kvstore=1, etcd=guarded.etcd.url, options=options) as cluster:
        until(lambda: {other["id"] for other in cluster.status()["others"]} >= OTHERS)  # `baton up` waits for the workers alone
        yield cluster


def test_a_request_goes_the_whole_way_with_mtls(locked: RunningCluster) -> None:
    prompt = {"prompt": list(range(20, 60)) * 6, "max_tokens": 8, "ignore_eos": True}
    answer = httpx.post(f"{locked.url}/v1/completions", json=prompt, timeout=60).raise_for_status()
    assert answer.json()["usage"]["completion_tokens"] == 8
    assert "prefill=prefill-0" in answer.headers["x-baton-route"]
    assert {other["id"] for other in locked.status()["others"]} == OTHERS


async def test_nobody_is_let_in_without_a_certificate_of_the_authority(locked: RunningCluster, guarded: Guarded, tmp_path: Path) -> None:
    stranger = Authority(tmp_path).sign(tmp_path / "stranger")
    (stranger / "ca.crt").write_bytes(guarded.authority.cert.read_bytes())
    status = locked.status()
    addresses = [each["address"] for each in [*status["workers"], *status["others"]] if each["id"] != "router"]
    assert len(addresses) == 4
    for certificates, welcome in ((of(guarded.folder), True), (of(stranger), False), (None, False)):
        channels = Channels(PATIENT_S, certificates)
        assert [await asked(channels.get(address)) for address in addresses] == [welcome] * 4
        await channels.close()


async def test_clients_of_the_router_need_none_and_see_whom_they_ask(locked: RunningCluster, guarded: Guarded) -> None:
    trust = grpc.ssl_channel_credentials(guarded.authority.cert.read_bytes())
    async with grpc.aio.secure_channel(locked.grpc, trust, options=NAME) as channel:
        request = router_pb2.RouterGenerateRequest(text="hello", sampling=common_pb2.SamplingParams(max_tokens=4, temperature=0))
        answers = [answer async for answer in router_pb2_grpc.RouterStub(channel).Generate(request)]
        assert answers[-1].usage.completion_tokens > 0
    async with grpc.aio.insecure_channel(locked.grpc) as channel:
        assert not await asked(channel)


def test_the_kubelet_asks_without_a_certificate(locked: RunningCluster) -> None:
    status = locked.status()
    for each in [*status["workers"], *status["others"]]:
        assert [httpx.get(f"http://{each['metrics']}/{path}").status_code for path in ("health", "ready")] == [200, 200]
        assert "baton" in httpx.get(f"http://{each['metrics']}/metrics").text


def test_all_of_a_machine_listens_on_its_loopback_but_mooncake(cluster: RunningCluster) -> None:
    """With the pool on, and the direct push."""
    mine = [psutil.Process(cluster.process.pid), *psutil.Process(cluster.process.pid).children(recursive=True)]
    found = {(process.name(), *each.laddr) for process in mine for each in process.net_connections("inet") if each.status == "LISTEN"}
    open_to_all = {(name, port) for name, address, port in found if not ip_address(address.removeprefix("::ffff:")).is_loopback}
    assert len(found - open_to_all) >= 14, "etcd's two, Mooncake's master's two, the router's three, two of each other process"
    assert {port for _, port in open_to_all} <= set(MOONCAKES)
    assert open_to_all, "Mooncake binds its own otherwise by now: say so in docs/security.md"


def test_who_would_be_open_to_all_does_not_start(tiny_model: Path) -> None:
    ran = baton("serve", "router", f"model={tiny_model}", "server.host=0.0.0.0")
    assert ran.returncode == 2
    assert "is reached from other machines" in ran.stderr
    assert "security.insecure=true" in ran.stderr


async def test_etcd_says_whom_it_refuses(guarded: Guarded, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("battery staple")
    for access, said in (
        (guarded.access(password_file=str(wrong)), "refuses user baton: .*authentication failed.*password_file"),
        (guarded.access(user="", password_file=""), "refuses who gives no user: .*permission denied"),  # it goes by the certificate
    ):
        membership = EtcdMembership(guarded.etcd.url, "test", lease_s=PATIENT_S, access=access)
        with pytest.raises(ConfigError, match=said):
            await membership.join(member("w1"))
        await membership.close()
    elsewhere = EtcdMembership(guarded.etcd.url, "zoo", lease_s=PATIENT_S, access=guarded.access())
    with pytest.raises(ConfigError, match=r"refuses user baton: .*permission denied"):
        await elsewhere.join(member("w1"))
    await elsewhere.close()
    with pytest.raises(ConfigError, match=r"cluster\.etcd_access\.password_file: .* cannot be read"):
        EtcdMembership(guarded.etcd.url, "test", lease_s=PATIENT_S, access=guarded.access(password_file=str(tmp_path / "none")))


def test_a_service_with_a_wrong_password_ends_and_says_so(guarded: Guarded, tiny_model: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("battery staple")
    access = guarded.access(password_file=str(wrong)).model_dump(exclude_defaults=True)
    told = [f"cluster.etcd={guarded.etcd.url}", *(f"cluster.etcd_access.{key}={value}" for key, value in access.items())]
    ran = baton("serve", "router", f"model={tiny_model}", f"http_port={free_port()}", *told)
    assert ran.returncode == 2
    assert "refuses user baton" in ran.stderr


async def test_the_planner_shows_a_certificate_too(locked: RunningCluster, guarded: Guarded) -> None:
    """The last, since the worker drains from now on."""
    (decode,) = [worker for worker in locked.workers() if worker["id"] == "decode-0"]
    for certificates in (None, of(guarded.folder)):
        drains = Drains(certificates)
        if certificates is None:
            with pytest.raises(Unavailable, match="cannot be told to drain"):
                await drains(decode)
        else:
            assert await drains(decode) == 0
        await drains.close()
