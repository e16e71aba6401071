"""`apportion run`: the stages of a recipe in order, finished ones skipped."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from apportion.cli.arguments import show, value_of
from apportion.cli.terminal import note
from apportion.cli.threads import configure_threads
from apportion.config import EvaluateConfig, RLConfig
from apportion.config.chain.kinds import KINDS, outputs_of
from apportion.config.chain.recipe import Recipe, overridden, read_recipe
from apportion.config.chain.resolve import Stage, resolve
from apportion.config.chain.rewards import specs_of
from apportion.config.schema.section import settings_of, takes_null, takes_text, unknown_setting
from apportion.errors import ConfigError, unknown_name
from apportion.system.paths import local_path

HELP = """usage: apportion run RECIPE.yaml [--set NAME=VALUE ...] [options]

Run the stages of a recipe in order, each as its own command in its own run folder. Finished stages are skipped and an
interrupted one is resumed, so the same command continues after any end.

  RECIPE                     a YAML file; recipes/ has some
  --set NAME=VALUE           a variable of the recipe, or a setting of a stage: --set ppo.steps=10; repeatable
  --output FOLDER            folder of the whole chain (default: the recipe's, or runs/ and the recipe's name)
  --dry_run                  print every stage's settings, what it reads, and its time and memory here; then stop
  --only STAGE[,STAGE ...]   run only these
  --from STAGE               leave out those before this one
  --redo STAGE[,STAGE ...]   start these over, and the stages that use them

a recipe:
  description: Rankings to a reward model and a policy
  output: runs/mine                     # each stage writes to runs/mine/STAGE
  vars: {{rankings: null}}                # null: has to be given, --set rankings=rankings.jsonl
  stages:
    split:                              # the name of a stage is its command, unless `stage` says another
      data: ${{rankings}}                 # a variable
    reward:
      data: ${{split.rankings}}           # what an earlier stage gives
      optim.lr: 5e-4                    # settings are those of `apportion reward --help`
    ppo:
      stage: rl
      reward_model: ${{reward.model}}
      prompts: ${{split.prompts}}

stages, and what each gives:
{stages}

examples:
  apportion run recipes/oasst-ppo.yaml --set rankings=rankings.jsonl --dry_run
  apportion run recipes/oasst-ppo.yaml --set rankings='[rankings.jsonl, pairs.jsonl]'
  apportion run recipes/imdb-abc.yaml --set abc.steps=20 --output runs/short
