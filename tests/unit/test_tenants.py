"""Tenants: keys, rates, and what is wrong with their settings."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.config import RouterConfig, TenantConfig, load_config
from baton.errors import ConfigError, Unauthorized
from services.router.tenants import Bucket, Tenants
from tests.unit.clock import Clock


@given(st.floats(0.1, 50), st.floats(1, 100), st.lists(st.tuples(st.floats(0, 5), st.floats(1, 200)), max_size=50))
def test_a_bucket_gives_no_more_than_its_rate_and_says_exactly_when_there_is_more(
    rate: float, capacity: float, asks: list[tuple[float, float]]
) -> None:
    clock = Clock()
    bucket, taken = Bucket(rate, capacity, clock), 0.0
    for pause_s, amount in asks:
        clock.now += pause_s
        wait_s = bucket.wait_s()
        if not wait_s:
            assert taken <= capacity + rate * clock.now + 1e-6  # what was taken before has been paid
            bucket.take(amount)
            taken += amount
        else:
            clock.now += wait_s * 0.99
            assert bucket.wait_s() > 0
            clock.now += wait_s * 0.01 + 1e-6
            assert bucket.wait_s() == pytest.approx(0, abs=1e-5)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_tenants_by_key(tmp_path: Path) -> None:
    keys = write(tmp_path / "keys", "# rotated monthly\nsk-one\n\nsk-two\n")
    tenants = Tenants.read([TenantConfig(name="lab", key_file=keys, priority=2)])
    lab = tenants.of("Bearer sk-one")
    assert tenants.of("bearer sk-two") is lab
    assert (lab.name, lab.allowed(None), lab.allowed(-5), lab.allowed(7)) == ("lab", 2, 2, 7)
    chief = Tenants.read([TenantConfig(name="chief", priority=1, most_urgent=-1)]).of(None)
    assert [chief.allowed(asked) for asked in (None, 0, -1, -2)] == [1, 0, -1, -1]
    for wrong in (None, "", "Bearer", "Bearer nobody", "Basic sk-one", "sk-one"):
        with pytest.raises(Unauthorized, match="Authorization: Bearer KEY"):
            tenants.of(wrong)
    open_too = Tenants.read([TenantConfig(name="lab", key_file=keys), TenantConfig(name="guests", requests_per_s=1)])
    assert open_too.of(None).name == "guests"
    with pytest.raises(Unauthorized):
        open_too.of("Bearer nobody")
    assert Tenants.read([]).of("Bearer anything").allowed(-3) == -3  # nothing configured: as ever


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda t: [TenantConfig(name="a", key_file=str(t / "none"))], "cannot read the key_file of 'a'"),
        (lambda t: [TenantConfig(name="a", key_file=write(t / "k", "# nothing\n"))], "has no key in it"),
        (lambda t: [TenantConfig(name=n, key_file=write(t / "k", "same")) for n in "ab"], "'a' and 'b' have a key in common"),
        (lambda t: [TenantConfig(name="a"), TenantConfig(name="b")], "only one can be all the others"),
        (lambda t: [TenantConfig(name="a"), TenantConfig(name="a", key_file=write(t / "k", "x"))], "two named 'a'"),
    ],
)
def test_what_is_wrong_with_tenants_is_said(tmp_path: Path, make: Callable[[Path], list[TenantConfig]], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Tenants.read(make(tmp_path))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("tenants=[{name: a, nmae: b}]", "unknown key tenants.0.nmae; did you mean name?"),
        ("tenants=[{name: 'a b'}]", "tenants.0.name"),
        ("admission.max_runing=3", "did you mean max_running?"),
        ("tls.cert=x.pem", "give tls.cert and tls.key"),
        ("allowed_origins=['https://chat.example/']", "allowed_origins: browsers send no origin 'https://chat.example/'"),
        ("allowed_origins=[chat.example]", "give scheme://host[:port] alone, or *"),
        ("allowed_origins=['https://*.example']", "give scheme://host[:port] alone, or *"),
    ],
)
def test_what_is_wrong_with_settings_is_said(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(RouterConfig, None, [override], {})
    assert says in caught.value.message
    with pytest.raises(ConfigError, match="needs predicted times"):
        load_config(RouterConfig, None, ["policy=round_robin", "admission.backlog_s=1"], {})
    origins = ("*", "https://chat.example", "http://127.0.0.1:3000", "chrome-extension://abc")
    assert load_config(RouterConfig, None, [f"allowed_origins={list(origins)}"], {}).allowed_origins == origins
