"""Drives a real headless Chromium by its DevTools protocol over a pipe: no driver, no web socket, no package."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
KEYS = {
    "Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, ""), "ArrowUp": (38, ""), "ArrowDown": (40, ""),
    "ArrowLeft": (37, ""), "ArrowRight": (39, ""),
}  # fmt: skip


def find() -> str:
    """Return the path of a Chromium, "" where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), "")


class Chromium:
    """One browser with one page at a time."""

    def __init__(self, seconds: float = 60.0) -> None:
        self._seconds = seconds
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        read_end, self._out = os.pipe()
        self._in, write_end = os.pipe()

        def pass_pipes() -> None:
            # Chromium reads commands from descriptor 3 and writes answers to 4.
            far = [os.dup2(read_end, 100), os.dup2(write_end, 101)]
            os.dup2(far[0], 3)
            os.dup2(far[1], 4)

        command = [
            find(), "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={self._profile.name}", "--no-first-run",
            "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--mute-audio", "--force-color-profile=srgb",
            "--autoplay-policy=no-user-gesture-required", "about:blank",
        ]  # fmt: skip
        if os.getuid() == 0:
            command.insert(1, "--no-sandbox")
        self._process = subprocess.Popen(
            command, preexec_fn=pass_pipes, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(read_end)
        os.close(write_end)
        self._numbers = itertools.count(1)
        self._buffer, self._session = b"", ""
        self.events: list[dict[str, Any]] = []
        self.new_page()

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def send(self, method: str, *, browser: bool = False, **parameters: Any) -> dict[str, Any]:
        """Send one command and return its result; events that arrive meanwhile are kept."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session and not browser:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                return found["result"]
            if "method" in found:
                self.events.append(found)

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + self._seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(self._in, 1 << 16) if ready else b""
            if not part:
                raise TimeoutError("Chromium does not answer")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def new_page(self) -> None:
        """Begin a page in a context of its own: no cookies, no cache."""
        self._session = ""
        context = self.send("Target.createBrowserContext", browser=True)["browserContextId"]
        target = self.send("Target.createTarget", browser=True, url="about:blank", browserContextId=context)["targetId"]
        attached = self.send("Target.attachToTarget", browser=True, targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.events.clear()
        self.size(1280, 860)
        self.scheme("light")

    def size(self, width: int, height: int) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def scheme(self, name: str) -> None:
        """Prefer "light" or "dark"."""
        wanted = {"prefers-color-scheme": name, "prefers-reduced-motion": "reduce"}
        self.send("Emulation.setEmulatedMedia", features=[{"name": k, "value": v} for k, v in wanted.items()])

    def scripts(self, on: bool) -> None:
        """Run the scripts of pages, or do not."""
        self.send("Emulation.setScriptExecutionDisabled", value=not on)

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """Evaluate JavaScript in the page, awaiting a promise."""
        found = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(f"{script}: {found['exceptionDetails'].get('exception', {}).get('description')}")
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript condition holds."""
        deadline = time.monotonic() + self._seconds
        while True:
            try:
                if self.run(f"Boolean({condition})"):
                    return
            except RuntimeError as error:
                # The page may be between two documents.
                if not any(sign in str(error) for sign in ("context", "null", "navigated")):
                    raise
            if time.monotonic() > deadline:
                raise TimeoutError(f"not true after {self._seconds:g} s: {condition}; {self.text()[:300]}")
            time.sleep(0.02)

    def text(self) -> str:
        return self.run("document.body.innerText")

    def key(self, *names: str) -> None:
        """Press keys, one after another; "ctrl+Enter" holds one down."""
        for name in names:
            held, _, name = name.rpartition("+") if len(name) > 1 else ("", "", name)
            code, text = KEYS.get(name, (ord(name.upper()) if len(name) == 1 else 0, name))
            text = "" if held else text
            common = {"key": name, "windowsVirtualKeyCode": code, "modifiers": 2 if held == "ctrl" else 0}
            self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **common)
            self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)

    def centre(self, selector: str) -> tuple[float, float]:
        """Return the centre of an element, scrolled into view."""
        place = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); if (!e) return null;"
            " e.scrollIntoView({block: 'center', behavior: 'instant'}); const r = e.getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        assert place, f"no {selector} in {self.text()[:300]}"
        return place[0], place[1]

    def mouse(self, kind: str, place: tuple[float, float], **more: Any) -> None:
        self.send("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], **more)

    def click(self, selector: str) -> None:
        place = self.centre(selector)
        self.mouse("mousePressed", place, button="left", clickCount=1)
        self.mouse("mouseReleased", place, button="left", clickCount=1)

    def drag(self, selector: str, to: str) -> None:
        """Drag one element onto another that is in view already, as a sticky one is."""
        start, end = self.centre(selector), None
        self.mouse("mousePressed", start, button="left", clickCount=1)
        end = tuple(
            self.run(
                f"(() => {{ const r = document.querySelector({json.dumps(to)}).getBoundingClientRect();"
                " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
            )
        )
        for share in (0.3, 0.7, 1.0):
            place = (start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1]))
            self.mouse("mouseMoved", place, button="left", buttons=1)
        self.mouse("mouseReleased", end, button="left", clickCount=1)

    def screenshot(self, path: Path) -> Path:
        raw = self.send("Page.captureScreenshot", format="png")["data"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(raw))
        return path

    def complaints(self) -> list[str]:
        """Return what the browser complained of since the page began: exceptions, errors, blocked scripts, dialogs."""
        self.run("0")
        found = []
        for event in self.events:
            name, given = event["method"], event.get("params", {})
            if name == "Runtime.exceptionThrown":
                found.append(str(given["exceptionDetails"].get("exception", {}).get("description")))
            elif name == "Log.entryAdded" and given["entry"]["level"] == "error":
                if "status of 422" in given["entry"]["text"]:
                    continue  # an answer that was incomplete, as the page itself says
                found.append(f"{given['entry']['text']} {given['entry'].get('url', '')}")
            elif name == "Page.javascriptDialogOpening":
                found.append(f"dialog: {given['message']}")
        return found
