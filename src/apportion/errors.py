"""Errors that a user can fix: each has the field, the value, what was expected and the fix as attributes."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any


class _Nothing:
    """The value of an error that is a plain text; it stays itself when it is pickled or copied."""

    def __reduce__(self) -> str:
        return "_NOTHING"


_NOTHING: Any = _Nothing()


class ApportionError(Exception):
    """Base of every error that the command line shows as one message without a traceback (exit code 2).

    Attributes:
        field: the setting, column or tensor that is wrong. got: its value. expected: what would be right, in words.
        fix: what to do about it. row, token: the rollout and the token it is about, where it is about one.
        process: the process it was raised in, where that is another one. saved: where its rollouts were saved.

    An error made with `field` alone is a plain text.
    """

    # of the class, for a subclass of the user's that does not call `__init__`
    field: str = ""
    got: Any = _NOTHING
    expected: str = ""
    fix: str = ""
    row: int | None = None
    token: int | None = None
    process: int | None = None
    saved: str = ""

    def __init__(
        self,
        field: str = "",
        got: object = _NOTHING,
        expected: str = "",
        fix: str = "",
        *,
        row: int | None = None,
        token: int | None = None,
    ) -> None:
        self.field, self.got, self.expected, self.fix = field, got, expected, fix
        self.row, self.token = row, token
        # not by super(): an OSError would take two arguments for its number and its text
        self.args = (field,) if got is _NOTHING else (field, got, expected, fix)

    @property
    def has_parts(self) -> bool:
        """Whether it has a value, an expectation and a fix, and is more than a text."""
        return self.got is not _NOTHING

    def __str__(self) -> str:
        if self.has_parts:
            text = format_problem(self.field, self.got, self.expected, self.fix, row=self.row, token=self.token)
        else:
            text = self.field or Exception.__str__(self)
        where = "" if self.process is None else f"process {self.process}: "
        return f"{where}{text} {self.saved}".rstrip()

    def to_data(self) -> dict[str, Any]:
        """Return the error as plain values for another process; `got` as it is shown."""
        found: dict[str, Any] = {
            "kind": type(self).__name__,
            "field": self.field or Exception.__str__(self),
            "expected": self.expected,
            "fix": self.fix,
        }
        found |= {"row": self.row, "token": self.token, "saved": self.saved}
        return found | ({"got": repr(self.got)} if self.has_parts else {})


class Shown(str):
    """A value that only its repr is known of: it is shown as it stands."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def from_data(data: Mapping[str, Any], process: int) -> ApportionError:
    """Return the error of another process that `to_data` described; a class of the user's becomes an ApportionError."""
    known = globals().get(data["kind"])
    kind = known if isinstance(known, type) and issubclass(known, ApportionError) else ApportionError
    got = Shown(data["got"]) if "got" in data else _NOTHING
    error = kind(data["field"], got, data["expected"], data["fix"], row=data["row"], token=data["token"])
    error.process, error.saved = process, data["saved"]
    return error


class ConfigError(ApportionError, ValueError):
    """A setting, flag, method name or combination that cannot work."""


class DataError(ApportionError, ValueError):
    """A row, file or column of data that cannot be used."""


class ModelError(ApportionError, ValueError):
    """A model or tokenizer that is absent, incomplete or unsuited to its role."""


class ScoreError(ApportionError, ValueError):
    """A reward model returned something that is not a score; it is never turned into a number."""


class UserCodeError(ApportionError, RuntimeError):
    """A user-supplied function raised, or did not return in time; the run folder holds its traceback."""


class MonitorError(ApportionError, ArithmeticError):
    """A monitor stopped the run: updates that are not finite, or a monitor that is set to stop."""


class DiskError(ApportionError, OSError):
    """A run folder that cannot be written to."""


class HubError(ApportionError, OSError):
    """A finished model that could not be uploaded; it is in the run folder all the same."""


class Interrupted(Exception):
    """A run that a signal ended after its batch, with a checkpoint: no error, and it can be resumed.

    Attributes:
        code: the exit code that says so, 128 and the signal's number.
    """

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def format_problem(
    field: str, got: object, expected: str, fix: str, *, row: int | None = None, token: int | None = None
) -> str:
    """Return the one shape of every error and warning: field, value, expectation, fix."""
    where = "" if row is None else f" of rollout {row}"
    where += "" if token is None else f", token {token}"
    return f"{field}{where}: got {got!r}; expected {expected}. {fix}"


def unknown_name(field: str, name: str, known: Iterable[str]) -> ConfigError:
    """Return the error for a name that is not in `known`, with the nearest ones suggested."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    hint = f"Did you mean {' or '.join(repr(n) for n in near)}?" if near else "Use one of the names listed."
    return ConfigError(field, name, "one of " + ", ".join(names), hint)


def check_fraction(field: str, value: float, fix: str = "0 is sparse, 1 spreads the whole score.") -> float:
    """Return `value` if it lies in [0, 1]; raise ConfigError that names `field` otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise ConfigError(field, value, "a number in [0, 1]", fix)
    return float(value)


def check_number(
    field: str, value: object, least: float, fix: str = "See its docstring.", *, most: float = math.inf
) -> float:
    """Return `value` if it is a finite number in [least, most]; raise ConfigError that names `field` otherwise."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not least <= value <= most:  # type: ignore[operator]
        expected = f"a finite number >= {least:g}" if most == math.inf else f"a number in [{least:g}, {most:g}]"
        raise ConfigError(field, value, expected, fix)
    return float(value)  # type: ignore[arg-type]


def check_whole(field: str, value: object, least: int, fix: str = "See its docstring.") -> int:
    """Return `value` if it is a whole number >= `least`; raise ConfigError that names `field` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(field, value, f"a whole number >= {least}", fix)
    return value


def check_flag(field: str, value: object, fix: str = "Write it without quotes.") -> bool:
    """Return `value` if it is true or false; raise ConfigError that names `field` otherwise."""
    if not isinstance(value, bool):
        raise ConfigError(field, value, "true or false", fix)
    return value
