"""Run folders of others, damaged in any way: a page or one DataError, and nothing on it from outside the folder."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apportion.errors import DataError
from apportion.report import page
from apportion.report.page import report_html, write_report
from apportion.report.read import read_run

VALUES = [0.5, -0.5]
SPREAD = {"mean": 0.5, "low": 0.25, "high": 0.75}
FOLDER: dict[str, Any] = {
    "config.yaml": {"stage": "rl", "credit": ["attention", {"mix": 0.8}], "optim": {"lr": 1e-4}},
    "status.json": {"stage": "rl", "status": "finished", "name": "mine"},
    "metrics.jsonl": [
        {"step": i, "objective/scores": 0.1 * i, "loss/reward": 1.0, "monitors/kl": 1.0, "monitors/skipped_updates": 2}
        for i in range(40)
    ],
    "rollouts.jsonl": [
        {"step": i, "row": 0, "prompt": "p", "tokens": ["a", "b"], "ended": True, "score": 0.0, "credit": VALUES,
         "methods": {"uniform": VALUES}}
        for i in range(2)
    ],
    "stopped/step-3/rollouts.jsonl": [{"step": 3, "row": 0, "prompt": "p", "tokens": ["a"], "credit": [1.0]}],
    "samples.jsonl": [{"prompt": "p", "before": "b", "after": "a", "reward_before": 0.0, "reward_after": 1.0}],
    "evaluation.json": {
        "reward_before": SPREAD, "reward_after": SPREAD, "kl": SPREAD, "accuracy": SPREAD,
        "calibration": [{"confidence": 0.6, "accuracy": 0.5, "count": 3}],
        "by_length": {"1-8": {"accuracy": SPREAD}},
    },
    "diagnosis.json": {
        "recommended": "uniform", "why": "so", "rollouts": 4, "prompts": 2, "batch": 2,
        "methods": {"uniform": {"verdict": "fine", "cosine": SPREAD, "extra_ms": 3}, "sparse": {"bias": SPREAD}},
    },
}  # fmt: skip
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(max_size=4),
    st.sampled_from([1e308, -1e308, 1e-320, float("nan"), float("inf"), 10**400, -1, "</script>", "\ud800", "x" * 99]),
    st.sampled_from([[1], ["a"], [[1]], {"a": 1}, {"a": float("nan")}, {"mean": 1e308, "low": -1e308}, [], {}]),
)  # fmt: skip
Path_ = tuple[Any, ...]


def places(value: Any, here: Path_ = ()) -> list[Path_]:
    """Return the path to every value inside `value`, its own first."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(place for key, item in inner for place in places(item, (*here, key)))]


def put(value: Any, place: Path_, new: Any) -> Any:
    """Return `value` with `new` in `replace_durably`."""
    if not place:
        return new
    changed = value.copy()
    changed[place[0]] = put(value[place[0]], place[1:], new)
    return changed


def lay(folder: Path, content: dict[str, Any]) -> Path:
    for name, value in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".jsonl") and isinstance(value, list):
            path.write_text("".join(json.dumps(row) + "\n" for row in value))
        else:
            path.write_text(json.dumps(value))
    return folder


@pytest.fixture(scope="module", autouse=True)
def no_plotly() -> Any:
    """Keep plotly's 5 MB out of the pages: no value reaches it, and each page is made in milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "_plotly", lambda: "")
        yield


CELLS = [(name, place) for name, value in FOLDER.items() for place in places(value)]


@given(st.data())
def test_any_damage_leaves_a_page_or_one_error(data: st.DataObject) -> None:
    content = dict(FOLDER)
    for name, place in data.draw(st.lists(st.sampled_from(CELLS), min_size=1, max_size=3)):
        if place in places(content[name]):  # unless an earlier change took it away
            content[name] = put(content[name], place, data.draw(ODD))
    with tempfile.TemporaryDirectory() as folder:
        run = lay(Path(folder) / "run", content)
        name = data.draw(st.sampled_from(["", *FOLDER]))
        if name:
            raw = (run / name).read_bytes()
            cut = data.draw(st.integers(0, len(raw)))
            (run / name).write_bytes(raw[:cut] + data.draw(st.binary(max_size=4)) + raw[cut + 1 :])
        with suppress(DataError):
            assert "</html>" in report_html([read_run(run), read_run(lay(Path(folder) / "sound", FOLDER))])


DAMAGE: dict[str, tuple[str, Any, str]] = {
    "a step that is a list": ("rollouts.jsonl", [{"step": [1], "tokens": ["a"]}], 'id="credit"'),
    "a reward that is a list": ("samples.jsonl", [{"prompt": "p", "reward_before": [1]}], 'id="samples"'),
    "methods in a list": ("diagnosis.json", {"methods": ["a"]}, "methods that are not objects; left out"),
    "methods that say nothing": ("diagnosis.json", {"methods": {"a": 1}}, "methods that are not objects; left out"),
    "an end that is none": ("rollouts.jsonl", [{"tokens": ["a"], "ended": {"a": float("nan")}}], 'id="credit"'),
    "an end of updates": ("metrics.jsonl", [{"monitors/skipped_updates": 1e308}] * 2, "updates were skipped"),
    "a sum beyond all": ("metrics.jsonl", [{"step": i, "mine": 1.7e308} for i in range(40)], "further metrics"),
    "a text that is nested": ("samples.jsonl", json.loads("[" * 900 + "]" * 900), "line 1 skipped"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_that_was_a_traceback_once(tmp_path: Path, name: str) -> None:
    file, content, reported = DAMAGE[name]
    run = lay(tmp_path / "run", FOLDER | {file: content})
    assert reported in write_report([run], tmp_path / "page.html").read_text()


def test_a_whole_number_of_many_digits_in_yaml(tmp_path: Path) -> None:
    runs = [lay(tmp_path / name, FOLDER) for name in "ab"]
    (runs[0] / "config.yaml").write_text(f"steps: 0x{'f' * 9000}\n")
    assert "config.yaml: not valid YAML" in write_report(runs, tmp_path / "page.html").read_text()


LINKS: dict[str, Callable[[Path], Path]] = {
    "config.yaml": lambda outside: outside / "secret",
    "samples.jsonl": lambda outside: outside / "secret",
    "stopped": lambda outside: outside,
}


@pytest.mark.parametrize("name", LINKS)
def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("my secret")
    run = lay(tmp_path / "run", FOLDER)
    shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    (run / name).symlink_to(LINKS[name](tmp_path / "outside"))
    with pytest.raises(DataError, match=rf"run: got '.*{name}, a link to .*outside.*Remove it"):
        write_report([run], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_run_folder_that_is_a_link_itself_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "here").symlink_to(lay(tmp_path / "disk" / "run", FOLDER))
    assert "mine" in write_report([tmp_path / "here"], tmp_path / "page.html").read_text()


def test_names_that_no_folder_can_have(command: Any) -> None:
    command("report", "x" * 5000).assert_refused("File name too long")
    command("report", "~nobody-here/x").assert_refused("home directory")
