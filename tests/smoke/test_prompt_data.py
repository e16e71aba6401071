"""Prompts in the forms that public tables hold them: parts, tool calls, JSON cells, further columns, pairs."""

from __future__ import annotations

import csv
import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apportion.data import BadRows, prompts, read_prompts
from apportion.data.prompts import common_beginning
from apportion.errors import DataError

ASK = {"role": "user", "content": "is it cold"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Bern", "days": 2}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "default": None}}}


def json_lines(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "user", "content": [{"type": "text", "text": "is it"}, {"type": "text", "text": " cold"}]}],
        [ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "minus four"}],
        [ASK, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": ""}],
        [{"role": "system", "content": ""}, ASK],
        [ASK, {"role": "assistant", "content": ""}],
        [ASK, {"role": "assistant", "content": "It is"}],
    ],
)
def test_contents_are_read_as_they_are(tmp_path: Path, turns: list[dict[str, Any]]) -> None:
    assert prompts(json_lines(tmp_path / "a.jsonl", {"messages": turns}, {"messages": turns})) == [turns, turns]


@pytest.mark.parametrize(
    ("turns", "pieces"),
    [
        ([{"role": "user", "content": 7}], ["prompt[0]: content = 7 (int)", "Write it as a string"]),
        ([{"role": "user", "content": {"a": "b"}}], ["prompt[0]: content = {'a': 'b'} (dict)"]),
        ([{"role": "user", "content": None}], ["prompt[0]: content = None"]),
        ([{"role": "user", "content": " "}, {"role": "system", "content": []}], ["prompt[0]: content = ' '"]),
        ([{"role": 3, "content": "a"}], ["prompt[0]: role = 3 (int)"]),
        ([ASK, {"role": "user", "content": ["cold"]}], ["prompt[1]: content[0] = 'cold'", "type and text"]),
        (
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it"}]}],
            ["prompt[0]: content[0]: type = 'image'", "Only text is read", "skip_bad_rows"],
        ),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], ["content[0]: text = 3 (int)"]),
        ([{"role": "user", "content": [{"type": "text"}]}], ["content[0]: columns type"]),
        ([ASK, {"role": "assistant", "tool_calls": [CALL]}], ["prompt[1], the last turn", "Add the tool's answer"]),
    ],
)
def test_other_contents_are_named(tmp_path: Path, turns: list[dict[str, Any]], pieces: list[str]) -> None:
    path = json_lines(tmp_path / "a.jsonl", {"prompt": [ASK]}, {"prompt": turns})
    with pytest.raises(DataError) as caught:
        prompts(path)
    for piece in ("prompts: got", "a.jsonl, line 2: ", *pieces):
        assert piece in str(caught.value)
    bad = BadRows(lambda rows: None)
    assert prompts(path, bad=bad) == [[ASK]] and bad.count == 1


@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_a_cell_of_json_is_a_conversation(tmp_path: Path, column: str) -> None:
    turns = [ASK, {"role": "assistant", "content": 'She said "no", [ok]'}]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [column, "tools", "chat_template_kwargs"])
        writer.writeheader()
        row = {column: json.dumps(turns), "tools": json.dumps([TOOL]), "chat_template_kwargs": '{"thinks": false}'}
        writer.writerows([row, {column: json.dumps(turns), "tools": "", "chat_template_kwargs": ""}])
    one, two = prompts(str(tmp_path / "a.csv"))
    assert one == two == turns
    assert (one.tools, one.template_kwargs) == ([TOOL], {"thinks": False})  # type: ignore[union-attr]
    assert (two.tools, two.template_kwargs) == (None, {})  # type: ignore[union-attr]


@pytest.mark.parametrize("text", ["[1, 2] are numbers", "[]", '["a"]', '[{"title": "no turn"}]', "[INST] hello"])
def test_a_text_that_begins_with_a_bracket_stays_text(tmp_path: Path, text: str) -> None:
    assert prompts(json_lines(tmp_path / "a.jsonl", {"prompt": text})) == [text]


@pytest.mark.parametrize("text", ["[{'role': 'user', 'content': 'hi'}]", '[{"content": "a", "role": "user"},'])
def test_messages_that_are_no_json_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: prompt = .*a conversation as JSON.*json\.dumps"):
        prompts(json_lines(tmp_path / "a.jsonl", {"prompt": text}))


def test_tools_and_variables_come_with_the_conversation(tmp_path: Path) -> None:
    row = {"messages": [ASK], "tools": [json.dumps(TOOL), TOOL], "chat_template_kwargs": {"thinks": True, "x": None}}
    (found,) = prompts(json_lines(tmp_path / "a.jsonl", row))
    assert (found.tools, found.template_kwargs) == ([TOOL, TOOL], {"thinks": True})  # type: ignore[union-attr]
    copy = pickle.loads(pickle.dumps(found))
    assert (copy, copy.tools, copy.template_kwargs) == (found, [TOOL, TOOL], {"thinks": True})


