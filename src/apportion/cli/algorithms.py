"""`apportion algorithms`: list algorithms, credit methods, segments, estimators and losses."""

from __future__ import annotations

import inspect
from typing import Any

from rich.console import Console
from rich.table import Table

from apportion import advantages, credit, losses, registry, segments
from apportion.algorithms import ALGORITHMS
from apportion.config import RLConfig
from apportion.errors import ConfigError

WHY = (
    "{default} is the default: of the credits tried with the demo's reward model it learned most, and as much as PPO "
    "over all weights with a critic that begins as the reward model (docs/algorithms.md, LOG.md). It wants a reward "
    "model that scores unfinished text well; where each start of a text is a forward of its own (an encoder, another "
    "tokenizer), abc and ppo are faster."
)
FIELDS = {"credit": credit, "segments": segments, "advantages": advantages, "loss": losses}


def run(arguments: list[str]) -> int:
    """Print the tables; takes no arguments."""
    if arguments and arguments[0] not in ("-h", "--help"):
        raise ConfigError("argument", arguments[0], "no arguments", "Write `apportion algorithms`.")
    console = Console(markup=False)
    default = RLConfig.model_fields["algorithm"].default
    table = Table("algorithm", "what it does", "paper", title="--algorithm", caption=WHY.format(default=default))
    for name, algorithm in ALGORITHMS.items():
        table.add_row(f"{name} (default)" if name == default else name, algorithm.formula, algorithm.paper)
    console.print(table)
    table = Table("algorithm", *FIELDS, title="the four choices of each")
    for name, algorithm in ALGORITHMS.items():
        table.add_row(name, *(one_line(field, getattr(algorithm, field)) for field in FIELDS))
    console.print(table)
    for title, module in FIELDS.items():
        table = Table("name", "settings", "what it is", title=f"--{title}")
        for name, factory in module.METHODS.items():
            settings = ", ".join(str(p).split(":")[0] + f"={p.default}" for p in _parameters(factory))
            table.add_row(name, settings or "none", _purpose(factory))
        console.print(table)
    return 0


def one_line(field: str, spec: Any) -> str:
    """Return a choice in one line: names joined by +, settings in brackets (not those of a KL penalty)."""
    parts = []
    for name, kwargs in registry.parse(field, spec):
        settings = ", ".join(f"{key}={value}" for key, value in kwargs.items())
        parts.append(f"{name}({settings})" if settings and name != "kl_penalty" else name)
    return " + ".join(parts)


def _purpose(factory: object) -> str:
    """Return the first line of the method's module docstring."""
    return (inspect.getmodule(factory).__doc__ or "").split("\n")[0]


def _parameters(factory: object) -> list[inspect.Parameter]:
    return list(inspect.signature(factory).parameters.values())  # type: ignore[arg-type]
