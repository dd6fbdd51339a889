"""Tenants: who asks, by API key, and how much each may have.

A tenant's limits are token buckets: one fills with requests, one with tokens. A request may start while there is at least one of each;
what it takes is subtracted when it is known, the prompt at the start, the output at the end. So a bucket may go below zero, and nobody has
to guess lengths: the rate is kept over time, and no request is too large ever to be served.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from baton.config import TenantConfig
from baton.errors import ConfigError, RateLimited, Unauthorized


class Bucket:
    """`rate` a second, for at most `capacity` in advance."""

    def __init__(self, rate: float, capacity: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._capacity, self._clock = rate, max(capacity, 1.0), clock
        self._level, self._at = self._capacity, clock()

    def wait_s(self) -> float:
        """Until there is one; 0 where there is."""
        self._fill()
        return max(1.0 - self._level, 0.0) / self._rate

    def take(self, amount: float) -> None:
        """Less than nothing gives some back."""
        self._fill()
        self._level = min(self._level - amount, self._capacity)

    def _fill(self) -> None:
        now = self._clock()
        self._level, self._at = min(self._level + (now - self._at) * self._rate, self._capacity), now


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    name: str = ""  # empty: nobody is told from anybody
    weight: float = 1.0
    priority: int = 0  # of its requests that ask for none
    most_urgent: float = -math.inf  # that they may ask for
    requests: Bucket | None = None
    tokens: Bucket | None = None

    def check_rates(self) -> None:
        """Raises RateLimited, with when to come again."""
        for bucket, what, setting in ((self.requests, "requests", "requests_per_s"), (self.tokens, "tokens", "tokens_per_min")):
            wait_s = bucket.wait_s() if bucket is not None else 0.0
            if wait_s > 0:
                raise RateLimited(
                    f"the tenant {self.name!r} has had the {what} that it may have ({setting}); try again in {math.ceil(wait_s)} s",
                    retry_after_s=wait_s,
                )

    def take(self, *, requests: int = 0, tokens: float = 0) -> None:
        if self.requests is not None and requests:
            self.requests.take(requests)
        if self.tokens is not None and tokens:
            self.tokens.take(tokens)

    def allowed(self, priority: int | None) -> int:
        """The priority that a request gets which asks for this one."""
        asked = self.priority if priority is None else priority
        return asked if asked >= self.most_urgent else int(self.most_urgent)


EVERYBODY = Tenant()


@dataclass(slots=True)
class Tenants:
    """Keys are kept as digests alone."""

    by_key: dict[bytes, Tenant] = field(default_factory=dict[bytes, Tenant])
    others: Tenant | None = EVERYBODY  # who shows no key; None: nobody may

    @classmethod
    def read(cls, configs: Iterable[TenantConfig]) -> "Tenants":
        """Raises ConfigError."""
        by_key: dict[bytes, Tenant] = {}
        keyless: list[Tenant] = []
        names: set[str] = set()
        for config in configs:
            tenant = _tenant(config)
            if config.name in names:
                raise ConfigError(f"tenants: there are two named {config.name!r}; give each a name of its own")
            names.add(config.name)
            keys = _read_keys(config) if config.key_file else []
            for key in keys:
                other = by_key.setdefault(_digest(key), tenant)
                if other is not tenant:
                    raise ConfigError(f"tenants: {other.name!r} and {tenant.name!r} have a key in common; give each its own")
            if not keys:
                keyless.append(tenant)
        if len(keyless) > 1:
            raise ConfigError(f"tenants: {keyless[0].name!r} and {keyless[1].name!r} have no key_file; only one can be all the others")
        return cls(by_key, keyless[0] if keyless else None if by_key else EVERYBODY)

    def of(self, authorization: str | None) -> Tenant:
        """By the header `Authorization: Bearer KEY`. Without any keys configured it says nothing, as before. Raises Unauthorized."""
        scheme, _, key = (authorization or "").partition(" ")
        if self.by_key and key:
            tenant = self.by_key.get(_digest(key.strip())) if scheme.lower() == "bearer" else None
            if tenant is None:
                raise Unauthorized("this API key is not known here; send a valid one as `Authorization: Bearer KEY`")
            return tenant
        if self.others is None:
            raise Unauthorized("an API key is needed; send it as `Authorization: Bearer KEY`")
        return self.others


def _tenant(config: TenantConfig) -> Tenant:
    per_s = None if config.tokens_per_min is None else config.tokens_per_min / 60
    return Tenant(
        name=config.name,
        weight=config.weight,
        priority=config.priority,
        most_urgent=config.priority if config.most_urgent is None else config.most_urgent,
        requests=None if config.requests_per_s is None else Bucket(config.requests_per_s, config.requests_per_s),
        tokens=None if per_s is None or config.tokens_per_min is None else Bucket(per_s, config.tokens_per_min),
    )


def _read_keys(config: TenantConfig) -> list[str]:
    try:
        lines = [line.strip() for line in Path(config.key_file).read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"tenants: cannot read the key_file of {config.name!r}, {config.key_file}: {why}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"tenants: the key_file of {config.name!r}, {config.key_file}, has no key in it; write one a line")
    return keys


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
