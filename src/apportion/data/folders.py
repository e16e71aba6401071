"""Files of a folder with tables: those of one split, as the hub and the library datasets lay them out."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from apportion.data.formats import READERS, check_reader, has_reader
from apportion.errors import DataError

_BESIDE_DATA = {".md", ".yaml", ".yml"}  # other files of a dataset folder: cards, licences
_CARDS = {"authors", "changelog", "citation", "copying", "licence", "license", "notice", "readme"}  # or with .txt
_INFO = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json"}  # what datasets writes beside its tables
_WORDS = {  # of file names -> split, as the library datasets knows them
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_WORD = re.compile(rf"(?:^|[-._ 0-9])({'|'.join(_WORDS)})(?=$|[-._ 0-9])", re.IGNORECASE)
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\b")


def files_of(folder: Path, field: str, split: str | None = None) -> list[Path]:
    """Return the files of `folder` to read, in the order of their names.

    A folder of `save_to_disk` has the files that its state.json lists. In others, files with train, validation or test
    (or training, dev, val, valid, eval) in their names are splits, and so are folders of these names; a folder whose
    only tables are in its folder `data` stands for that.

    Args:
        split: the split to read; None for "train" where there are splits, or for the only one.

    Raises:
        DataError: no tables, files of another kind, no such split, or files of no split beside some.
    """
    if os.path.isfile(folder / "dataset_dict.json"):  # unlike Path.is_file, it is False without permission
        splits = _plain_names(_json(folder / "dataset_dict.json", field).get("splits"), folder, field)
        return _saved(_chosen({name: [folder / name] for name in splits}, split, folder, field)[0], field)
    if os.path.isfile(folder / "state.json") and os.path.isfile(folder / "dataset_info.json"):
        return _saved(folder, field, split)
    files, folders = _inside(folder, field)
    for file in files:
        check_reader(file, field)
    tables = {place: found for place in folders if (found := list(_tables_under(place)))}
    if files:
        _check_flat(folder, files, [table for found in tables.values() for table in found], field)
        return _of_split(files, split, folder, field)
    if tables and all(place.name.lower() in _WORDS for place in tables):
        groups: dict[str, list[Path]] = {}
        for place in tables:
            groups.setdefault(canonical(place.name), []).append(place)
        return [file for place in _chosen(groups, split, folder, field) for file in files_of(place, field)]
    if [place.name for place in tables] == ["data"]:
        return files_of(folder / "data", field, split)
    names = ", ".join(sorted(one.name for one in folder.iterdir())[:8]) or "nothing"
    fix = "Give the folder that contains the files."
    raise DataError(field, f"{folder} with {names}", "a folder with " + ", ".join(READERS), fix)


def canonical(split: str) -> str:
    """Return the usual name of a split: "validation" for "dev", and others as they are."""
    return _WORDS.get(split.lower(), split)


def _inside(folder: Path, field: str) -> tuple[list[Path], list[Path]]:
    """Return (files that should be tables, folders) in `folder`, hidden ones left out."""
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        fix = "Check its permissions."
        raise DataError(field, f"{folder}: {error.strerror}", "a readable folder", fix) from error
    seen = [one for one in inside if not one.name.startswith(".")]
    return [one for one in seen if not one.is_dir() and not _is_card(one)], [one for one in seen if one.is_dir()]


def _is_card(file: Path) -> bool:
    name, suffix = file.name.lower(), file.suffix.lower()
    return suffix in _BESIDE_DATA or name in _INFO or name.removesuffix(".txt") in _CARDS


def _tables_under(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        yield from (Path(place, name) for name in sorted(names) if has_reader(Path(name)))


def _check_flat(folder: Path, files: Sequence[Path], deeper: Sequence[Path], field: str) -> None:
    """Raise DataError for tables in `folder` and also in a folder inside it."""
    if deeper:
        got = f"{folder} with {files[0].name} and, in a folder of its own, {deeper[0].relative_to(folder)}"
        fix = "Put the tables into one folder, or give one of the folders or files."
        raise DataError(field, got, "tables in one folder", fix)


def _of_split(files: Sequence[Path], split: str | None, folder: Path, field: str) -> list[Path]:
    """Return those of `files` that belong to `split`; all of them where no name has the word of a split."""
    if not any(_WORD.search(file.name) for file in files):
        if split is None:
            return [*files]
        got = f"{folder} with {', '.join(file.name for file in files[:8])}"
        raise DataError(field, got, f"files of split {split!r}, such as {split}-00000.csv", "Leave the split out.")
    groups: dict[str, list[Path]] = {}
    for file in files:
        name = _split_of(file.name)
        if name is None:
            got = f"{folder} with {file.name} beside files of splits"
            fix = "Move it to a folder of its own, or give the files of one split in a folder."
            raise DataError(field, got, "train, validation or test in every file's name, or in none", fix)
        groups.setdefault(name, []).append(file)
    return _chosen(groups, split, folder, field)


def _split_of(name: str) -> str | None:
    """Return the split of a file by its name, or None: "train_sft" of train_sft-00000-of-00002.parquet."""
    shard = _SHARD.match(name)
    if shard:
        return canonical(shard[1])
    words = {_WORDS[word.lower()] for word in _WORD.findall(name)}
    return words.pop() if len(words) == 1 else None


def _chosen(groups: Mapping[str, list[Path]], split: str | None, folder: Path, field: str) -> list[Path]:
    """Return the files of `split`: None is "train", or the only one."""
    wanted = split if split is not None else next(iter(groups)) if len(groups) == 1 else "train"
    if wanted in groups:
        return groups[wanted]
    alike = [name for name in groups if canonical(name) == canonical(wanted)]
    if len(alike) == 1:
        return groups[alike[0]]
    got = f"{folder} with the split{'s' * (len(groups) != 1)} {', '.join(sorted(groups)) or '(none)'}"
    fix = "Name one of its splits (split; test_split for test_data), or give the files of one."
    raise DataError(field, got, f"a split {wanted!r}", fix)


def _saved(folder: Path, field: str, split: str | None = None) -> list[Path]:
    """Return the files of a dataset that `save_to_disk` wrote to `folder`, in their order."""
    state = _json(folder / "state.json", field)
    stored, files = state.get("_split"), state.get("_data_files")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        fix = "Load it with `datasets.load_from_disk`, call `flatten_indices()`, and save it again."
        raise DataError(field, f"{folder} with an index of its rows", "rows in the order of their files", fix)
    if split is not None and (not isinstance(stored, str) or canonical(stored) != canonical(split)):
        got = f"{folder} of split {stored!r}"
        raise DataError(field, got, f"a split {split!r}", "Name another folder, or leave the split out.")
    listed = [one.get("filename") if isinstance(one, dict) else one for one in files] if files else None
    return [folder / name for name in _plain_names(listed, folder, field)]


def _plain_names(names: Any, folder: Path, field: str) -> list[str]:
    """Return `names` of files in `folder`. Raises DataError for none, and for a path that leads elsewhere."""
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        fix = "Save the dataset again with `save_to_disk`."
        raise DataError(field, f"{folder} with files {names!r:.60}", "a dataset with at least one file", fix)
    outside = next((name for name in names if name in (".", "..") or Path(name).name != name), None)
    if outside is not None:
        fix = "Save the dataset again with `save_to_disk`."
        raise DataError(field, f"{folder} with the file {outside!r:.80}", "names of files inside it", fix)
    return names


def _json(path: Path, field: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__}")
        return value
    except (OSError, ValueError, RecursionError) as error:
        fix = "Save the dataset again with `save_to_disk`."
        raise DataError(field, f"{path}: {error}", "a JSON object of `save_to_disk`", fix) from error