"""
VALUED = ("set", "output", "only", "from", "redo")
SWITCHES = ("dry_run", "help")


@dataclass
class Options:
    """The words of the command line."""

    recipe: str = ""
    sets: list[str] = field(default_factory=list)
    output: str | None = None
    only: list[str] = field(default_factory=list)
    first: str | None = None
    redo: list[str] = field(default_factory=list)
    dry_run: bool = False
    help: bool = False


def run(arguments: list[str]) -> int:
    """Read the recipe, check all of it, plan, and run what is not finished; return the exit code of a failed stage."""
    options = parse_options(arguments)
    if options.help:
        sys.stdout.write(help_text())
        return 0
    recipe = read_recipe(options.recipe)
    if options.output is not None:
        recipe = recipe._replace(head=recipe.head.model_copy(update={"output": options.output}))
    for word in options.sets:
        recipe = apply(recipe, word)
    for flag, names in (("--only", options.only), ("--redo", options.redo), ("--from", [options.first or ""])):
        for name in filter(None, names):
            recipe.stage(name, flag)
    stages = resolve(recipe)
    check_methods(recipe, stages)
    return work_on(recipe, stages, options)


def work_on(recipe: Recipe, stages: Sequence[Stage], options: Options) -> int:
    """Plan and run the stages."""
    from apportion.stages.recipe.plan import make_plan, measured, seconds_of, table
    from apportion.stages.recipe.run import dependents, run_stages, todo
    from apportion.stages.recipe.state import ChainState
    from apportion.system.lock import lock_folder

    configure_threads()
    state = ChainState(recipe.output, options.recipe)
    redone = dependents(stages, options.redo)
    for name in redone:
        state.stages.get(name, {})["status"] = "stale"
    work = todo(stages, state, only=options.only, first=options.first)  # before the folder is made
    if options.dry_run:
        for stage in stages:
            sys.stdout.write(f"--- # {stage.name}: apportion {stage.kind}\n{show(stage.config)}")
        sys.stdout.flush()
        machine = measured()
        for line in ["", *describe(recipe), *table(make_plan(work, machine), machine)]:
            note(line)
        return 0
    lock, warning = lock_folder(recipe.output)
    if warning:
        note(f"warning: {warning}")
    if redone:
        state.make_stale(redone)
    machine = measured()
    planned = make_plan(work, machine)
    for line in [*describe(recipe), *table(planned, machine), ""]:
        note(line)
    code = run_stages(work, state, seconds_of(planned), note)
    if code:
        note("Finished stages are kept: the same command resumes with this one.")
        return code
    for stage in stages:
        if state.finished(stage):
            sys.stdout.write(
                "".join(f"{stage.name}: {stage.output(name)}\n" for name in list(KINDS[stage.kind].outputs)[:1])
            )
    del lock
    return 0


def describe(recipe: Recipe) -> list[str]:
    """Return what the recipe says of itself."""
    expect = recipe.head.expect
    minutes = "" if expect.minutes is None else f" in {expect.minutes:g} minutes"
    machine = f" on {expect.machine}" if expect.machine else ""
    lines = [recipe.head.description.strip()] if recipe.head.description else []
    return lines + ([f"expect{minutes}{machine}: {expect.result.strip()}", ""] if expect.result else [])


def check_methods(recipe: Recipe, stages: Sequence[Stage]) -> None:
    """Raise ConfigError for rewards, judges and methods that do not exist or do not go together."""
    for stage in stages:
        if not isinstance(stage.config, RLConfig | EvaluateConfig):
            continue
        try:
            specs_of(stage.config, "rewards")
            specs_of(stage.config, "judges")
            if isinstance(stage.config, RLConfig):
                from apportion.cli.rl import check_method

                check_method(stage.config)
        except ConfigError as error:
            where = recipe.where("stages", stage.name, *error.field.split("."))
            raise ConfigError(where, error.got, error.expected, error.fix) from None


def apply(recipe: Recipe, word: str) -> Recipe:
    """Return the recipe with `NAME=VALUE` or `STAGE.SETTING=VALUE` set."""
    name, equals, value = word.partition("=")
    if not equals:
        raise ConfigError("--set", word, "NAME=VALUE or STAGE.SETTING=VALUE", "Example: --set ppo.steps=10.")
    first, dot, setting = name.partition(".")
    if not dot:
        if first not in recipe.variables:
            raise unknown_name("--set", first, [*recipe.variables, *(f"{one.name}.SETTING" for one in recipe.stages)])
        return overridden(recipe, ("vars", first), value_of(name, value, text=False, null=True))
    stage = recipe.stage(first, "--set")
    known = settings_of(KINDS[stage.kind].settings)
    if setting not in known or setting == "output":
        raise unknown_setting(f"--set {first}", setting, [one for one in known if one != "output"], value)
    kind = known[setting]
    parsed = value_of(name, value, text=takes_text(kind) and "${" not in value, null=takes_null(kind))
    return overridden(recipe, ("stages", first, *setting.split(".")), parsed)


def parse_options(arguments: Sequence[str]) -> Options:
    """Return the words of the command line. Raises ConfigError for an unknown or incomplete one."""
    found, rest = Options(), list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        name = {"-h": "help"}.get(word, name.replace("-", "_"))
        if not word.startswith("-"):
            if found.recipe:
                raise ConfigError("argument", word, "one recipe", "Write settings as --set NAME=VALUE.")
            found.recipe = word
        elif name in SWITCHES and not equals:
            setattr(found, name, True)
        elif name in VALUED:
            if not equals:
                if not rest or rest[0].startswith("--"):
                    raise ConfigError(f"--{name}", "nothing", "a value", f"Write --{name} VALUE.")
                value = rest.pop(0)
            if not value.strip(" ,"):
                raise ConfigError(f"--{name}", value, "a value", f"Write --{name} VALUE, or leave it out.")
            take(found, name, value)
        else:
            raise unknown_name("flag", word, [f"--{one}" for one in (*VALUED, *SWITCHES)])
    if not found.recipe and not found.help:
        raise ConfigError("RECIPE", "nothing", "a recipe's file", "Example: `apportion run recipes/imdb-abc.yaml`.")
    return found


def take(found: Options, name: str, value: str) -> None:
    """Put the value of a flag into the options."""
    if name == "set":
        found.sets.append(value)
    elif name == "output":
        local_path(value, "--output", ConfigError)
        found.output = value
    elif name == "from":
        found.first = value
    else:
        getattr(found, name).extend(one.strip() for one in value.split(",") if one.strip())


def help_text() -> str:
    """Return the help, with the stages and what each gives."""
    width = max(map(len, KINDS))
    lines = [
        f"  {name:<{width}}  {kind.words}\n  {'':<{width}}  gives {', '.join(outputs_of(name))}"
        for name, kind in KINDS.items()
    ]
    return HELP.format(stages="\n".join(lines))
