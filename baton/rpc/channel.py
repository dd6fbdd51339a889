"""gRPC channels and servers whose calls end soon after the other side is gone: keepalive pings find a dead, paused or cut-off peer within
one lease. Message sizes are limited where strangers send them, at the router; the engine limits prompts."""

from collections.abc import Sequence

import grpc
import grpc.aio

from baton.rpc.certificates import Certificates

Options = Sequence[tuple[str, int | str]]

_NARROW = 512  # bytes: some twenty tokens; a larger message comes in parts
_NARROW_OPTIONS = (("grpc.http2.lookahead_bytes", _NARROW), ("grpc.http2.bdp_probe", 0))  # without the probe, which widens it
_Made = tuple[grpc.aio.Channel, grpc.ChannelCredentials | None]
_UNLIMITED = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


def _keepalive(lease_s: float) -> Options:
    """A ping after half a lease of silence, and half a lease for its answer."""
    half = max(int(lease_s * 500), 100)
    return (
        ("grpc.keepalive_time_ms", half),
        ("grpc.keepalive_timeout_ms", half),
        ("grpc.http2.ping_timeout_ms", half),  # what counts in today's gRPC, where it is a minute by default
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    )


def client_options(lease_s: float) -> Options:
    return (
        *_UNLIMITED,
        *_keepalive(lease_s),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        ("grpc.use_local_subchannel_pool", 1),
    )


def server_options(lease_s: float, max_receive: int = -1) -> Options:
    """A server notices a client that is gone as well: its calls are cancelled, and what they held is free. `max_receive`: bytes of a
    message; -1: any number."""
    return (
        ("grpc.max_receive_message_length", max_receive),
        ("grpc.max_send_message_length", -1),
        *_keepalive(lease_s),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 50),
        ("grpc.so_reuseport", 0),
    )


class Channels:
    """One channel per address, made when first asked for; and one more for streams whose sender is to notice soon that its reader is
    behind. With certificates: a new one when they have been renewed, since a channel connects again with those that it was made with."""

    def __init__(self, lease_s: float, certificates: Certificates | None = None) -> None:
        self._options, self._certificates = client_options(lease_s), certificates
        self._channels: dict[str, list[_Made]] = {}
        self._narrow: dict[str, list[_Made]] = {}

    def get(self, address: str) -> grpc.aio.Channel:
        return self._latest(self._channels, address, self._options)

    def narrow(self, address: str) -> grpc.aio.Channel:
        """What is on its way is `_NARROW` bytes at most: more waits at its sender, who can put it together there."""
        return self._latest(self._narrow, address, (*self._options, *_NARROW_OPTIONS))

    def _latest(self, channels: dict[str, list[_Made]], address: str, options: Options) -> grpc.aio.Channel:
        shown = self._certificates.channel() if self._certificates is not None else None
        made = channels.setdefault(address, [])  # older ones carry the calls that they have; gRPC closes their connections when those end
        if not made or made[-1][1] is not shown:
            made.append((self._open(address, options, shown), shown))
        return made[-1][0]

    def _open(self, address: str, options: Options, shown: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
        if self._certificates is None or shown is None:
            return grpc.aio.insecure_channel(address, options=options)
        return grpc.aio.secure_channel(address, shown, options=(*options, ("grpc.ssl_target_name_override", self._certificates.name)))

    async def drop(self, address: str) -> None:
        """The address left the cluster; calls on its channels are cancelled."""
        for channels in (self._channels, self._narrow):
            for channel, _ in channels.pop(address, ()):
                await channel.close(None)

    async def close(self) -> None:
        for address in {*self._channels, *self._narrow}:
            await self.drop(address)
