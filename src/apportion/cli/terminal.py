"""Terminal output of a stage: a progress bar with the time left and chosen metrics, and notes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from apportion.system import heartbeat, progress, stderr
from apportion.system.progress import Activity, duration


def console() -> Console:
    """Return the console for progress and notes: stderr, since stdout is for results."""
    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


class Bar:
    """One bar; `on_step(done, total, metrics)` moves it. Without a terminal it prints about ten lines."""

    def __init__(self, screen: Progress, label: str, total: int, shown: Mapping[str, str]) -> None:
        self._progress, self._label, self._total, self._shown = screen, label, total, shown
        self._pace: Activity | None = None
        self._task = screen.add_task(label, total=total, numbers="")

    def on_step(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Move the bar to `done` of `total` and show the chosen metrics."""
        self._total = total
        numbers = "  ".join(f"{name} {metrics[key]:.3g}" for key, name in self._shown.items() if key in metrics)
        whole = progress.left_of_all(progress.current())
        self._progress.update(self._task, completed=done, total=self._total, numbers=numbers + whole)
        every = max(1, self._total // 10)
        left = self._left(done) + whole
        if not self._progress.console.is_terminal and (done % every == 0 or done == self._total):
            stderr.write(f"{self._label} {done}/{self._total}  {numbers}{left}\n")
            heartbeat.touch()

    def _left(self, done: int) -> str:
        """Return "  about 3 min 05 s left" after `done` steps, counted from the first that this run made."""
        if self._pace is None:
            self._pace = Activity(self._label, self._total, start=done)
        self._pace.total, self._pace.done = self._total, done
        left = self._pace.seconds_left
        return "" if left is None or done == self._total else f"  about {duration(left)} left"

    def line(self, done: int, text: str) -> None:
        """Move the bar to `done` and show a line of text; without a terminal only the text is printed."""
        moved = done > self._progress.tasks[self._task].completed or not done
        self._progress.update(self._task, completed=done, numbers=text)
        every = max(1, self._total // 50)
        if moved and not self._progress.console.is_terminal and done % every == 0:
            stderr.write(f"{self._label} {done}/{self._total}  {text}\n")
            heartbeat.touch()


@contextmanager
def bar(label: str, total: int, shown: Mapping[str, str], *, doing: str | None = None) -> Iterator[Bar]:
    """Show a progress bar with elapsed time and time left; `shown` maps metric keys to short names.

    Args:
        doing: what is being done meanwhile, where `label` says only what is counted.
    """
    screen = console()
    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    with (
        progress.activity(doing or label),
        Progress(*columns, console=screen, disable=not screen.is_terminal) as shown_bar,
    ):
        yield Bar(shown_bar, label, total, shown)


def note(line: str) -> None:
    """Print one line to stderr; it is lost where stderr was closed."""
    with suppress(OSError, ValueError, SystemExit):  # rich exits where the reader of a pipe is gone
        console().print(line)
    heartbeat.touch()


def interval(value: Mapping[str, float], digits: int = 2) -> str:
    """Return "mean [low, high]"."""
    return f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"
