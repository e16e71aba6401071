"""The state of a recipe, in status.json of its folder: each stage's settings, inputs, status and seconds."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apportion.config import to_dict
from apportion.config.chain.resolve import Stage
from apportion.errors import ConfigError
from apportion.stages.recipe.inputs import Input, digest
from apportion.training.run_folder import NOT_COMPARED, RunFolder, explain_disk_errors, flat

STATUS = "status.json"
RUN = "run"  # the stage that a recipe's own folder is of
# settings of how people are served, not of what they rank
OF_SERVING = {"host", "port", "token", "tls_certificate", "tls_key", "public_url", "annotators", "title", "guidelines"}
OF_SERVING |= {"lease_minutes", "until_ranked"}


class ChainState:
    """The state of a recipe in its folder; every change is written at once.

    Attributes:
        folder: of the whole recipe. stages: {name: what is known of a stage that was started}.
    """

    def __init__(self, folder: Path, recipe: str) -> None:
        self.folder, self.recipe = folder, recipe
        self._run = RunFolder(folder, RUN)
        known = self._run.read(STATUS)
        if known and known.get("stage") != RUN:
            got = f"{folder} of `apportion {known.get('stage')}`"
            fix = "Choose another --output."
            raise ConfigError("output", got, "a new folder or one of a recipe", fix)
        other = Path(known.get("recipe") or recipe).name
        if other != Path(recipe).name:
            fix = f"Choose another --output; if {other} was renamed, correct its name in {folder / STATUS}."
            raise ConfigError("output", f"{folder} of {other}", f"a new folder or one of {Path(recipe).name}", fix)
        self.stages: dict[str, dict[str, Any]] = dict(known.get("stages") or {})

    def finished(self, stage: Stage) -> bool:
        """Whether the stage has come to its end."""
        return self.stages.get(stage.name, {}).get("status") == "finished"

    def difference(self, stage: Stage, inputs: Sequence[Input]) -> str | None:
        """Return what has changed since the stage was begun, "" where it was only begun and has made nothing.

        None where nothing changed, or the stage was not begun.
        """
        known = self.stages.get(stage.name)
        if known is None or self.is_stale(stage) or not self.is_begun(stage):
            return None
        if known["kind"] != stage.kind:
            return f"it was `{known['kind']}` and is `{stage.kind}`"
        before, now = compared(stage, known["settings"]), compared(stage, settings_of(stage))
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                return f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        if known["status"] == "finished":
            now = self.marks(inputs)
            for name, mark in known["inputs"].items():
                if now.get(name, mark) != mark:
                    return f"{name} has changed"
        return None

    def is_begun(self, stage: Stage) -> bool:
        """Whether the stage has made anything that other settings would spoil."""
        return self.finished(stage) or stage.kind == "label" or RunFolder(stage.folder, stage.kind).started

    def is_foreign(self, stage: Stage) -> bool:
        """Whether the stage's folder has a run that this recipe did not start."""
        return stage.name not in self.stages and RunFolder(stage.folder, stage.kind).started

    def marks(self, inputs: Sequence[Input]) -> dict[str, str]:
        """Return {input: what recognises it}: of an earlier stage the time of its end, of a file its content."""
        found = {}
        for one in inputs:
            if one.source == "stage":
                found[f"stage {one.stage}"] = str(self.stages.get(one.stage, {}).get("finished"))
            elif one.source == "here":
                found[one.name] = digest(Path(one.name).expanduser())
        return found

    def begin(self, stage: Stage, inputs: Sequence[Input]) -> None:
        """Note that the stage is being run."""
        self.stages[stage.name] = {
            "kind": stage.kind,
            "status": "running",
            "settings": settings_of(stage),
            "inputs": self.marks(inputs),
            "begun": time.time(),
            "seconds": self.stages.get(stage.name, {}).get("seconds", 0.0),
        }
        self.write("running")

    def end(self, stage: Stage, status: str, seconds: float) -> None:
        """Note how the stage ended, and the seconds that it took, those of earlier attempts included."""
        known = self.stages[stage.name]
        known |= {"status": status, "seconds": round(known["seconds"] + seconds, 1)}
        if status == "finished":
            known["finished"] = time.time()
        self.write("running" if status == "finished" else status)

    def make_stale(self, names: Sequence[str]) -> None:
        """Note that these stages are to start over, now or in a later call."""
        for name in names:
            if name in self.stages:
                self.stages[name] |= {"status": "stale", "seconds": 0.0}
        self.write("running")

    def is_stale(self, stage: Stage) -> bool:
        """Whether the stage is to start over: as was asked, or as it was about to when it failed or was killed.

        Then its folder still has the end of the run before, which must not pass for that of this one.
        """
        known = self.stages.get(stage.name, {})
        if known.get("status") in (None, "finished", "stale"):
            return known.get("status") == "stale"
        run = RunFolder(stage.folder, stage.kind)
        return stage.kind != "label" and run.finished and (run.path / STATUS).stat().st_mtime < known["begun"]

    def write(self, status: str) -> None:
        """Write status.json."""
        with explain_disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            content = {"stage": RUN, "recipe": self.recipe, "status": status, "stages": self.stages}
            self._run.write_json(STATUS, content)

    def write_progress(self, **fields: Any) -> None:
        """Write progress.json."""
        self._run.write_progress(**fields)


def settings_of(stage: Stage) -> dict[str, Any]:
    """Return the settings of a stage as JSON has them."""
    made: dict[str, Any] = json.loads(json.dumps(to_dict(stage.config)))
    return made


def compared(stage: Stage, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flat settings that decide what a stage computes."""
    left_out = NOT_COMPARED | (OF_SERVING if stage.kind == "label" else set())
    return {key: value for key, value in flat(settings).items() if key.split(".")[0] not in left_out}
