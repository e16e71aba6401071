"""From flags and YAML to a checked stage configuration, with errors that suggest the right name."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, TypeVar

import yaml

from apportion.config import check, to_dict
from apportion.errors import ConfigError, unknown_name
from apportion.system import safe_yaml
from apportion.system.paths import local_path
from apportion.training.run_folder import flat

C = TypeVar("C")
METHODS = (
    "credit",
    "segments",
    "advantages",
    "loss",
)  # fields whose value is a method: a name, {name: {key: value}}, a list
SWITCHES = ("fresh", "dry_run")
ALONE = ("skip_bad_rows",)  # settings that are true when their flag stands alone


class Parsed(NamedTuple):
    """A command's settings and switches."""

    config: Any
    fresh: bool
    dry_run: bool


def parse(kind: type, command: str, arguments: Sequence[str], examples: str = "") -> Parsed:
    """Return the configuration of dataclass `kind` from `arguments`; prints help and exits when asked to.

    Flags are the fields (`--ppo.epochs 2`; `-` and `_` are the same), `--config FILE` reads YAML first. A method's
    keyword arguments are flags too: `--credit attention --credit.mix 0.5`, and `--credit.kl_penalty.coef 0.1` for a
    method further down the chain.

    Raises:
        ConfigError: an unknown flag or key, a value of the wrong type, or one outside its range.
    """
    flags, switches = split_flags(arguments, keys_of(kind))
    methods, flags = fold_methods(flags, kind)
    parser = _parser(kind, command)
    if "help" in switches:
        sys.stdout.write(f"{parser.format_help()}\n{examples}")
        sys.exit(0)
    flags = sorted(flags, key=lambda flag: flag[0] != "config")  # flags win over the file, wherever they stand
    values = [text for name, value in flags for text in (f"--{name}", value)]
    for name, value in flags:
        if name == "config":
            _check_yaml(value, kind)
    config = _parsed(parser, values)
    config = kind(**{f.name: config[f.name] for f in fields(kind)})
    for name, spec in methods.items():
        setattr(config, name, merge_method(name, getattr(config, name), spec, getattr(config, "algorithm", None)))
    check(config)
    for name in ("output", "run"):
        if (place := getattr(config, name, None)) is not None:
            local_path(place, name, ConfigError)
    return Parsed(config, "fresh" in switches, "dry_run" in switches)


def _parsed(parser: Any, values: list[str]) -> Any:
    """Return jsonargparse's namespace of settings. Raises ConfigError for what it refuses."""
    for name, value in zip(values[::2], values[1::2], strict=True):
        if any("\ud800" <= character <= "\udfff" for character in value):  # bytes of the shell's that are no UTF-8
            raise ConfigError(name, value, "text in UTF-8", "Write it in UTF-8, or rename the file.")
        try:
            loaded = safe_yaml.load(value)
        except safe_yaml.Excess as error:  # jsonargparse reads YAML too, without any limit
            fix = "Write it out, and less of it."
            raise ConfigError(name, f"{value[:40]}… ({error})", "a value of bounded size", fix) from error
        except yaml.YAMLError:  # a text that is no YAML is a text
            continue
        _refuse_classes(name, loaded)
    try:
        return parser.instantiate(parser.parse_args(values))
    except (argparse.ArgumentError, SystemExit, ValueError, TypeError, LookupError, AttributeError) as error:
        raise _explain(error) from None  # the second half: what YAML's own types raise, unguarded


def _refuse_classes(field: str, value: Any) -> None:
    """Raise ConfigError for a mapping from which jsonargparse would make an object of any class: `class_path`."""
    layer = [value]
    while layer := [item for item in layer if isinstance(item, (Mapping, list))]:
        if any(isinstance(item, Mapping) and "class_path" in item for item in layer):
            fix = "Name a function of yours: package.module:function."
            raise ConfigError(field, "class_path", "no such key: settings make no objects", fix)
        layer = [inner for item in layer for inner in (item.values() if isinstance(item, Mapping) else item)]


def keys_of(kind: type, prefix: str = "") -> list[str]:
    """Return the dotted names of every setting of a dataclass."""
    names = []
    for f in fields(kind):
        default = f.default_factory() if callable(f.default_factory) else f.default  # type: ignore[misc]
        names.append(prefix + f.name)
        if is_dataclass(default):
            names += keys_of(type(default), f"{prefix}{f.name}.")
    return names


def split_flags(arguments: Sequence[str], known: Sequence[str]) -> tuple[list[tuple[str, str]], set[str]]:
    """Return ([(name, value)], switches). Raises ConfigError for an unknown flag or a flag without a value."""
    flags: list[tuple[str, str]] = []
    switches: set[str] = set()
    rest = list(arguments)
    sections = _sections(known)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            switches.add("help")
            continue
        if not word.startswith("--"):
            raise ConfigError("argument", word, "--name value", "Write every setting as --name value.")
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name in SWITCHES and not equals:
            switches.add(name)
            continue
        if name in SWITCHES:
            raise ConfigError(f"--{name}", value, "no value", f"Write --{name} alone.")
        if name in sections:
            raise ConfigError(f"--{name}", value or "nothing", "one of its settings", sections[name])
        base = name.split(".")[0]
        if name not in (*known, "config") and not (base in METHODS and base in known and "." in name):
            raise _unknown("flag", f"--{name}", [f"--{k}" for k in (*known, "config", *SWITCHES)])
        if not equals:
            last = not rest or re.match(r"--[a-zA-Z]", rest[0])
            if last and name in ALONE:
                rest.insert(0, "true")
            elif last:
                raise ConfigError(f"--{name}", "nothing", "a value", f"Write --{name} VALUE.")
            value = rest.pop(0)
        flags.append((name, value))
    return flags, switches


