# pyright: basic
"""EtcdMembership: members as keys under a lease. The only importer of aetcd.

    /baton/{cluster}/members/{id} → JSON of Member, under a lease of `lease_s` that is kept alive three times as often

Watching is: list, then watch from the next revision; when the watch breaks, the same again. A watch that is silent for a lease is compared
with a new list, since one that died quietly looks the same. While etcd is away the last view stays in force; and since its leases may have
run out meanwhile, members missing after an outage have one lease to come back before they are dropped.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlparse

import aetcd
import aetcd.exceptions
import grpc
import grpc.aio

from baton.cluster.membership import View
from baton.config import EtcdAccessConfig
from baton.errors import ConfigError, MembershipError
from baton.types import Member, MemberState, Role

logger = logging.getLogger(__name__)
T = TypeVar("T")
_RETRY_S = 0.5
_FAILURES = (aetcd.exceptions.ClientError, grpc.RpcError, grpc.aio.UsageError, TimeoutError, OSError)
_REFUSALS = ("authentication failed", "user name is empty", "authentication is not enabled", "permission denied")  # etcd's own words


class EtcdMembership:
    def __init__(self, url: str, cluster: str, *, lease_s: float, access: EtcdAccessConfig | None = None) -> None:
        """`url` is http://host:port[,host:port…], or https://…; a connection that fails is followed by one to the next of them. Raises
        ConfigError if it is not so, or a file of `access` is not there. Connects when first used."""
        self._url, self._access = url, access or EtcdAccessConfig()
        self._endpoints = itertools.cycle(_parse(url))
        _shown(url, self._access)
        if self._access.user and not url.startswith("https://"):
            logger.warning("the password of cluster.etcd_access.user goes to %s unencrypted: whoever sees it pass has it", url)
        self._prefix = f"/baton/{cluster}/members/"
        self._lease_s = lease_s
        self._member: Member | None = None
        self._changed = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._client: aetcd.Client | None = None

    async def join(self, member: Member) -> None:
        self._member = member
        if self._keeper is None:
            try:
                lease = await self._announce()
            except _FAILURES as error:
                await self._reset()
                if any(words in str(error) for words in _REFUSALS):
                    who = f"user {self._access.user}" if self._access.user else "who gives no user"
                    raise ConfigError(
                        f"etcd at {self._url} refuses {who}: {error}; see cluster.etcd_access.user and password_file"
                    ) from error
                raise MembershipError(f"etcd at {self._url} cannot be reached: {error!r}") from error
            self._keeper = asyncio.create_task(self._keep(lease), name="etcd-lease")
        else:
            self._changed.set()

    async def leave(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
            self._keeper = None
        if self._member is not None and self._client is not None:
            with contextlib.suppress(*_FAILURES):
                await self._bounded(self._client.delete(self._key(self._member)))
        self._member = None

    async def watch(self) -> AsyncIterator[View]:
        view: dict[str, Member] = {}
        first, broken = True, False
        while True:
            try:
                client = self._new_client()
                try:
                    async for followed in self._follow(client, view, grace=not first):
                        if broken:
                            logger.info("etcd answers again")
                        first, broken, view = False, False, followed
                        yield dict(view)
                finally:
                    with contextlib.suppress(*_FAILURES, asyncio.TimeoutError):
                        await asyncio.wait_for(client.close(), 1.0)
            except Exception as error:
                if not isinstance(error, _FAILURES):
                    logger.exception("watching etcd failed in a way that is not known here")
                elif not broken:
                    logger.warning("etcd cannot be watched (%r); the last view of the cluster stays in force", error)
                broken = True
            if first:  # nothing is known yet; say so, so that nobody waits for the first view
                first = False
                yield {}
            await asyncio.sleep(_RETRY_S)

    async def close(self) -> None:
        await self.leave()
        if self._client is not None:
            client, self._client = self._client, None
            with contextlib.suppress(*_FAILURES):
                await asyncio.wait_for(client.close(), 1.0)

    # -- announcing

    async def _announce(self) -> "aetcd.Lease":
        assert self._member is not None
        if self._client is None:
            self._client = self._new_client()
        lease = await self._bounded(self._client.lease(max(int(self._lease_s + 0.5), 1)))
        await self._bounded(self._client.put(self._key(self._member), _encode(self._member), lease=lease))
        return lease

    async def _keep(self, lease: "aetcd.Lease | None") -> None:
        """Refreshes the lease; grants a new one whenever that fails or finds it gone: at once, since the old one still holds for half of
        its time then."""
        wait = self._lease_s / 3
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            wait = self._lease_s / 3
            changed = self._changed.is_set()
            self._changed.clear()
            try:
                if lease is None or changed:
                    old, lease = lease, await self._announce()
                    if old is not None:
                        await self._bounded(old.revoke())
                elif (await self._bounded(lease.refresh(), self._lease_s / 6)).TTL <= 0:
                    lease = None
                    self._changed.set()
            except Exception as error:
                if not isinstance(error, _FAILURES):
                    logger.exception("etcd failed in a way that is not known here")
                elif lease is not None:
                    logger.warning("etcd does not answer (%r); serving on, and joining again when it does", error)
                wait = 0.0 if lease is not None else _RETRY_S
                lease = None
                await self._reset()

    async def _reset(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(client.close(), 1.0)

    # -- watching

    async def _follow(self, client: aetcd.Client, last: dict[str, Member], *, grace: bool) -> AsyncIterator[dict[str, Member]]:
        """Views until the watch breaks. With `grace`, members of the last view have one lease to come back."""
        listed, revision = await self._list(client)
        absent = {name: member for name, member in last.items() if name not in listed} if grace else {}
        deadline = time.monotonic() + self._lease_s + 1.0
        yield {**absent, **listed}
        watch = await self._bounded(client.watch_prefix(self._prefix.encode(), start_revision=revision + 1))
        events = aiter(watch)
        pending: asyncio.Future[Any] | None = None
        try:
            while True:
                pending = pending or asyncio.ensure_future(anext(events))
                wait = max(deadline - time.monotonic(), 0) if absent else self._lease_s
                done, _ = await asyncio.wait([pending], timeout=wait)
                if not done:
                    if absent and time.monotonic() >= deadline:
                        absent = {}
                        yield dict(listed)
                    elif (await self._list(client))[0] != listed:  # the watch has missed something
                        return
                    continue
                try:
                    event = pending.result()
                except StopAsyncIteration:
                    return
                pending = None
                name = event.kv.key.decode().removeprefix(self._prefix)
                member = None if event.kind == "DELETE" else _decode(event.kv.value)
                if member is None:
                    listed.pop(name, None)
                else:
                    listed[name] = member
                absent.pop(name, None)
                yield {**absent, **listed}
        finally:
            if pending is not None:
                pending.cancel()
                with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration, *_FAILURES):
                    await pending

    async def _list(self, client: aetcd.Client) -> tuple[dict[str, Member], int]:
        """The members there are, and as of which revision."""
        result = await self._bounded(client.get_prefix(self._prefix.encode()))
        return {member.id: member for item in result if (member := _decode(item.value)) is not None}, result.header.revision

    # -- the client

    def _new_client(self) -> aetcd.Client:
        host, port = next(self._endpoints)
        credentials, password = _shown(self._url, self._access)
        who = {"username": self._access.user, "password": password} if self._access.user else {}
        options: dict[str, Any] = {"host": host, "port": port, "timeout": int(self._lease_s) or 1, **who}
        if credentials is None:
            return aetcd.Client(**options)
        return _SecureClient(credentials, self._access.name or host.strip("[]"), **options)

    async def _bounded(self, call: Coroutine[Any, Any, T], limit_s: float | None = None) -> T:
        async with asyncio.timeout(limit_s or self._lease_s / 2):
            return await call

    def _key(self, member: Member) -> bytes:
        return (self._prefix + member.id).encode()


class _SecureClient(aetcd.Client):
    """aetcd makes a channel without TLS, and knows no other: what it makes is not used, and connects to nobody."""

    def __init__(self, credentials: grpc.ChannelCredentials, name: str, **options: Any) -> None:
        """`name`: in the certificate of etcd."""
        self._credentials, self._name = credentials, name
        super().__init__(**options)

    @property
    def channel(self) -> grpc.aio.Channel | None:
        return self._channel

    @channel.setter
    def channel(self, made: grpc.aio.Channel | None) -> None:
        name = (("grpc.ssl_target_name_override", self._name),)
        self._channel = made and grpc.aio.secure_channel(f"{self._host}:{self._port}", self._credentials, options=name)


def _shown(url: str, access: EtcdAccessConfig) -> tuple[grpc.ChannelCredentials | None, str]:
    """Certificates and password, as the files of `access` have them now: for each connection anew, so that they may be renewed. Raises
    ConfigError."""

    def read(setting: str) -> bytes | None:
        path = getattr(access, setting)
        try:
            return Path(path).read_bytes() if path else None
        except OSError as error:
            raise ConfigError(f"cluster.etcd_access.{setting}: {path} cannot be read: {error.strerror}") from error

    try:
        password = (read("password_file") or b"").decode().partition("\n")[0].rstrip("\r")
    except UnicodeDecodeError as error:
        raise ConfigError(f"cluster.etcd_access.password_file: {access.password_file} is not text, in UTF-8") from error
    if not url.startswith("https://"):
        return None, password
    return grpc.ssl_channel_credentials(read("authority"), read("key"), read("cert")), password


def _parse(url: str) -> list[tuple[str, int]]:
    """Hosts and ports. Raises ConfigError."""
    wrong = ConfigError(f"cluster.etcd={url!r} must look like http://127.0.0.1:2379, or https://host:port,host:port for several with TLS")
    endpoints: list[tuple[str, int]] = []
    scheme = "https" if url.startswith("https://") else "http"
    for part in url.split(","):
        try:
            parsed = urlparse(part if "//" in part else f"{scheme}://{part}")
            host, port = parsed.hostname, parsed.port or 2379
        except ValueError as error:
            raise wrong from error
        if not host or parsed.scheme != scheme:
            raise wrong
        endpoints.append((f"[{host}]" if ":" in host else host, port))
    return endpoints


def _encode(member: Member) -> bytes:
    return json.dumps(dataclasses.asdict(member)).encode()


def _decode(value: bytes) -> Member | None:
    """None for a record that this version does not understand: one bad member must not hide the others."""
    try:
        fields = json.loads(value)
        fields["role"], fields["state"] = Role(fields["role"]), MemberState(fields["state"])
        return Member(**fields)
    except (ValueError, TypeError, KeyError) as error:
        logger.warning("etcd: a member's record cannot be read (%s); is it of another version?", error)
        return None
