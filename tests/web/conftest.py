"""A real browser for the tests of pages: offline, and any request beyond the page's own file is a failure."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


def _absent(reason: str) -> None:
    if os.environ.get("APPORTION_REQUIRE_BROWSER") == "1":
        pytest.fail(f"APPORTION_REQUIRE_BROWSER=1, but {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A Chromium from the system; the test is skipped without one, or fails under APPORTION_REQUIRE_BROWSER=1."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _absent("playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        _absent(f"none of {', '.join(BROWSERS)} is installed")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield running
        running.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """A function (path, expect="", **context options) -> page; at the end the test fails on console errors or requests.

    `expect` names the console errors that a page must show; then its absence is the failure.
    """
    contexts: list[Any] = []
    complaints: list[str] = []
    expected: list[str] = []

    def on_request(request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            complaints.append(f"request to {request.url}")

    def on_console(entry: Any) -> None:
        if entry.type in ("error", "warning"):
            complaints.append(f"console {entry.type}: {entry.text}")

    def open_(path: Path, expect: str = "", **options: Any) -> Any:
        expected.extend([expect] if expect else [])
        context = browser.new_context(offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", on_request)
        page.on("console", on_console)
        page.on("pageerror", lambda error: complaints.append(f"uncaught: {error}"))
        page.goto(path.resolve().as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()
    for text in expected:
        found = [c for c in complaints if text in c]
        assert found, f"no console error with {text!r}; came: {complaints}"
        complaints = [c for c in complaints if c not in found]
    assert complaints == []
