"""A real browser for tests: Debian's Chromium, driven by playwright; a stated skip without them."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@contextmanager
def chromium(*flags: str) -> Iterator[Any]:
    """Yield a browser started with these flags; the test is skipped where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *flags])
        yield browser
        browser.close()


class Watched:
    """What a page asks for and says, which tests assert to be nothing unexpected."""

    def __init__(self, page: Any) -> None:
        self.requests: list[str] = []
        self.said: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.said.append(f"error: {error}"))

    def assert_quiet(self, *allowed: str) -> None:
        """Assert that no error was said and nothing was asked for outside of the allowed places."""
        assert self.said == []
        own = (*allowed, "data:", "blob:")
        assert [url for url in self.requests if not url.startswith(own)] == []


AXE = next((Path(__file__).parent / "axe").glob("axe-core-*.min.js"))
"""axe-core (MPL-2.0), which finds mistakes that keep people with disabilities from using a page."""


def accessibility_findings(page: Any) -> list[str]:
    """Return the serious and critical findings of axe-core in an open page."""
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("async () => (await axe.run()).violations")
    return [
        f"{entry['id']}: {node['html'][:200]}"
        for entry in found
        if entry["impact"] in ("serious", "critical")
        for node in entry["nodes"]
    ]
