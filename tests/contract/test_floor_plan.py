"""One floor plan: import-linter's contract, the table of docs/architecture.md and the folders of the package agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from tools.coverage_floors import floors

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "apportion"
PYPROJECT = ROOT / "pyproject.toml"
PLAN = [{name for name in floor if name != "__main__"} for floor in floors(PYPROJECT)]


def documented() -> dict[int, set[str]]:
    """Return the names of each floor in the table of docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) [^|]*\| ([^|]*)\|", text, flags=re.MULTILINE)
    return {int(number): set(re.findall(r"`(\w+)(?:/[\w./]*|\.py)`", cell)) for number, cell in rows}


def test_the_documented_floors_are_those_of_the_contract() -> None:
    assert documented() == dict(enumerate(PLAN))


def test_every_module_of_the_package_is_on_one_floor() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.parent.name for path in PACKAGE.glob("*/__init__.py")
    }
    assert modules - {"__init__", "__main__"} == set().union(*PLAN)
    assert sum(map(len, PLAN)) == len(set().union(*PLAN))


def test_stages_of_the_contract_are_the_folders_of_stages() -> None:
    contracts = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["id"] == "stages")
    named = {name.strip() for layer in layers for name in layer.split("|")}
    stages = PACKAGE / "stages"
    assert named == {path.stem for path in [*stages.glob("*.py"), *stages.glob("*/")]} - {"__init__", "__pycache__"}
