"""Data of a run as its model card names it: files with their hashes, or the id of a hub set."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from apportion.data.assets import BUILTIN_DATA, builtin_table
from apportion.data.folders import files_of
from apportion.errors import ApportionError
from apportion.system.paths import local_path

MOST_FILES = 20  # of a folder that are listed


class Use(NamedTuple):
    """What a run took from one source.

    Attributes:
        role: what it was for. source, split: as the settings name them. amount: how much of it, with its unit.
    """

    role: str
    source: str
    split: str | None
    amount: str


class DataFile(NamedTuple):
    """A file with its size in bytes and its SHA-256; of a hub set the id alone."""

    name: str
    size: int | None = None
    sha256: str = ""


def files_in(source: str, split: str | None = None) -> list[DataFile]:
    """Return the files of `source` by name, without the folders that lead to them; what is gone by now by its name."""
    try:
        return _files_in(source, split)
    except (ApportionError, OSError):  # the run is done, and its card is no reason to fail
        return [DataFile(source.rpartition("/")[2])]


def _files_in(source: str, split: str | None) -> list[DataFile]:
    if source in BUILTIN_DATA:
        return [_described(builtin_table(source), f"{source} (built in)")]
    path = local_path(source, "data", ApportionError)
    if not os.path.exists(path):
        return [DataFile(source)]
    if not path.is_dir():
        return [_described(path, path.name)]
    files = files_of(path, "data", split)
    listed = [_described(file, f"{path.name}/{file.relative_to(path)}") for file in files[:MOST_FILES]]
    return listed + ([DataFile(f"and {len(files) - MOST_FILES} more")] if len(files) > MOST_FILES else [])


def is_hub_set(source: str) -> bool:
    """Whether `source` is neither built in nor on this disk: then it was read from the hub."""
    return source not in BUILTIN_DATA and not os.path.exists(local_path(source, "data", ApportionError))


def _described(path: Path, name: str) -> DataFile:
    with path.open("rb") as file:
        return DataFile(name, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
