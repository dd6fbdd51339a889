"""Headless Chromium for tests: its DevTools protocol (https://chromedevtools.github.io/devtools-protocol) over two pipes."""

import base64
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "google-chrome")
_FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-lcd-text",
)
_ANSWER_S = 60


class Page:
    """One tab. Each call raises AssertionError with what Chromium says against it."""

    def __init__(self, to: int, come_from: int) -> None:
        self._to, self._from, self._left = to, come_from, b""
        self._ids, self._session = itertools.count(1), ""
        self.complaints: list[str] = []  # exceptions that nobody caught, and what the console or the browser says as an error
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        message = {"id": next(self._ids), "method": method, "params": params, **({"sessionId": self._session} if self._session else {})}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _ANSWER_S
        while True:
            answer = self._read(deadline)
            if answer.get("id") == message["id"]:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer.get("method", ""), answer.get("params", {}))

    def open(self, url: str, *, width: int = 1280, height: int = 900) -> None:
        self.size(width, height)
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def size(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def dark(self, wanted: bool) -> None:
        feature = {"name": "prefers-color-scheme", "value": "dark" if wanted else "light"}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def value(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, f"{expression}: {answer['exceptionDetails']}"
        return answer["result"].get("value")

    def wait(self, expression: str, within_s: float = 30) -> Any:
        """Its value, once that is true."""
        deadline = time.monotonic() + within_s
        while not (value := self.value(expression)):
            assert time.monotonic() < deadline, f"not within {within_s} s: {expression}\n{self.value('document.body.innerText')}"
            time.sleep(0.1)
        return value

    def text(self, selector: str) -> str:
        return self.value(f"document.querySelector({json.dumps(selector)}).innerText")

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int, text: str = "") -> None:
        """A key by its name and virtual key code; `text`: what it would write."""
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, text=text if kind == "keyDown" else ""
            )

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._left:
            assert select.select([self._from], [], [], max(deadline - time.monotonic(), 0))[0], "Chromium does not answer"
            data = os.read(self._from, 1 << 16)
            assert data, "Chromium has ended"
            self._left += data
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append(params["entry"]["text"])


@contextmanager
def chromium() -> Iterator[Page]:
    """A browser of its own, without a past; none of its processes is left. Raises where there is no Chromium."""
    binary = next(filter(None, map(shutil.which, _NAMES)), None)
    assert binary, f"this test needs Chromium, one of {', '.join(_NAMES)}: make test-browser installs it"
    flags = [*_FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    commands, told = os.pipe(), os.pipe()  # it reads from its descriptor 3 and writes to 4
    with tempfile.TemporaryDirectory(prefix="baton-chromium-", ignore_cleanup_errors=True) as profile:
        line = [binary, *flags, f"--user-data-dir={profile}"]
        wire = f'exec "$@" 3<&{commands[0]} 4>&{told[1]}'
        process = subprocess.Popen(
            ["bash", "-c", wire, "chromium", *line],
            pass_fds=(commands[0], told[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(commands[0])
        os.close(told[1])
        try:
            yield Page(commands[1], told[0])
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.close(commands[1])
            os.close(told[0])
