"""mTLS between services: who is let in, what a renewal does, and who may listen without."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from baton.cluster.machine import is_loopback
from baton.config import ClusterConfig, KVStoreConfig, PoolConfig, SecurityConfig, ServerConfig, WorkerConfig, load_config, pool_master
from baton.errors import ConfigError
from baton.hosting.members import make_membership
from baton.hosting.process import certificates_of, check_exposure
from baton.rpc.certificates import Certificates
from baton.rpc.channel import Channels, client_options, server_options
from tests.certificates import Authority, settings

LEASE_S = 2.0
ASK = health_pb2.HealthCheckRequest()


def of(folder: Path) -> Certificates:
    found = certificates_of(load_config(WorkerConfig, None, settings(folder), {}).security)
    assert found is not None
    return found


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@asynccontextmanager
async def serving(credentials: grpc.ServerCredentials) -> AsyncIterator[str]:
    server: Any = cast(Any, grpc.aio).server(options=server_options(LEASE_S))
    health_pb2_grpc.add_HealthServicer_to_server(cast(Any, health).aio.HealthServicer(), server)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def asked(channel: grpc.aio.Channel) -> bool:
    """Whether an answer came."""
    try:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        return (await stub.Check(ASK, timeout=5)).status == health_pb2.HealthCheckResponse.SERVING
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            raise
        return False


async def shown(address: str, folder: Path) -> str:
    """The server's certificate, as `openssl s_client` sees it, which has the one in `folder`."""
    files = ["-cert", str(folder / "tls.crt"), "-key", str(folder / "tls.key"), "-CAfile", str(folder / "ca.crt")]
    client = await asyncio.create_subprocess_exec(
        "openssl", "s_client", "-connect", address, *files, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    text = (await client.communicate())[0].decode()
    return text[text.index("-----BEGIN") : text.index("-----END")]


async def test_who_has_a_certificate_of_the_authority_is_let_in_and_nobody_else(authority: Authority, tmp_path: Path) -> None:
    ours, theirs = authority.sign(tmp_path / "ours"), authority.sign(tmp_path / "theirs")
    (tmp_path / "strange").mkdir()
    stranger = Authority(tmp_path / "strange").sign(tmp_path / "stranger")
    (stranger / "ca.crt").write_bytes((ours / "ca.crt").read_bytes())  # it believes the server, which shall not believe it
    async with serving(of(ours).server()) as address:
        for certificates, welcome in ((of(theirs), True), (of(stranger), False), (None, False)):
            channels = Channels(LEASE_S, certificates)
            assert await asked(channels.get(address)) is welcome
            assert await asked(channels.narrow(address)) is welcome
            await channels.close()
        nothing_of_mine = grpc.ssl_channel_credentials((ours / "ca.crt").read_bytes())
        options = (*client_options(LEASE_S), ("grpc.ssl_target_name_override", "baton.internal"))
        async with grpc.aio.secure_channel(address, nothing_of_mine, options=options) as channel:
            assert not await asked(channel)
    async with (
        serving(of(ours).server(demand=False)) as address,
        grpc.aio.secure_channel(address, nothing_of_mine, options=options) as client,
    ):
        assert await asked(client)


async def test_a_server_is_believed_by_its_authority_and_its_name(authority: Authority, tmp_path: Path) -> None:
    ours = authority.sign(tmp_path / "ours")
    (tmp_path / "strange").mkdir()
    stranger = Authority(tmp_path / "strange").sign(tmp_path / "stranger")
    (stranger / "ca.crt").write_bytes((ours / "ca.crt").read_bytes())
    for folder in (stranger, authority.sign(tmp_path / "another", ["www.example.com"])):
        async with serving(of(folder).server()) as address:
            channels = Channels(LEASE_S, of(ours))
            assert not await asked(channels.get(address))
            await channels.close()


async def test_renewed_files_are_used_by_new_connections_and_old_ones_stay(authority: Authority, tmp_path: Path) -> None:
    server, client = authority.sign(tmp_path / "server"), authority.sign(tmp_path / "client")
    channels = Channels(LEASE_S, of(client))
    async with serving(of(server).server()) as address:
        stub: Any = health_pb2_grpc.HealthStub(channels.get(address))
        stream = stub.Watch(ASK)
        await stream.read()
        first, before = channels.get(address), await shown(address, client)
        assert before.strip() in (server / "tls.crt").read_text()
        for folder in (server, client):
            authority.sign(folder)
        assert channels.get(address) is not first
        assert channels.get(address) is channels.get(address)
        assert await asked(channels.get(address))
        after = await shown(address, client)
        assert after != before
        assert after.strip() in (server / "tls.crt").read_text()
        (server / "tls.key").write_text("half of it")
        assert await shown(address, client) == after
        assert not stream.done(), "what was there before the renewal goes on"
        await channels.close()


def test_what_is_renewed_while_it_is_read_is_read_again(authority: Authority, tmp_path: Path) -> None:
    folder = authority.sign(tmp_path / "one")

    class Renewed(Certificates):
        def _read(self) -> Any:
            found, times[0] = super()._read(), times[0] + 1
            if times[0] == 1:
                authority.sign(folder)
            return found

    times = [0]
    certificates = Renewed(str(folder / "tls.crt"), str(folder / "tls.key"), str(folder / "ca.crt"))
    assert certificates._now().cert == (folder / "tls.crt").read_bytes()
    assert certificates._now() is certificates._now()
    assert times == [2]


def test_a_file_that_is_missing_is_told_once(authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = authority.sign(tmp_path / "one")
    certificates = of(folder)
    before = certificates.channel()
    (folder / "tls.key").rename(folder / "away")
    assert [certificates.channel() is before for _ in range(3)] == [True] * 3
    assert caplog.text.count("there is no file") == 1
    (folder / "away").rename(folder / "tls.key")
    assert certificates.channel() is not before


def test_files_that_cannot_be_used(authority: Authority, tmp_path: Path) -> None:
    one, other = authority.sign(tmp_path / "one"), authority.sign(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"security\.key: there is no file"):
        Certificates(str(one / "tls.crt"), str(one / "none"), str(one / "ca.crt"))
    with pytest.raises(ConfigError, match="are not a certificate and its unencrypted key"):
        Certificates(str(one / "tls.crt"), str(other / "tls.key"), str(one / "ca.crt"))
    with pytest.raises(ConfigError, match="has no certificate"):
        Certificates(str(one / "tls.crt"), str(one / "tls.key"), str(one / "tls.key"))


async def test_what_etcd_is_to_be_shown_is_looked_at_before(authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, other, password = authority.sign(tmp_path / "one"), authority.sign(tmp_path / "other"), tmp_path / "password"
    good = {"authority": str(one / "ca.crt"), "cert": str(one / "tls.crt"), "key": str(one / "tls.key")}
    for wrong, said in (
        ({"authority": str(one / "tls.key")}, r"etcd_access\.authority: .* has no certificate"),
        ({"key": str(other / "tls.key")}, "are not a certificate and its unencrypted key"),
        ({"user": "u", "password_file": str(password)}, "not text, in UTF-8"),
    ):
        password.write_bytes(b"\xff")
        with pytest.raises(ConfigError, match=said):
            make_membership(ClusterConfig.model_validate({"etcd": "https://a:1", "etcd_access": {**good, **wrong}}))
    password.write_text("p")
    access = {"user": "u", "password_file": str(password)}
    make_membership(ClusterConfig.model_validate({"etcd": "https://a:1", "etcd_access": {**good, **access}}))
    assert not caplog.text
    make_membership(ClusterConfig.model_validate({"etcd": "http://a:1", "etcd_access": access}))
    assert "goes to http://a:1 unencrypted" in caplog.text


def test_without_certificates_a_service_is_for_its_machine_alone(caplog: pytest.LogCaptureFixture) -> None:
    check_exposure(ServerConfig(), SecurityConfig())
    check_exposure(ServerConfig(host="0.0.0.0"), SecurityConfig(cert="a", key="b", authority="c"))
    assert not caplog.text
    for host in ("0.0.0.0", "10.1.2.3", "::", "no-such-name.invalid"):
        with pytest.raises(ConfigError, match=r"security\.insecure=true, where a firewall"):
            check_exposure(ServerConfig(host=host), SecurityConfig())
    check_exposure(ServerConfig(host="10.1.2.3"), SecurityConfig(insecure=True))
    assert "neither encrypted nor authenticated" in caplog.text
    assert [is_loopback(host) for host in ("127.0.0.1", "127.8.9.1", "localhost", "::1", "[::1]")] == [True] * 5


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("security.cert=a", "give security.cert, security.key and security.authority"),
        ("security={cert: a, key: b, authority: c, insecure: true}", "for services without certificates"),
        ("cluster.etcd=https://a:1", "give cluster.etcd_access.authority"),
        ("cluster={etcd: 'http://a:1', etcd_access: {authority: a}}", "not at https"),
        ("cluster={etcd: 'http://a:1', etcd_access: {user: a}}", "give cluster.etcd_access.user and password_file"),
    ],
)
def test_what_does_not_fit_together_is_refused(wrong: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(KVStoreConfig, None, [wrong], {})


def test_mooncakes_masters_cannot_use_an_etcd_that_asks_who_they_are() -> None:
    for access in ({"etcd": "https://a:1", "etcd_access": {"authority": "a"}}, {"etcd_access": {"user": "a", "password_file": "b"}}):
        cluster = ClusterConfig.model_validate({"etcd": "http://a:1", **access})
        with pytest.raises(ConfigError, match="without TLS and without a password"):
            pool_master(PoolConfig(master="etcd"), cluster)
    assert pool_master(PoolConfig(master="a:1"), cluster) == "a:1"
