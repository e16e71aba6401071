"""The page of a comparison in a real browser: plots, paging, links that exist, markup that stays text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import axe
import pytest
from run_folders import write_lines

from apportion.report.comparison.page import write_comparison
from apportion.report.comparison.tables import percent, span

Open = Callable[..., Any]
PLANTED = "</script><script>window.pwned=1</script><img src=x onerror=window.pwned=1>' onmouseover='window.pwned=1"
COUNT = 11


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}


def measured(gain: float, start: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"prompts": COUNT, "mean": interval(gain)}
    if not start:
        found |= {"difference": interval(gain), "length_controlled_win_rate": interval(0.5 + gain / 2)}
        found["win_rate"] = interval(0.5 + gain) | {"win": 0.5, "tie": 0.2, "loss": 0.3}
    return found


def write_folder(folder: Path, names: list[str], text: str) -> Path:
    """Write the folder of a finished comparison of `names`, the first the start; every text holds `text`."""
    folder.mkdir()
    measures = ["reward", "judge/helpful"]
    figures, gains = {}, dict(zip(names, (0.0, 0.2, -0.1), strict=False))
    for name in names:
        own = {key: measured(gains[name], name == names[0]) for key in measures}
        kl = None if name == names[0] else interval(3.0)
        figures[name] = {
            "source": f"runs/{name}", "answers": "sampled", "length": interval(20.0), "characters": interval(90.0),
            "cut": interval(0.5), "distinct": {"1": 0.5, "2": 0.8, "3": 0.9}, "self_similarity": 0.1,
            "self_similarity_of_a_prompt": None, "kl": kl, "kl_token": kl, "kl_k3_token": kl,
            "perplexity": interval(9.0), "measures": own,
        }  # fmt: skip
    wins = {one: {other: measured(0.1, False)["win_rate"] for other in names if other != one} for one in names}
    bucket = {"bucket": text or "topic", "prompts": COUNT, "figures": {n: figures[n]["measures"] for n in names}}
    found = {
        "kind": "comparison", "start": names[0], "policies": names[1:], "measures": measures, "prompts": COUNT,
        "answers_per_prompt": 1, "seed": 1, "against": "all", "figures": figures, "left_out": [f"KL of {text}."],
        "wins": dict.fromkeys(measures, wins), "buckets": {"by": text or "topic", "rows": [bucket]},
    }  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(found))
    (folder / "config.yaml").write_text(json.dumps({"output": text}))
    (folder / "status.json").write_text(json.dumps({"stage": "evaluate", "status": "finished"}))
    rows = []
    for i in range(COUNT):
        scores = {name: {key: [gains[name] * (i + 1)] for key in measures} for name in names}
        row = {name: {"completions": [f"answer {i} {text}"], "tokens": [2], "ended": [False], "scores": scores[name]}
               for name in names}  # fmt: skip
        row[names[1]]["log_ratios"] = [[0.5, -0.25]]
        rows.append({"prompt": [{"role": "user", "content": f"prompt {i} {text}"}], "policies": row})
    write_lines(folder / "samples.jsonl", rows)
    methods = {"prefix_difference": [0.25, -0.5]}
    credit = [
        {"prompt": i, "policy": n, "measure": "reward", "tokens": [f" a{text}", "b"], "score": 1.0, "methods": methods}
        for i in range(3)
        for n in names
    ]
    write_lines(folder / "credit.jsonl", credit)
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("compared") / "eval", ["sft", "ppo", "dpo"], "")
    return write_comparison(folder)


def test_every_plot_is_drawn_and_every_link_leads_somewhere(page: Path, open_page: Open) -> None:
    opened = open_page(page)
    opened.wait_for_function("[...document.querySelectorAll('[data-chart]')].every(n => Number(n.dataset.drawn) > 0)")
    assert opened.locator("[data-chart]").count() == 4
    links = opened.locator("a").evaluate_all("nodes => nodes.map(n => n.href)")
    beyond = [urlparse(link) for link in links if "tokens/" in link]
    assert len(beyond) == 9
    assert "2 tokens · cut off" in opened.locator(".compared").first.inner_text()
    for link in links:
        parts = urlparse(link)
        path = Path(unquote(parts.path))
        assert path.is_file(), link
        assert f'id="{parts.fragment}"' in path.read_text(encoding="utf-8"), link


def test_answers_are_paged_ordered_and_found_by_their_link(page: Path, open_page: Open) -> None:
    opened = open_page(page)
    shown = "nodes => nodes.filter(n => !n.hidden).map(n => n.id)"
    blocks = opened.locator(".compared")
    assert blocks.evaluate_all(shown) == [f"prompt-{i}" for i in (1, 2, 3, 4)]
    assert opened.locator("[data-where]").inner_text() == "1–4 of 11"
    opened.locator("[data-next]").click()
    opened.locator("[data-next]").click()
    assert blocks.evaluate_all(shown) == ["prompt-9", "prompt-10", "prompt-11"]
    assert opened.locator("[data-next]").is_disabled()
    opened.locator("[data-order]").select_option(label="largest gain of ppo")
    assert blocks.evaluate_all(shown)[:2] == ["prompt-11", "prompt-10"]
    opened.locator("[data-order]").select_option(label="largest loss of dpo")
    assert blocks.evaluate_all(shown)[0] == "prompt-11"
    opened.locator("[data-order]").select_option(label="in file order")
    opened.evaluate("window.location.hash = '#prompt-7'")
    opened.wait_for_function("!document.getElementById('prompt-7').hidden")
    assert blocks.evaluate_all(shown) == [f"prompt-{i}" for i in (5, 6, 7, 8)]


def test_a_heat_map_has_its_tokens_colours_and_a_way_back(page: Path, open_page: Open) -> None:
    opened = open_page(page)
    opened.locator("#prompt-2 .run-1 a").click()
    opened.wait_for_load_state()
    assert opened.url.endswith("tokens/prompt-0002.html#policy-1")
    rows = opened.locator("#policy-1 .stack-row")
    assert rows.count() == 2 and rows.locator(".token").count() == 4
    assert opened.locator("#policy-1 .token.positive").count() == 2
    assert opened.locator("#policy-0 .stack-row").count() == 1, "the start has no log-ratio to itself"
    opened.get_by_text("Back to the comparison").click()
    opened.wait_for_load_state()
    assert opened.locator("#prompt-2").is_visible()


NAMES = ["evaluation.html", "tokens/prompt-0001.html"]


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", NAMES)
def test_it_fits_a_phone_and_a_desk(page: Path, open_page: Open, width: int, name: str) -> None:
    opened = open_page(page.parent / name, viewport={"width": width, "height": 844})
    assert opened.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", NAMES)
def test_axe_finds_no_serious_fault(page: Path, open_page: Open, name: str, scheme: str) -> None:
    script, reason = axe.script()
    if script is None:
        pytest.skip(reason)
    opened = open_page(page.parent / name, color_scheme=scheme, bypass_csp=True)  # for the checker's own script
    opened.evaluate(script)
    found = opened.evaluate("axe.run().then(r => r.violations.map(v => [v.impact, v.id, v.nodes.map(n => n.html)]))")
    assert [one for one in found if one[0] in ("serious", "critical")] == []


@pytest.mark.parametrize("name", NAMES)
def test_planted_markup_is_text_even_without_the_pages_policy(tmp_path: Path, open_page: Open, name: str) -> None:
    names = [f"{word} {PLANTED}" for word in ("sft", "ppo", "dpo")]
    write_comparison(write_folder(tmp_path / "eval", names, PLANTED))
    opened = open_page(tmp_path / "eval" / name, bypass_csp=True)
    opened.wait_for_timeout(300)
    assert opened.evaluate("window.pwned") is None
    assert opened.locator("img, [onerror], [onmouseover]").count() == 0
    assert opened.locator("body").inner_text().count("<script>window.pwned=1") >= 5


def test_pages_of_an_earlier_comparison_are_removed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "eval", ["sft", "ppo"], "")
    (folder / "tokens").mkdir()
    (folder / "tokens" / "prompt-0009.html").write_text("old")
    write_comparison(folder)
    assert sorted(path.name for path in (folder / "tokens").iterdir()) == [f"prompt-000{i}.html" for i in (1, 2, 3)]


def test_numbers_of_a_table_are_short_and_a_missing_one_is_a_dash() -> None:
    assert span(None) == percent(None) == "–"
    assert span({"mean": -0.25, "low": -0.5, "high": 0.1}, signed=True) == (
        '<b>−0.250</b><span class="interval">[−0.500, +0.100]</span>'
    )
    assert percent({"mean": 0.625, "low": 0.5, "high": 0.75}).startswith("<b>62.5%</b>")
