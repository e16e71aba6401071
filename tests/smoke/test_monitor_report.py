"""The report's section on monitors: fired monitors, skipped updates, crash dumps of stopped runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from apportion.report.monitors import spans
from apportion.report.page import write_report
from apportion.report.read import read_run


def make_run(folder: Path, lines: list[dict[str, Any]], status: str = "finished") -> Path:
    folder.mkdir()
    (folder / "status.json").write_text(json.dumps({"stage": "rl", "name": folder.name, "status": status}))
    if lines:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def stop(run: Path, step: int, rows: list[dict[str, Any]], error: str) -> None:
    place = run / "stopped" / f"step-{step}"
    place.mkdir(parents=True)
    (place / "rollouts.jsonl").write_text("".join(json.dumps({"step": step, **row}) + "\n" for row in rows))
    (place / "error.txt").write_text(error + "\n")


def metrics(steps: int, **fired: set[int]) -> list[dict[str, Any]]:
    names = ("ratio", "entropy", "skipped_updates")
    return [
        {"step": step, "objective/scores": 1.0, "loss/x": 2.0}
        | {f"monitors/{name}": float(step in fired.get(name, ())) for name in names}
        for step in range(1, steps + 1)
    ]


def page(*runs: Path) -> str:
    return write_report(runs, runs[0].parent / "page.html").read_text()


def test_a_healthy_run_has_no_section_and_no_curves_of_zeros(tmp_path: Path) -> None:
    html = page(make_run(tmp_path / "run", metrics(9)))
    assert 'id="monitors"' not in html and "monitors/" not in html and 'data-chart="loss/x"' in html


def test_what_fired_is_named_with_its_steps_its_causes_and_what_to_do(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", metrics(20, entropy={3, 4, 5, 9}, skipped_updates={7, 8}))
    html = page(run)
    section = html[html.index('<section id="monitors">') :]
    section = section[: section.index("</section>")]
    assert "entropy" in section and "3\u20135, 9" in section and "(4 of 20)" in section
    assert "Likely causes: a learning rate or clip too large" in section and "ratio" not in section
    assert "2 updates were skipped" in section and "steps 7\u20138" in section
    two = page(run, make_run(tmp_path / "other", metrics(9, ratio={1})))
    assert "<h3>run</h3>" in two and "<h3>other</h3>" in two and "Lower optim.lr or ppo.epochs" in two


def test_a_stopped_run_shows_its_error_and_its_rollouts_and_runs_nothing_they_hold(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", metrics(6), "failed")
    evil = "</script><script>window.pwned=1</script>"
    row = {"prompt": evil, "text": evil, "tokens": [evil, "b"], "score": 1.0, "advantage": ["NaN", 0.5]}
    stop(run, 7, [{"row": 0, "credit": [0.25, 0.75], "reward": ["Infinity", 0.1], **row}, {"row": 1}], f"x {evil}")
    data = read_run(run)
    assert data.stopped == ({"name": "stopped/step-7", "error": f"x {evil}", "rollouts": 2},)
    assert [(r["step"], r["row"]) for r in data.rollouts] == [(7, 0)]  # the other one was not apportioned yet
    html = page(run)
    assert "<script>window.pwned" not in html and "stopped/step-7: x &lt;/script&gt;" in html
    assert "(2 rollouts saved)" in html and '"quantities":{"credit as trained":[0.25,0.75]' in html


def test_a_run_that_stopped_in_its_first_step_can_be_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [], "failed")
    stop(run, 1, [{"row": 0, "text": "a"}], "score of rollout 0: got nan")
    assert "stopped/step-1: score of rollout 0: got nan (1 rollouts saved)" in page(run)


def test_a_step_that_was_done_again_is_shown_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", metrics(9))
    (run / "rollouts.jsonl").write_text(json.dumps({"step": 7, "row": 0, "tokens": ["a"], "credit": [1.0]}) + "\n")
    stop(run, 7, [{"row": 0, "tokens": ["a"], "credit": [1.0]}], "down")
    assert len(read_run(run).rollouts) == 1


def test_spans_of_steps() -> None:
    assert spans([1, 2, 3, 7, 9, 10]) == "1\u20133, 7, 9\u201310"
    assert spans(list(range(1, 40, 2))).endswith("13, 15, \u2026")
