"""Methods and evidence by name: built-in names, "package.module:function", specs, and keys of evidence."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from apportion.errors import ConfigError, unknown_name

Factory = Callable[..., Any]


class EvidenceKey(str):
    """The name of evidence that is produced with settings: `EvidenceKey("vine_values", samples=4)`.

    It is a str, "name@key=value;key=value" with sorted keys and JSON values, which is its key in `Rollouts.evidence`
    and in logs; the settings are carried beside the text and never parsed back from it. A plain str names evidence
    that is produced without settings.

    Attributes:
        name: the evidence, without settings.
        settings: read-only mapping.
    """

    __slots__ = ("name", "settings")
    name: str
    settings: Mapping[str, Any]

    def __new__(cls, name: str, /, **settings: Any) -> EvidenceKey:
        """Return the key of evidence `name` produced with `settings`, JSON values; without any it equals `name`."""
        pairs = ";".join(f"{key}={json.dumps(settings[key])}" for key in sorted(settings))
        made = super().__new__(cls, f"{name}@{pairs}" if pairs else name)
        made.name, made.settings = name, MappingProxyType(dict(settings))
        return made

    @classmethod
    def of(cls, need: str) -> EvidenceKey:
        """Return `need` as a key: itself, or a plain name without settings."""
        return need if isinstance(need, cls) else cls(need)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(EvidenceKey, self.name, **self.settings), ()


def find(field: str, name: str, known: Mapping[str, Factory]) -> Factory:
    """Return the factory called `name`: one of `known`, or an importable "package.module:function".

    Raises:
        ConfigError: the name is unknown (with suggestions), or the import fails (with its reason).
    """
    if name in known:
        return known[name]
    if ":" not in name:
        raise unknown_name(field, name, known)
    module, _, attribute = name.partition(":")
    expected = "an importable package.module:function"
    try:
        factory: Any = getattr(_import(module), attribute)
    except (Exception, SystemExit) as error:  # a user-supplied module may raise anything while it is imported
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(field, name, expected, f"The import failed with {reason}.") from error
    if not callable(factory):
        raise ConfigError(field, name, expected, f"{attribute} is a {type(factory).__name__}, not a function.")
    method: Factory = factory
    return method


def _import(module: str) -> Any:
    """Import `module`, also from the working folder, which is not on the path of a console script."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise  # the module exists, and something that it imports does not
    sys.path.append(os.getcwd())
    try:
        return importlib.import_module(module)
    finally:
        sys.path.pop()


def call(field: str, name: str, factory: Factory, kwargs: Mapping[str, Any]) -> Any:
    """Return `factory(**kwargs)`, its keys checked against the signature.

    Raises:
        ConfigError: a key that the factory does not take (with suggestions), or a required one that is absent.
    """
    try:
        parameters = inspect.signature(factory).parameters
    except (ValueError, TypeError) as error:
        fix = "Wrap it in a function of your own."
        raise ConfigError(field, name, "a function with a signature", fix) from error
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in kwargs:
        if key not in parameters and not takes_any:
            if parameters:
                raise unknown_name(f"{field}.{name}", key, parameters)
            raise ConfigError(f"{field}.{name}", key, "no settings", f"Remove {key}: {name} takes none.")
    empty = inspect.Parameter.empty
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    required = [k for k, p in parameters.items() if p.default is empty and p.kind not in variable]
    missing = [k for k in required if k not in kwargs]
    if missing:
        raise ConfigError(f"{field}.{name}", dict(kwargs), f"a value for {missing[0]!r}", "Add that key.")
    if ":" not in name:
        return factory(**kwargs)
    try:
        return factory(**kwargs)
    except ConfigError:
        raise
    except Exception as error:  # a user-supplied factory may raise anything
        got = f"{name}, which raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ConfigError(field, got, "a method", "Fix the function, or its settings.") from error


def check_method(field: str, name: str, made: Any) -> Any:
    """Return `made` if it is a function of rollouts with an attribute `needs`. Raises ConfigError otherwise."""
    if not callable(made) or not isinstance(getattr(made, "needs", None), frozenset):
        got = f"{name}, which returned a {type(made).__name__}"
        fix = "Return a function of rollouts with an attribute `needs`, a frozenset of evidence names."
        raise ConfigError(field, got, f"a method for {field}", fix)
    return made


def parse(field: str, spec: object) -> list[tuple[str, dict[str, Any]]]:
    """Return [(name, keyword arguments)] of a method spec: a name, {name: {key: value}}, or a list of these.

    Raises:
        ConfigError: any other shape.
    """
    if isinstance(spec, str):
        return [(spec, {})]
    if isinstance(spec, Mapping) and spec:
        pairs = [(str(k), {} if v is None else v) for k, v in spec.items()]
        if all(isinstance(v, Mapping) for _, v in pairs):
            return [(k, dict(v)) for k, v in pairs]
    if isinstance(spec, (list, tuple)) and spec:
        return [pair for item in spec for pair in parse(field, item)]
    raise ConfigError(field, spec, "a name, {name: {key: value}} or a list of these", "Example: [attention].")


def single(field: str, specs: list[tuple[str, dict[str, Any]]]) -> tuple[str, dict[str, Any]]:
    """Return the one pair of `specs`. Raises ConfigError when there are several."""
    if len(specs) != 1:
        raise ConfigError(field, [n for n, _ in specs], "exactly one method", "Only `credit` takes a list.")
    return specs[0]
