"""The documentation's site: built without a warning, complete, with links that lead somewhere, and silent when read."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

from apportion import advantages, credit, losses, segments

ROOT = Path(__file__).parents[2]
PACKAGES = {"credit": credit, "segments": segments, "advantages": advantages, "losses": losses}
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


class Reader(HTMLParser):
    """Collects a page's anchors, links and what a browser would fetch for it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.ids.add(found.get("id", ""))
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if FETCHED.get(tag) in found and found.get("rel") not in ("next", "prev", "canonical"):
            self.fetched.append(found[FETCHED[tag]])


def build(folder: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(config),
        "--site-dir",
        str(folder),
    ]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Reader]:
    return {path: Reader(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def test_every_file_of_the_documentation_is_a_page(site: Path) -> None:
    written = {p.relative_to(ROOT / "docs") for p in (ROOT / "docs").rglob("*.md")}
    built = {p.relative_to(site) for p in site.rglob("*.html")}
    wanted = {p.parent / ("index.html" if p.name == "README.md" else f"{p.stem}.html") for p in written}
    assert wanted <= built
    assert {Path(f"{name}.html") for name in ("overview", "changelog", "contributing", "log")} <= built


def test_every_page_is_in_the_navigation(site: Path, pages: dict[Path, Reader]) -> None:
    home = pages[site / "index.html"]
    reached = {(site / unquote(urldefrag(link).url)).resolve() for link in home.links if not urlsplit(link).scheme}
    assert [p.name for p in pages if p.resolve() not in reached and p.name != "404.html"] == []


def test_every_public_method_is_in_the_reference(site: Path, pages: dict[Path, Reader]) -> None:
    for package, module in PACKAGES.items():
        ids = pages[site / "reference" / f"{package}.html"].ids
        for name, factory in module.METHODS.items():
            assert f"{factory.__module__}.{name}" in ids, name
    ids = pages[site / "reference" / "types.html"].ids
    assert {f"apportion.types.{n}" for n in ("Rollouts", "Credit", "Advantages", "PolicyLoss")} <= ids


def test_links_lead_to_pages_and_anchors_that_exist(site: Path, pages: dict[Path, Reader]) -> None:
    by_path = {path.resolve(): reader for path, reader in pages.items()}
    broken = []
    for path, reader in pages.items():
        for link in reader.links:
            address, anchor = urldefrag(link)
            if urlsplit(link).scheme or link.startswith("/") or path.name == "404.html":
                continue
            target = (path.parent / unquote(address)).resolve() if address else path.resolve()
            if not target.is_file() or (anchor and target in by_path and unquote(anchor) not in by_path[target].ids):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []


def test_nothing_that_a_page_fetches_is_elsewhere(site: Path, pages: dict[Path, Reader]) -> None:
    away = [(path.name, url) for path, reader in pages.items() for url in reader.fetched if urlsplit(url).netloc]
    assert away == []
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(https?:)?//|@import", style.read_text(encoding="utf-8")), style.name


def test_a_file_that_is_not_there_and_an_unknown_anchor_fail_the_build(tmp_path: Path) -> None:
    """The build is strict: without this, a site full of broken links would pass the tests above it."""
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("# Home\n\n[gone](../gone.md) and [lost](other.md#lost)\n", encoding="utf-8")
    (docs / "other.md").write_text("# Other\n", encoding="utf-8")
    lines = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[0]
    config = tmp_path / "mkdocs.yml"
    hook = f"hooks: [{ROOT / 'tools' / 'docs_site.py'}]"
    config.write_text(re.sub(r"^hooks: .*$", hook, lines, flags=re.MULTILINE) + "\nnav: ['*.md']\n", encoding="utf-8")
    (docs / "assets").mkdir()
    done = build(tmp_path / "site", config)
    assert done.returncode != 0
    assert "gone.md" in done.stderr and "#lost" in done.stderr


@pytest.mark.parametrize("name", ["index", "glossary", "reference/credit", "methods/credit-attention"])
def test_a_reader_is_shown_the_page_and_the_browser_asks_nobody(
    site: Path, open_page: Callable[..., Any], name: str
) -> None:
    page = open_page(site / f"{name}.html", viewport={"width": 1200, "height": 900})
    assert page.locator("h1").first.is_visible()
    page.wait_for_load_state("networkidle")
    narrow = open_page(site / f"{name}.html", viewport={"width": 380, "height": 800})
    width = narrow.evaluate("document.documentElement.scrollWidth")
    assert width <= 380, f"{name} is {width} px wide on a screen of 380"


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """Serve the site on this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_page_is_found_by_the_search_and_only_the_site_is_asked(address: str, browser: Any) -> None:
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page = context.new_page()
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.goto(f"{address}/index.html")
    page.locator(".md-search__input").click()
    page.keyboard.type("glossary")
    hit = page.locator(".md-search-result__link[href*='glossary']").first
    hit.wait_for(timeout=20_000)
    hit.click()
    page.wait_for_url("**/glossary.html*")
    context.close()
    assert [url for url in requested if not url.startswith((address, "data:", "blob:"))] == []
