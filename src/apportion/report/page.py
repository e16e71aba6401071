"""The report: one self-contained HTML page for several run folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from apportion.errors import ConfigError
from apportion.report import summary
from apportion.report.curves import charts_html, main_charts, other_charts, reward_charts
from apportion.report.diagnosis import diagnosis_html, widest
from apportion.report.document import asset, document, write_page
from apportion.report.heatmap import CAUTION, viewer_html
from apportion.report.monitors import monitors_html
from apportion.report.read import RunData, read_run
from apportion.report.rollouts import logged
from apportion.report.samples import samples_html
from apportion.report.settings import settings_html
from apportion.report.style import number, run_colour

Section = tuple[str, str, str]  # anchor, title, HTML


def write_report(runs: Sequence[Path], output: Path) -> Path:
    """Read the run folders `runs`, write one HTML page to `output` and return its path.

    Raises:
        ConfigError: no run was given.
        DataError: one of them is not a run folder.
        DiskError: `output` cannot be written.
    """
    if not runs:
        raise ConfigError("runs", list(runs), "at least one run folder", "Name one, for example runs/rl.")
    return write_page(report_html(_distinct([read_run(Path(run)) for run in runs])), output)


def report_html(runs: Sequence[RunData]) -> str:
    """Return the page for these runs, in their order; run i has colour i everywhere."""
    names = [run.name for run in runs]
    curves, reward, other = main_charts(runs), reward_charts(runs), other_charts(runs)
    viewer, rollouts = _heat_maps(runs)
    sections: list[Section] = [
        ("summary", "Before and after", _summary(runs)),
        ("monitors", "Monitors", monitors_html(runs)),
        ("reward-model", "Reward model", _reward_model(runs, reward)),
        ("curves", "Learning curves", _curves(runs, curves, other)),
        ("diagnosis", "Direction of each credit method's gradient", diagnosis_html(runs)),
        ("credit", "Where the reward lands", viewer),
        ("samples", "Samples", samples_html(runs)),
        ("settings", "Configuration", settings_html(runs)),
        ("method", "How the numbers were computed", _method(runs)),
    ]
    present = [section for section in sections if section[2]]
    body = _header(runs, present) + "<main>" + "".join(_section(s) for s in present) + "</main>"
    colours = [run_colour(i)._asdict() for i in range(len(runs))]
    charts = {chart["id"]: chart for chart in [*curves, *reward, *other]}
    data: dict[str, Any] = {"chart-data": {"names": names, "colours": colours, "charts": charts}}
    if rollouts:
        data["rollout-data"] = rollouts
    styles = [asset("base.css"), asset("report.css"), asset("heatmap.css"), _run_styles(max(len(runs), widest(runs)))]
    scripts = [_plotly(), asset("charts.js"), asset("heatmap.js")]
    return document("Run report: " + ", ".join(names), body, data=data, styles=styles, scripts=scripts)


def _plotly() -> str:
    # Imported here: plotly is slow to load, and a bad run folder should be reported before that.
    from plotly.offline import get_plotlyjs

    script: str = get_plotlyjs()
    return script


def _distinct(runs: list[RunData]) -> list[RunData]:
    """Return the runs with distinct names: the folder is added, then a number, where names repeat."""
    names = [run.name for run in runs]
    folders = [f"{n} ({r.path.name})" if names.count(n) > 1 else n for n, r in zip(names, runs, strict=True)]
    final = [f"{n} #{folders[: i + 1].count(n)}" if folders.count(n) > 1 else n for i, n in enumerate(folders)]
    return [replace(run, name=name) for run, name in zip(runs, final, strict=True)]


def _run_styles(count: int) -> str:
    light = "".join(f".run-{i}{{--run:{run_colour(i).light}}}" for i in range(count))
    dark = "".join(f".run-{i}{{--run:{run_colour(i).dark}}}" for i in range(count))
    return f"{light}\n@media (prefers-color-scheme:dark){{{dark}}}\n"


def _section(section: Section) -> str:
    anchor, title, html = section
    return f'<section id="{anchor}"><h2>{title}</h2>{html}</section>'


def _header(runs: Sequence[RunData], sections: Sequence[Section]) -> str:
    rows = []
    for i, run in enumerate(runs):
        facts = [run.stage, f"{len(run.metrics)} steps" if run.metrics else "", run.status]
        details = " \u00b7 ".join(escape(fact) for fact in facts if fact)
        state = " failed" if run.status == "failed" else ""
        name = f'<i class="dot"></i><b>{escape(run.name)}</b>'
        rows.append(f'<li class="run-{i}{state}">{name} <span class="unit">{details}</span></li>')
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _ in sections)
    notes = "".join(f"<p>{escape(run.name)}: {escape(note)}</p>" for run in runs for note in run.notes)
    aside = f'<div class="notice" role="note">{notes}</div>' if notes else ""
    return (
        f'<header class="top"><p class="kicker">apportion report</p><h1>{_title(runs)}</h1>'
        f'<ul class="run-list">{"".join(rows)}</ul>{aside}<nav aria-label="Sections">{links}</nav></header>'
    )


def _title(runs: Sequence[RunData]) -> str:
    return escape(runs[0].name) if len(runs) == 1 else f"{len(runs)} runs"


SUPERVISED = ("sft", "dpo")


def _summary(runs: Sequence[RunData]) -> str:
    others = (*SUPERVISED, "reward")
    cards = summary.cards_html([replace(r, evaluation={}) if r.stage in others else r for r in runs], summary.POLICY)
    cards += summary.cards_html(
        [r if r.stage in SUPERVISED else replace(r, evaluation={}) for r in runs], summary.SUPERVISED
    )
    if cards:
        key = "Hollow marks are before training, filled ones after; bars are 95% intervals over what was held out."
        return f'{cards}<p class="note">{key}</p>'
    trained = [run for run in runs if run.stage not in ("reward", "diagnose")]
    if not trained:
        return ""
    lines = "".join(f"<p>{escape(run.name)}: {_training(run)}</p>" for run in trained)
    hint = "<p>No evaluation yet: <code>apportion evaluate</code> adds one.</p>"
    return f'<div class="prose">{lines}{hint}</div>'


def _training(run: RunData) -> str:
    loss = f"loss/{run.stage}"
    charts = [chart for chart in main_charts([run]) if chart["id"] in ("objective/scores", loss)]
    if not charts:
        return "no reward was logged."
    y = charts[0]["traces"][0]["y"]
    tenth = max(1, len(y) // 10)
    first, last = sum(y[:tenth]) / tenth, sum(y[-tenth:]) / tenth
    what = "loss" if charts[0]["id"] == loss else "reward"
    return f"training {what} {number(first)} in the first tenth of its steps, {number(last)} in the last."


def _reward_model(runs: Sequence[RunData], charts: list[dict[str, Any]]) -> str:
    cards = summary.cards_html([r if r.stage == "reward" else replace(r, evaluation={}) for r in runs], summary.REWARD)
    figures = charts_html(charts, [run.name for run in runs]) if charts else ""
    return cards + figures


def _curves(runs: Sequence[RunData], main: list[dict[str, Any]], other: list[dict[str, Any]]) -> str:
    if not main and not other:
        return ""
    names = [run.name for run in runs]
    parts = []
    if main:
        drawn = sorted({trace["run"] for chart in main for trace in chart["traces"]})
        boxes = "".join(
            f'<label class="run-{i}"><input type="checkbox" checked data-show-run="{i}"><i class="dot"></i>'
            f"{escape(names[i])}</label>"
            for i in drawn
        )
        if len(drawn) > 1:
            parts.append(f'<fieldset class="legend"><legend>Runs shown</legend>{boxes}</fieldset>')
        parts.append(charts_html(main, names))
        parts.append('<p class="note">Thin: each step. Bold: running mean of the nearest tenth of the steps.</p>')
        if any(chart["id"] == "advantage/end_token_length_corr" for chart in main):
            parts.append(f'<p class="note">{END_TOKEN}</p>')
    if other:
        opened = "" if main else " open"
        figures = charts_html(other, names)
        parts.append(f"<details{opened}><summary>{len(other)} further metrics</summary>{figures}</details>")
    return "".join(parts)


def _heat_maps(runs: Sequence[RunData]) -> tuple[str, list[dict[str, Any]]]:
    packed, notes = [], []
    for run in runs:
        steps, note = logged(run.rollouts)
        if steps:
            packed.append({"name": run.name, "steps": steps})
            notes.append(f"{run.name}: {note}" if len(runs) > 1 else note)
    if not packed:
        return "", []
    paragraphs = "".join(f"<p>{escape(note)}</p>" for note in [CAUTION, *notes])
    return f'{viewer_html()}<div class="note">{paragraphs}</div>', packed


END_TOKEN = (
    "End token and length: near 0 where the choice to end is judged by the score alone. Beyond \u00b10.5 for long, "
    "ending is paid or punished by the length of the response, as a credit that is not causal does (uniform, "
    "attention); the means by position, advantage/quarter_1 to quarter_4, show the slope that goes with it."
)
METHOD = {
    "Reward and judge": "Means over the evaluation prompts, continued by the policy before training and by the policy "
    "after it. The policy was trained on the reward, so the reward can rise without better text; the judge, which was "
    "not part of training, is the better measure.",
    "KL": "The log-ratio of the policy to the reference, summed over the sampled tokens of a response and averaged "
    "over responses: an estimate in nats a sequence, which can be negative in single batches.",
    "Distinct-2 and perplexity": "Distinct bigrams divided by all bigrams of the continuations, and their perplexity "
    "under the policy before training. A falling distinct-2 with a rising reward is a sign of repetition.",
    "Intervals": "95% intervals of the evaluation. They cover the choice of evaluation prompts in one run, not "
    "the difference between training seeds.",
    "Advantages by position": "Means over the tokens of a batch that the update counts, of the advantages it uses: "
    "the first token, each quarter of a response, and the end token of responses that ended by themselves, whose "
    "correlation with the length is given for batches with at least 12 of them.",
    "Learning curves": "All numbers of metrics.jsonl. The running mean is centred, over fewer points towards both "
    "ends. Of more than 2,000 steps, evenly spaced ones are plotted.",
    "Heat maps": "Credit is the reward on each token after redistribution and before the KL penalty; reward is "
    "after the penalty; advantage and value are those of the update. "
    "\u201cWhat each method would have given\u201d applies every method to the same text and score; the policy was "
    "trained with only one of them. The number of effective tokens is exp(entropy) of the shares. Colours are linear "
    "and symmetric around zero; the ends of each scale are printed. For credit they are at least four times an even "
    "share, so that an even spread is pale. " + CAUTION,
}
REWARD_METHOD = {
    "Reward model": "Accuracy is the share of held-out excerpts whose label is the sign of the score. Confidence is "
    "the sigmoid of the score, the probability of a positive label; the calibration error is the mean difference "
    "between it and the share of positive labels over bins, weighted by their counts, which the marker areas show.",
}


SUPERVISED_METHOD = {
    "Held-out loss": "The mean negative log-likelihood of a demonstration's target tokens, averaged over held-out "
    "demonstrations; perplexity is over all their tokens. Both models are scored as they are saved.",
    "Held-out accuracy": "The share of held-out pairs whose chosen answer has the higher implicit reward, \u03b2 times "
    "the log-ratio of the trained policy to the model it started from; before training, of which that model gives the "
    "higher log-probability, which favours short answers.",
}


def _method(runs: Sequence[RunData]) -> str:
    texts: dict[str, str] = {}
    if any(run.stage in SUPERVISED for run in runs):
        texts |= SUPERVISED_METHOD
    if any(run.stage not in (*SUPERVISED, "reward", "diagnose") for run in runs):
        texts |= METHOD
    if any(run.stage == "reward" for run in runs):
        texts |= REWARD_METHOD
    prose = "".join(f"<p><b>{name}.</b> {text}</p>" for name, text in texts.items())
    return f'<div class="prose">{prose}</div>' if prose else ""
