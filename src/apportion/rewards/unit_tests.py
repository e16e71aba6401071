"""Rule `tests`: a program in the response passes the unit tests in a column, in a sandbox."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from apportion.errors import ConfigError, DataError, check_flag, check_number
from apportion.rewards.rule import Rule, cell
from apportion.rewards.sandbox import NoSandbox, checked, passed

FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
AT_ONCE = 4  # processes; each has one thread


def unit_tests(
    *,
    column: str = "tests",
    seconds: float = 5.0,
    memory: float = 512.0,
    partial: bool = False,
    python: Any = None,
) -> Rule:
    """Return 1 where the response's program passes every test in `column`, 0 otherwise.

    The program is the last ```python block, or the whole response without one. A test is Python code that raises where
    it fails, such as `assert add(1, 2) == 3`; the column holds a list of tests, or a text with one. Program and tests
    run in a process of their own that reaches no file but Python's libraries, no network and no other process.

    Args:
        seconds: that a response's program and tests may take. memory: megabytes that they may use.
        partial: the share of the tests that pass, instead of all or nothing.
        python: a command, as a list, that runs Python in a sandbox of your own; null uses the built-in one.

    Raises:
        ConfigError: a setting out of its range, or there is no sandbox here: programs of a model run in nothing else.
    """
    check_flag("rewards.tests.partial", partial)
    limits: dict[str, Any] = {"seconds": check_number("rewards.tests.seconds", seconds, 0.1)}
    limits["memory"] = check_number("rewards.tests.memory", memory, 64)
    if python is not None and not (isinstance(python, list) and python and all(isinstance(w, str) for w in python)):
        fix = "Example: [docker, run, -i, --rm, --network=none, 'python:3.12-slim', python]."
        raise ConfigError("rewards.tests.python", python, "a command as a list of words, or null", fix)
    limits["python"] = python
    _check_sandbox(limits)

    def tests_of(row: Mapping[str, Any]) -> list[str]:
        value = cell("tests", row, column)
        tests = [value] if isinstance(value, str) else value
        if (
            not isinstance(tests, Sequence)
            or not tests
            or not all(isinstance(one, str) and one.strip() for one in tests)
        ):
            fix = "Write a list of assert statements."
            raise DataError(f"prompts, column {column!r}", f"{value!r:.60}", "a list of tests as text", fix)
        return list(tests)

    def score(texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
        def one(place: int) -> float:
            tests = tests_of(rows[place])
            count = checked(program_of(texts[place]), tests, place, **limits)
            return count / len(tests) if partial else float(count == len(tests))

        with ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as pool:
            return list(pool.map(one, range(len(texts))))

    def check(row: Mapping[str, Any]) -> None:
        tests_of(row)

    return Rule(score, frozenset({column}), check)


def program_of(text: str) -> str:
    """Return the last fenced block of Python in a response, the response itself where it has none."""
    blocks = FENCE.findall(text)
    return str(blocks[-1]) if blocks else text


def _check_sandbox(limits: Mapping[str, Any]) -> None:
    """Raise ConfigError where a program cannot be run in the sandbox, tried on a sound and on a failing test."""
    fix = "Use Linux 5.13 or later (x86_64 or aarch64), or set rewards.tests.python to a sandbox of your own."
    try:
        count = passed("one = 1", ["assert one == 1", "assert one == 2"], **dict(limits) | {"seconds": 5.0})
    except NoSandbox as error:
        raise ConfigError("rewards.tests", f"no sandbox ({error})", "one that programs can be run in", fix) from error
    if count != 1:
        got = f"a sandbox in which {count} of 1 sound and 1 failing test pass"
        raise ConfigError("rewards.tests.python", got, "one that runs Python", fix)
