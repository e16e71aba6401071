"""Coverage follows the commands that tests start, and a line of a floor that nothing runs fails the check by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "coverage_floors.py"
PACKAGE = {
    "__init__.py": "",
    "masking.py": "def last(n):\n    if n > 0:\n        return n - 1\n    return None\n",
    "credit/__init__.py": "from apportion.credit.uniform import uniform\n",
    "credit/uniform.py": "def uniform(n):\n    return [1 / n] * n\n",
    "edges.py": "def main():\n    return 1\n",
}
FLOORS = '[[tool.importlinter.contracts]]\nid = "floors"\nlayers = ["edges", "credit", "masking"]\n'
PARENT = """
import os, subprocess, sys
from apportion import edges, masking
masking.last(3)
child = "from apportion.credit import uniform; uniform(2); import os; os._exit(0)"
subprocess.run([sys.executable, "-c", child], cwd="/", check=True)
if os.fork() == 0:
    masking.last(0 if {forked} else 1)
    os._exit(0)
os.wait()
"""


def measure(folder: Path, *, forked: bool) -> Path:
    """Run a program over a package of this name under the project's own settings; return the JSON of its coverage."""
    source = folder / "src" / "apportion"
    for name, text in PACKAGE.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text, encoding="utf-8")
    (folder / "program.py").write_text(PARENT.format(forked=forked), encoding="utf-8")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
    environment = kept | {"PYTHONPATH": str(folder / "src")}
    # relative, as in `make coverage`, though one process runs in another folder
    (folder / "build" / "coverage").mkdir(parents=True)
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"), encoding="utf-8")
    for command in (["run", "program.py"], ["combine", "--quiet"], ["json", "--quiet", "-o", "coverage.json"]):
        words = [sys.executable, "-m", "coverage", *command]
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "coverage.json"


def check(report: Path, floors: str) -> subprocess.CompletedProcess[str]:
    settings = report.parent / "floors.toml"
    settings.write_text(floors, encoding="utf-8")
    command = [sys.executable, str(TOOL), str(report), "--pyproject", str(settings)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return measure(tmp_path_factory.mktemp("complete"), forked=True)


def test_lines_that_only_a_subprocess_or_a_forked_process_runs_count(complete: Path) -> None:
    files = json.loads(complete.read_text(encoding="utf-8"))["files"]
    assert files["src/apportion/credit/uniform.py"]["missing_lines"] == []
    assert files["src/apportion/edges.py"]["missing_lines"] == [2]
    done = check(complete, FLOORS)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines() == ["floor 0: 4 of 4 lines run (100.0%)", "floor 1: 3 of 3 lines run (100.0%)"]


def test_a_line_that_is_never_run_is_named_with_its_file(tmp_path: Path) -> None:
    done = check(measure(tmp_path, forked=False), FLOORS)
    assert done.returncode == 1
    assert "  src/apportion/masking.py: 4" in done.stdout.splitlines()


def test_files_above_the_floors_may_miss_lines_and_a_module_that_is_gone_may_not(complete: Path) -> None:
    assert check(complete, FLOORS).returncode == 0
    assert check(complete, FLOORS.replace('"credit"', '"credit : edges"')).returncode == 1
    renamed = check(complete, FLOORS.replace('"masking"', '"masks"'))
    assert renamed.returncode == 1 and "masks: no such module" in renamed.stdout
    part = check(complete, FLOORS.replace('"credit"', '"credit.uniform"'))
    assert part.returncode == 0 and "floor 1: 2 of 2" in part.stdout
