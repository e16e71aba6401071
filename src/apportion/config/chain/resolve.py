"""The stages of a recipe with every reference replaced and every setting checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from apportion.config.chain.kinds import DATABASE, KINDS, OUTPUT, outputs_of
from apportion.config.chain.recipe import NAME, Recipe, StageSpec
from apportion.config.chain.references import leaves, replaced
from apportion.config.schema.section import Section, settings_of, unknown_setting
from apportion.errors import ConfigError, unknown_name


class Stage(NamedTuple):
    """A stage that can be run.

    Attributes:
        name: in the recipe. kind: its command. config: its settings, checked.
        folder: its run folder. uses: the earlier stages whose outputs it names, in their order.
    """

    name: str
    kind: str
    config: Any
    folder: Path
    uses: tuple[str, ...]

    def output(self, name: str) -> Path:
        """Return the file or folder that `${STAGE.name}` stands for."""
        if name == OUTPUT:
            return self.folder
        return self.folder / KINDS[self.kind].outputs[name].format_map(self.config.model_dump())


def resolve(recipe: Recipe) -> list[Stage]:
    """Return the stages of `recipe`, settings checked as the stages' commands check them. Opens no file.

    Raises:
        ConfigError: a reference to no variable, to a stage that is not before this one or to what it does not give; a
            variable without a value; an unknown setting or a value that is refused; with file, line, stage and setting.
    """
    made: dict[str, Stage] = {}
    for spec in recipe.stages:
        made[spec.name] = resolved(recipe, spec, made)
    return list(made.values())


def resolved(recipe: Recipe, spec: StageSpec, before: dict[str, Stage]) -> Stage:
    """Return one stage, whose references are to variables and to the stages `before`."""
    used: dict[str, None] = {}
    settings: dict[str, Any] = {}
    for keys, value in leaves(spec.settings):
        field = recipe.where("stages", spec.name, *keys)

        def lookup(name: str, field: str = field) -> Any:
            stage, dot, output = name.partition(".")
            if dot:
                used[stage] = None
                return output_of(recipe, stage, output, before, field)
            return variable(recipe, name, field)

        inner, names = settings, [replaced(key, lookup) for key in keys]
        for name in names[:-1]:
            inner = inner.setdefault(name, {})
        if names:
            inner[names[-1]] = replaced(value, lookup)
    folder = recipe.output / spec.name
    place: dict[str, Any] = {"output": str(folder)}
    if spec.kind == "label":
        place = {"database": str(folder / DATABASE), "until_ranked": 1.0}
        place |= {name: settings[name] for name in place if name in settings}
    config = checked(recipe, spec, KINDS[spec.kind].settings, settings | place)
    return Stage(spec.name, spec.kind, config, folder, tuple(used))


def checked(recipe: Recipe, spec: StageSpec, kind: type[Section], settings: dict[str, Any]) -> Any:
    """Return the settings of a stage. Raises ConfigError with the place in the recipe."""
    try:
        return kind(**settings)
    except ConfigError as error:
        names = str(error.got) if error.field == "key" else error.field
        field = recipe.where("stages", spec.name, *names.split("."))
        if error.field == "key":
            error = unknown_setting(field, names, list(settings_of(kind)))
        raise ConfigError(field, error.got, error.expected, error.fix) from None


def variable(recipe: Recipe, name: str, field: str) -> Any:
    """Return the value of a variable of `vars`."""
    if name not in recipe.variables:
        if not NAME.fullmatch(name):
            fix = "Write ${NAME} for a variable of `vars`, ${STAGE.OUTPUT} for what an earlier stage gives."
            raise ConfigError(field, f"${{{name}}}", "a reference", fix)
        known = ", ".join(recipe.variables) or "none"
        stages = " or ".join(
            f"${{{name}.{output}}}" for one in recipe.stages if one.name == name for output in outputs_of(one.kind)
        )
        fix = f"Write {stages}." if stages else "Add it to `vars`, or write ${STAGE.OUTPUT} for an earlier stage."
        raise ConfigError(field, f"${{{name}}}", f"a variable of `vars` ({known})", fix)
    if recipe.variables[name] is None:
        fix = f"Pass --set {name}=VALUE, or write it in the recipe."
        raise ConfigError(recipe.where("vars", name), None, f"a value: {field.split(': ')[-1]} needs it", fix)
    value = recipe.variables[name]
    nested = next((one for _, one in leaves({"": value}) if "${" in str(one)), None)
    if nested is not None:
        fix = "Write it out; only the settings of stages have references."
        raise ConfigError(recipe.where("vars", name), nested, "a value without a reference", fix)
    return value


def output_of(recipe: Recipe, stage: str, output: str, before: dict[str, Stage], field: str) -> str:
    """Return the path of what an earlier stage gives."""
    if stage not in before:
        if any(one.name == stage for one in recipe.stages):
            fix = "Move that stage before this one."
            raise ConfigError(field, f"${{{stage}.{output}}}", "a stage before this one", fix)
        if not before:
            fix = "Write ${NAME} for a variable of `vars`, or put the stage that gives it before this one."
            raise ConfigError(field, f"${{{stage}.{output}}}", "an earlier stage: this is the first", fix)
        raise unknown_name(field, stage, before)
    if output == "best" and before[stage].kind == "rl" and not before[stage].config.keep_best.every:
        fix = f"Set {stage}.keep_best.every and {stage}.keep_best.prompts, or use ${{{stage}.model}}."
        raise ConfigError(field, f"${{{stage}.best}}", "an output of a stage that keeps its best policy", fix)
    if output not in outputs_of(before[stage].kind):
        raise unknown_name(field, f"{stage}.{output}", [f"{stage}.{one}" for one in outputs_of(before[stage].kind)])
    return str(before[stage].output(output))
