"""Checkpoints of any stage: written atomically, verified before use.

`step-N/` holds safetensors, `progress.json` (the step, where the logs ended, what the numbers depend on) and, written
last, `manifest.json` with the size and SHA-256 of each of them. It is written as `step-N.tmp`, made durable, renamed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from apportion.errors import DiskError
from apportion.system import disk
from apportion.training import rng
from apportion.training.reproducibility import check_devices, describe_changes, run_environment
from apportion.training.run_folder import RunFolder
from apportion.training.state import Checkpointable, Tensors

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
T = TypeVar("T")
Warn = Callable[[str], None]


class Damaged(Exception):
    """A checkpoint that cannot be used, and why."""


def save_checkpoint(run: RunFolder, learner: Checkpointable, step: int, *, keep: int) -> Path:
    """Write checkpoints/step-N, prune older ones, have status.json say so, and return it.

    Raises:
        DiskError: no space, also after waiting for it; the checkpoints that were there still are.
    """
    final = run.path / "checkpoints" / f"step-{step}"
    files = learner.state_dict() | {"random": rng.states()}
    wanted = sum(t.numel() * t.element_size() for tensors in files.values() for t in tensors.values())

    def work() -> None:
        final.parent.mkdir(parents=True, exist_ok=True)
        # the logs are made durable here, with the names in the run folder, and the disk may be full for them too
        _write(final, files, progress_of(run, step, learner.models_by_name()))

    run.retry_when_full(work, wanted + (1 << 16))
    prune(run, step, keep)
    return final


def progress_of(run: RunFolder, step: int, models: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint's progress.json says, with the logs made durable up to here."""
    return {"step": step, "logs": run.logs.positions(), "run_environment": run_environment(models)}


