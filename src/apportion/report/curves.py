"""Learning curves and calibration, as plain data for charts.js and plotly."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from apportion.report.read import RunData
from apportion.report.style import finite, interval, number

POINTS = 2000
SMOOTH_FROM = 30

EACH_REWARD = re.compile(r"rewards/(.+)/mean")

Chart = dict[str, Any]


class Measure(NamedTuple):
    """A metric's name in metrics.jsonl, its title, and its unit or meaning."""

    key: str
    title: str
    unit: str = ""


MAIN = (
    Measure("objective/scores", "Reward", "mean score of the batch"),
    Measure("objective/kl", "KL from the reference", "nats a sequence"),
    Measure("objective/length", "Length", "tokens"),
    Measure("objective/entropy", "Entropy", "nats"),
    Measure("loss/value", "Value loss"),
    Measure("policy/clipfrac", "Clip fraction", "share of clipped ratios"),
    Measure("kl/coef", "KL coefficient"),
    Measure("credit/kept_mass", "Kept mass", "share of attention on the response"),
    Measure("advantage/end_token_length_corr", "End token and length", "correlation"),
)
REWARD = (
    Measure("loss/reward", "Loss", "nats an excerpt"),
    Measure("accuracy", "Accuracy", "share of training excerpts classified correctly"),
)
SUPERVISED = (
    Measure("loss/sft", "Loss of sft", "nats a token"),
    Measure("loss/dpo", "Loss of dpo", "nats a pair"),
    Measure("accuracy/tokens", "Token accuracy", "share of target tokens that are the most likely"),
    Measure("accuracy/pairs", "Accuracy of pairs", "share that the implicit reward ranks right"),
    Measure("rewards/margins", "Margin", "implicit reward of chosen less rejected, nats"),
    Measure("logps/chosen", "Log-probability of chosen answers", "nats an answer"),
)


GROUPS = (  # key of evaluation.json, title, what its groups are
    ("by_length", "Accuracy by length", "tokens"),
    ("by_rank_gap", "Accuracy by rank gap", "ranks apart"),
    ("by_score_gap", "Accuracy by score gap", "difference of the scores"),
    ("by_length_difference", "Accuracy by length difference", "winner's length beside the loser's"),
)


def main_charts(runs: Sequence[RunData]) -> list[Chart]:
    """Return the learning curves of policy runs, all runs in each chart; each of several rewards has its own."""
    supervised = [i for i, run in enumerate(runs) if run.stage in ("sft", "dpo")]
    others = [i for i, run in enumerate(runs) if run.stage not in ("reward", "sft", "dpo")]
    score, *further = MAIN
    measures = (score, *reward_measures(runs), *further)
    return [*_charts(runs, others, measures), *_charts(runs, supervised, SUPERVISED)]


def reward_measures(runs: Sequence[RunData]) -> list[Measure]:
    """Return a measure for each reward of runs with several, in alphabetical order."""
    found = {match[1] for run in runs for row in run.metrics for key in row if (match := EACH_REWARD.fullmatch(key))}
    return [Measure(f"rewards/{name}/mean", f"Reward: {name}", "mean where it applies") for name in sorted(found)]


def reward_charts(runs: Sequence[RunData]) -> list[Chart]:
    """Return the learning curves of reward-model runs, then calibration and accuracy by length and other measures."""
    indices = [i for i, run in enumerate(runs) if run.stage == "reward"]
    groups = [_by_group(runs, indices, *names) for names in GROUPS]
    candidates = [*_charts(runs, indices, REWARD), _calibration(runs, indices), *groups]
    return [chart for chart in candidates if chart["traces"]]


def other_charts(runs: Sequence[RunData]) -> list[Chart]:
    """Return a curve for every further number in metrics.jsonl, in alphabetical order; monitors have a section."""
    known = {measure.key for measure in (*MAIN, *SUPERVISED, *REWARD, *reward_measures(runs))} | {"step"}
    keys = {key for run in runs for row in run.metrics for key, value in row.items() if finite(value) is not None}
    return _charts(
        runs, range(len(runs)), [Measure(k, k) for k in sorted(keys - known) if not k.startswith("monitors/")]
    )


def charts_html(charts: Sequence[Chart], names: Sequence[str]) -> str:
    """Return a figure element for each chart; charts.js draws into them."""
    return f'<div class="charts count-{len(charts)}">{"".join(_figure(chart, names) for chart in charts)}</div>'


