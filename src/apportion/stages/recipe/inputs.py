"""Models and tables that a stage of a recipe reads: checked before anything is loaded, recognised when changed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from apportion.config import reward_models
from apportion.config.chain.kinds import KINDS
from apportion.config.chain.resolve import Stage
from apportion.config.chain.rewards import specs_of
from apportion.data.assets import BUILTIN_DATA, BUILTIN_MODELS
from apportion.data.formats import has_reader
from apportion.errors import ConfigError
from apportion.system.paths import local_path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
CHUNK = 1 << 20  # bytes


class Input(NamedTuple):
    """A model or a table that a stage reads.

    Attributes:
        setting: the dotted name of the setting. name: its value. source: "stage", "built-in", "hub" or "here".
        stage: the name of the stage that makes it, "" for another source.
    """

    setting: str
    name: str
    source: str
    stage: str = ""


def inputs_of(stage: Stage, before: Sequence[Stage]) -> list[Input]:
    """Return what `stage` reads.

    Raises:
        ConfigError: a file or folder that is not there and that no stage of `before` makes, with stage and setting.
    """
    found = []
    for setting in KINDS[stage.kind].inputs:
        for name in named(stage, setting):
            found.append(classified(stage, setting, name, before))
    return found


def named(stage: Stage, setting: str) -> Iterator[str]:
    """Yield the names in an input setting: a text, the texts of a list, the reward models among rewards."""
    value: Any = stage.config
    for key in setting.split("."):
        value = getattr(value, key, None)
    if value is None or value == "":
        return
    if setting in ("rewards", "judges"):
        for spec in reward_models(specs_of(stage.config, setting)):
            yield spec.source
        return
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, str):
            yield one


def classified(stage: Stage, setting: str, name: str, before: Sequence[Stage]) -> Input:
    """Return where an input is from. Raises ConfigError where it is nowhere."""
    path = local_path(name, setting, ConfigError)
    maker = next((one for one in before if path == one.folder or one.folder in path.parents), None)
    if maker is not None:
        return Input(setting, name, "stage", maker.name)
    if name in (*BUILTIN_MODELS, *BUILTIN_DATA):
        return Input(setting, name, "built-in")
    if path.exists():
        return Input(setting, name, "here")
    if HUB_ID.fullmatch(name) and not has_reader(path) and not Path(name.split("/")[0]).exists():
        return Input(setting, name, "hub")
    expected = "a file or folder that exists, an output of an earlier stage, or a hub id"
    fix = f"Check the path; it is taken from {Path.cwd()}. `--set {stage.name}.{setting}=PATH` names another."
    raise ConfigError(f"stage {stage.name}: {setting}", name, expected, fix)


def check_made(stage: Stage, inputs: Sequence[Input]) -> None:
    """Raise ConfigError where an earlier stage has not made what `stage` reads."""
    for one in inputs:
        if one.source == "stage" and not Path(one.name).exists():
            fix = f"Run that stage first, without --only and --from; or repeat it with --redo {one.stage}."
            got = f"{one.name}, which stage {one.stage} has not made"
            raise ConfigError(f"stage {stage.name}: {one.setting}", got, "a file or folder that exists", fix)


def digest(path: Path) -> str:
    """Return what recognises a file by its content, and a folder by the names and sizes in it."""
    made = hashlib.sha256()
    if path.is_dir():
        for one in sorted(path.rglob("*")):
            if one.is_file():
                made.update(f"{one.relative_to(path)}:{one.stat().st_size}\n".encode("utf-8", "replace"))
    else:
        with path.open("rb") as file:
            while block := file.read(CHUNK):
                made.update(block)
    return made.hexdigest()
