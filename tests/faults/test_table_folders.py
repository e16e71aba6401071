"""Folders as the hub and the library datasets lay them out: one split is read, and what is not read is named."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from apportion.data import BadRows, labelled, read_rows
from apportion.data.lines import MAX_ROW_BYTES
from apportion.errors import DataError

HUB = ["README.md", "dataset_infos.json", "data/train-00000-of-00002.csv", "data/train-00001-of-00002.csv"]


def lay(folder: Path, names: Sequence[str]) -> Path:
    """Write a table of one row, its own name, for each of `names`."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text\n{name}\n")
    return folder


def read(folder: Path, split: str | None = None) -> list[str]:
    return [row["text"] for row in read_rows(str(folder), ["text"], field="data", split=split)]


def refusal(folder: Path, split: str | None = None) -> str:
    with pytest.raises(DataError) as caught:
        read(folder, split)
    return str(caught.value)


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["train.csv", "test.csv"], None, ["train.csv"]),
        (["train.csv", "test.csv"], "test", ["test.csv"]),
        (["a-train-1.csv", "a-train-2.csv", "a-dev.csv"], None, ["a-train-1.csv", "a-train-2.csv"]),
        (["a-train-1.csv", "a-train-2.csv", "a-dev.csv"], "validation", ["a-dev.csv"]),
        (["a-train-1.csv", "a-dev.csv"], "val", ["a-dev.csv"]),
        (["TRAIN.CSV", "Test.csv"], None, ["TRAIN.CSV"]),
        ([*HUB, "data/test-00000-of-00001.csv"], None, HUB[2:]),
        ([*HUB, "data/test-00000-of-00001.csv"], "test", ["data/test-00000-of-00001.csv"]),
        (["train_sft-00000-of-00001.csv", "test_sft-00000-of-00001.csv"], "test_sft", ["test_sft-00000-of-00001.csv"]),
        (["train/a.csv", "train/b.csv", "test/a.csv"], None, ["train/a.csv", "train/b.csv"]),
        (["train/a.csv", "dev/a.csv"], "validation", ["dev/a.csv"]),
        (["test-1.csv", "test-2.csv"], None, ["test-1.csv", "test-2.csv"]),  # the only split
        (["a.csv", "contest.csv", "trains.csv"], None, ["a.csv", "contest.csv", "trains.csv"]),  # words inside words
        (["part-00000-of-00002.csv", "part-00001-of-00002.csv"], None, None),
        (["a-00000-of-00001.csv", "b-00000-of-00001.csv"], None, None),
    ],
)
def test_one_split_is_read(tmp_path: Path, names: list[str], split: str | None, expected: list[str] | None) -> None:
    assert read(lay(tmp_path, names), split) == (names if expected is None else expected)


@pytest.mark.parametrize(
    ("names", "split", "pieces"),
    [
        (["train.csv", "extra.csv"], None, ["extra.csv beside files of splits", "in every file's name, or in none"]),
        (["train.csv", "train_test.csv"], None, ["train_test.csv beside files of splits"]),
        (["test.csv", "dev.csv"], None, ["with the splits test, validation", "a split 'train'", "test_split"]),
        (["train.csv", "test.csv"], "dev", ["with the splits test, train", "a split 'dev'"]),
        (["a.csv", "b.csv"], "test", ["with a.csv, b.csv", "files of split 'test'", "Leave the split out"]),
        (["train/a.csv", "notes/a.csv"], None, ["with notes, train", "Give the folder that contains the files"]),
        (["train.csv", "data/test.csv"], None, ["in a folder of its own, data/test.csv", "into one folder"]),
    ],
)
def test_what_would_be_mixed_or_left_out_is_named(
    tmp_path: Path, names: list[str], split: str | None, pieces: list[str]
) -> None:
    message = refusal(lay(tmp_path, names), split)
    assert all(piece in message for piece in ("data: got", *pieces)), message


def test_a_file_has_no_split(tmp_path: Path) -> None:
    lay(tmp_path, ["train.csv"])
    assert "train.csv with split 'train'" in refusal(tmp_path / "train.csv", "train")


def test_gzip_inside_a_folder(tmp_path: Path) -> None:
    (tmp_path / "train-0.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    (tmp_path / "test-0.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}\n'))
    assert read(tmp_path) == ["one", "two"] and read(tmp_path, "test") == ["three"]


