"""Exports and imports of `apportion label`: K-wise rankings, TRL's pairs, Label Studio's and Argilla's files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from commands import Result, Server

from apportion.data.answers.item_id import item_id
from apportion.data.answers.rankings_to_pairs import ranked_pairs
from apportion.label.items import read_items
from apportion.label.store import Answer, add_items, open_store, sign_in, submit, take

Label = Callable[..., Result]
TURNS = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}]


@pytest.fixture
def label(light: Server, tmp_path: Path) -> Label:
    return lambda *arguments: light.run("label", *arguments, cwd=tmp_path)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
        return rows
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ranked(folder: Path, samples: list[dict[str, Any]], ranks: dict[str, list[int | None]]) -> None:
    """Make a database in which each annotator gave every item these ranks, in the order of the file."""
    write(folder / "samples.jsonl", samples)
    store = open_store(str(folder / "labels.db"), create=True)
    add_items(store, read_items(str(folder / "samples.jsonl")), overlap=1.0, overlap_annotators=9)
    for name, given in ranks.items():
        who = sign_in(store, name)
        for n, work in enumerate(take(store, who, 99, 60)):
            row = next(s for s in samples if s["prompt"] == work.prompt)
            left = list(enumerate(row["completions"]))
            shown = [left.pop([text for _, text in left].index(answer))[0] for answer in work.answers]
            answer = Answer(f"{name}-{n:06}", work.item, "ranking", [given[i] for i in shown], 4.0)
            assert submit(store, who, answer) == "saved"
    store.close()


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rankings_are_exported_in_the_order_of_the_file(tmp_path: Path, label: Label, suffix: str) -> None:
    samples = [{"prompt": f"p{i}", "completions": ["a", "b", "c"], "policy": "hidden"} for i in range(3)]
    ranked(tmp_path, samples, {"Ann": [2, 1, None], "Bob": [1, 1, 2]})
    done = label("export", "--output", f"out.{suffix}")
    assert done.code == 0 and done.out == f"out.{suffix}\n"
    rows = read(tmp_path / f"out.{suffix}")
    assert [(r["prompt"], r["annotator"], r["ranks"]) for r in rows] == [
        (f"p{i}", name, ranks) for i in range(3) for name, ranks in (("Ann", [2, 1, None]), ("Bob", [1, 1, 2]))
    ]
    assert set(rows[0]) == {"prompt", "completions", "ranks", "item", "annotator", "seconds", "shown", "source"}
    assert rows[0]["item"] == item_id("p0", ["a", "b", "c"])
    again = label("--data", f"out.{suffix}", "--dry_run")
    assert again.code == 0
    assert len(read_items(str(tmp_path / f"out.{suffix}"))) == 3, "an export can be ranked again"


def test_pairs_are_trls(tmp_path: Path, label: Label) -> None:
    samples = [{"prompt": "text", "completions": ["a", "b", "c"]}, {"prompt": TURNS, "completions": ["a", "b", "c"]}]
    ranked(tmp_path, samples, {"Ann": [2, 1, 2]})
    assert label("export", "--form", "pairs", "--output", "pairs.jsonl").code == 0
    rows = read(tmp_path / "pairs.jsonl")
    assert [(r["chosen"], r["rejected"]) for r in rows[:2]] == [("b", "a"), ("b", "c")]
    assert rows[2]["prompt"] == TURNS
    assert rows[2]["chosen"] == [{"role": "assistant", "content": "b"}]
    assert rows[2]["rejected"] == [{"role": "assistant", "content": "a"}]
    assert label("export", "--form", "pairs", "--pairs", "best_worst", "--output", "pairs.jsonl").code == 0
    assert len(read(tmp_path / "pairs.jsonl")) == 2
    mixed = label("export", "--output", "mixed.parquet")
    assert mixed.code == 2 and "columns of one type" in mixed.err
    assert not (tmp_path / "mixed.parquet").exists()


@pytest.mark.parametrize(
    ("ranks", "every", "extreme"),
    [
        ([1, 2, 3], [(0, 1), (0, 2), (1, 2)], [(0, 2)]),
        ([3, 1, 2], [(1, 2), (1, 0), (2, 0)], [(1, 0)]),
        ([1, 1, 2], [(0, 2), (1, 2)], [(0, 2)]),
        ([1, None, 2], [(0, 2)], [(0, 2)]),
        ([1, 1, None], [], []),
        ([None, None], [], []),
    ],
)
def test_ranked_pairs(ranks: list[int | None], every: list[Any], extreme: list[Any]) -> None:
    assert ranked_pairs(ranks) == every
    assert ranked_pairs(ranks, "best_worst") == extreme


def test_equal_texts_are_no_pair(tmp_path: Path, label: Label) -> None:
    ranked(tmp_path, [{"prompt": "p", "completions": ["a", "a", "b"]}], {"Ann": [1, 2, 3]})
    assert label("export", "--form", "pairs", "--output", "pairs.jsonl").code == 0
    assert [(r["chosen"], r["rejected"]) for r in read(tmp_path / "pairs.jsonl")] == [("a", "b"), ("a", "b")]


ITEMS = [{"id": f"llm_{i}", "title": f"LLM {i}", "body": f"body {i}"} for i in (1, 2, 3)]


def task(result: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Return a task as Label Studio exports it."""
    annotation = {"id": 9, "completed_by": 4, "was_cancelled": False, "lead_time": 12.5, "result": result} | more
    return {"id": 1, "data": {"prompt": "Why?", "items": ITEMS}, "annotations": [annotation], "predictions": []}


