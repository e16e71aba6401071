"""Rule `json`: the response is JSON, and fits a JSON schema where one is given."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from apportion.errors import ConfigError, DataError, check_flag
from apportion.rewards.rule import Rule, cell, each
from apportion.system.paths import local_path

CONTAINER: Mapping[str, Any] = {"type": ["object", "array"]}  # a bare number or word is JSON too, by accident
FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL)
Fits = Callable[[Any], bool]


def json_schema(*, schema: Any = None, column: str | None = None, fenced: bool = False, prefix: bool = False) -> Rule:
    """Return 1 where the response is JSON that fits the schema, 0 otherwise.

    The whole response has to be JSON, white space around it aside, as the standard defines it: no NaN, no comments.

    Args:
        schema: a JSON schema, or the path of a file with one; null accepts every object and array.
        column: the column of the prompts' rows with each prompt's own schema, in place of `schema`.
        fenced: read the last ```json block of the response instead of the whole.
        prefix: the response may go further after the JSON; for models that do not know when to stop yet.

    Raises:
        ConfigError: both `schema` and `column`, no valid schema, or a file that cannot be read.
    """
    check_flag("rewards.json.fenced", fenced)
    check_flag("rewards.json.prefix", prefix)
    if schema is not None and column is not None:
        got, fix = "schema and column", "Remove one of them."
        raise ConfigError("rewards.json", got, "one schema for all, or a column with one each", fix)
    fixed = None if column is not None else validator(read_schema(schema), "rewards.json.schema", ConfigError)
    known: dict[str, Fits] = {}

    def fits_row(row: Mapping[str, Any]) -> Fits:
        if fixed is not None or column is None:
            assert fixed is not None
            return fixed
        value = cell("json", row, column)
        key = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
        if key not in known:
            parsed, found = parse(value) if isinstance(value, str) else (True, value)
            if not parsed:
                fix = "Write it with json.dumps."
                raise DataError(f"prompts, column {column!r}", f"{value:.60}", "a JSON schema", fix)
            known[key] = validator(found, f"prompts, column {column!r}", DataError)
        return known[key]

    def score(text: str, row: Mapping[str, Any]) -> float:
        if fenced:
            blocks = FENCE.findall(text)
            if not blocks:
                return 0.0
            text = blocks[-1]
        parsed, value = parse(text, prefix)
        return float(parsed and fits_row(row)(value))

    def check(row: Mapping[str, Any]) -> None:
        fits_row(row)

    return Rule(each(score), frozenset() if column is None else frozenset({column}), check)


def parse(text: str, prefix: bool = False) -> tuple[bool, Any]:
    """Return (whether `text`, or only its beginning, is JSON; the value)."""

    def refuse(word: str) -> Any:
        raise ValueError(word)  # NaN and infinities are no JSON

    try:
        if prefix:
            return True, json.JSONDecoder(parse_constant=refuse).raw_decode(text.lstrip())[0]
        return True, json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False, None


def read_schema(schema: Any) -> Any:
    """Return the schema that the setting is, or names the file of. Raises ConfigError for a file without one."""
    if not isinstance(schema, str):
        return CONTAINER if schema is None else schema
    path, field = local_path(schema, "rewards.json.schema", ConfigError), "rewards.json.schema"
    try:
        parsed, value = parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(field, schema, "a file with a JSON schema", f"It cannot be read: {error}.") from error
    if not parsed:
        raise ConfigError(field, schema, "a file with a JSON schema", "It is not valid JSON.")
    return value


def validator(schema: Any, field: str, error: type[ConfigError] | type[DataError]) -> Fits:
    """Return a function that says whether a value fits `schema`; references to other documents are never fetched.

    Raises:
        error: it is no JSON schema, or refers to another document.
    """
    import jsonschema
    import referencing
    import referencing.exceptions

    fix = "See json-schema.org; keep all definitions inside it."
    try:
        made = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        made.check_schema(schema)
        checks = made(schema, registry=referencing.Registry())  # one without a way to retrieve anything
    except (jsonschema.SchemaError, TypeError, ValueError) as problem:
        reason = " ".join(str(getattr(problem, "message", problem)).split())[:120]
        raise error(field, f"{schema!r:.60}", f"a JSON schema ({reason})", fix) from problem

    def fits(value: Any) -> bool:
        try:
            return bool(checks.is_valid(value))
        except referencing.exceptions.Unresolvable as problem:
            raise error(field, str(problem)[:120], "a schema whose references are inside it", fix) from problem
        except RecursionError:  # a value nested deeper than the schema can be followed
            return False

    return fits
