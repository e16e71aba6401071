"""Tables read a row at a time: bounded memory, the same rows as ever, and bad rows that are counted, never dropped."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apportion.data import BadRows, iter_rows, labelled, prompts, read_rows
from apportion.data.lines import MAX_ROW_BYTES
from apportion.errors import DataError

Command = Callable[..., Any]
MEGABYTES = 60
BOUND = 16  # MB that reading so large a file may add; pyarrow holds a few batches
MEASURE = """
import resource, sys
import pyarrow.parquet
from apportion.data import iter_rows
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
small, large = sys.argv[1:4], sys.argv[4:]
for path in small:  # first, so that everything is loaded
    list(iter_rows(path, field="data"))
for path in large:
    before = peak()
    count = sum(len(row["text"]) > 0 for row in iter_rows(path, ("text", "label"), field="data"))
    print(count, peak() - before)
"""
SUFFIXES = (".csv", ".jsonl", ".parquet")


def write_table(path: Path, rows: int) -> Path:
    """Write `rows` rows of 6 kB each, in the format that the name of `path` says."""
    text = "A fine film, well told. " * 250
    if path.suffix == ".parquet":
        schema = pyarrow.schema([("text", pyarrow.string()), ("label", pyarrow.int64())])
        with pyarrow.parquet.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
            for first in range(0, rows, 500):
                some = range(first, min(rows, first + 500))
                batch = {"text": [f"{i} {text}" for i in some], "label": [i % 2 for i in some]}
                writer.write_table(pyarrow.table(batch, schema=schema))
        return path
    with path.open("w", newline="") as file:
        if path.suffix == ".csv":
            file.write("text,label\n")
        for i in range(rows):
            row = f'"{i}\n{text}",{i % 2}' if path.suffix == ".csv" else json.dumps({"text": f"{i} {text}", "label": 1})
            file.write(row + "\n")
    return path


def test_a_large_table_is_never_in_memory(tmp_path: Path) -> None:
    count = MEGABYTES * 2**20 // 6000
    small = [write_table(tmp_path / f"small{suffix}", 600) for suffix in SUFFIXES]
    large = [write_table(tmp_path / f"large{suffix}", count) for suffix in SUFFIXES]
    assert min(path.stat().st_size for path in large) > MEGABYTES * 2**20
    done = subprocess.run([sys.executable, "-c", MEASURE, *small, *large], capture_output=True, text=True, check=True)
    for path, message in zip(large, done.stdout.splitlines(), strict=True):
        rows, grown = message.split()
        assert int(rows) == count
        assert float(grown) < BOUND, f"{path.name}: {grown} MB more than for small files"
        path.unlink()


def test_rows_come_before_the_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\noops\n')
    rows = iter_rows(str(path), ["text"], field="data")
    assert [next(rows)["text"], next(rows)["text"]] == ["one", "two"]
    with pytest.raises(DataError, match="line 3, column 1"):
        next(rows)


CELLS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=8)


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6), st.sampled_from(["\n", "\r\n", "\r"]))
def test_csv_reads_back_what_was_written_with_the_right_lines(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], ending: str
) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=ending, quoting=csv.QUOTE_ALL)
    writer.writerow(["text", "label"])
    begins = []
    for row in rows:
        before = text.getvalue()
        # \r, \n and \r\n each begin a line, as editors count
        begins.append(before.replace("\r\n", "\n").replace("\r", "\n").count("\n") + 1)
        writer.writerow(row)
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_bytes(text.getvalue().encode())
    found = read_rows(str(path), field="data")
    assert [(row["text"], row["label"]) for row in found] == rows
    assert [int(row.where.split("line")[1].lstrip("s ").split("-")[0]) for row in found] == begins


@pytest.mark.parametrize(
    ("name", "content", "pieces"),
    [
        ("a.jsonl", b'{"text": "a", "text": "b"}\n', ["line 1: the key 'text' twice", "each key once"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b", "x": NaN}\n', ["line 2: the number NaN, which is not finite"]),
        ("a.jsonl", b'{"text": "a", "x": -Infinity}\n', ["line 1: the number -Infinity"]),
        ("a.jsonl", b'{"text": "a", "x": 1e999}\n', ["line 1: the number 1e999"]),
        ("a.jsonl", b'{"text": "a", "x": ' + b"9" * 5000 + b"}\n", ["line 1: Exceeds the limit (4300 digits)"]),
        ("a.jsonl", b'{"text": "a", "x": ' + b"[" * 80 + b"]" * 80 + b"}\n", ["line 1: nested too deeply", "flat"]),
        ("a.jsonl", b'{"text": "a\0b"}\n', ["line 1, column 12: Invalid control character"]),
        ("a.jsonl", b'{"text": "a"}\r{"text": "b"}\r', ["line 1, column 15: Extra data"]),
        ("a.json", b'[{"text": "a"}, {"text": "b", "text": "c"}]', ["a.json: the key 'text' twice"]),
        ("a.json", b'{\n"text": "a"\n}\n', ["line 1, column 2"]),
        ("a.csv", b"text,label\nfine,1\nbro\0ken,0\n", ["line 3: a NUL at offset 21", "iconv -f utf-16"]),
        ("a.csv", "text\nok\n".encode("utf-16-le"), ["line 1: a NUL at offset 1", "iconv -f utf-16"]),
        ("a.csv", b'text,label\n"one\xff\ntwo",1\n', ["line 2: byte 0xff at offset 15"]),
        ("a.csv", b'text,label\n"one\ntwo\xff",1\n', ["line 3: byte 0xff at offset 19"]),
        ("a.csv", b'text,label\n"a" b,1\n', ["a.csv, line 2:", "expected after", "double the quotation marks"]),
        ("a.csv", gzip.compress(b"text\na\n", mtime=0)[:-9], ["after line 2 of its contents", "a complete gzip file"]),
        ("a.csv", gzip.compress(b"text\nok\nna\xefve\n", mtime=0), ["line 3: byte 0xef at offset 10", "UTF-8"]),
        ("a.jsonl", gzip.compress(b'{"text": "a"}\n', mtime=0) + b"more", ["after line 1", "a complete gzip file"]),
        ("a.parquet", gzip.compress(b"PAR1", mtime=0), ["compressed with gzip", "gunzip"]),
        ("a.arrow", gzip.compress(b"ARROW1", mtime=0), ["compressed with gzip", "gunzip"]),
        ("a.tsv", b'text\tlabel\n"a" b\t1\n', ["a.tsv, line 2:", "tab-separated values"]),
        ("a.jsonl", b"PK\x03\x04....", ["compressed with zip", "Decompress"]),
        ("a.parquet", b"PAR1" + b"\0" * 40 + b"PAR1", ["a complete Parquet file"]),
    ],
)
def test_what_a_table_may_not_hold_is_named(tmp_path: Path, name: str, content: bytes, pieces: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rows(str(tmp_path / name), field="data")
    assert all(piece in str(caught.value) for piece in ("data: got", name, *pieces)), caught.value


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_row_without_end_is_refused(tmp_path: Path, name: str) -> None:
    head = b'text,label\n"a",1\n"' if name == "a.csv" else b'{"text": "a"}\n'
    (tmp_path / name).write_bytes(head + b"x" * (MAX_ROW_BYTES + 10))
    with pytest.raises(DataError, match=rf"{name}, line [23]: a line of 167772[23]\d bytes.*close quotations"):
        read_rows(str(tmp_path / name), field="data")
    if name == "a.csv":  # the same of many lines: the quotation is never closed
        (tmp_path / name).write_bytes(head + (b"x" * 1023 + b"\n") * (MAX_ROW_BYTES // 1024 + 2))
        with pytest.raises(DataError, match="ends here or later"):
            read_rows(str(tmp_path / name), field="data")


def test_a_truncated_parquet_file_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    whole = write_table(tmp_path / "whole.parquet", 20).read_bytes()
    for size in range(0, len(whole), len(whole) // 23):
        (tmp_path / "a.parquet").write_bytes(whole[:size])
        with pytest.raises(DataError, match="a complete Parquet file"):
            read_rows(str(tmp_path / "a.parquet"), field="data")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    (tmp_path / "lost.jsonl").symlink_to(tmp_path / "gone.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    for name, message in (
        ("pipe.csv", "pipe.csv, which is not a regular file"),
        ("loop.csv", "loop.csv, a broken link"),
        ("lost.jsonl", "lost.jsonl, a broken link"),
        ("zero.jsonl", "zero.jsonl, which is not a regular file"),
    ):
        with pytest.raises(DataError, match=message):
            read_rows(str(tmp_path / name), field="data")
    with pytest.raises(DataError, match=r"not a regular file|no such|readable file"):  # nor inside a folder
        read_rows(str(tmp_path), field="data")


@pytest.mark.parametrize(
    ("name", "message"),
    [("x" * 5000 + ".csv", "File name too long"), ("a\0b.csv", "null byte"), ("~nobody-here/a.csv", "home directory")],
)
def test_a_name_that_no_file_has_is_refused(name: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"data: got .*{message}.*a path of this system"):
        read_rows(name, field="data")


def collected() -> tuple[BadRows, list[dict[str, Any]]]:
    written: list[dict[str, Any]] = []
    return BadRows(lambda rows: written.extend(map(dict, rows))), written


MIXED = {
    "a.csv": (
        b'text,label\ngood,1\nragged\nna\xefve,1\n"two\nlines",0\nnu\0l,1\nodd,perhaps\n"  ",1\n'
        b"fine,0\nwell,1\nso,0\nlast,1\n",
        ["lines 5-6", "line 10", "line 14"],
        [3, 4, 7, 8, 9],
    ),
    "a.jsonl": (
        b'{"text": "good", "label": 1}\noops\n["list"]\n{"text": "\xff"}\n{"text": "x", "label": "?"}\n'
        + b'{"text": "fine", "label": 0}\n' * 5,
        [],
        [2, 3, 4, 5],
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_bad_rows_are_written_down_and_the_others_kept(tmp_path: Path, name: str) -> None:
    content, _, wrong = MIXED[name]
    (tmp_path / name).write_bytes(content)
    bad, written = collected()
    rows = labelled(str(tmp_path / name), bad=bad)
    bad.flush()
    assert [row.text for row in rows][:2] == (["good", "two\nlines"] if name == "a.csv" else ["good", "fine"])
    assert len(rows) == 6 and bad.count == len(written) == len(wrong)
    lines = [int(row["where"].split("line")[1].lstrip("s ").split("-")[0]) for row in written]
    assert lines == wrong
    assert all(row["setting"] == "data" and row["why"].startswith("data: got") and row["row"] for row in written)
    with pytest.raises(DataError) as strict:  # the first of them, in the words of the error without the switch
        labelled(str(tmp_path / name))
    assert str(strict.value) == written[0]["why"]


def test_bad_rows_of_parquet(tmp_path: Path) -> None:
    text = pyarrow.array([b"ok", b"na\xefve", b"fine"] + [b"more"] * 2000).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    bad, written = collected()
    assert len(read_rows(str(tmp_path / "a.parquet"), ["text"], field="data", bad=bad)) == 2002
    bad.flush()
    assert [row["where"] for row in written] == [f"{tmp_path / 'a.parquet'}, row 2"]


def test_more_bad_rows_than_good_ones_are_an_error_anyway(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    bad, _ = collected()
    assert prompts(str(path), bad=bad) == ["a"] and bad.count == 1
    path.write_text('{"prompt": ""}\noops\n{"prompt": "a"}\n')
    with pytest.raises(
        DataError, match=r"2 of 3 rows cannot be used'.*The first of them: prompts: got .*line 1: prompt = ''"
    ):
        prompts(str(path), bad=collected()[0])
    path.write_text('{"other": 1}\n{"prompt": "a"}\n{"prompt": "b"}\n')  # a bad first row does not choose the column
    assert prompts(str(path), bad=collected()[0]) == ["a", "b"]


@pytest.mark.parametrize(
    "content",
    [
        b'text,label\ngood,1\n"open,0\nx,1\ny,1\n',  # where its row ends is not known: nothing after it is certain
        b'text,label\ngood,1\n"He said "no" and\nleft",1\nx,1\ny,1\n',
        b"text,text\na,b\n",
        b"txt,label\na,1\n",
    ],
)
def test_what_makes_the_rest_uncertain_is_never_left_out(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError):
        labelled(str(tmp_path / "a.csv"), bad=collected()[0])


def test_the_command_leaves_them_out_with_a_warning(
    model_command: Command, command: Command, tmp_path: Path, rl_flags: list[str], world: Path
) -> None:
    lines = (world / "prompts.jsonl").read_text().splitlines()
    (tmp_path / "p.jsonl").write_text("\n".join([lines[0], "oops", '{"prompt": ""}', *lines[1:]]) + "\n")
    flags = [*rl_flags, "--prompts", "p.jsonl"]
    command("rl", *flags).assert_refused_early("prompts: got 'p.jsonl, line 2, column 1")
    assert not (tmp_path / "run" / "bad_rows.jsonl").exists()
    done = model_command("rl", "--skip-bad-rows", *flags)
    done.assert_done()
    assert "warning: 2 bad rows left out; run/bad_rows.jsonl lists them with the reasons." in done.err
    written = [json.loads(line) for line in (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()]
    assert [row["where"] for row in written] == ["p.jsonl, line 2", "p.jsonl, line 3"]
    assert "skip_bad_rows: true" in (tmp_path / "run" / "config.yaml").read_text()
    given = ("--prompts", "p.jsonl", "--judge", "false", "--count", 2, "--skip-bad-rows", "true")
    model_command("evaluate", "--run", "run", *given).assert_done()
    assert len((tmp_path / "run" / "evaluate_bad_rows.jsonl").read_text().splitlines()) == 2
    (tmp_path / "p.jsonl").write_text("oops\noops\n" + lines[0] + "\n")
    most = command("rl", "--skip_bad_rows", *flags, "--output", "other")
    assert most.code == 2 and "2 of 3 rows cannot be used" in most.err and most.loads_nothing
    assert most.err.startswith("warning: 2 bad rows left out; other/bad_rows.jsonl")
    assert "failed" in (tmp_path / "other" / "status.json").read_text() and not (tmp_path / "other" / "final").exists()


def test_a_reward_model_learns_from_the_good_rows(model_command: Command, tmp_path: Path, world: Path) -> None:
    rows = (world / "reviews.csv").read_text().splitlines()
    (tmp_path / "a.csv").write_text("\n".join([*rows[:5], "ragged", *rows[5:]]) + "\n")
    flags = ("--data", "a.csv", "--output", "run", "--excerpts", 8, "--batch_size", 4, "--probe_excerpts", 0)
    done = model_command("reward", "--model", world / "policy", *flags, "--skip_bad_rows")
    done.assert_done()
    assert "warning: 1 bad row left out" in done.err
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()]
    assert row == {
        "setting": "data",
        "where": "a.csv, line 6",
        "why": "data: got 'a.csv, line 6: 1 cells'; expected 2 cells, as in the header. "
        "Quote cells that contain commas.",
        "row": "ragged\n",
    }