def _figure(chart: Chart, names: Sequence[str]) -> str:
    label = chart["title"] + ": " + "; ".join(_describe(trace, names[trace["run"]]) for trace in chart["traces"])
    unit = f' <span class="unit">{escape(chart["unit"])}</span>' if chart["unit"] else ""
    name = escape(chart["id"])
    return (
        f'<figure class="chart"><figcaption>{escape(chart["title"])}{unit}</figcaption>'
        f'<div class="plot" data-chart="{name}" role="img" aria-label="{escape(label)}"></div>'
        "</figure>"
    )


def _describe(trace: Mapping[str, Any], name: str) -> str:
    return f"{name} from {number(trace['y'][0])} to {number(trace['y'][-1])}"


def _charts(runs: Sequence[RunData], indices: Iterable[int], measures: Sequence[Measure]) -> list[Chart]:
    indices = list(indices)
    charts = []
    for measure in measures:
        traces = [trace for i in indices if (trace := _trace(i, runs[i].metrics, measure.key))]
        if traces:
            charts.append({"id": measure.key, **measure._asdict(), "kind": "curve", "traces": traces})
    return charts


def _trace(run: int, metrics: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any] | None:
    points = []
    for i, row in enumerate(metrics):
        x, y = finite(row.get("step", i)), finite(row.get(key))
        if x is not None and y is not None:
            points.append((x, y))
    if not points:
        return None
    raw = [p[1] for p in points]
    smooth = running_mean(raw) if len(raw) >= SMOOTH_FROM else None
    stride = -(-len(raw) // POINTS)
    # The last point is always included, so that curves end at the last step.
    chosen = sorted({*range(0, len(raw), stride), len(raw) - 1})
    trace: dict[str, Any] = {"run": run, "x": [points[i][0] for i in chosen], "y": [_short(raw[i]) for i in chosen]}
    if smooth and all(map(math.isfinite, smooth)):  # a sum of finite numbers can overflow
        trace["smooth"] = [_short(smooth[i]) for i in chosen]
    return trace


def running_mean(values: Sequence[float]) -> list[float]:
    """Return the centred mean over a tenth of the points around each; the window is cut off at the ends."""
    half = max(1, len(values) // 20)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for i in range(len(values)):
        first, end = max(0, i - half), min(len(values), i + half + 1)
        means.append((sums[end] - sums[first]) / (end - first))
    return means


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _calibration(runs: Sequence[RunData], indices: Sequence[int]) -> Chart:
    traces = []
    for i in indices:
        bins = runs[i].evaluation.get("calibration")
        rows = [_bin(b) for b in bins if isinstance(b, Mapping)] if isinstance(bins, list) else []
        points = sorted(row for row in rows if row is not None)
        if points:
            x, y, n = (list(column) for column in zip(*points, strict=True))
            traces.append({"run": i, "x": x, "y": y, "n": n})
    unit = "accuracy against confidence; the diagonal is perfect"
    return {"id": "calibration", "title": "Calibration", "unit": unit, "kind": "calibration", "traces": traces}


def _bin(row: Mapping[str, Any]) -> tuple[float, float, float] | None:
    confidence, accuracy = finite(row.get("confidence")), finite(row.get("accuracy"))
    count = finite(row.get("count"))
    if confidence is None or accuracy is None or count == 0:
        return None
    return confidence, accuracy, 1.0 if count is None else count


def _by_group(runs: Sequence[RunData], indices: Sequence[int], key: str, title: str, unit: str) -> Chart:
    """Return the accuracies in {group: accuracy} under `key` of the evaluations."""
    traces = []
    for i in indices:
        groups = runs[i].evaluation.get(key)
        rows = groups.items() if isinstance(groups, Mapping) else ()
        found = [(str(k), value) for k, v in rows if (value := interval(_accuracy(v))) is not None]
        if found:
            y = [v.mean for _, v in found]
            low = [v.mean if v.low is None else v.low for _, v in found]
            high = [v.mean if v.high is None else v.high for _, v in found]
            traces.append({"run": i, "x": [k for k, _ in found], "y": y, "low": low, "high": high})
    return {"id": key, "title": title, "unit": f"{unit}; 95% intervals", "kind": "interval", "traces": traces}


def _accuracy(value: object) -> object:
    return value["accuracy"] if isinstance(value, Mapping) and "accuracy" in value else value
