"""The report in a real, offline browser: figures draw, switches work, planted markup stays text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_folders import PLANTED_PROMPT, PLANTED_SAMPLE, PLANTED_TOKEN, write_reward_run, write_rl_run

from apportion.report.document import write_page
from apportion.report.heatmap import credit_page
from apportion.report.page import write_report

Open = Callable[..., Any]
COLOURS = "nodes => nodes.map(node => getComputedStyle(node).backgroundColor)"
MAIN = "[data-tokens] .token"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("runs")
    abc = write_rl_run(base / "abc", "abc, seed 1", trained="attention", seed=1, speed=2.2, planted=True)
    ppo = write_rl_run(base / "ppo", "ppo <b>seed</b> 1", trained="sparse", seed=2, speed=1.7)
    return write_report([abc, ppo, write_reward_run(base / "reward", "reward model")], base / "report.html")


def choose(page: Any, view: str) -> list[str]:
    page.locator(f'input[name=view][value="{view}"]').check()
    return page.locator(MAIN).evaluate_all(COLOURS)


def traces(page: Any, chart: str) -> set[str]:
    names = page.locator(f'[data-chart="{chart}"]').evaluate(
        "node => node._fullData.filter(t => t.visible === true).map(t => t.name)"
    )
    return set(names)


def test_every_figure_draws_a_trace_for_each_run_that_is_shown(report: Path, open_page: Open) -> None:
    page = open_page(report)
    for summary in page.locator("#curves summary").all():
        summary.click()
    plots = page.locator("[data-chart]")
    page.wait_for_function("[...document.querySelectorAll('[data-chart]')].every(n => n.dataset.drawn)")
    charts = plots.evaluate_all("nodes => nodes.map(n => n.dataset.chart)")
    assert len(charts) == len(set(charts)) == 19
    for chart in charts:
        plot = page.locator(f'[data-chart="{chart}"]')
        assert plot.locator("svg.main-svg").count() >= 1, chart
        drawn = plot.locator(".scatterlayer .trace").count()
        runs = 1 if chart in ("loss/reward", "accuracy", "calibration", "by_length") else 2
        assert drawn >= runs, f"{chart}: {drawn} traces for {runs} runs"
        assert len(traces(page, chart)) == runs, chart
        paths = plot.locator(".scatterlayer .trace path").evaluate_all("nodes => nodes.map(n => n.getAttribute('d'))")
        assert paths and all(d and "NaN" not in d for d in paths), chart
    assert traces(page, "objective/kl") == {"abc, seed 1", "ppo &lt;b&gt;seed&lt;/b&gt; 1"}
    page.locator("[data-show-run='1']").uncheck()
    assert traces(page, "objective/kl") == {"abc, seed 1"}
    assert traces(page, "loss/value") == {"abc, seed 1"}


def test_method_and_quantity_switches_change_the_colours(report: Path, open_page: Open) -> None:
    page = open_page(report)
    seen = {
        view: choose(page, view)
        for view in ("method:sparse", "method:uniform", "method:attention", "quantity:KL", "quantity:value")
    }
    clear = "rgba(0, 0, 0, 0)"
    transparent = [c for c in seen["method:sparse"] if c == clear or c.endswith(", 0)")]
    assert len(transparent) == len(seen["method:sparse"]) - 1, "sparse puts the whole score on one token"
    assert len(set(seen["method:uniform"])) == 1, "uniform gives every token the same"
    assert len(set(seen["method:attention"])) > 5
    assert len({tuple(colours) for colours in seen.values()}) == len(seen)
    assert any(c.startswith("rgba(90, 155, 224") for c in seen["quantity:KL"]), "negative values are blue"
    names = page.locator("[data-stack] h4").all_inner_texts()
    assert names == ["sparse", "uniform", "attention", "policy_attention"]


def test_table_of_values_sums_to_the_score_and_rollout_picker_changes_the_text(report: Path, open_page: Open) -> None:
    page = open_page(report)
    page.locator("[data-values] summary").click()
    page.wait_for_selector("[data-table] td")
    table = page.locator("[data-table] tr").evaluate_all("rows => rows.map(r => [...r.cells].map(c => c.textContent))")
    column = table[0].index("attention")
    total = sum(float(row[column].replace("\u2212", "-")) for row in table[1:])
    score = float(page.locator("[data-facts]").inner_text().split("score ")[1].split(" ")[0])
    assert total == pytest.approx(score, abs=0.02)
    first = page.locator("[data-tokens]").inner_text()
    page.get_by_role("button", name="Last").click()
    assert page.locator("[data-step-text]").inner_text().startswith("200 ")
    last = page.locator("[data-tokens]").inner_text()
    page.locator("[data-row]").select_option("1")
    assert len({first, last, page.locator("[data-tokens]").inner_text()}) == 3
    assert "cut off" in page.locator("[data-facts]").inner_text()
    page.locator("[data-run]").select_option("1")
    page.get_by_role("button", name="First").click()
    assert page.locator("[data-step-text]").inner_text().startswith("0 ")


def test_works_by_keyboard(report: Path, open_page: Open) -> None:
    page = open_page(report)
    page.locator("input[name=view]:checked").focus()
    before = page.locator(MAIN).evaluate_all(COLOURS)
    page.keyboard.press("ArrowRight")
    assert page.locator(MAIN).evaluate_all(COLOURS) != before
    page.locator("[data-step]").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("[data-step-text]").inner_text().startswith("20 ")
    page.locator("[data-tokens]").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator("[data-readout]").inner_text().startswith("2. ")


def test_planted_markup_is_shown_and_never_runs(report: Path, open_page: Open) -> None:
    page = open_page(report)
    tokens = page.locator(MAIN).all_inner_texts()
    assert PLANTED_TOKEN in tokens
    assert page.locator("[data-prompt]").inner_text() == PLANTED_PROMPT
    assert PLANTED_SAMPLE.strip() in page.locator("#samples").inner_text()
    page.locator(MAIN).nth(2).hover()
    assert PLANTED_TOKEN in page.locator("[data-readout]").inner_text()
    assert page.evaluate("window.pwned") is None
    # Not the policy alone: the markup never became elements.
    assert page.locator("img, svg[onload], [onerror]").count() == 0
    scripts = page.locator("script").evaluate_all("nodes => nodes.map(n => n.id || 'code')")
    assert scripts == ["chart-data", "rollout-data", "code", "code", "code"]


def test_policy_blocks_the_network_and_a_script_that_gets_in(report: Path, open_page: Open, tmp_path: Path) -> None:
    html = report.read_text(encoding="utf-8")
    broken = tmp_path / "broken.html"
    broken.write_text(html.replace("<main>", "<main><script>window.pwned=1</script>", 1), encoding="utf-8")
    page = open_page(broken, bypass_csp=True)
    assert page.evaluate("window.pwned") == 1, "the planted script works where the policy is switched off"
    page = open_page(broken, expect="Content Security Policy")
    assert page.evaluate("window.pwned") is None
    message = page.evaluate("fetch('https://example.org/').then(() => 'reached', error => error.name)")
    assert message == "TypeError"


@pytest.mark.parametrize(("scheme", "width"), [("light", 390), ("dark", 1200)])
def test_fits_and_is_readable(report: Path, open_page: Open, scheme: str, width: int) -> None:
    page = open_page(report, color_scheme=scheme, viewport={"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    choose(page, "method:sparse")
    strongest = page.locator(MAIN).last.evaluate(
        "n => [getComputedStyle(n).color, getComputedStyle(n).backgroundColor]"
    )
    assert contrast(*strongest) >= 4.5, strongest


def test_credit_page_switches_methods(open_page: Open, tmp_path: Path) -> None:
    methods = {"sparse": [0.0, 0.0, -1.0], "uniform": [-1 / 3] * 3}
    html = credit_page("A title", "Prompt", [" a\n", PLANTED_TOKEN, "</s>"], methods, -1.0, ["A note."])
    page = open_page(write_page(html, tmp_path / "credit.html"))
    assert page.locator(MAIN).all_inner_texts()[:2] == [" a\u21b5\n", PLANTED_TOKEN]
    assert choose(page, "method:sparse") != choose(page, "method:uniform")
    assert page.locator("[data-picker]").is_hidden()
    assert page.evaluate("window.pwned") is None


def contrast(text: str, ground: str) -> float:
    """Return the contrast ratio of two opaque CSS colours "rgb(r, g, b)", as WCAG defines it."""

    def luminance(colour: str) -> float:
        parts = [float(p) / 255 for p in colour[4:-1].split(",")]
        r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    light, dark = sorted((luminance(text), luminance(ground)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
