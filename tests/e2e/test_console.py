"""The console in a real browser, beside a real cluster."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.cluster import RunningCluster, running_cluster
from tests.e2e.browser import Page, chromium

pytestmark = pytest.mark.browser

STATUS = "document.getElementById('status').innerText"
NASTY = "<img src=x onerror=alert(1)>" + "long" * 20
TOO_WIDE = """[...document.querySelectorAll('body *')].filter((e) => e.getBoundingClientRect().right > document.documentElement.clientWidth)
    .map((e) => e.outerHTML)"""


@pytest.fixture(scope="module")
def cluster(demo_model: Path) -> Iterator[RunningCluster]:
    with running_cluster(model=demo_model, prefill=2, decode=1, kvstore=1) as running:
        yield running


@pytest.fixture
def page(cluster: RunningCluster) -> Iterator[Page]:
    cluster.wait_ready()
    with chromium() as tab:
        tab.open(f"{cluster.url}/console")
        tab.wait(f"{STATUS} === 'Ready'")
        yield tab


def ask(cluster: RunningCluster, text: str, request_id: str = "", key: str = "") -> None:
    headers = {"x-request-id": request_id} if request_id else {}
    headers |= {"authorization": f"Bearer {key}"} if key else {}
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8}
    httpx.post(f"{cluster.url}/v1/chat/completions", json=body, headers=headers, timeout=60).raise_for_status()


def asked(page: Page, cluster: RunningCluster, text: str, request_id: str = "") -> None:
    """`ask`, and the page shows where it went."""
    before = page.value("document.querySelectorAll('.route').length")
    ask(cluster, text, request_id)
    page.wait(f"document.querySelectorAll('.route').length > {before}")


def test_the_fleet_is_there_by_pool(page: Page) -> None:
    pools = page.value(
        "[...document.querySelectorAll('.pool')].map((e) => [e.id, [...e.querySelectorAll('tbody tr')].map((r) => r.innerText)])"
    )
    assert [name for name, _ in pools] == ["pool-prefill", "pool-decode"]
    rows = [row.split() for _, pool in pools for row in pool]
    assert [row[:5] for row in rows] == [[name, "ready", "0", "0", "0"] for name in ("prefill-0", "prefill-1", "decode-0")]
    assert "kvstore" in page.text("#others")
    assert page.value("document.getElementById('alarm').hidden")
    assert page.complaints == []


def test_an_answer_streams_into_the_playground_and_tells_its_way(page: Page) -> None:
    page.value("""{ window.lengths = []; new MutationObserver(() => {
        const answer = document.querySelector('.turn.assistant');
        if (answer) window.lengths.push(answer.innerText.length);
    }).observe(document.getElementById('chat'), {childList: true, subtree: true}); }""")
    page.value("document.getElementById('message').focus()")
    page.type("What is Baton?")
    page.press("Enter", 13, "\r")
    page.wait("document.getElementById('told').innerText.includes('a second')")
    assert "cluster" in page.text(".turn.assistant")
    assert "decode=decode-0" in page.text("#told")
    lengths = page.value("window.lengths")
    assert len(set(lengths)) > 5, "it grew as it came"
    assert lengths == sorted(lengths)

    page.wait("document.querySelector('.route summary')?.innerText.includes('first token')")
    assert "decode-0" in page.text(".route summary")
    page.value("document.querySelector('.route summary').focus()")
    page.press("Enter", 13, "\r")
    page.wait("document.querySelector('.route .chosen')?.innerText.includes('decode-0')")
    time.sleep(2.5)  # the page has looked again
    assert page.value("document.querySelector('.route').open")

    page.value("document.getElementById('message').focus()")
    page.type("And what is 3 + 4?")
    page.press("Enter", 13, "\r")
    page.wait("document.querySelectorAll('.turn.assistant').length === 2 && document.getElementById('stop').hidden")
    assert not page.value("document.querySelectorAll('.turn.bad').length")
    assert page.complaints == []


def test_a_stream_is_stopped_by_a_key_and_leaves_nothing(page: Page, cluster: RunningCluster) -> None:
    page.value("""{ const real = window.fetch;  // it would go on for long
        const longer = (body) => JSON.stringify({...JSON.parse(body), ignore_eos: true});
        window.fetch = (path, more) => real(path, more.body ? {...more, body: longer(more.body)} : more);
        new MutationObserver(() => {
            if (document.querySelector('.turn.assistant')?.innerText.length > 20)
                document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape', bubbles: true}));
        }).observe(document.getElementById('chat'), {childList: true, subtree: true}); }""")
    page.value("document.getElementById('max-tokens').value = 4000")
    page.value("document.getElementById('message').focus()")
    page.type("Tell me a story")
    page.press("Enter", 13, "\r")
    page.wait("document.getElementById('chat').innerText.includes('Stopped.') && document.getElementById('stop').hidden")
    assert page.value("document.querySelector('.turn.assistant').innerText.length") > 20
    cluster.assert_clean()


def test_what_comes_from_the_network_is_text(page: Page, cluster: RunningCluster) -> None:
    asked(page, cluster, "hello there", NASTY)
    page.value("document.querySelector('.route summary').click()")
    page.wait(f"document.querySelector('.route .id')?.innerText === {json.dumps(NASTY)}")
    assert page.value("document.querySelectorAll('img').length") == 0
    assert "TypeError" in page.value("(() => { try { document.body.innerHTML = '<b>x</b>'; } catch (e) { return String(e); } })()")


def test_a_narrow_window_is_read_without_scrolling_sideways(page: Page, cluster: RunningCluster) -> None:
    asked(page, cluster, "a prompt of some length, to be computed by whoever has time " * 8, NASTY + "2")
    page.value("document.querySelector('.route summary').click()")
    page.wait("document.querySelector('.route .chosen') !== null")
    for width in (390, 700, 1100):
        page.size(width, 844)
        assert page.value(TOO_WIDE) == []
        assert page.value("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_it_follows_the_systems_colours(page: Page) -> None:
    grounds = []
    for dark in (False, True):
        page.dark(dark)
        grounds.append(page.value("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(245, 246, 248)", "rgb(16, 19, 24)"]


def test_the_keyboard_reaches_everything(page: Page, cluster: RunningCluster) -> None:
    asked(page, cluster, "hello")
    met = []
    for _ in range(12):
        page.press("Tab", 9)
        met.append(page.value("document.activeElement.id || document.activeElement.tagName"))
    assert [name for name in met if name in ("pause", "message", "send", "clear", "SUMMARY")][:5] == [
        "pause",
        "message",
        "send",
        "clear",
        "SUMMARY",
    ]
    page.value("document.getElementById('pause').focus()")
    page.press("Enter", 13, "\r")
    page.wait(f"{STATUS} === 'Ready (paused)'")


def test_it_is_loud_without_prefill_workers_and_without_its_router(page: Page, cluster: RunningCluster) -> None:
    cluster.process.send_signal(signal.SIGSTOP)  # so that nobody starts them again
    try:
        for name in ("prefill-0", "prefill-1"):
            cluster.signal(name, signal.SIGKILL)
        page.wait(f"{STATUS} === 'Degraded'")
        assert "no prefill worker" in page.text("#alarm")
        assert page.value("document.title").startswith("Degraded")
        page.size(390, 844)
        assert page.value(TOO_WIDE) == []
        cluster.signal("router", signal.SIGKILL)
        page.wait(f"{STATUS} === 'Unreachable'")
        assert "is old" in page.text("#alarm")
    finally:
        cluster.process.send_signal(signal.SIGCONT)
    page.wait(f"{STATUS} === 'Ready'", within_s=60)
    assert page.value("document.getElementById('alarm').hidden")


def test_with_keys_each_tenant_sees_its_own(demo_model: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(f"sk-{name}\n")
    tenants = json.dumps([{"name": name, "key_file": str(tmp_path / name)} for name in ("one", "two")])
    options = ["--set", f"router.tenants={tenants}"]
    with running_cluster(model=demo_model, unified=1, kvstore=0, etcd="none", options=options) as cluster, chromium() as page:
        for name in ("one", "two"):
            ask(cluster, "hello", f"request-of-{name}", f"sk-{name}")
        page.open(f"{cluster.url}/console")
        page.wait(f"{STATUS} === 'Ready'")
        assert "your API key" in page.text("#routes-note")
        for key, told in (("sk-none", "not known"), ("sk-one", "")):
            page.value("document.getElementById('key').select()")
            page.type(key)
            page.press("Tab", 9)
            page.wait(f"document.getElementById('routes-note').innerText.includes({json.dumps(told)})")
        page.wait("document.querySelectorAll('.route').length === 1")
        page.value("document.querySelector('.route summary').click()")
        page.wait("document.querySelector('.route .id')?.innerText === 'request-of-one'")
        page.wait("document.querySelector('.route .chosen') !== null")
        page.value("document.getElementById('message').focus()")
        page.type("What is Baton?")
        page.press("Enter", 13, "\r")
        page.wait("document.querySelectorAll('.route').length === 2")
        assert not page.value("document.querySelectorAll('.turn.bad').length")