def prune(run: RunFolder, step: int, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, of which `step` is the last, and have status.json name it."""
    folder = run.path / "checkpoints"
    for old in [*(path for _, path in steps_in(folder)[:-keep]), *folder.glob("step-*.damaged")]:
        shutil.rmtree(old, ignore_errors=True)  # what is left of one will be counted as damaged
    run.update_status(checkpoint=step)


def seal(part: Path, final: Path, progress: Mapping[str, Any]) -> None:
    """Finish the checkpoint in folder `part`: add progress.json and its manifest, and rename it to `final`, durably."""
    (part / PROGRESS).write_text(json.dumps(progress, indent=2), encoding="utf-8")
    (part / MANIFEST).write_text(manifest(part), encoding="utf-8")
    disk.replace_durably(part, final)


def _write(final: Path, files: Tensors, progress: dict[str, Any]) -> None:
    part = final.with_name(f"{final.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        for name, tensors in files.items():
            where = {k: v.device.type for k, v in tensors.items() if v.device.type != "cpu"}
            save_file(separate_storage(tensors), part / f"{name}.safetensors", metadata=where)
        seal(part, final, progress)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)  # on a full disk its room is needed for the logs
        raise


def separate_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as a file can hold them: contiguous, and none in the memory of another."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.detach().contiguous()
        if whole.untyped_storage().data_ptr() in seen:
            whole = whole.clone()
        seen.add(whole.untyped_storage().data_ptr())
        separate[name] = whole
    return separate


def manifest(folder: Path) -> str:
    """Return the text of the manifest of `folder`'s files; it carries its own sum, so that it is checked as well."""
    there = sorted(p for p in folder.iterdir() if p.name != MANIFEST)
    return _manifest({p.name: {"size": p.stat().st_size, "sha256": _sum(p)} for p in there})


def _manifest(files: dict[str, Any]) -> str:
    own = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": own}, indent=2, sort_keys=True) + "\n"


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(folder: Path) -> list[str]:
    """Return the names of the checkpoint's files. Raises Damaged, naming one, unless each is what was written."""
    text = _read(folder / MANIFEST, Path.read_bytes)
    try:
        files = json.loads(text)["files"]
        whole = _manifest(files).encode() == text
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise Damaged(f"{MANIFEST} is not as it was written")
    for name, expected in files.items():
        size = _read(folder / name, lambda path: path.stat().st_size)
        if size != expected["size"]:
            raise Damaged(f"{name} has {size} bytes instead of {expected['size']}")
        if _read(folder / name, _sum) != expected["sha256"]:
            raise Damaged(f"{name} has another SHA-256 than was written")
    return list(files)


def _read(path: Path, read: Callable[[Path], T]) -> T:
    """Return `read(path)`. Raises Damaged where it is not there or cannot be read."""
    try:
        return read(path)
    except FileNotFoundError:
        raise Damaged(f"{path.name} is missing") from None
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read ({error.strerror})") from error


def load_latest(run: RunFolder, learner: Checkpointable, warn: Warn | None = None) -> int:
    """Put the newest good checkpoint into `learner`, truncate the logs to it, and return its step; 0 without one.

    One that is damaged, or from which the logs have lost something, is reported by name and skipped.

    Raises:
        DiskError: there are checkpoints, or were, and none is good. ConfigError: it is another model's, or another
            kind of device's.
    """
    return use_latest(run, learner.models_by_name, lambda folder, files: _restore(learner, folder, files), warn)


def use_latest(
    run: RunFolder,
    models: Callable[[], Mapping[str, Any]],
    restore: Callable[[Path, Sequence[str]], None],
    warn: Warn | None = None,
) -> int:
    """Call `restore` with the newest good checkpoint and its files, truncate the logs to it, and return its step.

    Otherwise as `load_latest`.

    Args:
        models: returns the run's models by name: their devices are compared with the checkpoint's.
    """
    warn = run.warn if warn is None else warn
    found, bad = steps_in(run.path / "checkpoints"), []
    for step, folder in reversed(found):
        try:
            progress, files = _load_manifest(run, folder)
        except Damaged as problem:
            bad.append(f"{folder.name}: {problem}")
            warn(f"apportion: checkpoint {folder} cannot be used: {problem}.\n")
            continue
        now = run_environment(models())
        check_devices(progress["run_environment"], now)
        restore(folder, files)
        warning = describe_changes(progress["run_environment"], now)
        if warning is not None:
            warn(f"apportion: warning: {warning}\n")
        run.logs.truncate(progress["logs"])
        warn(f"apportion: resuming from {folder}.\n")
        return step
    known = run.status_fields.get("checkpoint", 0)
    if bad or known:
        got = f"{run.path / 'checkpoints'} ({'; '.join(bad) or f'nothing, and step-{known} was there'})"
        fix = "Put it back from a copy, or pass --fresh to start over from step 1."
        raise DiskError("checkpoints", got, "a whole checkpoint to resume from", fix)
    if any((run.path / name).exists() for name in ("metrics.jsonl", "rollouts.jsonl")):
        warn(f"apportion: {run.path} has no checkpoint yet: starting over from step 1.\n")
    run.logs.truncate({})
    return 0


def _load_manifest(run: RunFolder, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Return (what `progress.json` says, names of the files) of a whole checkpoint whose logs are there.

    Raises:
        Damaged: it is not.
    """
    files = check(folder)
    progress: dict[str, Any] = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    problem = run.logs.verify(progress["logs"])
    if problem is not None:
        raise Damaged(problem)
    return progress, files


def _restore(learner: Checkpointable, folder: Path, files: Sequence[str]) -> None:
    stored: Tensors = {}
    for file in (folder / name for name in files if name.endswith(".safetensors")):
        with safe_open(file, framework="pt") as tensors:
            where = tensors.metadata() or {}  # the device of those that were not on the CPU
            # cloned: the file is mapped into memory, at any alignment, and will be pruned
            stored[file.stem] = {
                name: tensors.get_tensor(name).clone().to(where.get(name, "cpu"))
                for name in tensors.keys()  # noqa: SIM118
            }
    everywhere = stored.pop("random")
    learner.load_state_dict(stored)
    rng.restore(everywhere)


def discard_after(run: RunFolder, step: int) -> None:
    """Rename checkpoints after `step`, which were skipped, so that they are neither used nor counted again."""
    for number, folder in steps_in(run.path / "checkpoints"):
        if number > step:
            gone = folder.with_name(f"{folder.name}.damaged")
            shutil.rmtree(gone, ignore_errors=True)
            folder.rename(gone)


def steps_in(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of the checkpoints in `folder` in order; half-written ones have other names."""
    return sorted((int(p.name[5:]), p) for p in folder.glob("step-*") if p.name[5:].isdigit() and p.is_dir())
