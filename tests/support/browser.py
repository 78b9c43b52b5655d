"""A real browser: headless Chromium, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page, sync_playwright

CHROMIUM = shutil.which("chromium")

needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here: scripts/test_tools.sh installs it"
)

_SWITCHES = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

_CONTRASTS = """() => {
const luminance = ([r, g, b]) => {
  const of = [r, g, b].map((c) => {
    const s = c / 255;
    return s <= 0.03928 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * of[0] + 0.7152 * of[1] + 0.0722 * of[2];
};
const parts = (color) => color.match(/[\\d.]+/g).map(Number);
const background = (at) => {
  for (; at; at = at.parentElement) {
    const of = parts(getComputedStyle(at).backgroundColor);
    if (of.length === 3 || of[3] === 1) return of.slice(0, 3);
  }
  return [255, 255, 255];
};
const found = [];
for (const at of document.querySelectorAll("body *")) {
  const own = [...at.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data).join("").trim();
  const text = at.tagName === "INPUT" ? at.value : own;
  if (!text || !at.checkVisibility() || at.closest(".uplot, svg")) continue;
  const [a, b] = [luminance(parts(getComputedStyle(at).color)), luminance(background(at))];
  found.push([text, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]);
}
return found;
}"""


class Browser:
    """A tab, and what the tests do in it.

    Args:
        page: of Playwright.

    Attributes:
        asked: the URLs of all requests since the page was opened.
        faults: what its console says of errors, and what its scripts throw.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.asked: list[str] = []
        self.faults: list[str] = []
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("console", self._listen)

    def _listen(self, message: Any) -> None:
        if message.type == "error":
            self.faults.append(message.text)

    def open(self, url: str) -> None:
        """Open a page."""
        self.asked.clear()
        self.faults.clear()
        self.page.goto(url)

    def text(self, selector: str) -> str:
        """What can be read there, in one line."""
        return " ".join(self.page.inner_text(selector).split())

    def wait(self, condition: Callable[[], Any]) -> None:
        """Until it holds; the test's timeout is the bound."""
        while not condition():
            self.page.wait_for_timeout(20)  # the browser's events come in meanwhile

    def shows(self, selector: str, text: str) -> None:
        """Wait until `text` can be read there."""
        self.wait(lambda: text in self.text(selector))

    def click(self, selector: str) -> None:
        """As a reader would."""
        self.page.click(selector)

    def write(self, selector: str, text: str) -> None:
        """Put `text` in the place of what a field holds."""
        self.page.fill(selector, text)

    def press(self, *keys: str) -> None:
        """Keys, one after the other."""
        for key in keys:
            self.page.keyboard.press(key)

    def run(self, script: str) -> Any:
        """The value of an expression of JavaScript in the page."""
        return self.page.evaluate(script)

    def shown_ms(self) -> float:
        """From the first request of the page that is open until its numbers could be read."""
        return self.run("performance.getEntriesByName('shown')[0].startTime")

    def is_asking(self) -> bool:
        """Whether a dialog is open."""
        return self.run("document.getElementById('ask').open")

    def confirm(self) -> None:
        """Say yes in the dialog."""
        self.click("#ask-yes")
        self.wait(lambda: not self.is_asking())

    def hosts(self) -> set[str]:
        """HOST:PORT of all requests since the page was opened."""
        schemes = ("http", "https", "ws", "wss")
        urls = map(urlsplit, self.asked)
        return {url.netloc for url in urls if url.scheme in schemes}

    def looks(self, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Resize the window, and choose what the reader prefers."""
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.emulate_media(color_scheme="dark" if dark else "light")

    def contrasts(self) -> list[tuple[str, float]]:
        """Every text that can be read, with its contrast by WCAG 2 to what is behind it."""
        return [(text, ratio) for text, ratio in self.run(_CONTRASTS)]


@contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
    """A browser with a profile of its own in `folder`, an empty one."""
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            folder, executable_path=CHROMIUM, args=_SWITCHES, chromium_sandbox=False
        )
        try:
            yield Browser(context.pages[0])
        finally:
            context.close()
