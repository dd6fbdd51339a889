"""Makes docs/console.png: a small cluster with something to do, seen in headless Chromium.

PYTHONPATH=. .venv/bin/python scripts/screenshot.py
"""

import os
import threading
import time
from pathlib import Path

import httpx

from tests.cluster import running_cluster
from tests.e2e.browser import chromium

ROOT = Path(__file__).resolve().parents[1]
TOPICS = ("routing", "prefill", "decode", "the pool", "leases", "tiers")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def talk(url: str, topic: str, end: threading.Event) -> None:
    """A conversation about it that grows, and begins anew."""
    with httpx.Client(timeout=60) as client:
        turns: list[dict[str, str]] = []
        while not end.is_set():
            turns = [*turns[-8:], {"role": "user", "content": f"Tell me more about {topic}, as much as you can, please. " * 4}]
            body = {"messages": turns, "max_tokens": 400, "ignore_eos": True, "temperature": 1}
            answer = client.post(f"{url}/v1/chat/completions", json=body)
            if answer.is_success:
                turns.append(answer.json()["choices"][0]["message"])


def main() -> None:
    settings = [f"{role}.engine.kv_memory=32MiB" for role in ("prefill", "decode")]
    options = [part for setting in settings for part in ("--set", setting)]
    end = threading.Event()
    with (
        running_cluster(model=ROOT / "examples" / "demo-model", prefill=2, decode=2, kvstore=1, options=options) as cluster,
        chromium() as page,
    ):
        talks = [threading.Thread(target=talk, args=(cluster.url, topic, end)) for topic in TOPICS]
        page.open(f"{cluster.url}/console", width=1150, height=666)
        for each in talks:
            each.start()
        time.sleep(12)  # workers have learned their pace
        page.value("document.getElementById('message').focus()")
        page.type("What is Baton?")
        page.press("Enter", 13, "\r")
        page.wait("document.getElementById('told').innerText.includes('a second')")
        page.value("document.getElementById('message').blur()")
        page.wait("document.querySelectorAll('.route').length > 4 && document.getElementById('figures').innerText[11] > '3'")
        page.screenshot(ROOT / "docs" / "console.png")
        end.set()
        for each in talks:
            each.join()


if __name__ == "__main__":
    main()
