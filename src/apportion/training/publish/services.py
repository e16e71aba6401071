"""The services that a run's settings ask for: checked before it opens its folder, given its model at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from apportion.distributed import collectives
from apportion.training.publish.hub import check_hub, push
from apportion.training.publish.trackers import Trackers, check_trackers
from apportion.training.run_folder import RunFolder


class ServiceSettings(Protocol):
    """The settings of trackers and hub."""

    output: str
    trackers: list[Any]
    tracker_project: str
    push_to_hub: str | None
    hub_private: bool


def check_services(config: ServiceSettings, stage: str, *, fresh: bool) -> None:
    """Check the trackers, and the hub where a model is to be trained for it. Raises ConfigError in every process."""
    with collectives.error_barrier():
        if collectives.is_main():
            check_trackers(config.trackers)
            trained = not fresh and RunFolder(Path(config.output).expanduser(), stage).finished
            if config.push_to_hub is not None and not trained:
                check_hub(config.push_to_hub)


def open_trackers(config: ServiceSettings, run: RunFolder, settings: Any) -> Trackers | None:
    """Return the trackers of a run; None in all processes but the main one."""
    return Trackers(config.trackers, config.tracker_project, run, settings) if collectives.is_main() else None


def push_final(run: RunFolder, config: ServiceSettings) -> None:
    """Upload the model of a finished run where `config` asks for it, in the main process. Raises HubError."""
    if config.push_to_hub is not None and collectives.is_main():
        push(run, config.push_to_hub, private=config.hub_private)