def _unknown(field: str, name: str, known: Sequence[str]) -> ConfigError:
    """Return the error for a setting that does not exist."""
    if name.endswith("trust_remote_code"):
        fix = "Use a model of a type that transformers knows; there is no way to switch this on."
        return ConfigError(field, name, "no such setting: code inside a model's folder is never run", fix)
    return unknown_name(field, name, known)


def _sections(known: Sequence[str]) -> dict[str, str]:
    """Return {section: fix} of the names that only hold settings, such as optim."""
    inner: dict[str, list[str]] = {}
    for name in known:
        section, dot, _ = name.rpartition(".")
        if dot:
            inner.setdefault(section, []).append(name)
    return {name: f"Write --{keys[0]} VALUE; its settings are {', '.join(keys)}." for name, keys in inner.items()}


def fold_methods(flags: list[tuple[str, str]], kind: type) -> tuple[dict[str, list[tuple[str, Any]]], Any]:
    """Return ({field: [(dotted key, value)]}, the other flags): `--credit.mix 0.5` belongs to field credit."""
    methods: dict[str, list[tuple[str, Any]]] = {}
    others = []
    for name, value in flags:
        base, _, key = name.partition(".")
        if base in METHODS and key:
            methods.setdefault(base, []).append((key, load_value(name, value)))
        else:
            others.append((name, value))
    return methods, others


def load_value(name: str, text: str) -> Any:
    """Return the YAML value of a flag. Raises ConfigError when it is none."""
    try:
        return safe_yaml.load(text)
    except yaml.YAMLError as error:
        expected = "a number, a word or other YAML"
        raise ConfigError(f"--{name}", text, expected, "Close what you opened, or quote it.") from error


def merge_method(field: str, spec: Any, settings: list[tuple[str, Any]], algorithm: str | None) -> Any:
    """Return method `spec` (None: the algorithm's own) with keyword arguments set by flags.

    A key "coef" belongs to the first method, "kl_penalty.coef" to the one of that name.
    """
    from apportion import registry
    from apportion.algorithms import ALGORITHMS, merge

    named = ALGORITHMS.get(algorithm or "abc")
    if named is None:  # an unknown algorithm is reported by name where it is built
        return spec
    default = getattr(named, field)
    full = merge(default, spec) if field == "credit" else (default if spec is None else spec)
    pairs = registry.parse(field, full)
    names = [name for name, _ in pairs]
    for key, value in settings:
        method, _, rest = key.rpartition(".")
        if method and method not in names:
            raise unknown_name(f"--{field}.{key}", method, names)
        pairs[names.index(method) if method else 0][1][rest] = value
    return [{name: kwargs} for name, kwargs in pairs]


def _parser(kind: type, command: str) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=f"apportion {command}",
        exit_on_error=False,
        description=(kind.__doc__ or "").split("\n\n")[0].strip(),
        usage=f"apportion {command} [--config FILE.yaml] [--name value ...]",
    )
    parser.add_argument("--config", action="config", help="a YAML file of settings; flags win over it")
    parser.add_argument("--fresh", action="store_true", help="start over in the output folder")
    parser.add_argument("--dry_run", action="store_true", help="print the resolved settings and stop")
    parser.add_class_arguments(kind, None)
    return parser


def _check_yaml(path: str, kind: type) -> None:
    """Raise ConfigError unless `path` is a YAML mapping whose every key is a setting; methods' own keys come later."""
    file = local_path(path, "--config", ConfigError)
    if not file.is_file():
        raise ConfigError("--config", path, "a YAML file", "There is no such file: check the path.")
    try:
        loaded = safe_yaml.load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError("--config", path, "valid YAML in UTF-8", f"It says: {reason}.") from error
    if not isinstance(loaded, Mapping):
        raise ConfigError("--config", path, "a mapping of settings", "Example: `steps: 20`.")
    _refuse_classes(f"{path}: key", loaded)
    known = keys_of(kind)
    settings = [name for name in known if name not in _sections(known)]
    for key, value in flat(loaded).items():
        base, dot, rest = key.partition(".")
        if base in METHODS and base in known and base in loaded:
            continue
        if base in METHODS and base in known and dot:
            fix = f"Write `{base}:` and under it a method with its settings: `attention: {{{rest}: {value}}}`."
            raise ConfigError(f"{path}: key", key, "nested keys", fix)
        if key in _sections(known) and value != {}:
            raise ConfigError(f"{path}: {key}", value, "a mapping of its settings", "Indent them under it.")
        if key not in known:
            raise _unknown(f"{path}: key", key, settings)


def _explain(error: BaseException) -> ConfigError:
    """Return jsonargparse's complaint in our shape."""
    text = " ".join(str(error).split())
    found = re.search(r'[Kk]ey "([^"]+)".*?Expected an? (.+?)\. Got value: (.+)', text)
    if found:
        name, expected, got = found.groups()
        expected = re.sub(r"<class '(\w+)'>", r"\1", expected)
        return ConfigError(f"--{name}", got, f"a value of type {expected}", f"Write --{name} with such a value.")
    either = re.search(r'key "([^"]+)": Does not validate .*?Subtypes: \[(.+?)\] Errors.*? Given value: (.+)', text)
    if either:
        name, kinds, got = either.groups()
        named = [kind for kind in re.findall(r"<class '(\w+)'>", kinds) if kind != "NoneType"]
        expected = f"a value of type {' or '.join(named)}, or null"
        return ConfigError(f"--{name}", got, expected, f"Write --{name} with such a value.")
    return ConfigError("settings", text, "values of the types that --help lists", "See `--help`.")


def show(config: Any) -> str:
    """Return the resolved settings as YAML, for `--dry-run`."""
    return safe_yaml.dump(to_dict(config))
