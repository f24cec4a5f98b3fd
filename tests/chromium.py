"""A headless Chromium that a test drives: real clicks and keys, both themes, any width, and what the console says."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]
KEYS = {"PageUp": 33, "PageDown": 34, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39}
KEYS |= {"ArrowDown": 40, "Tab": 9, "n": 78, "p": 80}

SPEAK = """import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for end, place in zip(ends, (3, 4)):
    os.dup2(end, place)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Becomes a browser that speaks the protocol through descriptors 3 and 4, whatever their numbers were."""

# A colour may be written in any space: what is compared are the bytes that the browser makes of it.
BYTES = """(() => {
const pen = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
const bytes = (c) => {
  pen.clearRect(0, 0, 1, 1);
  pen.fillStyle = c;
  pen.fillRect(0, 0, 1, 1);
  return [...pen.getImageData(0, 0, 1, 1).data];
};
const light = (c) => bytes(c).slice(0, 3).map((v) => v / 255)
  .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
const contrast = (a, b) => {
  const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
};
"""
FAINT = (
    BYTES
    + """
const behind = (e) => {
  for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (bytes(c)[3]) return c; }
};
const out = [];
for (const e of document.querySelectorAll('body *')) {
  if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || !e.checkVisibility()) continue;
  const style = getComputedStyle(e), colour = e instanceof SVGElement ? style.fill : style.color;
  if (contrast(colour, behind(e)) < 4.5) out.push(e.outerHTML.slice(0, 90));
}
return out; })()"""
)


class Tab:
    """One page of the browser; `complaints` is what the console and the policy reported."""

    def __init__(self, commands: int, answers: int) -> None:
        self.commands, self.answers = os.fdopen(commands, "wb", buffering=0), os.fdopen(answers, "rb")
        self.number, self.rest = 0, b""
        self.session: str | None = None
        self.complaints: list[str] = []

    def start(self) -> None:
        """Make the page."""
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.tell(f"{domain}.enable")

    def tell(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol and return its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        self.commands.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            assert select.select([self.answers], [], [], 60)[0], "Chromium does not answer"
            block = os.read(self.answers.fileno(), 1 << 16)
            assert block, "Chromium is gone"
            self.rest += block
        line, self.rest = self.rest.split(b"\0", 1)
        answer = json.loads(line)
        if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(json.dumps(answer["params"]))
        if answer.get("method") == "Runtime.consoleAPICalled" and answer["params"]["type"] in (
            "error",
            "warning",
        ):
            self.complaints.append(json.dumps(answer["params"]["args"]))
        return answer

    def open(self, page: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> float:
        """Open a file at a size and theme; the seconds until it says that it is ready."""
        self.tell(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tell("Emulation.setEmulatedMedia", media="screen", features=[scheme])
        self.complaints.clear()
        began = time.perf_counter()
        self.tell("Page.navigate", url=page.as_uri())
        while not self.run("document.documentElement?.dataset.ready === 'yes'"):
            assert time.perf_counter() < began + 60, self.run("document.body.innerText.slice(0, 400)")
            time.sleep(0.02)
        return time.perf_counter() - began

    def run(self, script: str) -> Any:
        """The value of an expression in the page, a promise's when it is one."""
        answer = self.tell("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def frame(self) -> None:
        """Wait until what was changed is drawn."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def press(self, *keys: str) -> None:
        """Press keys on what has the focus."""
        for key in keys:
            code = {"key": key, "windowsVirtualKeyCode": KEYS[key]}
            text = {"text": key} if len(key) == 1 else {}
            self.tell("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **code, **text)
            self.tell("Input.dispatchKeyEvent", type="keyUp", **code)
        self.frame()

    def click(self, element: str, across: float = 0.5) -> None:
        """Click an element at its middle height, `across` it from 0 to 1; it is scrolled into view first."""
        box = self.run(
            f"(() => {{ const e = document.querySelector({element!r}); e.scrollIntoView({{ block: 'nearest', "
            "behavior: 'instant' }); const b = e.getBoundingClientRect(); "
            "return [b.left, b.top, b.width, b.height]; })()"
        )
        place = {"x": box[0] + across * box[2], "y": box[1] + box[3] / 2, "button": "left", "clickCount": 1}
        self.tell("Input.dispatchMouseEvent", type="mouseMoved", x=place["x"], y=place["y"])
        self.tell("Input.dispatchMouseEvent", type="mousePressed", buttons=1, **place)
        self.tell("Input.dispatchMouseEvent", type="mouseReleased", **place)
        self.frame()

    def faint(self) -> list[str]:
        """The elements whose text stands out too little from what is behind it (WCAG: less than 4.5 to 1)."""
        return self.run(FAINT)

    def shot(self, whole: bool = False) -> bytes:
        """The page as PNG, all of it with `whole`."""
        return base64.b64decode(
            self.tell("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        )


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[Tab]:
    """A browser with one page and a profile in `folder`, closed at the end."""
    assert CHROMIUM
    command_out, command_in = os.pipe()
    answer_out, answer_in = os.pipe()
    flags = [*FLAGS, "--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}"]
    process = subprocess.Popen(
        [sys.executable, "-c", SPEAK, str(command_out), str(answer_in), CHROMIUM, *flags],
        pass_fds=(command_out, answer_in),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(command_out)
    os.close(answer_in)
    tab = Tab(command_in, answer_out)
    try:
        tab.start()
        yield tab
    finally:
        with contextlib.suppress(AssertionError, OSError):
            tab.session = None
            tab.tell("Browser.close")
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        tab.commands.close()
        tab.answers.close()
