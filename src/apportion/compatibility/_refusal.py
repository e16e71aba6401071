"""One rule on a combination: when it applies, the setting and its value, what is expected, and the fix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from apportion.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Refusal(Generic[T]):
    """One refusal. `field`, `got` and `expected` are texts, or functions of what the rule is about."""

    applies: Callable[[T], bool]
    field: str | Callable[[T], str]
    got: Callable[[T], Any]
    expected: str | Callable[[T], str]
    fix: str

    def check(self, subject: T) -> None:
        """Raise ConfigError where it applies to `subject`."""
        if self.applies(subject):
            field = self.field if isinstance(self.field, str) else self.field(subject)
            expected = self.expected if isinstance(self.expected, str) else self.expected(subject)
            raise ConfigError(field, self.got(subject), expected, self.fix)
