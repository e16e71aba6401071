"""Markup planted wherever text of others reaches a page: shown as text, never run, with the page's policy and without.

With the policy switched off nothing but the escaping stands between a planted script and the browser.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from run_folders import write_lines

from apportion.report.document import embed_json, write_page
from apportion.report.heatmap import credit_page, stack_html
from apportion.report.page import write_report

Open = Callable[..., Any]
NUMBER = count()
ENDS = ("</script>", "<!--", "]]>", "'>", '">', "</title>", "</style>", "</textarea>", "{{", "\u2028", "&lt;")


def planted() -> str:
    """Return markup that would leave a trace if it ran, another one each time, out of any place it might stand in."""
    number = next(NUMBER)
    end = ENDS[number % len(ENDS)]
    return (
        f"p{number} {end}<script>window.pwned={number}</script><img src=x onerror=window.pwned={number}>"
        f"<svg onload=window.pwned={number}>' onmouseover='window.pwned={number}"
    )


def spread(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}


def rl_run(folder: Path) -> Path:
    """Write a run folder whose every name and text holds markup."""
    folder.mkdir()
    config = {"stage": "rl", planted(): planted(), "credit": [{planted(): {planted(): planted()}}], "seed": 1}
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    message = {"stage": "rl", "status": "failed", "name": planted(), "error": planted()}
    (folder / "status.json").write_text(json.dumps(message))
    metric = planted()
    rows = [{"step": i, "objective/scores": 0.1 * i, metric: 1.0 * i, planted(): 2.0} for i in range(4)]
    write_lines(folder / "metrics.jsonl", rows)
    values = [0.5, -0.5]
    rollout = {
        "step": 1, "row": 0, "prompt": planted(), "text": planted(), "tokens": [planted(), planted()], "ended": True,
        "raw_score": 0.0, "score": 0.0, "credit": values, "kl": values, "reward": values, "value": values,
        "advantage": values, "logprob": values, "methods": {planted(): values, "uniform": values},
    }  # fmt: skip
    write_lines(folder / "rollouts.jsonl", [rollout])
    sample = {"prompt": planted(), "before": planted(), "after": planted(), "kl": 1.0}
    write_lines(folder / "samples.jsonl", [sample | {"reward_before": 0.0, "reward_after": 1.0}])
    found = {"reward_before": spread(0), "reward_after": spread(1), planted(): spread(1), "by_length": {planted(): 0.5}}
    (folder / "evaluation.json").write_text(json.dumps(found))
    return folder


def diagnosis(folder: Path) -> Path:
    """Write the folder of a diagnosis whose methods' names and verdicts hold markup."""
    folder.mkdir()
    (folder / "config.yaml").write_text("stage: diagnose\n")
    (folder / "status.json").write_text(json.dumps({"stage": "diagnose", "status": "finished", "name": planted()}))
    keys = ("cosine", "bias", "snr", "useful_snr", "stop_bias", "length_correlation")
    methods = {planted(): {key: spread(0.5) for key in keys} | {"verdict": planted()} for _ in range(2)}
    found = {
        "methods": methods,
        "recommended": planted(),
        "why": planted(),
        "rollouts": planted(),
        "prompts": planted(),
    }
    (folder / "diagnosis.json").write_text(json.dumps(found | {"batch": planted(), "samples": 2}))
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("planted")
    runs = [rl_run(base / "run <b>"), rl_run(base / "other' onload='"), diagnosis(base / "diagnosis &amp;")]
    texts = [planted() for _ in range(3)]
    methods = {planted(): [0.1, 0.2, 0.3], planted(): [-0.1, 0.0, 0.4]}
    html = credit_page(planted(), planted(), texts, methods, 0.6, [planted(), planted()])
    return {
        "report": write_report(runs, base / "report.html"),
        "diagnosis": write_report(runs[2:], base / "diagnosis.html"),
        "credit": write_page(html, base / "credit.html"),
    }


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        pytest.param("report", "on", marks=pytest.mark.long),  # weaker than "off", where only the escaping protects
        ("report", "off"),
        ("diagnosis", "off"),
        ("credit", "off"),
    ],
)
def test_planted_markup_is_text_everywhere(pages: dict[str, Path], open_page: Open, name: str, policy: str) -> None:
    page = open_page(pages[name], bypass_csp=policy == "off")
    for summary in page.locator("details > summary").all():
        summary.click()
    for choice in page.locator("input[type=radio]").all():
        choice.check(force=True)
    for place in page.locator(".token").all()[:6]:
        place.hover(force=True)
    page.wait_for_timeout(100)
    assert page.evaluate("window.pwned") is None
    assert page.locator("img, [onerror], [onload], [onmouseover], body script:not([type]) ~ svg[onload]").count() == 0
    scripts = page.locator("script").evaluate_all("nodes => nodes.map(n => n.id || n.textContent.slice(0, 20))")
    assert not [script for script in scripts if "pwned" in script]
    shown = page.locator("body").inner_text() + page.title()
    assert shown.count("<script>window.pwned=") >= 5, "it is there, and it is text"


def test_a_data_block_cannot_be_closed() -> None:
    block = embed_json("x", {end: [end, planted()] for end in ENDS})
    assert block.count("<") == 2 and block.count(">") == 2
    inside = block[block.index(">") + 1 : block.rindex("<")]
    assert json.loads(inside) == {end: [end, value[1]] for end, value in json.loads(inside).items()}
    assert "&" not in inside and "\u2028" not in inside


def test_what_is_shown_without_scripts_is_escaped_too() -> None:
    html = stack_html([planted()], {planted(): [1.0]})
    assert "<script" not in html and "<img" not in html and "<svg" not in html