def ranker(value: Any) -> dict[str, Any]:
    return {"id": "x", "from_name": "rank", "to_name": "results", "type": "ranker", "value": {"ranker": value}}


@pytest.mark.parametrize(
    ("value", "ranks"),
    [
        ({"rank": ["llm_2", "llm_3", "llm_1"]}, [3, 1, 2]),
        (["llm_3", "llm_1", "llm_2"], [2, 3, 1]),
        ({"_": ["llm_2"], "good": ["llm_3"], "bad": ["llm_1"]}, [2, None, 1]),
        ({"_": ["llm_2", "llm_1", "llm_3"]}, [2, 1, 3]),
    ],
)
def test_a_ranker_of_label_studio_is_read(tmp_path: Path, label: Label, value: Any, ranks: list[int | None]) -> None:
    tasks = [task([ranker(value)]), task([ranker(value)], was_cancelled=True), task([])]
    (tmp_path / "project.json").write_text(json.dumps(tasks))
    done = label("import", "--format", "label_studio", "--source", "project.json")
    assert done.code == 0, done.err
    (row,) = read(tmp_path / "rankings.jsonl")
    assert row["ranks"] == ranks
    assert row["completions"] == ["body 1", "body 2", "body 3"] and row["prompt"] == "Why?"
    assert (row["annotator"], row["seconds"], row["source"]) == ("4", 12.5, "Label Studio")
    assert row["item"] == item_id("Why?", ["body 1", "body 2", "body 3"])


@pytest.mark.parametrize(("selected", "ranks"), [("left", [1, 2]), ("right", [2, 1]), (None, [1, 1])])
def test_a_pairwise_tag_of_label_studio_is_read(
    tmp_path: Path, label: Label, selected: str | None, ranks: list[int]
) -> None:
    value = {} if selected is None else {"selected": selected}
    found = {"type": "pairwise", "from_name": "pw", "to_name": "text1,text2", "value": value}
    row = {
        "data": {"prompt": "Why?", "text1": "a", "text2": "b"},
        "annotations": [{"result": [found], "completed_by": {"email": "ann@x"}}],
    }
    (tmp_path / "project.json").write_text(json.dumps([row]))
    assert label("import", "--source", "project.json").code == 0
    (made,) = read(tmp_path / "rankings.jsonl")
    assert (made["completions"], made["ranks"], made["annotator"]) == (["a", "b"], ranks, "ann@x")


FIELDS = {"instruction": "Why?", "response_1": "one", "response_2": "two"}
ARGILLA = {
    "nested": {"fields": FIELDS, "metadata": {}, "suggestions": {}, "external_id": None,
               "responses": {"ranking": [{"value": ["response-2", "response-1"], "user_id": "u1"}],
                             "note": [{"value": "fine", "user_id": "u1"}]}},
    "flat": {**FIELDS, "ranking.responses": [["response_2", "response_1"], ["response_1", "response_2"]],
             "ranking.responses.users": ["u1", "u2"], "ranking.responses.status": ["submitted", "draft"],
             "ranking.suggestion": None},
    "version 1": {**FIELDS, "ranking": [{"user_id": "u1", "status": "submitted",
                                        "value": [{"rank": 2, "value": "response-1"},
                                                  {"rank": 1, "value": "response-2"}]}]},
    "version 1, table": {**FIELDS, "ranking": [{"user_id": "u1", "status": "submitted",
                                               "value": {"rank": [2, 1], "value": ["response-1", "response-2"]}}]},
}  # fmt: skip


