"""Errors a user can mend: each names the field, what came, what was expected and how to put it right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ApportionError(Exception):
    """Base of every error that the command line shows as one message without a traceback (exit code 2)."""


class ConfigError(ApportionError, ValueError):
    """A setting, flag, method name or combination that cannot work."""


class DataError(ApportionError, ValueError):
    """A row, file or column of data that cannot be used."""


class ModelError(ApportionError, ValueError):
    """A model or tokenizer that is absent, incomplete or unsuited to its role."""


class ScoreError(ApportionError, ValueError):
    """A reward model returned something that is not a score; it is never turned into a number."""


class UserCodeError(ApportionError, RuntimeError):
    """A function of the user's raised, or did not return in time; the run folder holds its traceback."""


class GuardError(ApportionError, ArithmeticError):
    """A guard stopped the run: updates that are not finite, or a watch that was told to stop."""


class DiskError(ApportionError, OSError):
    """A run folder that cannot be written to."""


class Interrupted(Exception):
    """A run that a signal ended after its batch, with a checkpoint: no error, and it can go on.

    Attributes:
        code: the exit code that says so, 128 and the signal's number.
    """

    def __init__(self, said: str, code: int) -> None:
        super().__init__(said)
        self.code = code


def message(field: str, came: object, expected: str, mend: str) -> str:
    """Return the one shape of every error text: field, value, expectation, mend."""
    return f"{field}: got {came!r}; expected {expected}. {mend}"


def unknown_name(field: str, name: str, known: Iterable[str]) -> str:
    """Return the error text for a name that is not in `known`, with the nearest ones suggested."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    hint = f"Did you mean {' or '.join(repr(n) for n in near)}?" if near else "Use one of the names listed."
    return message(field, name, "one of " + ", ".join(names), hint)


def check_fraction(field: str, value: float, mend: str = "0 is sparse, 1 spreads the whole score.") -> float:
    """Return `value` if it lies in [0, 1]; raise ConfigError that names `field` otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise ConfigError(message(field, value, "a number in [0, 1]", mend))
    return float(value)
