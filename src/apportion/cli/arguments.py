"""From flags and YAML to a checked stage configuration, with errors that suggest the right name, and `--help`."""

from __future__ import annotations

import json
import re
import sys
from argparse import ArgumentParser, HelpFormatter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import yaml

from apportion.config import Section, to_dict
from apportion.config.schema.section import (
    KEY,
    rule_of,
    section_of,
    sections_of,
    settings_of,
    takes_null,
    takes_text,
    unknown_setting,
)
from apportion.errors import ConfigError, unknown_name
from apportion.system import safe_yaml
from apportion.system.paths import local_path

C = TypeVar("C", bound=Section)
METHODS = (
    "credit",
    "segments",
    "advantages",
    "loss",
    "rewards",
    "judges",
)  # fields whose value names methods with settings
LISTS = ("policies", "rewards", "judges", "trackers")  # fields whose flag takes several words
SWITCHES = ("fresh", "dry_run")
SETTING_SWITCHES = ("skip_bad_rows",)  # settings that are true when their flag has no value
NULLS = ("null", "~")
BOUNDED = "Write it out, and less of it."


class Parsed(NamedTuple, Generic[C]):
    """A command's settings and switches."""

    config: C
    fresh: bool
    dry_run: bool


def parse(kind: type[C], command: str, arguments: Sequence[str], examples: str = "") -> Parsed[C]:
    """Return the settings `kind` from `arguments`; prints the help and exits where --help is among them.

    Flags are the fields (`--ppo.epochs 2`; `-` and `_` are the same), `--config FILE` reads YAML first. A method's
    keyword arguments are flags too: `--credit attention --credit.mix 0.5`, and `--credit.kl_penalty.coef 0.1` for a
    method further down the chain.

    Raises:
        ConfigError: an unknown flag or key, or a value that its field refuses.
    """
    fields = settings_of(kind)
    flags, switches = split_flags(arguments, list(fields))
    if "help" in switches:
        sys.stdout.write(f"{format_help(kind, command)}\n{examples}")
        sys.exit(0)
    values: dict[str, Any] = to_dict(kind())  # checked with the rest: a setting may have no usable default
    for name, text in flags:
        if name == "config":
            _merge(values, read_file(text, kind))
    methods: dict[str, list[tuple[str, Any]]] = {}
    for name, text in flags:  # flags win over the file, wherever they stand
        if name in fields:
            _put(values, name, value_of(name, text, text=takes_text(fields[name]), null=takes_null(fields[name])))
        elif name != "config":
            field, _, key = name.partition(".")
            methods.setdefault(field, []).append((key, load_value(name, text)))
    config = kind(**values)
    for name, settings in methods.items():
        setattr(config, name, merge_method(name, getattr(config, name), settings, getattr(config, "algorithm", None)))
    for name in ("output", "run"):
        if (place := getattr(config, name, None)) is not None:
            local_path(place, name, ConfigError)
    return Parsed(config, "fresh" in switches, "dry_run" in switches)


def show(config: Section) -> str:
    """Return the resolved settings as YAML, for `--dry_run`."""
    return safe_yaml.dump(to_dict(config))


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
            raise ConfigError(f"--{name}", value, "no value", f"Write only --{name}.")
        if name in sections:
            raise ConfigError(f"--{name}", value or "nothing", "one of its settings", sections[name])
        base = name.split(".")[0]
        if name not in (*known, "config") and not (base in METHODS and base in known and "." in name):
            everything = [f"--{k}" for k in (*known, "config", *SWITCHES)]
            raise unknown_setting("flag", f"--{name}", everything, value or (rest[0] if rest else None))
        if not equals:
            last = not rest or re.match(r"--[a-zA-Z]", rest[0])
            if last and name in SETTING_SWITCHES:
                rest.insert(0, "true")
            elif last:
                raise ConfigError(f"--{name}", "nothing", "a value", f"Write --{name} VALUE.")
            value = rest.pop(0)
        if name in LISTS:
            value = _joined([value, *_words(rest)])
        flags.append((name, value))
    return flags, switches


def _words(rest: list[str]) -> list[str]:
    """Return the words at the beginning of `rest` that are no flags, taken from it."""
    words = []
    while rest and not rest[0].startswith("-"):
        words.append(rest.pop(0))
    return words


def _joined(words: Sequence[str]) -> str:
    """Return several words of one flag as a YAML list of them; one word as it is."""
    if len(words) == 1:
        return words[0]
    return f"[{', '.join(word if word[:1] in '{[' else json.dumps(word, ensure_ascii=False) for word in words)}]"


def _sections(known: Iterable[str]) -> dict[str, str]:
    """Return {section: fix} of the names that only hold settings, such as optim."""
    inner: dict[str, list[str]] = {}
    for name in known:
        section, dot, _ = name.rpartition(".")
        if dot:
            inner.setdefault(section, []).append(name)
    return {name: f"Write --{keys[0]} VALUE; its settings are {', '.join(keys)}." for name, keys in inner.items()}


def value_of(name: str, word: str, *, text: bool, null: bool) -> Any:
    """Return the value of a flag: its word where the setting is `text` (or `null`), else the word read as YAML.

    A word that is no YAML is returned as it is, for the setting's own type to refuse.

    Raises:
        ConfigError: it is not valid UTF-8, or YAML beyond the limits of `safe_yaml`.
    """
    if any("\ud800" <= character <= "\udfff" for character in word):  # undecodable bytes of the command line
        raise ConfigError(name, word, "text in UTF-8", "Write it in UTF-8, or rename the file.")
    if text:
        return None if null and word in NULLS else word
    try:
        return safe_yaml.load(word)
    except safe_yaml.Excess as error:
        raise ConfigError(name, f"{word[:40]}… ({error})", "a value of bounded size", BOUNDED) from error
    except yaml.YAMLError:
        return word