@pytest.mark.parametrize("form", ARGILLA)
def test_argillas_records_are_read(tmp_path: Path, label: Label, form: str) -> None:
    write(tmp_path / "records.jsonl", [ARGILLA[form]])
    done = label("import", "--format", "argilla", "--source", "records.jsonl", "--prompt", "instruction")
    assert done.code == 0, done.err
    (row,) = read(tmp_path / "rankings.jsonl")
    assert (row["completions"], row["ranks"], row["annotator"]) == (["one", "two"], [2, 1], "u1")
    assert (row["prompt"], row["source"]) == ("Why?", "Argilla")


def test_ties_of_argilla_stay_ties(tmp_path: Path, label: Label) -> None:
    value = [{"rank": 1, "value": "response-1"}, {"rank": 1, "value": "response-2"}]
    write(
        tmp_path / "records.jsonl", [{**FIELDS, "ranking": [{"user_id": "u", "status": "submitted", "value": value}]}]
    )
    assert label("import", "--format", "argilla", "--source", "records.jsonl", "--prompt", "instruction").code == 0
    assert read(tmp_path / "rankings.jsonl")[0]["ranks"] == [1, 1]


@pytest.mark.parametrize(
    ("kind", "rows", "part"),
    [
        ("label_studio", [task([ranker(["llm_9", "llm_1"])])], "llm_9"),
        ("label_studio", [task([ranker(["llm_1"])])], "at least two"),
        ("label_studio", [task([ranker(["llm_1", "llm_2"]), ranker(["llm_2", "llm_1"])])], "--question"),
        ("label_studio", [task([])], "no rankings"),
        ("label_studio", [{"data": {"question": "Why?"}, "annotations": []}], "--prompt"),
        ("label_studio", [{"prompt": "Why?", "rank": ["a"]}], "export the project as JSON"),
        ("label_studio", [task([ranker(ids)]) for ids in (["llm_1", "llm_2"], ["llm_2", "llm_1"])], "second ranking"),
        ("argilla", [{"prompt": "p", "x": 1}], "no rankings"),
        ("argilla", [{"prompt": "p", "r.responses": [["a", "b"]]}], "--completions"),
        ("argilla", [ARGILLA["flat"]], "--prompt"),
    ],
)  # fmt: skip
def test_exports_that_cannot_be_read_are_named(
    tmp_path: Path, label: Label, kind: str, rows: list[dict[str, Any]], part: str
) -> None:
    (tmp_path / "export.json").write_text(json.dumps(rows))
    done = label("import", "--format", kind, "--source", "export.json")
    assert done.code == 2 and part in done.err, done.err
    assert not (tmp_path / "rankings.jsonl").exists()


def test_bad_rows_of_an_import_can_be_left_out(tmp_path: Path, label: Label) -> None:
    first, other = (task([ranker(["llm_1", *rest])]) for rest in (["llm_2", "llm_3"], ["llm_3", "llm_2"]))
    (tmp_path / "export.json").write_text(json.dumps([first, first, other, {"nothing": 1}]))
    done = label("import", "--format", "label_studio", "--source", "export.json", "--skip_bad_rows")
    assert done.code == 0, done.err
    assert len(read(tmp_path / "rankings.jsonl")) == 1, "a task that stands there twice counts once"
    bad = read(tmp_path / "rankings.jsonl.bad_rows.jsonl")
    assert len(bad) == 2 and "a second ranking of" in bad[0]["why"], "other ranks by the same person contradict it"


def test_the_results_page_is_one_file(tmp_path: Path, label: Label) -> None:
    ranked(tmp_path, [{"prompt": "p<b>", "completions": ["a", "b", "c"]}], {"Ann": [1, 2, 3], "Bob": [1, 3, 2]})
    done = label("results")
    assert done.code == 0, done.err
    page = (tmp_path / "labels.html").read_text(encoding="utf-8")
    assert "0.583" in page, "alpha of the ranks is 7/12"
    assert "p&lt;b&gt;" in page and "p<b>" not in page
