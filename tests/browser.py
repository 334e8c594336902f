"""A headless Chromium, driven by its DevTools protocol over a pipe: no other library is needed."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
_FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
]
KEYS = {
    "Enter": 13, "Delete": 46, "Escape": 27, "Tab": 9, "Home": 36, "End": 35,
    "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40,
}  # fmt: skip


class Browser:
    """One process with one tab; `errors` are what pages wrote to the console as errors, and exceptions."""

    def __init__(self, folder: Path) -> None:
        self.errors: list[str] = []
        self.loaded = 0
        (read, child_write), (child_read, write) = os.pipe(), os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 20) for fd in (child_read, child_write)]
        for fd in (child_read, child_write):
            os.close(fd)
        command = [CHROMIUM, *_FLAGS, f"--user-data-dir={folder}", "--remote-debugging-pipe", "about:blank"]
        quiet = os.open(os.devnull, os.O_RDWR)
        actions = [(os.POSIX_SPAWN_DUP2, fd, to) for fd, to in ((quiet, 1), (quiet, 2), (high[0], 3), (high[1], 4))]
        self._process = os.posix_spawn(CHROMIUM, command, os.environ, file_actions=actions, setpgroup=0)
        for fd in (*high, quiet):
            os.close(fd)
        self._write, self._read = os.fdopen(write, "wb", 0), os.fdopen(read, "rb", 0)
        self._number, self._rest, self._session = 0, b"", None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)

    def close(self) -> None:
        """End the process."""
        os.killpg(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        self._write.close()
        self._read.close()

    def call(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[self._write.write(data) :]
        while True:
            found = self._next()
            if found.get("id") == self._number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                return found["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = self._read.read(2**16)
            if not more:
                raise RuntimeError("the browser has ended")
            self._rest += more
        one, _, self._rest = self._rest.partition(b"\0")
        event = json.loads(one)
        given = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(given["exceptionDetails"].get("exception", {}).get("description", given)))
        if event.get("method") == "Runtime.consoleAPICalled" and given["type"] == "error":
            self.errors.append(str([argument.get("value") for argument in given["args"]]))
        if event.get("method") == "Log.entryAdded" and given["entry"]["level"] == "error":
            self.errors.append(given["entry"]["text"])
        if event.get("method") == "Page.loadEventFired":
            self.loaded += 1
        return event

    def open(self, path: Path, fragment: str = "", before: str = "") -> None:
        """Open a file, and wait for it; `before` runs first."""
        made = self.call("Page.addScriptToEvaluateOnNewDocument", source=before)["identifier"] if before else None
        for url in ("about:blank", f"{path.as_uri()}{fragment}"):  # another fragment alone would load nothing
            seen = self.loaded
            self.call("Page.navigate", url=url)
            while self.loaded == seen:
                self._next()
        if made is not None:
            self.call("Page.removeScriptToEvaluateOnNewDocument", identifier=made)

    def ask(self, code: str) -> Any:
        """The value of an expression, also of a promise."""
        found = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"].get("description"))
        return found["result"].get("value")

    def wait(self, code: str, seconds: float = 10) -> Any:
        """Wait until an expression is true."""
        return self.ask(
            f"new Promise((yes, no) => {{ const end = performance.now() + {1000 * seconds};"
            f"const look = () => {{ const found = {code}; if (found) yes(found);"
            f"else if (performance.now() > end) no(new Error({json.dumps(code)} + ' stays false'));"
            "else setTimeout(look, 20); }; look(); })"
        )

    def screen(self, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Set the size of the window, and light or dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def press(self, *keys: str, shift: bool = False) -> None:
        """Press keys by name, or type a text."""
        for key in keys:
            if key not in KEYS:
                self.call("Input.insertText", text=key)
                continue
            about = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": 8 * shift}
            if key == "Enter":
                about["text"] = "\r"
            self.call("Input.dispatchKeyEvent", type="keyDown", **about)
            self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def shoot(self, path: Path, *, whole: bool = True) -> None:
        """Write a picture of the page."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
            data = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        path.write_bytes(base64.b64decode(data))
