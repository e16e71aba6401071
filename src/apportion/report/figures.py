"""Static learning curves as PNG, for documents that cannot embed a page."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apportion.errors import DataError, DiskError
from apportion.report.curves import Chart, main_charts, reward_charts
from apportion.report.read import read_run
from apportion.report.style import run_colour

PANELS = 4
INK, MUTED = "#24272b", "#8a9098"


def learning_curve_png(runs: Sequence[Path], output: Path) -> Path:
    """Draw the first four learning curves of the run folders `runs` to `output` (PNG, 150 dpi) and return its path.

    Raises:
        DataError: one is not a run folder, or none has a curve.
        DiskError: `output` cannot be written.
    """
    from matplotlib.figure import Figure  # no pyplot: it keeps global state and may look for a display

    data = [read_run(Path(run)) for run in runs]
    charts = [c for c in (main_charts(data) or reward_charts(data)) if c["kind"] == "curve"][:PANELS]
    if not charts:
        got = [str(run) for run in runs]
        raise DataError("runs", got, "runs with metrics.jsonl", "Train first, or name other runs.")
    columns = min(2, len(charts))
    rows = -(-len(charts) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.0 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, chart in zip(axes, charts, strict=False):
        _draw(axis, chart, [run.name for run in data])
    for axis in axes[len(charts) :]:
        axis.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return _write(buffer.getvalue(), Path(output))


def _draw(axis: Any, chart: Chart, names: Sequence[str]) -> None:
    for trace in chart["traces"]:
        colour = run_colour(trace["run"]).light
        name = names[trace["run"]]
        # A name that starts with "_" would be left out of matplotlib's legend.
        label = f" {name}" if name.startswith("_") else name
        smooth = trace.get("smooth")
        if smooth:
            axis.plot(trace["x"], trace["y"], color=colour, alpha=0.28, linewidth=0.8)
        axis.plot(trace["x"], smooth or trace["y"], color=colour, linewidth=1.9, label=label)
    axis.set_title(chart["title"], loc="left", fontsize=11, color=INK, fontweight="bold")
    if chart["unit"]:
        axis.set_title(chart["unit"], loc="right", fontsize=8.5, color=MUTED)
    axis.set_xlabel("step", fontsize=8.5, color=MUTED)
    axis.tick_params(labelsize=8.5, colors=MUTED, length=0)
    axis.grid(axis="y", color="#e7e8ea", linewidth=0.8)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color("#cfd2d6")


def _write(raw: bytes, output: Path) -> Path:
    temporary = output.with_name(f".{output.name}.part")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(raw)
        os.replace(temporary, output)
    except OSError as error:
        fix = "Choose another output, or make room and check the permissions."
        raise DiskError("output", f"{output} ({error})", "a place that can be written to", fix) from error
    return output
