"""Rankings as rows: every source that is read, and every bad row by its name and place."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from apportion.data import read_rows
from apportion.data.answers import PairReader
from apportion.data.answers.item_id import item_id
from apportion.data.answers.ranking_rows import Ranking
from apportion.data.answers.rankings import kind_of, read_rankings
from apportion.data.bad_rows import BadRows
from apportion.errors import DataError

ASK = [{"role": "user", "content": "How?"}]
GOOD, BAD = [{"role": "assistant", "content": "Fine."}], [{"role": "assistant", "content": "No."}]
ROW = {"prompt": "How?", "completions": [" Fine.", " Well.", " No."], "ranks": [1, 2, 2]}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def test_a_row_has_its_item_and_its_details(tmp_path: Path) -> None:
    details = {"annotator": "ada", "seconds": 4, "shown": [2, 0, 1], "source": "page", "margins": [1, 0.5, 0]}
    [found] = read_rankings(write(tmp_path / "a.jsonl", [ROW | details]))
    plain = '{"completions":[" Fine."," Well."," No."],"prompt":"How?"}'
    assert found.item == hashlib.sha256(plain.encode()).hexdigest() == item_id("How?", found.completions)
    assert found.ranks == (1.0, 2.0, 2.0) and found.margins == (1.0, 0.5, 0.0) and found.pairs == 2
    assert (found.annotator, found.seconds, found.shown, found.source) == ("ada", 4.0, (2, 0, 1), "page")
    assert found.where.endswith("a.jsonl, line 1")
    [named] = read_rankings(write(tmp_path / "b.jsonl", [ROW | {"item": 17, "ranks": [0, None, 5]}]))
    assert named.item == "17" and named.ranks == (0.0, None, 5.0) and named.pairs == 1


def test_every_source_gives_the_same_rankings(tmp_path: Path) -> None:
    rows = [
        {"prompt": ASK, "completions": ["Fine.", "No."], "ranks": [1.0, 2.0], "annotator": "ada"},
        {"prompt": ASK, "completions": ["Fine.", "So so.", "No."], "ranks": [1.0, None, 2.0], "annotator": None},
    ]
    lines = read_rankings(write(tmp_path / "a.jsonl", rows))

    def without_place(found: list[Ranking]) -> list[Any]:
        return [(one.prompt, one.completions, one.ranks, one.item, one.annotator) for one in found]

    stored = read_rankings(parquet(tmp_path / "a.parquet", rows))
    assert without_place(stored) == without_place(lines) and stored[1].ranks == (1.0, None, 2.0)
    write(tmp_path / "folder" / "train-1.jsonl", rows[:1])
    parquet(tmp_path / "folder" / "train-2.parquet", rows[1:])
    write(tmp_path / "folder" / "test.jsonl", [ROW])
    assert without_place(read_rankings(str(tmp_path / "folder"))) == without_place(lines)
    assert len(read_rankings(str(tmp_path / "folder"), split="test")) == 1
    assert {kind_of(str(tmp_path / name)) for name in ("folder", "a.parquet")} == {"rankings"}
    pair = {"chosen": "a", "rejected": "b"}
    kinds = [
        kind_of(write(tmp_path / "b.jsonl", [row])) for row in ({"text": "a", "label": 1}, pair, pair | {"label": 1})
    ]
    assert kinds == ["other", "pairs", "other"] and kind_of("imdb") == "other"


@pytest.mark.parametrize(
    ("row", "prompt", "completions"),
    [
        ({"chosen": "A", "rejected": "B"}, "", ("A", "B")),
        ({"chosen": "How? A", "rejected": "How? B"}, "How?", (" A", " B")),
        ({"prompt": "How?", "chosen": "A", "rejected": "B"}, "How?", ("A", "B")),
        ({"chosen": ASK + GOOD, "rejected": ASK + BAD}, ASK, (GOOD, BAD)),
        ({"prompt": ASK, "chosen": ASK + GOOD, "rejected": ASK + BAD}, ASK, (GOOD, BAD)),
        ({"prompt": ASK, "chosen": GOOD, "rejected": BAD}, ASK, (GOOD, BAD)),
        ({"prompt": ASK, "chosen": "Fine.", "rejected": "No."}, ASK, ("Fine.", "No.")),
        ({"prompt": "How?", "chosen": ASK + GOOD, "rejected": ASK + BAD}, ASK, (GOOD, BAD)),
    ],
)
def test_pairs_are_rankings_of_two(tmp_path: Path, row: dict[str, Any], prompt: Any, completions: Any) -> None:
    [found] = read_rankings(write(tmp_path / "a.jsonl", [row | {"margin": 0.5}]))
    assert (found.prompt, found.completions) == (prompt, completions)
    assert (found.ranks, found.margins) == ((1.0, 2.0), (0.5, 0.0))


BAD_ROWS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "one completion": (ROW | {"completions": ["a"], "ranks": [1]}, ["1 completion'", "two or more"]),
    "no completion": (ROW | {"completions": [], "ranks": []}, ["0 completions", "two or more"]),
    "completions are null": (ROW | {"completions": None}, ["completions = None", "Fill it in"]),
    "completions are a text": (ROW | {"completions": "a"}, ["completions = 'a' (str)", "a list"]),
    "a completion is null": (ROW | {"completions": ["a", None, "b"]}, ["completions[1] = None"]),
    "a completion is a number": (ROW | {"completions": ["a", 3, "b"]}, ["completions[1] = 3 (int)"]),
    "the prompt is null": (ROW | {"prompt": None}, ["prompt = None"]),
    "the prompt is blank": (ROW | {"prompt": " "}, ["prompt = ' '"]),
    "ranks are null": (ROW | {"ranks": None}, ["ranks = None"]),
    "ranks are a text": (ROW | {"ranks": "1,2,3"}, ["ranks = '1,2,3' (str)", "a list"]),
    "a rank is missing": (ROW | {"ranks": [1, 2]}, ["2 ranks of 3 completions", "null"]),
    "a rank too many": (ROW | {"ranks": [1, 2, 3, 4]}, ["4 ranks of 3 completions"]),
    "ranks as strings": (ROW | {"ranks": ["1", "2", "3"]}, ["ranks[0] = '1' (str)", "without quotes"]),
    "a rank is true": (ROW | {"ranks": [True, 2, 3]}, ["ranks[0] = True (bool)"]),
    "equal texts": (ROW | {"completions": ["a", "b", "a"], "ranks": [1, 2, 1]}, ["completions 1 and 3 are equal'"]),
    "contradictory ranks": (
        ROW | {"completions": ["a", "b", "a"], "ranks": [1, 2, 3]},
        ["completions 1 and 3 are equal, with contradictory ranks 1 and 3"],
    ),
    "margins of another number": (ROW | {"margins": [1, 2]}, ["2 margins of 3 completions"]),
    "a margin is null": (ROW | {"margins": [1, 2, None]}, ["margins[2] = None"]),
    "an order of another number": (ROW | {"shown": [0, 1]}, ["shown = [0, 1]", "the numbers of the 3 completions"]),
    "seconds as text": (ROW | {"seconds": "4 s"}, ["seconds = '4 s' (str)"]),
    "an item is a list": (ROW | {"item": [1]}, ["item = [1] (list)"]),
    "an annotator is a list": (ROW | {"annotator": ["a"]}, ["annotator = ['a'] (list)"]),
    "turns behind a text": (ROW | {"completions": [GOOD, BAD], "ranks": [1, 2]}, ["prompt = text", "messages"]),
    "two kinds": (
        ROW | {"prompt": ASK, "completions": [GOOD, "No."], "ranks": [1, 2]},
        ["answers = messages and text"],
    ),
    "a prompt that is answered": (ROW | {"prompt": ASK + GOOD}, ["the last turn of the prompt is the assistant's"]),
    "a pair without the other": ({"prompt": "a", "chosen": "b"}, ["a column 'rejected'"]),
    "a pair with a null prompt": ({"prompt": None, "chosen": "a b", "rejected": "a c"}, ["prompt = None"]),
    "a pair of texts": ({"prompt": "a", "chosen": ["b"], "rejected": "c"}, ["chosen = ['b'] (list)"]),
    "a pair that ends with the user": (
        {"chosen": [*ASK, *GOOD, *ASK], "rejected": [*ASK, *GOOD, {"role": "user", "content": "Why?"}]},
        ["chosen ends with a turn of role 'user'", "ends with an answer"],
    ),
    "another prompt than the conversations'": (
        {"prompt": "When?", "chosen": ASK + GOOD, "rejected": ASK + BAD},
        ["prompt = text, answers = messages"],
    ),
    "an answer of the user": (
        ROW | {"prompt": ASK, "completions": [GOOD, ASK], "ranks": [1, 2]},
        ["completions[1] ends with a turn of role 'user'"],
    ),
    "a pair of two prompts": (
        {"chosen": ASK + GOOD, "rejected": [{"role": "user", "content": "Why?"}, *BAD]},
        ["two answers to one conversation"],
    ),
    "a pair of two kinds": ({"prompt": ASK, "chosen": GOOD, "rejected": "No."}, ["messages and text"]),
    "a null in a pair": ({"prompt": ASK, "chosen": GOOD, "rejected": None}, ["rejected = None"]),
    "a turn without content": (ROW | {"prompt": [{"role": "user", "content": 3}]}, ["prompt[0]"]),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_and_can_be_left_out(tmp_path: Path, name: str) -> None:
    row, pieces = BAD_ROWS[name]
    good = ROW if "completions" in row else {"prompt": "Q", "chosen": "a", "rejected": "b"}
    source = write(tmp_path / "a.jsonl", [good, row])  # what the first row is, decides what the next one lacks
    with pytest.raises(DataError) as caught:
        read_rankings(source)
    assert all(piece in str(caught.value) for piece in ("data: got", "a.jsonl, line 2", *pieces)), caught.value
    written: list[Any] = []
    bad = BadRows(written.extend)
    assert len(read_rankings(source, bad=bad)) == 1
    bad.flush()
    assert [one["where"] for one in written] == [f"{source}, line 2"]


def test_two_rankings_of_one_item_by_one_person_are_named(tmp_path: Path) -> None:
    mine = ROW | {"annotator": "ada"}
    other = ROW | {"annotator": "bob"}
    assert len(read_rankings(write(tmp_path / "a.jsonl", [mine, other, ROW]))) == 3
    for ranks, word in (([1, 2, 2], "the same ranks"), ([3, 2, 1], "contradictory ranks")):
        source = write(tmp_path / "b.jsonl", [mine, other, mine | {"ranks": ranks}])
        with pytest.raises(DataError) as caught:
            read_rankings(source)
        message = str(caught.value)
        assert "line 3: a second ranking of one item by 'ada'" in message and word in message and "line 1" in message
        bad = BadRows(lambda rows: None)
        assert len(read_rankings(source, bad=bad)) == 2 and bad.count == 1


def test_a_row_that_repeats_another_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "a.jsonl", [ROW, ROW | {"ranks": [2, 1, 1]}, ROW])
    assert [one.ranks for one in read_rankings(source)] == [(1.0, 2.0, 2.0), (2.0, 1.0, 1.0)]
    assert f"{source}: 1 row repeats another" in capsys.readouterr().err


def test_pairs_of_two_equal_texts_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = {"prompt": "How?", "chosen": "Fine.", "rejected": "No."}
    turns = {"chosen": ASK + GOOD, "rejected": ASK + GOOD}
    source = write(tmp_path / "a.jsonl", [pair, pair | {"chosen": "No."}, turns])
    assert [one.completions for one in read_rankings(source)] == [("Fine.", "No.")]
    assert f"{source}: 2 pairs have two equal texts" in capsys.readouterr().err


@pytest.mark.parametrize("blank", ["", "  ", "\n"])
def test_a_blank_answer_is_one(tmp_path: Path, blank: str) -> None:
    """A model may end at once, or write white space only."""
    rows: list[dict[str, Any]] = [
        ROW | {"completions": ["a", blank, "b"]},
        {"prompt": "How?", "chosen": "a", "rejected": blank},
    ]
    source = write(tmp_path / "a.jsonl", rows)
    assert [one.completions for one in read_rankings(source)] == [("a", blank, "b"), ("a", blank)]
    reader = PairReader("data")
    made = [[pair.rejected.content for pair in reader(row)] for row in read_rows(source, field="data")]
    assert made == [[f"How?{blank}", "How?b"], [f"How?{blank}"]]


def test_a_row_without_ranks_among_others_can_be_left_out(tmp_path: Path) -> None:
    lacking = {name: value for name, value in ROW.items() if name != "ranks"}
    source = write(tmp_path / "a.jsonl", [ROW, lacking, {"prompt": "x"}, ROW | {"prompt": "Why?"}])
    bad = BadRows(lambda rows: None)
    assert len(read_rankings(source, bad=bad)) == 2 and bad.count == 2


def test_pairs_are_those_of_the_rankings(tmp_path: Path) -> None:
    """`dpo` reads what `reward` reads: the same rows, prompts and answers."""
    tools = [{"type": "function", "function": {"name": "f"}}]
    rows: list[dict[str, Any]] = [
        ROW,
        {"prompt": ASK, "completions": [GOOD, BAD], "ranks": [2, 1], "tools": tools},
        {"prompt": ASK, "completions": ["Fine.", "No."], "ranks": [1, 2]},
        {"chosen": ASK + GOOD, "rejected": ASK + BAD},
    ]
    source = write(tmp_path / "a.jsonl", rows)
    reader = PairReader("data")
    pairs = [pair for row in read_rows(source, field="data") for pair in reader(row)]
    assert [(pair.chosen.content, pair.rejected.content) for pair in pairs] == [
        ("How? Fine.", "How? Well."),
        ("How? Fine.", "How? No."),
        (ASK + BAD, ASK + GOOD),
        (ASK + GOOD, ASK + BAD),
        (ASK + GOOD, ASK + BAD),
    ]
    assert getattr(pairs[2].chosen.content, "tools", None) == tools and {pair.chosen.prompt for pair in pairs} == {4, 1}


def test_answers_without_ranks_are_no_rankings(tmp_path: Path) -> None:
    row = {name: value for name, value in ROW.items() if name != "ranks"}
    with pytest.raises(DataError, match="a column 'ranks'") as caught:
        read_rankings(write(tmp_path / "a.jsonl", [row]), bad=BadRows(lambda rows: None))
    assert "apportion label" in str(caught.value)
    (tmp_path / "a.csv").write_text('prompt,completions,ranks\nHow?,"[""a"",""b""]","[1,2]"\n')
    with pytest.raises(DataError, match=r"completions = .*(str)") as caught:
        read_rankings(str(tmp_path / "a.csv"))
    assert "cells of CSV hold none" in str(caught.value)
