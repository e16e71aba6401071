"""The files of a model, in its folder or of its hub id: whole weights or an adapter's, and stored tensors by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # the second names the shards
ADAPTER, ADAPTER_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
PICKLED_ADAPTER = "adapter_model.bin"  # never loaded
Wanted = Callable[[str], bool]  # whether a stored tensor of this name is wanted


def is_adapter(folder: str | Path) -> bool:
    """Whether `folder` holds an adapter and no full model, with or without a config.json."""
    path = Path(folder)
    return (path / ADAPTER_SETTINGS).is_file() and next(path.glob("model*.safetensors"), None) is None


def has_weights(folder: str | Path) -> bool:
    """Whether `folder` holds weights that can be loaded without running code: safetensors.

    An adapter's have one name: beside other safetensors, peft would unpickle `PICKLED_ADAPTER`.
    """
    patterns = (ADAPTER,) if is_adapter(folder) else ("*.safetensors", "*.safetensors.index.json")
    return any(next(Path(folder).glob(pattern), None) is not None for pattern in patterns)


@contextmanager
def without_adapter(folder: str) -> Iterator[str]:
    """Yield `folder`, or a view of it without its adapter's files where it holds whole weights beside one.

    Trainers leave the adapter beside the weights that it was merged into; transformers would apply it once more, and
    may take its base model for the weights.
    """
    path = Path(folder)
    if not path.is_dir() or not (path / ADAPTER_SETTINGS).is_file():
        yield folder
        return
    with TemporaryDirectory(prefix="apportion-") as view:
        for name in os.listdir(path):
            if name not in (ADAPTER_SETTINGS, ADAPTER, PICKLED_ADAPTER):
                os.symlink((path / name).resolve(), Path(view) / name)
        yield view


def stored_shapes(
    folder: str, wanted: Wanted = lambda name: True, *, download: bool = True
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every `wanted` tensor in the weights of `folder` (or hub id), by name, from files' headers.

    Args:
        download: whether to fetch the weights of a hub id that are not here.

    Raises:
        SafetensorError, OSError, ValueError, LookupError, TypeError: a file that cannot be read.
    """
    from safetensors import safe_open

    found = {}
    for file in _weight_files(folder, wanted, download):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                if wanted(name):
                    found[name] = tuple(weights.get_slice(name).get_shape())
    return found


def _weight_files(folder: str, wanted: Wanted, download: bool) -> list[Path]:
    """Return the safetensors files that may hold `wanted` tensors: an adapter's own where it holds no whole model."""
    if is_adapter(folder):
        return [Path(folder) / ADAPTER]
    if (whole := stored_file(folder, WHOLE, download=download)) is not None:
        return [whole]
    if (index := stored_file(folder, INDEX, download=download)) is not None:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted({Path(shard).name for name, shard in named.items() if wanted(name)})  # never outside the folder
        located = [stored_file(folder, shard, download=download) for shard in shards]
        return [file for file in located if file is not None]
    return sorted(Path(folder).glob("*.safetensors"))


def stored_file(folder: str, name: str, *, download: bool = True) -> Path | None:
    """Return the path of a file of the model in `folder` (or hub id), None where it has none of that name."""
    path = Path(folder)
    if path.is_dir():
        return path / name if (path / name).is_file() else None
    from transformers.utils.hub import cached_file

    options: dict[str, Any] = {"local_files_only": not download}
    options |= {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    found = cached_file(folder, name, **options)
    return None if found is None else Path(found)
