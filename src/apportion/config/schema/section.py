"""The base class of all settings: rules at the fields, errors as ConfigError with field, value, expectation and fix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from apportion.config.schema.renamed import NEW_VALUES, renamed_key
from apportion.errors import ConfigError, unknown_name

KEY = "key"  # the field that an error about an unknown key names
UNKNOWN = ("extra_forbidden", "no_such_attribute")  # pydantic's types of that error


@dataclass(frozen=True)
class Rule:
    """The values that a setting accepts, in words, for errors and `--help`; annotates the type that checks them."""

    expected: str
    fix: str = "Set it to such a value."


class Section(BaseModel):
    """One section of a YAML file and one group of flags; a docstring below a field is its help.

    Constructing one and assigning to its fields check the value.

    Raises:
        ConfigError: an unknown key, or a value that the field's type refuses.
    """

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    if not TYPE_CHECKING:  # type checkers keep the signature that lists the fields

        def __init__(self, /, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise config_error(error, type(self), values) from None

        def __setattr__(self, name: str, value: Any) -> None:
            try:
                super().__setattr__(name, value)
            except ValidationError as error:
                raise config_error(error, type(self), {name: value}) from None


def to_dict(config: Section) -> dict[str, Any]:
    """Return the settings as a plain nested mapping."""
    return config.model_dump()


def section_of(field: FieldInfo) -> type[Section] | None:
    """Return the class of a field that is a section of its own, or None."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def settings_of(kind: type[Section], prefix: str = "") -> dict[str, FieldInfo]:
    """Return {dotted name: field} of every setting, those of nested sections included, in their order."""
    found: dict[str, FieldInfo] = {}
    for name, field in kind.model_fields.items():
        inner = section_of(field)
        found |= {prefix + name: field} if inner is None else settings_of(inner, f"{prefix}{name}.")
    return found


def sections_of(kind: type[Section]) -> dict[str, type[Section]]:
    """Return {name: class} of the sections of `kind`."""
    pairs = ((name, section_of(field)) for name, field in kind.model_fields.items())
    return {name: inner for name, inner in pairs if inner is not None}


def unknown_setting(field: str, name: str, known: Sequence[str], value: Any = None) -> ConfigError:
    """Return the error for a setting that does not exist; one that was renamed names its new key."""
    renamed = renamed_key(field, name, value)
    if renamed is not None:
        return renamed
    if name.endswith("trust_remote_code"):
        fix = "Use a model of a type that transformers knows; there is no way to switch this on."
        return ConfigError(field, name, "no such setting: code inside a model's folder is never run", fix)
    return unknown_name(field, name, known)


def config_error(error: ValidationError, kind: type[Section], values: Mapping[str, Any]) -> ConfigError:
    """Return the first problem that pydantic reports of `values` as a ConfigError, with its dotted name."""
    problems = error.errors(include_url=False)
    first = next((problem for problem in problems if problem["type"] in UNKNOWN), problems[0])
    name, inner = str(first["loc"][0]), first.get("ctx", {}).get("error")
    if isinstance(inner, ConfigError):  # raised by a nested section, which knows its own names only
        if inner.field == KEY:
            return unknown_setting(KEY, f"{name}.{inner.got}", list(settings_of(kind)))
        return ConfigError(f"{name}.{inner.field}", inner.got, inner.expected, inner.fix)
    value = values.get(name, first["input"])
    if first["type"] in UNKNOWN:
        return unknown_setting(KEY, name, list(settings_of(kind)), value)
    rule = rule_of(kind.model_fields[name])
    new = NEW_VALUES.get(value) if isinstance(value, str) else None
    fix = rule.fix if new is None else f"{value} is called {new} now."
    return ConfigError(name, value, rule.expected, fix)


def rule_of(field: FieldInfo) -> Rule:
    """Return the rule of a field: the one that annotates its type, or what the type says of itself."""
    if section_of(field) is not None:
        return Rule("a mapping of its settings", "Indent them under it.")
    return _rule(field.annotation, field.metadata)


def _rule(kind: Any, metadata: Sequence[Any] = ()) -> Rule:
    named = next((item for item in metadata if isinstance(item, Rule)), None)
    if named is not None:
        return named
    if get_origin(kind) is Annotated:
        inner, *more = get_args(kind)
        return _rule(inner, more)
    if get_origin(kind) in (Union, UnionType):
        rules = [_rule(one) for one in get_args(kind) if one is not NoneType]
        expected = " or ".join(rule.expected for rule in rules)
        return Rule(f"{expected}, or null" if NoneType in get_args(kind) else expected, rules[0].fix)
    if get_origin(kind) is Literal:
        return Rule("one of " + ", ".join(map(str, get_args(kind))), "Set it to one of them.")
    return Rule(f"a value of type {getattr(kind, '__name__', kind)}")


def takes_text(field: FieldInfo) -> bool:
    """Whether the field's value is text, or text or null: a flag's word is then taken as it stands."""
    kinds = get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else [field.annotation]
    bare = {get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in kinds}
    return bare - {NoneType} == {str}


def takes_null(field: FieldInfo) -> bool:
    """Whether null is among the field's values."""
    return NoneType in get_args(field.annotation)
