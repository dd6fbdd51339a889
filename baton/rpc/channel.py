"""gRPC channels and servers whose calls end soon after the other side is gone: keepalive pings find a dead, paused or cut-off peer within
one lease. Message sizes are limited where strangers send them, at the router; the engine limits prompts."""

from collections.abc import Sequence

import grpc
import grpc.aio

Options = Sequence[tuple[str, int]]

_NARROW = 512  # bytes: some twenty tokens; a larger message comes in parts
_NARROW_OPTIONS = (("grpc.http2.lookahead_bytes", _NARROW), ("grpc.http2.bdp_probe", 0))  # without the probe, which widens it
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
    behind."""

    def __init__(self, lease_s: float) -> None:
        self._options = client_options(lease_s)
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._narrow: dict[str, grpc.aio.Channel] = {}

    def get(self, address: str) -> grpc.aio.Channel:
        return self._made(self._channels, address, self._options)

    def narrow(self, address: str) -> grpc.aio.Channel:
        """What is on its way is `_NARROW` bytes at most: more waits at its sender, who can put it together there."""
        return self._made(self._narrow, address, (*self._options, *_NARROW_OPTIONS))

    def _made(self, channels: dict[str, grpc.aio.Channel], address: str, options: Options) -> grpc.aio.Channel:
        channel = channels.get(address)
        if channel is None:
            channel = channels[address] = grpc.aio.insecure_channel(address, options=options)
        return channel

    async def drop(self, address: str) -> None:
        """The address left the cluster; calls on its channel are cancelled."""
        for channels in (self._channels, self._narrow):
            channel = channels.pop(address, None)
            if channel is not None:
                await channel.close(None)

    async def close(self) -> None:
        for address in {*self._channels, *self._narrow}:
            await self.drop(address)
