"""Weights of frozen models in a file, so that the system can take their memory back between two uses.

A reward model and a reference are used once a batch, before the update needs most memory. Their weights are moved into
a file without a name that is mapped into memory: after `release` they take none that is not free for others, and the
next use finds them in the system's cache of files, or reads them from the disk where memory was short.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING

import psutil

from apportion.system import cpu

if TYPE_CHECKING:
    from torch import Tensor, UntypedStorage, nn

ALIGNMENT = 64  # bytes, as torch's allocator: the same kernels compute the same bits
IN_MEMORY = ("tmpfs", "ramfs")  # file systems that would keep the file in memory


class FileWeights:
    """Weights of frozen models, in a file that ends with this process.

    Attributes:
        size: bytes.
    """

    def __init__(self, models: Iterable[nn.Module], folder: Path, spare: float = 0.0) -> None:
        """Move the weights of `models` that lie in this computer's memory into a file in `folder`.

        Nothing else may share their memory. Raises OSError where the file cannot be made, or would leave less than
        `spare` bytes on the disk.
        """
        tensors = _in_memory(models)
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        self.size = sum(_padded(storage.nbytes()) for storage in storages.values())
        self._map: mmap.mmap | None = None
        if self.size == 0:
            return
        if shutil.disk_usage(folder).free < self.size + spare:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, self.size)
            _write(file, storages.values())  # not through the map: there a full disk ends the process
            self._map = mmap.mmap(file.fileno(), self.size)
        self._move(tensors, storages)
        storages.clear()
        cpu.return_freed_memory()
        self.release()

    def _move(self, tensors: list[Tensor], storages: dict[int, UntypedStorage]) -> None:
        import torch

        moved: dict[int, UntypedStorage] = {}
        place = 0
        for where, storage in storages.items():
            mapped = torch.frombuffer(self._map, dtype=torch.uint8, count=storage.nbytes(), offset=place)
            moved[where] = mapped.untyped_storage()
            place += _padded(storage.nbytes())
        for tensor in tensors:
            there = tensor.data.new_empty(0)
            old = moved[tensor.untyped_storage().data_ptr()]
            tensor.data = there.set_(old, tensor.storage_offset(), tensor.shape, tensor.stride())

    def release(self) -> None:
        """Let go of the memory; the next use takes it again."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)


def file_weights(models: Iterable[nn.Module], folder: Path, spare: float = 0.0) -> FileWeights | None:
    """Return the weights of `models` moved into a file in `folder`, None where that would save no memory.

    It saves some on Linux, where the weights lie in the computer's memory and the folder on a disk with space for them.

    Args:
        spare: bytes of the disk that are for something else, such as checkpoints.
    """
    if not sys.platform.startswith("linux") or _file_system(folder) in IN_MEMORY:
        return None
    try:
        return FileWeights(models, folder, spare)
    except OSError:  # no space, or a file system that maps no files: they stay in memory
        return None


def _in_memory(models: Iterable[nn.Module]) -> list[Tensor]:
    """Return the parameters and buffers, each once, that are plain tensors in the computer's memory."""
    import torch

    every = (tensor for model in models for tensor in (*model.parameters(), *model.buffers()))
    plain = {id(t): t for t in every if type(t.data) is torch.Tensor and t.device.type == "cpu" and t.numel()}
    return list(plain.values())


def _write(file: IO[bytes], storages: Iterable[UntypedStorage]) -> None:
    """Write the storages to an unbuffered file, each at its padded place."""
    import torch

    place = 0
    for storage in storages:
        rest = torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data
        file.seek(place)
        while rest:
            rest = rest[file.write(rest) :]  # at most 2 GiB at a time
        place += _padded(storage.nbytes())


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _file_system(folder: Path) -> str:
    """Return the kind of file system of a folder, such as ext4."""
    whole = folder.resolve()
    mounts = {Path(one.mountpoint): one.fstype for one in psutil.disk_partitions(all=True)}
    return next((mounts[place] for place in (whole, *whole.parents) if place in mounts), "")
