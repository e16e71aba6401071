"""A recipe: stages in order, each with its settings, which may name what an earlier stage gives."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import Field

from apportion.config.chain.kinds import KINDS
from apportion.config.schema.rules import Name, Positive, Word
from apportion.config.schema.section import Section, sections_of
from apportion.errors import ConfigError, unknown_name
from apportion.system import safe_yaml
from apportion.system.paths import local_path

NAME = re.compile(r"[A-Za-z_][\w-]{0,99}")
KEYS = ("description", "expect", "output", "vars", "stages")
Keys = tuple[str, ...]  # of nested mappings, from the outermost


class Expect(Section):
    """What someone who runs the recipe should see."""

    result: Word = ""
    """the figures."""
    minutes: Positive | None = None
    """how long the whole recipe took; null where it was not measured."""
    machine: Word = ""
    """on which machine."""


class Head(Section):
    """The keys of a recipe beside its stages."""

    description: Word = ""
    expect: Expect = Field(default_factory=Expect)
    output: Name | None = None


class StageSpec(NamedTuple):
    """A stage as the recipe has it: its name, the stage's command, and its settings with their references."""

    name: str
    kind: str
    settings: dict[str, Any]


class Recipe(NamedTuple):
    """A recipe as it is written.

    Attributes:
        path: its file. head: description, expectation, output. variables: of `vars`; None has to be set.
        stages: in their order. lines: the line of each key, counted from 1.
    """

    path: str
    head: Head
    variables: dict[str, Any]
    stages: tuple[StageSpec, ...]
    lines: Mapping[Keys, int]

    @property
    def output(self) -> Path:
        """The folder of the whole chain: `output`, or runs/ and the name of the recipe's file."""
        name = self.head.output or f"runs/{Path(self.path).stem}"
        return local_path(name, "output", ConfigError)

    def stage(self, name: str, field: str) -> StageSpec:
        """Return the stage `name`. Raises ConfigError, about `field`, where there is none."""
        found = next((one for one in self.stages if one.name == name), None)
        if found is None:
            raise unknown_name(field, name, [one.name for one in self.stages])
        return found

    def where(self, *keys: str) -> str:
        """Return the file, the line and the dotted name of a key, or of the nearest one around it that is written."""
        near = next((keys[:n] for n in range(len(keys), 0, -1) if keys[:n] in self.lines), ())
        line = f", line {self.lines[near]}" if near else ""
        return f"{self.path}{line}: {'.'.join(keys)}"


