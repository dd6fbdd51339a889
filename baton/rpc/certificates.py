"""Certificates of services: what a process shows when it is called and when it calls, and whom it believes. Read from files, which may be
renewed under it: a new connection is made with what is there then; those that there are stay.

One name stands in all certificates, and is what a caller looks for: members announce addresses, which come and go. So whoever has a
certificate of the authority is one of us (docs/security.md).
"""

import logging
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc

from baton.errors import ConfigError

logger = logging.getLogger(__name__)
_Stamp = tuple[tuple[int, int, int] | None, ...]  # None: there is no such file


@dataclass(frozen=True, slots=True)
class _Files:
    """What was in them."""

    cert: bytes
    key: bytes
    authority: bytes | None


class Certificates:
    """Its methods may be called from any thread."""

    def __init__(self, cert: str, key: str, authority: str = "", name: str = "", *, setting: str = "security") -> None:
        """Paths of PEM files. `authority`: of who signs the peers'; empty: peers are not asked. `name`: in the certificates of servers.
        `setting`: where all this stands in the configuration. Raises ConfigError."""
        self.name, self._setting = name, setting
        self._paths = {"cert": Path(cert), "key": Path(key)} | ({"authority": Path(authority)} if authority else {})
        self._seen: _Stamp = ()
        self._files = self._read()
        self._channel: tuple[_Files, grpc.ChannelCredentials] | None = None

    def server(self, *, demand: bool = True) -> grpc.ServerCredentials:
        """With `demand`, of a server that turns away whoever has no certificate of the authority."""
        shown = self._files

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            """gRPC asks before each handshake."""
            nonlocal shown
            if (now := self._now()) is shown:
                return None
            shown = now
            return _configuration(now)

        return cast(Any, grpc).dynamic_ssl_server_credentials(_configuration(shown), renewed, demand)

    def channel(self) -> grpc.ChannelCredentials:
        """Another object only when the files have changed."""
        now = self._now()
        if self._channel is None or self._channel[0] is not now:
            self._channel = now, grpc.ssl_channel_credentials(now.authority, now.key, now.cert)
        return self._channel[1]

    def _now(self) -> _Files:
        """What the files say; where that cannot be used, half renewed perhaps, what they said before."""
        if self._stamp() != self._seen:
            try:
                self._files = self._read()
                logger.info("%s: there are other certificates, which new connections are made with", self._setting)
            except (ConfigError, OSError) as error:
                logger.warning("the certificates that were there before stay in use: %s", error)
        return self._files

    def _stamp(self) -> _Stamp:
        return tuple(_stamp(path) for path in self._paths.values())

    def _read(self) -> _Files:
        self._seen = self._stamp()  # first: what is renewed meanwhile is read the next time
        check_files(self._setting, self._paths)
        cert, key, authority = self._paths["cert"], self._paths["key"], self._paths.get("authority")
        return _Files(cert.read_bytes(), key.read_bytes(), authority.read_bytes() if authority is not None else None)


def check_files(setting: str, paths: Mapping[str, Path]) -> None:
    """Of these PEM files, those that are given: that cert and key are a pair, and authority is a certificate. Raises ConfigError."""
    for name, path in paths.items():
        if not path.is_file():
            raise ConfigError(f"{setting}.{name}: there is no file {path}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    cert, key, authority = paths.get("cert"), paths.get("key"), paths.get("authority")
    try:
        if cert is not None:
            context.load_cert_chain(cert, key, password=lambda: "")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting}: {cert} and {key} are not a certificate and its unencrypted key, in PEM: {error}") from error
    try:
        if authority is not None:
            context.load_verify_locations(authority)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting}.authority: {authority} has no certificate, in PEM: {error}") from error


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _configuration(files: _Files) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(files.key, files.cert)], files.authority)