def test_datasets_that_were_saved_to_disk(tmp_path: Path) -> None:
    """`save_to_disk` of the real library, one set and several, in more files than one."""
    talk = [[{"role": "user", "content": f"q{i}"}] for i in range(150)]
    whole = datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(150)], "turns": talk})
    whole.save_to_disk(str(tmp_path / "one"), num_shards=3)
    (tmp_path / "one" / "data-00009-of-00009.arrow").write_bytes(b"of an earlier save, not in state.json")
    assert read(tmp_path / "one") == whole["text"][:]
    assert read_rows(str(tmp_path / "one"), field="data")[149]["turns"] == talk[149]
    both = datasets.DatasetDict({"train": whole.select(range(9)), "test": whole.shuffle(seed=0).select(range(5))})
    both.save_to_disk(str(tmp_path / "two"))
    assert read(tmp_path / "two") == [f"t{i}" for i in range(9)]
    assert read(tmp_path / "two", "test") == both["test"]["text"][:]  # the order of the shuffle, not of the file
    assert read(tmp_path / "two" / "test") == both["test"]["text"][:]
    assert "with the splits test, train" in refusal(tmp_path / "two", "validation")


def test_the_list_of_saved_files_leads_nowhere_else(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "one"))
    state = tmp_path / "one" / "state.json"
    stored = json.loads(state.read_text())
    for files, piece in (
        ([{"filename": "../secret.arrow"}], "with the file '../secret.arrow'"),
        ([{"filename": ".."}], "with the file '..'"),
        ([], "a dataset with at least one file"),
        ([{"filename": "gone.arrow"}], "gone.arrow: No such file"),
    ):
        state.write_text(json.dumps(stored | {"_data_files": files}))
        assert piece in refusal(tmp_path / "one")
    state.write_text(json.dumps(stored | {"_indices_data_files": [{"filename": "indices.arrow"}]}))
    assert "flatten_indices()" in refusal(tmp_path / "one")
    state.write_text("[")
    assert "state.json" in refusal(tmp_path / "one") and "save_to_disk" in refusal(tmp_path / "one")


def test_an_arrow_file_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    """Also between two batches, where pyarrow takes the rest for absent."""
    table = pyarrow.table({"text": [f"text {i}" for i in range(40)]})
    for make in (pyarrow.ipc.new_stream, pyarrow.ipc.new_file):
        with make(tmp_path / "whole.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=10)
        whole = (tmp_path / "whole.arrow").read_bytes()
        assert len(read(tmp_path / "whole.arrow")) == 40
        for size in range(0, len(whole), 8):
            (tmp_path / "cut.arrow").write_bytes(whole[:size])
            assert "a complete Arrow file" in refusal(tmp_path / "cut.arrow")


def test_a_class_is_read_by_its_name(tmp_path: Path) -> None:
    """A stored set may have 0 for the good class: its names are in the file."""
    rows = {"text": ["good one", "bad one", "good two"], "label": [0, 1, 0]}
    for names, expected in ((["pos", "neg"], [1, 0, 1]), (["neg", "pos"], [0, 1, 0]), (["x", "y"], [0, 1, 0])):
        features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=names))
        made = datasets.Dataset.from_dict(rows, features=features)
        made.save_to_disk(str(tmp_path / names[0]))
        made.to_parquet(str(tmp_path / f"{names[0]}.parquet"))
        for source in (names[0], f"{names[0]}.parquet"):
            assert [row.label for row in labelled(str(tmp_path / source))] == expected
    features["label"] = datasets.ClassLabel(names=["neg", "neutral", "pos"])  # 1 is not the good one
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "three.parquet"))
    with pytest.raises(DataError, match=r"label of 3 classes \(neg, neutral, pos\).*two classes"):
        labelled(str(tmp_path / "three.parquet"), bad=BadRows(lambda rows: None))


def test_a_row_that_unpacks_without_end_stays_small(tmp_path: Path) -> None:
    """128 MB of one line in less than 1 MB of gzip: that row is refused, and the rows around it are read."""
    head, rest = b'{"text": "one"}\n', b'\n{"text": "two"}\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(head + b"x" * (8 * MAX_ROW_BYTES) + rest, 1))
    assert (tmp_path / "a.jsonl.gz").stat().st_size < 1_000_000
    assert f"a.jsonl.gz, line 2: a line of {8 * MAX_ROW_BYTES + 1} bytes" in refusal(tmp_path / "a.jsonl.gz")
    bad = BadRows(lambda rows: None)
    tracemalloc.start()
    rows = read_rows(str(tmp_path / "a.jsonl.gz"), ["text"], field="data", bad=bad)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row["text"] for row in rows] == ["one", "two"] and bad.count == 1 and peak < 4.5 * MAX_ROW_BYTES
