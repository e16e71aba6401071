"""The report without a browser: what it reads, what it refuses, and what it writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from apportion.errors import ConfigError, DataError, DiskError
from apportion.report.curves import running_mean
from apportion.report.document import embed_json
from apportion.report.figures import learning_curve_png
from apportion.report.heatmap import tokens_html, tokens_rich
from apportion.report.page import write_report
from apportion.report.read import read_run
from apportion.report.rollouts import STEPS, logged
from apportion.report.style import Interval, blend, credit_limit, interval, level, number, scale_limit

METRICS = [{"step": i, "objective/scores": i / 10, "objective/kl": float("nan") if i == 3 else 1.0} for i in range(40)]


def make_run(folder: Path, **files: Any) -> Path:
    folder.mkdir()
    for name, content in files.items():
        stem, _, kind = name.rpartition("_")
        path = folder / f"{stem}.{kind}"
        if kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def rollout(step: int, row: int = 0, **more: Any) -> dict[str, Any]:
    return {"step": step, "row": row, "prompt": "p", "tokens": [" a", "b"], "credit": [0.5, 0.5], "score": 1.0, **more}


def test_refuses_what_is_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.*nothing there.*run folder"):
        read_run(tmp_path / "absent")
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(DataError, match="a file"):
        read_run(file)


def test_refuses_a_folder_without_numbers_and_names_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "photo.txt").write_text("x")
    with pytest.raises(DataError, match=r"photo\.txt.*metrics\.jsonl, evaluation\.json or diagnosis\.json"):
        read_run(tmp_path)


def test_refuses_no_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one run folder"):
        write_report([], tmp_path / "report.html")


def test_skips_a_cut_off_last_line_and_notes_it_on_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", metrics_jsonl=METRICS)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "objective/sco')
    data = read_run(run)
    assert len(data.metrics) == 40
    assert data.notes == ("metrics.jsonl: line 41 skipped (the last line is cut off).",)
    assert "line 41 skipped" in write_report([run], tmp_path / "r.html").read_text()


def test_survives_every_kind_of_damage(tmp_path: Path) -> None:
    rows = [rollout(0, methods={"sparse": [0.0]}), rollout(1, credit=[None, "x"], methods=3), {"step": 2}, [1]]
    run = make_run(
        tmp_path / "run",
        metrics_jsonl=METRICS,
        rollouts_jsonl=rows,
        samples_jsonl=[{"prompt": "a", "after": "b"}, {}],
        evaluation_json='{"kl": {"mean": "x"}',
        config_yaml="a: [",
        status_json="[]",
    )
    (run / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes() + b'{"step": 41, "x": "\xff')
    data = read_run(run)
    assert len(data.notes) == 6, data.notes
    html = write_report([run], tmp_path / "r.html").read_text()
    assert "1 without tokens are left out" in html
    assert data.name == "run"


def test_evaluation_alone_is_enough(tmp_path: Path) -> None:
    evaluation = {"reward_before": {"mean": -0.5, "low": -0.6, "high": -0.4}, "reward_after": 1.25, "kl": 3}
    html = write_report([make_run(tmp_path / "run", evaluation_json=evaluation)], tmp_path / "r.html").read_text()
    for text in ("\u22120.50", "[\u22120.60, \u22120.40]", "1.25", "3.00"):
        assert text in html
    assert 'id="curves"' not in html


def test_a_reward_model_of_rankings_stands_beside_length_alone(tmp_path: Path) -> None:
    half, more = {"mean": 0.5, "low": 0.4, "high": 0.6}, {"mean": 0.75, "low": 0.7, "high": 0.8}
    group = {"accuracy": more, "length_only": half, "pairs": 9}
    evaluation = {"accuracy": more, "length_only": half, "gain_over_length": {"mean": 0.25, "low": 0.1, "high": 0.4}}
    evaluation |= {"by_rank_gap": {"1": group}, "by_score_gap": {"0 to 0.5": group}}
    evaluation |= {"by_length_difference": {"within 10%": group, "winner longer": group}}
    run = make_run(tmp_path / "run", evaluation_json=evaluation, status_json={"stage": "reward"})
    html = write_report([run], tmp_path / "r.html").read_text()
    for text in ("Length alone", "Gain over length", "Accuracy by rank gap", "within 10%", "0 to 0.5"):
        assert text in html, text


def test_the_end_tokens_advantage_is_drawn_with_a_sentence(tmp_path: Path) -> None:
    key, note = "advantage/end_token_length_corr", "judged by the score alone"
    rows = [row | {key: -0.8, "advantage/quarter_1": 0.2} for row in METRICS]
    html = write_report([make_run(tmp_path / "run", metrics_jsonl=rows)], tmp_path / "r.html").read_text()
    further = html[html.index("<details") :]
    assert f'data-chart="{key}"' in html.replace(further, "") and html.count(note) == 1
    assert 'data-chart="advantage/quarter_1"' in further and "Advantages by position" in html
    plain = write_report([make_run(tmp_path / "plain", metrics_jsonl=METRICS)], tmp_path / "p.html").read_text()
    assert key not in plain.replace(re.search(r"<script>/\*\*.*?</script>", plain, re.S)[0], "") and note not in plain


def test_page_is_whole_and_reaches_for_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", metrics_jsonl=METRICS, rollouts_jsonl=[rollout(0)])
    output = write_report([run], tmp_path / "deep" / "report.html")
    html = output.read_text()
    own = html.replace(re.search(r"<script>/\*\*.*?</script>", html, re.S)[0], "")  # plotly holds addresses as text
    assert not re.search(r"https?://|<link[^>]+href=\"(?!data:)|@import|url\((?!data:)|<script[^>]+src", own)
    assert [p.name for p in output.parent.iterdir()] == ["report.html"], "no temporary file stays behind"


def test_equal_names_are_distinguished(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / n, metrics_jsonl=METRICS, status_json={"name": "rl", "stage": "rl"}) for n in "ab"]
    html = write_report([*runs, runs[0]], tmp_path / "r.html").read_text()
    for name in ("rl (a) #1", "rl (b)", "rl (a) #2"):
        assert name in html


def test_a_failed_write_leaves_the_old_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", metrics_jsonl=METRICS)
    (tmp_path / "taken").write_text("old")
    with pytest.raises(DiskError, match="output"):
        write_report([run], tmp_path / "taken" / "report.html")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(DiskError, match="output"):
        write_report([run], folder)
    assert not list(tmp_path.glob(".folder*")), "no temporary file stays behind"


def test_json_cannot_leave_its_block() -> None:
    value = {"a": "</script><!--&\u2028\u2029\ud83d"}
    block = embed_json("x", value)
    inside = block.removeprefix('<script type="application/json" id="x">').removesuffix("</script>")
    assert not set("<>&\u2028\u2029") & set(inside)
    assert json.loads(inside) == value


def test_tokens_html_escapes_and_keeps_spaces_and_breaks() -> None:
    html = tokens_html(["<b>", " \u00e9\n", "", "\x00"], [1.0, -0.5, None, float("nan")])
    assert "&lt;b&gt;" in html and "<b>" not in html
    assert "> \u00e9\u21b5\n<" in html
    assert ">\u2205<" in html and ">\u2400<" in html
    assert html.count("missing") == 2
    assert 'negative" style="--level:0.500"' in html


def test_tokens_rich_keeps_the_text_and_colours_by_sign() -> None:
    text = tokens_rich([" good", " bad", " so"], [2.0, -2.0, 0.0])
    assert text.plain == " good bad so"
    grounds = [s.style.bgcolor and s.style.bgcolor.name for s in text.spans]
    assert grounds[:2] == [blend(1.0), blend(-1.0)]
    assert len(grounds) == 2 or grounds[2] is None


def test_scale_is_symmetric_and_an_even_spread_is_pale() -> None:
    assert scale_limit([0.1, -0.4, None, float("inf")]) == 0.4
    assert level(-0.2, 0.4) == -level(0.2, 0.4) == -0.5
    assert level(9.0, 0.0) == 0.0
    assert credit_limit([0.25] * 8) == pytest.approx(1.0)
    assert credit_limit([0.0] * 7 + [2.0]) == 2.0
    assert blend(0) == "#ffffff" and blend(1) != blend(-1)


def test_numbers_read_well() -> None:
    printed = [number(v) for v in (-0.5, 12.345, 4321.0, 0.00001, None, -0.0)]
    assert printed == ["\u22120.500", "12.35", "4321", "1.0e\u221205", "\u2013", "0.000"]
    assert interval({"mean": 1, "low": 0}) == Interval(1.0, 0.0, None)
    assert interval(True) is None and interval("1") is None


def test_running_mean_by_hand() -> None:
    assert running_mean([1.0, 2.0, 6.0, 3.0]) == pytest.approx([1.5, 3.0, 11 / 3, 4.5])


def test_rollouts_are_thinned_evenly_with_first_and_last() -> None:
    chosen, note = logged([rollout(step, row) for step in range(100) for row in range(2)])
    steps = [entry["step"] for entry in chosen]
    assert len(steps) == STEPS and steps[0] == 0 and steps[-1] == 99
    assert note.startswith("80 of 200 logged rollouts")


def test_learning_curve_png(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", metrics_jsonl=METRICS)
    output = learning_curve_png([run], tmp_path / "curve.png")
    assert output.read_bytes().startswith(b"\x89PNG")
    empty = make_run(tmp_path / "empty", evaluation_json={"kl": 1.0})
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        learning_curve_png([empty], tmp_path / "none.png")