@pytest.mark.parametrize(
    ("columns", "piece"),
    [
        ({"tools": "hammer"}, "tools = 'hammer'.*a list of JSON schemas"),
        ({"tools": [3]}, r"tools = \[3\]"),
        ({"chat_template_kwargs": "yes"}, "chat_template_kwargs = 'yes'.*an object"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs with 'tokenize'"),
    ],
)
def test_other_tools_and_variables_are_named(tmp_path: Path, columns: dict[str, Any], piece: str) -> None:
    path = json_lines(tmp_path / "a.jsonl", {"messages": [ASK], **columns})
    with pytest.raises(DataError, match=f"line 1: {piece}"):
        prompts(path)
    assert prompts(json_lines(tmp_path / "b.jsonl", {"prompt": "a text", **columns})) == ["a text"]


def test_nulls_of_arrow_are_absent_and_those_of_json_stay(tmp_path: Path) -> None:
    """Arrow gives each struct the keys of all of its column: here another row's arguments and tools."""
    other = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "CET"}}}
    rows = [
        {"messages": [ASK, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "ok"}],
         "tools": [{"type": "function", "function": {"name": name, "parameters": parameters}}]}
        for call, name, parameters in ((CALL, "weather", {"town": "text"}), (other, "clock", {"zone": "text"}))
    ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    stored = pyarrow.parquet.read_table(tmp_path / "a.parquet").to_pylist()
    arguments = stored[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert arguments == {"town": "Bern", "days": 2, "zone": None}, "Arrow no longer does so"
    found = prompts(str(tmp_path / "a.parquet"))
    for one, row in zip(found, rows, strict=True):
        assert [{k: v for k, v in turn.items() if v is not None} for turn in one] == row["messages"]
        assert one.tools == row["tools"]  # type: ignore[union-attr]
    null = {"type": "function", "function": {"name": "weather", "arguments": {"town": None}}}
    turns = [ASK, {"role": "assistant", "tool_calls": [null], "name": None}, {"role": "tool", "content": "ok"}]
    (kept,) = prompts(json_lines(tmp_path / "a.jsonl", {"messages": turns}))
    assert kept[1] == {"role": "assistant", "tool_calls": [null]}


def test_nulls_of_tools_that_are_json_text_stay(tmp_path: Path) -> None:
    """Arrow has put none into a text, alone or in a list."""
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"town": {"default": None}}}}
    for name, cell in (("text", json.dumps([tool])), ("texts", [json.dumps(tool)])):
        path = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": [ASK], "tools": cell}]), path)
        (found,) = prompts(str(path))
        assert found.tools == [tool]  # type: ignore[union-attr]


def test_columns_are_kept_where_they_are_wanted(tmp_path: Path) -> None:
    path = json_lines(tmp_path / "a.jsonl", {"prompt": "one", "answer": 3, "x": [1]}, {"prompt": "two", "answer": 4})
    every = [prompt.columns for prompt in read_prompts(path, columns=None)]
    assert every == [{"prompt": "one", "answer": 3, "x": [1]}, {"prompt": "two", "answer": 4}]
    assert [prompt.columns for prompt in read_prompts(path, columns={"answer"})] == [{"answer": 3}, {"answer": 4}]
    assert [(prompt.columns, prompt.where) for prompt in read_prompts(path)] == [
        ({}, f"{path}, line 1"), ({}, f"{path}, line 2"),
    ]  # fmt: skip


class TestPairs:
    def test_the_common_beginning_is_the_prompt(self, tmp_path: Path) -> None:
        texts = {"chosen": "\n\nHuman: cold?\n\nAssistant: gladly", "rejected": "\n\nHuman: cold?\n\nAssistant: no"}
        turns = {
            "chosen": [ASK, {"role": "assistant", "content": "yes"}],
            "rejected": [ASK, {"role": "assistant", "content": "no"}],
        }
        assert prompts(json_lines(tmp_path / "a.jsonl", texts)) == ["\n\nHuman: cold?\n\nAssistant:"]
        assert prompts(json_lines(tmp_path / "b.jsonl", turns)) == [[ASK]]
        cells = {name: json.dumps(value) for name, value in turns.items()}
        assert prompts(json_lines(tmp_path / "c.jsonl", cells)) == [[ASK]]
        assert prompts(json_lines(tmp_path / "d.jsonl", {**texts, "prompt": "its own"})) == ["its own"]
        same = {"chosen": turns["chosen"], "rejected": turns["chosen"]}
        assert prompts(json_lines(tmp_path / "e.jsonl", same)) == [[ASK]]

    @pytest.mark.parametrize(("chosen", "rejected"), [("yes", "no"), ("a", [ASK]), ([ASK], [{**ASK, "content": "b"}])])
    def test_a_pair_without_one_is_named(self, tmp_path: Path, chosen: Any, rejected: Any) -> None:
        path = json_lines(tmp_path / "a.jsonl", {"chosen": chosen, "rejected": rejected})
        with pytest.raises(DataError, match=r"a\.jsonl, line 1"):
            prompts(path)

    @given(st.text("ab ", min_size=1, max_size=8), st.text("ab ", min_size=1, max_size=8))
    def test_it_is_the_longest_that_leaves_something_of_both(self, one: str, two: str) -> None:
        found = common_beginning(one, two)
        ends = [n for n in range(min(len(one), len(two))) if one[:n] == two[:n]]
        longest = one[: max(ends)]
        differ = one[len(longest)] != two[len(longest)]
        assert found == (longest[:-1] if differ and longest.endswith(" ") else longest)
        assert common_beginning(list(one), list(two)) == list(longest)
