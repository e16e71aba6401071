"""Rule `regex`: the response matches a regular expression."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from apportion.errors import ConfigError, check_flag
from apportion.rewards.rule import Rule, each


def matches(*, pattern: str, whole: bool = True) -> Rule:
    """Return 1 where the response matches `pattern` (Python's `re`), 0 otherwise.

    Args:
        whole: match the whole response without the white space around it; false finds the pattern anywhere in it.

    Raises:
        ConfigError: no valid pattern.
    """
    check_flag("rewards.regex.whole", whole)
    try:
        compiled = re.compile(pattern)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        fix = "Write it as Python's re does; in YAML in single quotes."
        raise ConfigError("rewards.regex.pattern", pattern, f"a regular expression ({error})", fix) from error

    def score(text: str, row: Mapping[str, Any]) -> float:
        found = compiled.fullmatch(text.strip()) if whole else compiled.search(text)
        return float(found is not None)

    return Rule(each(score))
