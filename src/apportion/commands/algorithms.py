"""`apportion algorithms`: list algorithms, credit methods, segments, estimators and losses."""

from __future__ import annotations

import inspect

from rich.console import Console
from rich.table import Table

from apportion import advantages, credit, losses, segments
from apportion.algorithms import ALGORITHMS
from apportion.errors import ConfigError, message

ROOMS = {"credit": credit, "segments": segments, "advantages": advantages, "loss": losses}


def run(arguments: list[str]) -> int:
    """Print the tables. Takes no arguments but --help."""
    if arguments and arguments[0] not in ("-h", "--help"):
        raise ConfigError(message("argument", arguments[0], "no arguments", "Write `apportion algorithms`."))
    console = Console(markup=False)
    table = Table("algorithm", "reward of token t", "paper", title="--algorithm")
    for name, algorithm in ALGORITHMS.items():
        table.add_row(name, algorithm.formula, algorithm.paper)
    console.print(table)
    for title, module in ROOMS.items():
        table = Table("name", "settings", "what it is", title=f"--{title}")
        for name, factory in module.METHODS.items():
            settings = ", ".join(str(p).split(":")[0] + f"={p.default}" for p in _parameters(factory))
            table.add_row(name, settings or "none", _purpose(factory))
        console.print(table)
    return 0


def _purpose(factory: object) -> str:
    """Return the first line of the file that holds the method: what it is for."""
    return (inspect.getmodule(factory).__doc__ or "").split("\n")[0]  # type: ignore[union-attr]


def _parameters(factory: object) -> list[inspect.Parameter]:
    return list(inspect.signature(factory).parameters.values())  # type: ignore[arg-type]
