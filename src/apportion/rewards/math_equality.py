"""Rule `math`: the response's answer equals the one in a column as mathematics, by the package math-verify."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from typing import Any

from apportion.errors import ConfigError, DataError
from apportion.rewards.exact import after
from apportion.rewards.rule import Rule, cell, each

PLAIN = re.compile(r"[-+]?[\d,]+(\.\d+)?")  # a number, which needs no parser to be known as an answer
SECONDS = 5  # that parsing and comparing may take each; a text that takes longer has no answer


def math_equality(*, column: str = "answer", marker: str | None = None) -> Rule:
    """Return 1 where the last answer of the response equals the one in `column`, 0 otherwise.

    Answers are LaTeX (in $…$ or \\boxed{…}) or plain expressions; 1/2, 0.5 and \\frac{1}{2} are equal. A response
    without one is 0.

    Args:
        marker: the column's value is cut after this text, as "####" for GSM8K; null takes all of it.

    Raises:
        ConfigError: math-verify is not installed, or a setting of another type. DataError: a column's value that is no
            answer.

    Source: https://github.com/huggingface/Math-Verify
    """
    for field, value in (("column", column), ("marker", marker or "")):
        if not isinstance(value, str):
            raise ConfigError(f"rewards.math.{field}", value, "text", "Write it in quotes.")
    try:
        import math_verify  # noqa: F401  (heavy: sympy)
    except ImportError as error:
        fix = "pip install 'math-verify[antlr4_13_2]'"
        raise ConfigError("rewards.math", f"no math-verify ({error})", "that package", fix) from error
    known: dict[str, list[Any]] = {}

    def expected_answer(row: Mapping[str, Any]) -> list[Any]:
        value = str(cell("math", row, column))
        text = value if not marker else (after(value, marker) or value)
        if text not in known:
            answers = parse(text) or parse(f"${text}$")
            if all(isinstance(one, str) for one in answers):  # only the text itself, no expression
                fix = "Write a number, an expression, or LaTeX in $…$."
                raise DataError(f"prompts, column {column!r}", value, "an answer that math-verify can parse", fix)
            known[text] = answers
        return known[text]

    def score(text: str, row: Mapping[str, Any]) -> float:
        from math_verify import verify

        return float(bool(verify(expected_answer(row), parse(text), **limits("timeout_seconds"))))

    def check(row: Mapping[str, Any]) -> None:
        value = str(cell("math", row, column))
        if not PLAIN.fullmatch((after(value, marker) if marker else value) or value):
            expected_answer(row)

    return Rule(each(score), frozenset({column}), check)


def parse(text: str) -> list[Any]:
    """Return the answers in `text`, an empty list without one."""
    from math_verify import parse as parse_answers

    return list(parse_answers(text, **limits("parsing_timeout")))


def limits(name: str) -> dict[str, Any]:
    """Return the time limit as math-verify takes it: by a signal, which only the main thread can receive."""
    return {name: SECONDS if threading.current_thread() is threading.main_thread() else None}