def read_recipe(path: str) -> Recipe:
    """Read the recipe in the YAML file at `path`. Nothing that its stages name is opened.

    Raises:
        ConfigError: no such file, not a mapping in YAML, an unknown key, a value of the wrong type, a stage whose
            command is not known, or a name that is none; with the file, its line and the key.
    """
    text = read_text(path)
    try:
        loaded, lines = safe_yaml.load(text), safe_yaml.lines(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        fix = f"The parser reports: {reason}."
        if "${" in text:
            fix += ' Within [ ] and { } a reference is quoted: "${sft.model}".'
        raise ConfigError(path, "text that is no YAML", "a recipe in YAML", fix) from error
    if not isinstance(loaded, Mapping) or "stages" not in loaded:
        got = sorted(map(str, loaded)) if isinstance(loaded, Mapping) else type(loaded).__name__
        fix = "`apportion run --help` shows one; settings of a single stage are given by `apportion STAGE --config`."
        raise ConfigError(path, got, "a mapping with the key `stages`", fix)
    values = {str(key): value for key, value in loaded.items()}
    recipe = Recipe(path, Head(), {}, (), lines)
    for key in values:
        if key not in KEYS:
            raise unknown_name(recipe.where(key), key, KEYS)
    try:
        head = Head(**{key: values[key] for key in ("description", "expect", "output") if values.get(key) is not None})
    except ConfigError as error:
        raise ConfigError(recipe.where(*error.field.split(".")), error.got, error.expected, error.fix) from None
    variables = mapping(recipe, values.get("vars") or {}, ("vars",))
    for name in variables:
        check_name(recipe, ("vars", name), name)
    return recipe._replace(head=head, variables=variables, stages=tuple(read_stages(recipe, values["stages"])))


def read_text(path: str) -> str:
    """Return the text of a recipe's file. Raises ConfigError where it cannot be read."""
    file = local_path(path, "RECIPE", ConfigError)
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        fix = "Check the path; the recipes of this project are in its folder recipes/."
        raise ConfigError("RECIPE", f"{path} ({reason})", "a recipe in YAML and UTF-8", fix) from error


def read_stages(recipe: Recipe, given: Any) -> Sequence[StageSpec]:
    """Return the stages of a recipe, in their order."""
    found = []
    for name, settings in mapping(recipe, given, ("stages",)).items():
        keys = ("stages", name)
        check_name(recipe, keys, name)
        values = mapping(recipe, {} if settings is None else settings, keys)
        kind = values.pop("stage", name)
        if not isinstance(kind, str) or kind not in KINDS:
            field = recipe.where(*keys, "stage")
            error = unknown_name(field, str(kind), KINDS)
            fix = error.fix if kind != name else f"Name the stage's command: `stage: rl`. {error.fix}"
            raise ConfigError(field, kind, error.expected, fix)
        check_once(recipe, keys, values)
        if "output" in values:
            fix = "Remove it; `output` beside `stages` is the folder of the whole chain."
            raise ConfigError(recipe.where(*keys, "output"), values["output"], "no output: OUTPUT/STAGE is it", fix)
        found.append(StageSpec(name, kind, nested(values, KINDS[kind].settings)))
    if not found:
        raise ConfigError(recipe.where("stages"), given, "at least one stage", "Example: `sft: {data: rows.jsonl}`.")
    return found


def mapping(recipe: Recipe, value: Any, keys: Keys) -> dict[str, Any]:
    """Return a mapping with text for keys. Raises ConfigError for anything else."""
    if not isinstance(value, Mapping):
        raise ConfigError(recipe.where(*keys), value, "a mapping", "Indent its keys under it, each with its value.")
    return {str(key): one for key, one in value.items()}


def check_name(recipe: Recipe, keys: Keys, name: str) -> None:
    """Raise ConfigError for a name that a reference could not have."""
    if not NAME.fullmatch(name):
        fix = "Use letters, digits, - and _."
        raise ConfigError(recipe.where(*keys), name, "a name of at most 100 characters that begins with a letter", fix)


def check_once(recipe: Recipe, keys: Keys, values: Mapping[str, Any]) -> None:
    """Raise ConfigError for a setting that is written both with a dot and inside its section."""
    for key, value in values.items():
        section, dot, name = key.partition(".")
        inner = values.get(section)
        if dot and isinstance(inner, Mapping) and name in inner:
            raise ConfigError(
                recipe.where(*keys, key), value, f"it once: `{section}` has it too", "Remove one of them."
            )


def nested(values: Mapping[str, Any], kind: type[Section]) -> dict[str, Any]:
    """Return settings with dotted keys such as `optim.lr` put into their sections."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        section, dot, name = key.partition(".")
        if section in sections_of(kind) and (dot or isinstance(value, Mapping)):
            found.setdefault(section, {}).update({name: value} if dot else value)
        else:
            found[key] = value
    return found


def overridden(recipe: Recipe, keys: Keys, value: Any) -> Recipe:
    """Return the recipe with a variable ("vars", name) or a setting ("stages", stage, names …) set to `value`."""
    place, name, *rest = keys
    if place == "vars":
        return recipe._replace(variables={**recipe.variables, name: value})
    stages = []
    for one in recipe.stages:
        if one.name == name:
            settings = nested({**one.settings}, KINDS[one.kind].settings)
            inner = settings
            for key in rest[:-1]:
                inner[key] = dict(inner.get(key) or {})
                inner = inner[key]
            inner[rest[-1]] = value
            one = one._replace(settings=settings)
        stages.append(one)
    return recipe._replace(stages=tuple(stages))
