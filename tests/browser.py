"""A headless Chromium, driven over pipes, that shows whether a page works as a reader sees it."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_SECONDS = 60.0  # after which a command has failed

# Plots and videos that do not show, and boxes that are wider than their place.
_PROBE = """(async () => {
  for (const details of document.querySelectorAll('details')) details.open = true;
  const pictures = [...document.images], videos = [...document.querySelectorAll('video')];
  await Promise.all(pictures.map(p => p.decode().catch(() => null)));
  for (let i = 0; i < 200 && videos.some(v => v.readyState < 2 && !v.error); i++)
    await new Promise(done => setTimeout(done, 50));
  const root = document.scrollingElement;
  return {
    title: document.title,
    pictures: pictures.map(p => p.naturalWidth),
    videos: videos.map(v => v.error ? v.error.message : v.videoWidth),
    overflow: root.scrollWidth - root.clientWidth,
    wide: [...document.querySelectorAll('main *')]
      .filter(e => e.getBoundingClientRect().right > root.clientWidth + 1)
      .map(e => e.tagName + ': ' + e.textContent.slice(0, 40)),
    height: root.scrollHeight,
  };
})()"""


def find() -> str | None:
    """Returns the path of an installed browser."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a browser; a context manager.

    Attributes:
      errors: messages of the console and of failed requests since the page was opened.
    """

    def __init__(self, program: str, profile: Path):
        read_end, self._to = os.pipe()
        self._from, write_end = os.pipe()
        # The browser reads commands from descriptor 3 and writes answers to descriptor 4.
        command = (
            f'exec "{program}" --headless=new --hide-scrollbars --no-sandbox --disable-gpu '
            f'--disable-dev-shm-usage --user-data-dir="{profile}" --remote-debugging-pipe '
            f"about:blank 3<&{read_end} 4>&{write_end}"
        )
        self._process = subprocess.Popen(
            ["bash", "-c", command],
            pass_fds=(read_end, write_end),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_end)
        os.close(write_end)
        os.set_blocking(self._from, False)
        self._numbers, self._buffer, self.errors = itertools.count(1), b"", []
        self._session = None
        target = self._do("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._do("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._do(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_) -> None:
        os.close(self._to)
        os.close(self._from)
        self._process.terminate()
        self._process.wait(30)

    def open(self, page: Path, width: int, height: int = 844, dark: bool = False) -> dict:
        """Opens a file in a window of this size and returns what `_PROBE` finds."""
        self.errors, self._loaded = [], False
        self._do(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._do("Emulation.setEmulatedMedia", features=[scheme])
        self._do("Page.navigate", url=page.absolute().as_uri())
        end = time.monotonic() + _SECONDS
        while not self._loaded:
            self._receive(end)
        return self.evaluate(_PROBE)

    def evaluate(self, expression: str):
        """Returns the value of a JavaScript expression."""
        result = self._do(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        return result["result"]["value"]

    def media(self, name: str) -> None:
        """Shows the page as on "print" or "screen"; "": as it is."""
        self._do("Emulation.setEmulatedMedia", media=name)

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """Writes a picture of the page."""
        shown = self._do("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shown["data"]))

    def pdf(self) -> bytes:
        """Returns the page as it is printed."""
        return base64.b64decode(self._do("Page.printToPDF", printBackground=False)["data"])

    def _do(self, method: str, **parameters) -> dict:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + _SECONDS
        while True:
            answer = self._receive(end)
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _receive(self, end: float) -> dict:
        """Returns the next message and notes what it says of the page."""
        while b"\0" not in self._buffer:
            assert time.monotonic() < end, "the browser does not answer"
            assert self._process.poll() is None, "the browser has ended"
            try:
                self._buffer += os.read(self._from, 1 << 20)
            except BlockingIOError:
                time.sleep(0.01)
        line, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(line)
        name, said = message.get("method"), message.get("params", {})
        if name == "Page.loadEventFired":
            self._loaded = True
        elif name == "Runtime.exceptionThrown":
            self.errors.append(said["exceptionDetails"]["text"])
        elif name == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.errors.append(said["entry"]["text"])
        elif name == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning"):
            self.errors.append(str(said["args"]))
        elif name == "Network.loadingFailed":
            self.errors.append(said["errorText"])
        elif name == "Network.requestWillBeSent":
            address = said["request"]["url"]
            if not address.startswith(("data:", "file:")):
                self.errors.append(f"a request to {address}")
        return message
