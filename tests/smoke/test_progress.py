"""Progress of long work: activities, the line of a silent command, progress.json."""

from __future__ import annotations

import gc
import re
import time

import pytest

from apportion.cli import main
from apportion.system import heartbeat, progress
from apportion.system.progress import Activity, activity, counted, describe, duration


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_seconds_left_by_hand() -> None:
    clock = Clock()
    entry = Activity("training", 40, unit="step", start=10, clock=clock)
    assert entry.seconds_left is None  # nothing tells yet
    clock.now += 60.0
    entry.advance(5)  # 12 s a step, counted from the tenth
    assert entry.seconds == 60.0
    assert entry.seconds_left == pytest.approx(12.0 * 25)
    entry.advance(25)
    assert entry.seconds_left == 0.0
    assert Activity("loading", clock=clock).seconds_left is None


def test_activities_are_named_from_the_outermost() -> None:
    assert progress.current() == () and describe(()) == ""
    with activity("2/3 PPO"):
        with activity("training", 4, unit="step") as steps:
            steps.advance()
            steps._began -= 30.0
            assert describe(progress.current()) == "2/3 PPO: training, step 1 of 4, 30 s so far, about 1 min 30 s left"
        with activity("saving the model"):
            assert describe(progress.current()) == "2/3 PPO: saving the model, 0 s so far"
    assert progress.current() == ()


def test_an_error_ends_its_activities() -> None:
    try:
        with activity("one"):
            for item in counted([1, 2], "two", 2):
                raise ValueError(item)
    except ValueError:
        assert [entry.label for entry in progress.current()][:1] != ["one"]
    gc.collect()  # what is left of the loop over a generator goes with its frame
    assert progress.current() == ()


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.6, "8 s"), (59.6, "1 min 00 s"), (185.0, "3 min 05 s"), (7800.0, "2 h 10 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_heartbeat_speaks_into_silence_only() -> None:
    lines: list[str] = []
    with heartbeat.Heartbeat(silence=0.2, write=lines.append) as beat:
        time.sleep(0.5)
        assert lines == []  # nothing is being done
        with activity("loading"):
            until = time.monotonic() + 0.6
            while time.monotonic() < until:
                beat.touch()
                time.sleep(0.02)
            assert lines == []  # something else was written all the time
            time.sleep(0.7)
    assert lines and all(re.fullmatch(r"loading, \d s so far\n", line) for line in lines)
    written = len(lines)
    time.sleep(0.3)
    assert len(lines) == written  # it ended with its block


def test_a_command_without_a_terminal_is_never_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow(arguments: list[str]) -> int:
        with activity("loading"):
            time.sleep(0.5)
        return 0

    monkeypatch.setattr("apportion.cli.algorithms.run", slow)
    monkeypatch.setattr(heartbeat.Heartbeat.__init__, "__defaults__", (0.1, heartbeat.stderr.write))
    assert main.main(["algorithms"]) == 0
    messages = capsys.readouterr().err.splitlines()
    assert len(messages) >= 2 and all(line.startswith("loading, ") for line in messages)
