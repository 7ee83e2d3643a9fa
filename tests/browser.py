"""A real headless Chromium, driven by the WebDriver protocol; tests are skipped where there is none."""

from __future__ import annotations

import base64
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import pytest
from servers import free_port

_KEY = "element-6066-11e4-a52e-4f735466cecf"
_OPTIONS = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-extensions"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    *("--hide-scrollbars", "--force-device-scale-factor=1", "--disable-lcd-text"),
]


class StaleElement(Exception):
    """The page of this element is gone."""


class Browser:
    """One browser window.

    Args:
        session: the WebDriver session's URL.
    """

    def __init__(self, session: str) -> None:
        self._client = httpx.Client(base_url=session, timeout=120)

    def open(self, page: Path | str) -> None:
        """Open a file, or an address on this machine."""
        self._post("/url", url=page if isinstance(page, str) else page.absolute().as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a script in the page; gives what it returns."""
        return self._post("/execute/sync", script=script, args=list(arguments))

    def click(self, selector: str, at: int = 0) -> None:
        """Click an element; one of a page that loads itself anew meanwhile is found again."""
        for _ in range(5):
            found = self._post("/elements", using="css selector", value=selector)
            with suppress(StaleElement, IndexError):
                self.run("arguments[0].scrollIntoView({block: 'center'})", found[at])
                self._post(f"/element/{found[at][_KEY]}/click")
                return
        raise AssertionError(f"{selector} is not there, or always gone again")

    def type(self, selector: str, text: str) -> None:
        """Type into an element."""
        found = self._post("/element", using="css selector", value=selector)
        self._post(f"/element/{found[_KEY]}/value", text=text)

    def press(self, *keys: str) -> None:
        """Press keys, wherever the focus is."""
        events = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._post("/actions", actions=[{"type": "key", "id": "keys", "actions": events}])

    def texts(self, selector: str) -> list[str]:
        """The text of each matching element that is laid out."""
        script = (
            "return [...document.querySelectorAll(arguments[0])].filter(e => e.offsetParent).map(e => e.textContent)"
        )
        return list(self.run(script, selector))

    def size(self, width: int, height: int) -> None:
        """Change the window's size."""
        self._cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def theme(self, name: str) -> None:
        """Prefer "light" or "dark"."""
        self._cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def shot(self) -> bytes:
        """The window as a PNG."""
        return base64.b64decode(self._client.get("/screenshot").raise_for_status().json()["value"])

    def log(self) -> list[dict[str, Any]]:
        """The console's messages since the last call, errors of the security policy included."""
        return list(self._post("/se/log", type="browser"))

    def _cdp(self, command: str, **parameters: Any) -> None:
        self._post("/goog/cdp/execute", cmd=command, params=parameters)

    def _post(self, path: str, **body: Any) -> Any:
        response = self._client.post(path, json=body)
        if response.status_code == 404 and response.json()["value"]["error"] == "stale element reference":
            raise StaleElement
        assert response.status_code == 200, response.text[:600]
        return response.json()["value"]


@contextmanager
def browsing() -> Iterator[Browser]:
    """A browser for the length of a block."""
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if driver is None or chromium is None:
        pytest.skip("no chromium and chromedriver: apt-get install chromium chromium-driver")
    port = free_port()
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_until_ready(url)
            options = {"binary": chromium, "args": [*_OPTIONS, f"--user-data-dir={profile}"]}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            answer = httpx.post(f"{url}/session", json={"capabilities": {"alwaysMatch": wanted}}, timeout=120)
            assert answer.status_code == 200, answer.text[:600]
            session = f"{url}/session/{answer.json()['value']['sessionId']}"
            try:
                yield Browser(session)
            finally:
                httpx.delete(session, timeout=60)
        finally:
            process.terminate()
            process.wait(30)


def _wait_until_ready(url: str) -> None:
    until = time.monotonic() + 60
    while True:
        try:
            if httpx.get(f"{url}/status").json()["value"]["ready"]:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < until, "chromedriver does not answer"
        time.sleep(0.05)
