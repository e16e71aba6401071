"""Broken tables: each error names the configuration key, the file, the line and the fix."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from apportion.data import labelled, prompts, read_rows
from apportion.errors import ConfigError, DataError


def assert_refused(source: Path | str, *expected: str, columns: tuple[str, ...] = ("text",)) -> None:
    """Check that reading `source` fails with the field and all `expected` pieces of text."""
    with pytest.raises(DataError) as caught:
        read_rows(str(source), columns, field="reward.data")
    for piece in ("reward.data: got", *expected):
        assert piece in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", b"", ["a.csv: no rows"]),
        ("a.csv", b"text\n", ["a.csv: no rows"]),
        ("a.jsonl", b"\n\n", ["a.jsonl: no rows"]),
        ("a.json", b"[]", ["a.json: no rows"]),
        ("a.csv", b"Text,label\nx,1\n", ["columns Text, label", "a column 'text'", "Did you mean 'Text'?"]),
        ("a.csv", b"review,label\nx,1\n", ["columns review, label", "Rename or add it"]),
        ("a.csv", b"text,text\nx,y\n", ["line 1", "each column once"]),
        ("a.csv", b'text,label\n"two\nlines",1\nx\n', ["a.csv, line 4: 1 cells", "2 cells"]),
        ("a.csv", b"text,label\nwell, then,1\n", ["a.csv, line 2: 3 cells", "Quote cells"]),
        ("a.csv", b'text\nok\n"never closed\nx\ny\n', ["a.csv, lines 3-5", "Close the quotation"]),
        ("a.csv", b'text,label\n"a\n\nb",1\n"  ",0\n', ["a.csv, line 5: text = '  '", "Fill it in"]),
        ("a.csv", b"text\nok\nna\xefve\n", ["a.csv, line 3: byte 0xef at offset 10", "UTF-8", "iconv"]),
        ("a.csv", b"\xef\xbb\xbftext\nna\xefve\n", ["a.csv, line 2: byte 0xef at offset 10"]),
        (
            "a.csv",
            "text\nok\n".encode("utf-16"),
            ["line 1: byte 0xff at offset 0, a file in UTF-16", "iconv -f utf-16 "],
        ),
        ("a.jsonl", '{"text": "ok"}\n'.encode("utf-32"), ["a.jsonl, line 1: byte 0xff at offset 0", "iconv -f utf-32"]),
        ("a.jsonl", '{"text": "\xeb"}\n'.encode("utf-16-le"), ["line 1: byte 0xeb at offset 20", "iconv -f utf-16"]),
        ("a.json", '[{"text": "ok"}]'.encode("utf-16"), ["a.json, line 1: byte 0xff at offset 0", "iconv -f utf-16"]),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd", ["a.jsonl.zst", "only gzip is read, not .zst"]),
        ("a.jsonl", b'{"text": "a"}\n\xff\n', ["a.jsonl, line 2: byte 0xff at offset 14"]),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', ["a.jsonl, line 3, column 13", "one JSON object on a line"]),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', ["a.jsonl, line 2: list ['b']", "a JSON object"]),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', ["a.jsonl, line 2: columns txt", "Did you mean 'txt'?"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', ["a.jsonl, line 2: text = None"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": ""}\n', ["a.jsonl, line 2: text = ''"]),
        ("a.jsonl", b"[" * 100_000, ["a.jsonl, line 1: nested too deeply"]),
        ("a.json", b'[\n{"text": "a"},\n{"text" "b"}\n]', ["a.json, line 3, column 9"]),
        ("a.json", b'[{"text": "a"}, "b"]', ["a.json, item 2: str b"]),
        ("a.parquet", b"PAR1 but not really PAR1", ["a.parquet", "a complete Parquet file"]),
        ("a.parquet", b"", ["a.parquet", "a complete Parquet file"]),
        ("a.txt", b"text\nx\n", ["a.txt", "ends in .csv, .jsonl, .json, .parquet"]),
        ("a.txt.gz", b"\x1f\x8b", ["a.txt.gz", "ends in .csv", "one of them and .gz"]),
        ("a.csv.gz", b"\x1f\x8b", ["a.csv.gz: after line 0 of its contents", "a complete gzip file"]),
        ("a.tsv", b"text\tlabel\na,b\n", ["a.tsv, line 2: 1 cells", "2 cells", "Quote cells that contain tabs"]),
        ("a.arrow", b"ARROW1 but not really", ["a.arrow", "a complete Arrow file"]),
        ("a.arrow", b"", ["a.arrow", "a complete Arrow file"]),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, expected: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    assert_refused(tmp_path / name, *expected)


def test_parquet_names_the_row(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "a.parquet")
    assert_refused(tmp_path / "a.parquet", "a.parquet, row 2: text = None")
    text = pyarrow.array([b"ok", b"na\xefve"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "b.parquet")
    assert_refused(tmp_path / "b.parquet", "b.parquet", "UTF-8")


def test_an_absent_file_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "reviews.csv").write_text("text\nx\n")
    assert_refused(tmp_path / "review.csv", "review.csv", f"Did you mean '{tmp_path / 'reviews.csv'}'?")
    assert_refused(tmp_path / "nothing" / "a.csv", f"There is no folder '{tmp_path / 'nothing'}'")
    assert_refused("absent.jsonl", "'absent.jsonl'")
    assert_refused("./absent", "'./absent'")
    assert_refused("", "''")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read every file")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nx\n")
    (tmp_path / "a.csv").chmod(0)
    assert_refused(tmp_path / "a.csv", "a.csv: Permission denied")


def test_a_folder_without_tables_or_with_a_strange_file_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path, "with nothing", "a folder with .csv")
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("a card")
    assert_refused(tmp_path, "with README.md, data", "Give the folder that contains the files")
    (tmp_path / "a.csv").write_text("text\nx\n")
    (tmp_path / "b.jsonl.gz").write_bytes(b"")
    assert_refused(tmp_path, "b.jsonl.gz: no rows")
    (tmp_path / "b.jsonl.gz").rename(tmp_path / "b.zip")
    assert_refused(tmp_path, "b.zip", "ends in .csv")
    (tmp_path / "b.zip").unlink()
    (tmp_path / "c.csv").write_text("text\n")
    assert_refused(tmp_path, "c.csv: no rows")


def test_a_hub_dataset_that_cannot_be_reached_is_one_error() -> None:
    # The tests run with the hub switched off, so this is what a machine without a network sees.
    assert_refused("nobody/no-such-dataset-here", "nobody/no-such-dataset-here", "or give a local file")


@pytest.mark.parametrize("name", ["text", "csv", "json", "parquet", "imagefolder", "arrow"])
def test_a_format_of_the_hubs_is_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Given one, `datasets` reads every file of that kind in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.csv").write_text("text\nsecret\n")
    assert_refused(name, f"'{name}', a name of file formats on the hub", "Check the path.")
    (tmp_path / f"{name}s").write_text("text\nx\n")
    assert_refused(name, f"Did you mean '{name}s'?")
    (tmp_path / f"{name}s").rename(tmp_path / name)
    assert_refused(name, "ends in .csv")


def test_a_row_of_the_hub_that_cannot_be_decoded_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a"], "sound": [{"bytes": b"none", "path": None}]})
    rows = rows.cast_column("sound", datasets.Audio())
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    assert_refused("owner/sounds", "'owner/sounds': ", "Error: ", "or give a local file")


def test_tables_in_folders_inside_a_folder_are_not_passed_over(tmp_path: Path) -> None:
    for name in ("a.csv", "more/images/b.csv", ".git/c.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text\nx\n")
    (tmp_path / "LICENSE").write_text("free")
    assert_refused(tmp_path, "with a.csv and, in a folder of its own, more/images/b.csv", "into one folder")
    (tmp_path / "more" / "images" / "b.csv").rename(tmp_path / "more" / "images" / "b.png")
    assert len(read_rows(str(tmp_path), ["text"], field="reward.data")) == 1
    (tmp_path / "reviews").write_text("text\nx\n")
    assert_refused(tmp_path, "reviews", "ends in .csv")


@pytest.mark.parametrize("label", ["2", "good", "-1", "0.5", "yes", "nan"])
def test_a_strange_label_is_named_with_its_line(tmp_path: Path, label: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f'text,label\n"a\nb",1\nc,{label}\n')
    with pytest.raises(DataError, match=re.escape(f"reward.data: got \"{path}, line 4: label = '{label}'\"")):
        labelled(str(path), field="reward.data")


@pytest.mark.parametrize("label", [2, 0.5, -1, 10**400, [1]])
def test_a_label_of_another_type_is_refused(tmp_path: Path, label: object) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a", "label": label}) + "\n")
    with pytest.raises(DataError, match=r"line 1: label = .*0, false, neg, negative or rejected; or 1, true, pos"):
        labelled(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [(["a"], "line 1: text = ['a'] (list)"), ("bad \ud800", "line 1: text has a lone surrogate at character 4")],
)
def test_text_that_no_tokenizer_takes_is_refused(tmp_path: Path, text: object, expected: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text, "label": 1}) + "\n")
    with pytest.raises(DataError) as caught:
        labelled(str(tmp_path / "a.jsonl"))
    assert expected in str(caught.value)


def test_an_unknown_part_is_refused_before_anything_is_read() -> None:
    for read in (labelled, prompts):
        with pytest.raises(ConfigError, match=r"part: got 'judgement'.*Did you mean 'judge'"):
            read("no/such/file.csv", "judgement")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "  "}, "line 2: prompt = '  '"),
        ({"prompt": None}, "line 2: prompt = None"),
        ({"text": "only text"}, "line 2: columns text"),
        ({"prompt": 7}, "line 2: prompt = 7 (int)"),
        ({"prompt": []}, "line 2: prompt = []"),
        ({"prompt": ["hello"]}, "line 2: prompt[0] = 'hello'"),
        ({"prompt": [{"role": "user", "content": "hi"}, {"role": "user"}]}, "line 2: prompt[1]: columns role"),
        ({"prompt": [{"role": "user", "content": ""}]}, "line 2: prompt[0]: content = ''"),
    ],
)
def test_a_broken_prompt_is_named_with_its_line(tmp_path: Path, row: dict[str, object], expected: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "fine"}\n' + json.dumps(row) + "\n")
    with pytest.raises(DataError) as caught:
        prompts(str(path))
    assert expected in str(caught.value) and str(path) in str(caught.value)


def test_messages_that_are_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("messages\nhello\n")
    with pytest.raises(DataError, match="a list of messages"):
        prompts(str(tmp_path / "a.csv"))
