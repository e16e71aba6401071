"""The shape of the package in figures, each with its limit: `python -m tools.shape` (`make shape`).

Exit code 1 where a limit is exceeded; the offenders are listed below the table.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import grimp
from tools import words

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "apportion"
LOOP = SOURCE / "stages" / "rl" / "train.py"
SHOWN = 12  # offenders of a figure that are listed

# The mathematics of one PPO batch: the files that a reader opens for its formulas, and the parts that these share.
# `ppo_files` derives the same set from the code; a difference is an error.
PPO = frozenset({
    "stages/rl/train.py",
    "stages/rl/update.py",
    "credit/sparse.py",
    "credit/kl_penalty.py",
    "segments/tokens.py",
    "advantages/gae.py",
    "losses/ppo.py",
    "losses/value.py",
})  # fmt: skip
PPO_SHARED = frozenset({"credit/__init__.py", "losses/_ratios.py", "masking.py"})
MATHEMATICS = ("credit", "segments", "advantages", "losses", "masking")


class Figure(NamedTuple):
    """One row of the table: a number, its limit (None: only shown), and what counts towards it."""

    name: str
    value: float
    limit: float | None
    offenders: list[str]

    @property
    def exceeded(self) -> bool:
        """Whether the number is over its limit."""
        return self.limit is not None and self.value > self.limit


def main() -> int:
    """Print the table; return 1 where a limit is exceeded."""
    figures = [figure for measure in MEASURES for figure in measure()]
    width = max(len(figure.name) for figure in figures)
    print(f"{'':{width}}   number    limit")
    for name, value, limit, _ in figures:
        print(f"{name:{width}} {value:>8,.0f} {'–' if limit is None else f'{limit:,.0f}':>8}")
    exceeded = [figure for figure in figures if figure.exceeded]
    for figure in exceeded:
        print(f"\n{figure.name}: {figure.value:,.0f}, limit {figure.limit:,.0f}")
        print("\n".join(f"  {line}" for line in figure.offenders[:SHOWN]))
        if len(figure.offenders) > SHOWN:
            print(f"  … and {len(figure.offenders) - SHOWN} more")
    return int(bool(exceeded))


# --- files and folders ------------------------------------------------------------------------------------------------


def python_files(folder: Path = SOURCE) -> list[Path]:
    """Return the Python files below `folder`, sorted."""
    return sorted(folder.rglob("*.py"))


def relative(path: Path) -> str:
    """Return the path within the package, or within the checkout."""
    return str(path.relative_to(SOURCE if path.is_relative_to(SOURCE) else ROOT))


def length(path: Path) -> int:
    """Return the number of lines of a file."""
    return path.read_text(encoding="utf-8").count("\n")


def folders() -> Iterator[Figure]:
    """Loose files at the package's root, the fullest folder, circles within folders."""
    loose = [relative(path) for path in SOURCE.glob("*.py")]
    yield Figure("loose .py files at the package root", len(loose), 12, loose)
    everywhere = [path for top in (SOURCE, ROOT / "benchmarks", ROOT / "tools") for path in python_files(top)]
    counts = {folder: sum(path.parent == folder for path in everywhere) for folder in {p.parent for p in everywhere}}
    fullest = sorted(counts.items(), key=lambda item: -item[1])
    names = [f"{relative(folder)}: {count}" for folder, count in fullest if count > 14]
    yield Figure("most .py files in a folder", fullest[0][1], 14, names)
    graph = grimp.build_graph("apportion")
    packages = [module for module in sorted(graph.modules) if graph.find_children(module)]
    circles = {package: graph.nominate_cycle_breakers(package) for package in packages}
    closing = [f"{a} imports {b}" for breakers in circles.values() for a, b in sorted(breakers)]
    yield Figure("import circles within folders", sum(map(bool, circles.values())), 0, closing)


