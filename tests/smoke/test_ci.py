"""Hosted CI runs what the README and CONTRIBUTING say, and the commit hooks stop what `make check` would."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
HOOKS = ROOT / ".pre-commit-config.yaml"


@pytest.fixture(scope="module")
def workflow() -> dict[Any, Any]:
    return dict(yaml.safe_load(WORKFLOW.read_text(encoding="utf-8")))


def commands(job: dict[str, Any]) -> list[str]:
    return [line.strip() for step in job["steps"] for line in step.get("run", "").splitlines()]


def test_tests_and_checks_are_jobs_of_their_own_that_run_the_documented_commands(workflow: dict[Any, Any]) -> None:
    jobs = workflow["jobs"]
    assert set(jobs) == {"test", "check"}
    for name, page in (("test", "README.md"), ("check", "CONTRIBUTING.md")):
        assert commands(jobs[name])[-1] == f"make {name}"
        blocks = re.findall(r"^```\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
        assert any(f"make {name}" in block.splitlines() for block in blocks), page
        assert re.search(rf"^{name}: ", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_every_supported_python_is_in_the_matrix(workflow: dict[Any, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [c.rpartition(" ")[2] for c in project["classifiers"] if re.search(r":: 3\.\d+$", c)]
    for job in workflow["jobs"].values():
        assert job["strategy"]["matrix"]["python"] == named
        assert job["container"].startswith("python:${{ matrix.python }}-")
    assert project["requires-python"] == f">={named[0]}"


def test_the_browser_is_demanded_as_in_the_local_script(workflow: dict[Any, Any]) -> None:
    local = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "APPORTION_REQUIRE_BROWSER=1" in local
    assert workflow["jobs"]["test"]["env"]["APPORTION_REQUIRE_BROWSER"] == "1"
    assert any("apt-get install" in c and c.endswith(" chromium") for c in commands(workflow["jobs"]["test"]))


def test_it_may_only_read_and_holds_no_secret(workflow: dict[Any, Any]) -> None:
    assert workflow["permissions"] == {"contents": "read"}
    assert not any("permissions" in job for job in workflow["jobs"].values())
    assert "secrets" not in WORKFLOW.read_text(encoding="utf-8")
    triggers = workflow[True]  # YAML 1.1 reads the key `on` as a boolean
    assert set(triggers) == {"push", "pull_request"}


def test_actions_are_pinned_to_commits(workflow: dict[Any, Any]) -> None:
    used = [step["uses"] for job in workflow["jobs"].values() for step in job["steps"] if "uses" in step]
    assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action) for action in used), used


def repository(folder: Path) -> dict[str, str]:
    """Make a git repository with this project's hooks and settings; return the environment for its commands."""
    names = {f"GIT_{who}_{what}": "test@invalid" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    kept = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    environment = kept | names | {"PRE_COMMIT_HOME": str(folder.parent / "cache")}
    subprocess.run(["git", "init", "-q", str(folder)], check=True, env=environment)
    (folder / ".venv").symlink_to(sys.prefix)
    for path in (HOOKS, ROOT / "pyproject.toml"):
        shutil.copy(path, folder)
    install = [".venv/bin/pre-commit", "install"]
    subprocess.run(install, cwd=folder, check=True, env=environment, capture_output=True)
    return environment


def commit(folder: Path, environment: dict[str, str], name: str, text: str) -> subprocess.CompletedProcess[str]:
    (folder / name).write_text(text, encoding="utf-8")
    subprocess.run(["git", "add", HOOKS.name, name], cwd=folder, check=True, env=environment)
    command = ["git", "commit", "-m", name]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_a_commit_is_stopped_and_fixed_by_the_hooks_without_a_network(tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    environment = repository(folder)
    clean = commit(folder, environment, "good.py", '"""A module."""\n')
    assert clean.returncode == 0, clean.stdout + clean.stderr
    spaced = commit(folder, environment, "notes.md", "a line \nand no end")
    assert spaced.returncode != 0 and (folder / "notes.md").read_text() == "a line\nand no end\n"
    assert commit(folder, environment, "notes.md", (folder / "notes.md").read_text()).returncode == 0
    wrong = commit(folder, environment, "bad.py", '"""A module."""\n\nprint(undefined,  1)\n')
    assert wrong.returncode != 0 and "F821" in wrong.stdout + wrong.stderr
    assert "print(undefined, 1)" in (folder / "bad.py").read_text(), "the formatter did not run"


def test_the_hooks_are_the_checks_of_make_and_programs_of_the_environment() -> None:
    hooks = yaml.safe_load(HOOKS.read_text(encoding="utf-8"))["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]
    entries = [hook["entry"] for repo in hooks for hook in repo["hooks"]]
    assert all((Path(sys.prefix) / "bin" / entry.split()[0].rpartition("/")[2]).is_file() for entry in entries)
    check = re.search(r"^check:.*?\n\n", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M | re.S)
    assert check is not None
    for program in ("ruff check", "ruff format", "mypy", "lint-imports"):
        assert program in check[0] and any(f"/{program}" in entry for entry in entries)
