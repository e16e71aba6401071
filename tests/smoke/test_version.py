"""The version stands in one place, and everything else reads it there or is held equal to it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

import apportion

ROOT = Path(__file__).parents[2]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_package_states_its_version_once() -> None:
    literal = re.compile(rf"""["']{re.escape(apportion.__version__)}["']""")
    files = [*(ROOT / "src").rglob("*.py"), ROOT / "pyproject.toml"]
    holders = {p.relative_to(ROOT).as_posix() for p in files if literal.search(p.read_text(encoding="utf-8"))}
    assert holders == {"src/apportion/__init__.py"}
    project = tomllib.loads(text("pyproject.toml"))
    assert "version" in project["project"]["dynamic"] and "version" not in project["project"]
    assert project["tool"]["hatch"]["version"]["path"] == "src/apportion/__init__.py"


def test_the_command_prints_it() -> None:
    done = subprocess.run([sys.executable, "-m", "apportion", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"apportion {apportion.__version__}\n"


def test_the_citation_file_carries_it() -> None:
    """CITATION.cff of format 1.2.0: the keys that the format demands, and the project's own facts."""
    citation = yaml.safe_load(text("CITATION.cff"))
    project = tomllib.loads(text("pyproject.toml"))["project"]
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert (citation["cff-version"], citation["type"]) == ("1.2.0", "software")
    assert citation["version"] == apportion.__version__
    assert citation["license"] == project["license"] and citation["title"].startswith(project["name"])
    assert citation["repository-code"] == project["urls"]["Repository"]
    assert [a["name"] for a in citation["authors"]] == [a["name"] for a in project["authors"]]


def test_the_changelog_has_a_section_for_it_and_one_for_what_comes_next() -> None:
    """The format of Keep a Changelog 1.1.0: newest first, six kinds of change, no kind twice in a section."""
    headings = re.findall(r"^## \[?([^\]\s]+)\]?(?: - (\S+))?", text("CHANGELOG.md"), flags=re.MULTILINE)
    assert [name for name, _ in headings[:2]] == ["Unreleased", apportion.__version__]
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for section in re.split(r"^## ", text("CHANGELOG.md"), flags=re.MULTILINE)[1:]:
        used = re.findall(r"^### (.+)$", section, flags=re.MULTILINE)
        assert used and set(used) <= kinds and len(used) == len(set(used)), section[:40]