def lengths() -> Iterator[Figure]:
    """Lengths of files and functions, and first lines."""
    files, trees = python_files(), {path: ast.parse(path.read_text(encoding="utf-8")) for path in python_files()}
    long = [f"{relative(path)}: {length(path)} lines" for path in files if length(path) > 400]
    yield Figure("files over 400 lines", len(long), 0, long)
    methods = [path for path in (SOURCE / "credit").glob("*.py") if not path.name.startswith("_")]
    long = [f"{relative(path)}: {length(path)} lines" for path in methods if length(path) > 100]
    yield Figure("credit methods over 100 lines", len(long), 0, long)
    long = [
        f"{relative(path)}:{node.lineno} {node.name}: {body_lines(node)} lines"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and body_lines(node) > 60
    ]
    yield Figure("functions over 60 lines", len(long), 0, long)
    bare = [relative(path) for path, tree in trees.items() if ast.get_docstring(tree) is None]
    yield Figure("files without a first line", len(bare), 0, bare)
    yield Figure("median lines of a file", median(map(length, files)), None, [])
    yield Figure("lines of the package", sum(map(length, files)), None, [])


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function without its docstring."""
    docstring = ast.get_docstring(node, clean=False)
    return (node.end_lineno or node.lineno) - node.lineno + 1 - (docstring.count("\n") + 1 if docstring else 0)


# --- the loop ---------------------------------------------------------------------------------------------------------


def loops() -> Iterator[Figure]:
    """The reinforcement-learning loop, and what the loop files of all stages import."""
    functions = [node for node in ast.parse(LOOP.read_text()).body if isinstance(node, ast.FunctionDef)]
    sizes = {f.name: body_lines(f) for f in functions if f.name in ("train", "train_batch")}
    for name, size in sizes.items():
        yield Figure(f"lines of `{name}` in {relative(LOOP)}", size, 35, [])
    names = {path: imported_names(path) for path in SOURCE.glob("stages/*/train.py")}
    counts = {path: len(imported) for path, imported in names.items()}
    over = [f"{relative(path)}: {count} names" for path, count in counts.items() if count > 40]
    yield Figure("most names imported in a loop file", max(counts.values()), 40, over)
    derived, declared = ppo_files(), PPO | PPO_SHARED
    different = [f"not declared in tools/shape.py: {name}" for name in sorted(derived - declared)]
    different += [f"declared, but not used by the loop: {name}" for name in sorted(declared - derived)]
    yield Figure("files of one PPO batch's mathematics", len(PPO), 8, sorted(PPO))
    yield Figure("  with the parts that they share", len(derived), 11, sorted(derived))
    yield Figure("  declared otherwise than derived", len(different), 0, different)


def imported_names(path: Path) -> list[str]:
    """Return the names that a file imports, `__future__` aside."""
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))]
    return [alias.name for node in imports if getattr(node, "module", "") != "__future__" for alias in node.names]


def ppo_files() -> frozenset[str]:
    """Return the files of one PPO batch's mathematics, derived from the code.

    They are the loop, the update, the methods that algorithm "ppo" names, and every file of `MATHEMATICS` that defines
    a name which one of these uses, directly or through another such file. A name that a package re-exports belongs to
    the file that defines it.
    """
    pending = [LOOP, LOOP.parent / "update.py", *recipe("ppo")]
    found: set[Path] = set()
    while pending:
        path = pending.pop()
        if path not in found:
            found.add(path)
            # a package's own functions count, the methods that it re-exports do not
            pending += [] if path.name == "__init__.py" else used_files(path)
    return frozenset(map(relative, found))


def recipe(algorithm: str) -> list[Path]:
    """Return the files of the methods that an algorithm of `algorithms.py` names."""
    from apportion.algorithms import ALGORITHMS

    named = ALGORITHMS[algorithm]
    specs = {"credit": named.credit, "segments": named.segments, "advantages": named.advantages, "losses": named.loss}
    files = []
    for folder, spec in specs.items():
        for one in spec if isinstance(spec, list) else [spec]:
            files.append(SOURCE / folder / f"{one if isinstance(one, str) else next(iter(one))}.py")
    return files


def used_files(path: Path) -> list[Path]:
    """Return the files of `MATHEMATICS` that define the names which a file imports from them, or reads off them."""
    tree, files = ast.parse(path.read_text(encoding="utf-8")), []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("apportion"):
            continue
        for alias in node.names:
            defined_in, module = definer(node.module or "", alias.name), f"{node.module}.{alias.name}"
            if defined_in != file_of(node.module or "") or file_of(module) is None:
                files.append(defined_in)
            else:  # a module: its names are read as attributes
                local = alias.asname or alias.name
                read = [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and named(n.value, local)]
                files += [definer(module, attribute) for attribute in read]
    return [file for file in files if relative(file).split("/")[0].removesuffix(".py") in MATHEMATICS]


def named(node: ast.expr, name: str) -> bool:
    """Whether an expression is the plain name `name`."""
    return isinstance(node, ast.Name) and node.id == name


def file_of(module: str) -> Path | None:
    """Return the file of a module of the package, None where there is none."""
    base = SOURCE.parent.joinpath(*module.split("."))
    return next((file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None)


def definer(module: str, name: str) -> Path:
    """Return the file that defines `name` of `module`, followed through re-exports."""
    file = file_of(module)
    assert file is not None, module
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and name in [alias.asname or alias.name for alias in node.names]:
            source = file_of(node.module or "")
            if source is not None and source != file:
                return definer(node.module or "", name)
    return file


# --- words ------------------------------------------------------------------------------------------------------------


def dialect() -> Iterator[Figure]:
    """Words of the private dialect that `tools/words.py` lists."""
    uses = [str(use) for path in words.files() for use in words.uses(path)]
    yield Figure("words of a private dialect", len(uses), 0, uses)


MEASURES: tuple[Callable[[], Iterator[Figure]], ...] = (folders, loops, lengths, dialect)

if __name__ == "__main__":
    sys.exit(main())