def load_value(name: str, word: str) -> Any:
    """Return the YAML value of a method's flag. Raises ConfigError where it is not valid YAML."""
    try:
        return safe_yaml.load(word)
    except yaml.YAMLError as error:
        expected = "a number, a word or other YAML"
        raise ConfigError(f"--{name}", word, expected, "Close what you opened, or quote it.") from error


def read_file(path: str, kind: type[Section]) -> dict[str, Any]:
    """Return the settings in the YAML file at `path`, checked by `kind`; its dotted keys are nested.

    Raises:
        ConfigError: it is absent, not a YAML mapping, or has an unknown key or a value that is refused.
    """
    file = local_path(path, "--config", ConfigError)
    if not file.is_file():
        raise ConfigError("--config", path, "a YAML file", "There is no such file: check the path.")
    try:
        loaded = safe_yaml.load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError("--config", path, "valid YAML in UTF-8", f"The parser reports: {reason}.") from error
    if not isinstance(loaded, Mapping):
        raise ConfigError("--config", path, "a mapping of settings", "Example: `steps: 20`.")
    values: dict[str, Any] = {}
    for key, value in loaded.items():
        base, dot, rest = str(key).partition(".")
        if base in METHODS and base in kind.model_fields and dot:
            fix = f"Write `{base}:` and under it a method with its settings: `attention: {{{rest}: {value}}}`."
            raise ConfigError(f"{path}: {KEY}", key, "nested keys", fix)
        inner = sections_of(kind).get(base)
        if inner is not None and not dot and isinstance(value, Mapping):
            _merge(values, {base: {str(k): v for k, v in value.items()}})
        elif inner is not None and rest in inner.model_fields:
            _put(values, str(key), value)
        else:
            values[str(key)] = value
    try:
        kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.field}", error.got, error.expected, error.fix) from None
    return values


def _merge(values: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Put `more` into the nested mapping `values`, section by section."""
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(values.get(key), dict) and key not in METHODS:
            values[key] |= value
        else:
            values[key] = value


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    """Set the dotted `name` in the nested mapping `values`."""
    section, dot, field = name.rpartition(".")
    if dot:
        _merge(values, {section: {field: value}})
    else:
        values[name] = value


def merge_method(field: str, spec: Any, settings: list[tuple[str, Any]], algorithm: str | None) -> Any:
    """Return method `spec` (None: the algorithm's own) with keyword arguments set by flags.

    A key "coef" belongs to the first method, "kl_penalty.coef" to the one of that name.
    """
    from apportion import registry
    from apportion.algorithms import ALGORITHMS, merge
    from apportion.config import RLConfig

    named = ALGORITHMS.get(algorithm or RLConfig.model_fields["algorithm"].default)
    if named is None:  # an unknown algorithm is reported by name where it is built
        return spec
    default = getattr(named, field, None)  # rewards have none
    if spec is None and default is None:
        keys = ", ".join(f"--{field}.{key}" for key, _ in settings)
        raise ConfigError(keys, "no rewards", "the rewards that it belongs to", "Give them with --rewards.")
    full = merge(default, spec) if field == "credit" else (default if spec is None else spec)
    pairs = registry.parse(field, full)
    names = [name for name, _ in pairs]
    for key, value in settings:
        method, _, rest = key.rpartition(".")
        if method and method not in names:
            raise unknown_name(f"--{field}.{key}", method, names)
        pairs[names.index(method) if method else 0][1][rest] = value
    return [{name: kwargs} for name, kwargs in pairs]


class _Formatter(HelpFormatter):
    """The standard layout, with room for dotted names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)


def format_help(kind: type[Section], command: str) -> str:
    """Return the help of `apportion COMMAND`, whose settings are `kind`: a group of flags a section."""
    parser = ArgumentParser(
        prog=f"apportion {command}",
        usage=f"apportion {command} [--config FILE.yaml] [--name value ...]",
        description=_summary(kind),
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="a YAML file of settings; flags win over it")
    parser.add_argument("--fresh", action="store_true", help="start over in the output folder")
    parser.add_argument("--dry_run", action="store_true", help="print the resolved settings and stop")
    _add_section(parser, kind(), "settings", "")
    return parser.format_help()


def _add_section(parser: ArgumentParser, defaults: Section, title: str, prefix: str) -> None:
    """Add a group with the settings of `defaults`, then one for each section in it."""
    group = parser.add_argument_group(title, _summary(type(defaults)) if prefix else None)
    fields = type(defaults).model_fields
    for name, field in fields.items():
        if section_of(field) is None:
            default = safe_yaml.dump(getattr(defaults, name)).removesuffix("...\n").strip()
            text = f"{field.description} ({rule_of(field).expected}; default: {_inline(default)})"
            group.add_argument(f"--{prefix}{name}", metavar=name.upper(), help=text.replace("%", "%%"))
    for name, field in fields.items():
        if section_of(field) is not None:
            _add_section(parser, getattr(defaults, name), name, f"{prefix}{name}.")


def _summary(kind: type[Section]) -> str:
    """Return the first paragraph of a section's docstring."""
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split())


def _inline(default: str) -> str:
    """Return the YAML of a value on one line: a list in brackets."""
    lines = default.splitlines()
    return f"[{', '.join(line.removeprefix('- ') for line in lines)}]" if default.startswith("- ") else default
