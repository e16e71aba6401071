"""Checks the budgets: files of 400 lines, functions of 60, credit methods of 100, one line of purpose each."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

FILE, FUNCTION, METHOD = 400, 60, 100
SOURCE = Path(__file__).parent.parent / "src" / "apportion"


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function without its docstring."""
    docstring = ast.get_docstring(node, clean=False)
    return (node.end_lineno or node.lineno) - node.lineno + 1 - (docstring.count("\n") + 1 if docstring else 0)


def problems(path: Path) -> list[str]:
    """Return what `path` breaks, as lines of text."""
    text = path.read_text(encoding="utf-8")
    tree, count = ast.parse(text), text.count("\n")
    limit = METHOD if path.parent.name == "credit" and path.name not in ("__init__.py", "redistribute.py") else FILE
    found = [f"{path}: {count} lines ({limit} at most)"] if count > limit else []
    if ast.get_docstring(tree) is None:
        found.append(f"{path}: no first line that says what it is for")
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and body_lines(node) > FUNCTION:
            found.append(f"{path}:{node.lineno} {node.name}: {body_lines(node)} lines ({FUNCTION} at most)")
    return found


if __name__ == "__main__":
    bad = [line for path in sorted(SOURCE.rglob("*.py")) for line in problems(path)]
    print("\n".join(bad) if bad else "size budget: all files and functions within it")
    sys.exit(bool(bad))
