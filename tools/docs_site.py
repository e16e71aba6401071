"""MkDocs hook: pages from the repository's root, their links, patterns in the navigation, every factory's reference."""

from __future__ import annotations

import ast
import posixpath
import re
import tomllib
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {  # files of the root that are pages of the site as well
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "LOG.md": "log.md",
    "README.md": "overview.md",
}
FACTORIES = re.compile(r"^<!-- factories: (\w+) -->$", flags=re.MULTILINE)
FENCE = re.compile(r"(^ *```.*?^ *```$)", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?![a-z]+:|#|/)([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the root's pages, and replace the navigation's patterns by the pages that they stand for."""
    for name, uri in PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / name).read_text(encoding="utf-8")))
    config.nav = expanded(config.nav, [file.src_uri for file in files.documentation_pages()])
    return files


def expanded(nav: list[Any], pages: list[str]) -> list[Any]:
    """Return `nav` with each pattern replaced by the pages that match it, sorted, and that no other entry names."""
    named = {entry for entry in _entries(nav) if "*" not in entry}

    def expand(value: Any) -> Any:
        if isinstance(value, dict):
            return {title: expand(inner) for title, inner in value.items()}
        if not isinstance(value, list):
            return value
        out: list[Any] = []
        for inner in value:
            if isinstance(inner, str) and "*" in inner:
                found = [p for p in sorted(pages) if _matches(p, inner) and p not in named]
                named.update(found)
                out += found
            else:
                out.append(expand(inner))
        return out

    return list(expand(nav))


def _matches(page: str, pattern: str) -> bool:
    path = PurePosixPath(page)
    return path.parent == PurePosixPath(pattern).parent and path.match(pattern)


def _entries(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [entry for part in parts for entry in _entries(part)]


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the page's Markdown: its links work on the site as in the repository, and factories are filled in."""
    markdown = FACTORIES.sub(lambda match: reference(match[1]), markdown)
    uri = page.file.src_uri
    source = {site: name for name, site in PAGES.items()}.get(uri, f"docs/{uri}")

    def replace(match: re.Match[str]) -> str:
        return f"]({target(match[1], source, uri)}{match[2] or ''})"

    parts = FENCE.split(markdown)
    return "".join(part if part.lstrip().startswith("```") else LINK.sub(replace, part) for part in parts)


def reference(package: str) -> str:
    """Return what mkdocstrings reads for each factory of a package: public, and named like its file.

    They are found by file since `apportion.credit.attention` is a module to a reader of the source, and the function to
    whoever imports it.
    """
    folder = ROOT / "src" / "apportion" / package
    public = _public(folder / "__init__.py")
    names = [path.stem for path in sorted(folder.glob("*.py")) if path.stem in public and _defines(path, path.stem)]
    return "\n\n".join(f"::: apportion.{package}.{n}.{n}\n    options:\n      heading_level: 3" for n in names)


def _public(path: Path) -> set[str]:
    """Return the names in a module's `__all__`."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return set(ast.literal_eval(node.value))
    return set()


def _defines(path: Path, name: str) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body)


def target(link: str, source: str, uri: str) -> str:
    """Return where `link`, written in the repository's file `source`, leads from the site's page `uri`.

    A link into docs/ or to a page of the root stays on the site; every other file of the repository is on its host.
    """
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    inside = PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
    if inside is not None:
        return posixpath.relpath(inside, posixpath.dirname(uri) or ".")
    if not (ROOT / path).exists():
        return link  # left to the strict build, which names it
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return f"{project['urls']['Repository']}/blob/HEAD/{path}"


def on_post_build(*, config: MkDocsConfig) -> None:
    """Write the search index as a script too, which the theme looks for where a page is opened as a file."""
    index = Path(config.site_dir) / "search" / "search_index.json"
    script = f"var __index = {index.read_text(encoding='utf-8')}"
    index.with_suffix(".js").write_text(script, encoding="utf-8")
