"""Checkpoints of a run: everything a learner holds, written whole or not at all, in safetensors and JSON."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from apportion.runs import Run, explained
from apportion.stages.learner import Learner


def save_checkpoint(run: Run, learner: Learner, step: int, *, keep: int) -> Path:
    """Write checkpoints/step-N (to a temporary name first, then renamed), prune older ones, and return it."""
    folder = run.path / "checkpoints"
    part, final = folder / f"step-{step}.tmp", folder / f"step-{step}"
    with explained(run.path):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, tensors in _tensors(learner).items():
            save_file({k: v.contiguous() for k, v in tensors.items()}, part / f"{name}.safetensors")
        progress = {"step": step, "sizes": run.sizes()}
        (part / "progress.json").write_text(json.dumps(progress))
        for file in part.iterdir():
            _sync(file)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)
        _sync(folder)
        for _, old in sorted(_steps(folder))[:-keep]:
            shutil.rmtree(old)
    return final


def load_latest(run: Run, learner: Learner) -> int:
    """Put the newest whole checkpoint into `learner`, cut the logs back to it, and return its step (0: none)."""
    found = sorted(_steps(run.path / "checkpoints"))
    if not found:
        run.cut({})
        return 0
    step, folder = found[-1]
    progress = json.loads((folder / "progress.json").read_text())
    _restore(learner, {f.stem: load_file(f) for f in folder.glob("*.safetensors")})
    run.cut(progress["sizes"])
    return step


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of the whole checkpoints; half-written ones end in .tmp and do not count."""
    names = folder.glob("step-*") if folder.is_dir() else ()
    return [(int(p.name[5:]), p) for p in names if p.name[5:].isdigit() and (p / "progress.json").is_file()]


def _tensors(learner: Learner) -> dict[str, dict[str, Tensor]]:
    parameters = dict(enumerate(learner.models.policy.trainable()))
    moments = learner.optimizer.state
    return {
        "weights": {str(i): p.detach().cpu() for i, p in parameters.items()},
        "optimizer": {
            f"{i}.{name}": value.cpu() for i, p in parameters.items() for name, value in moments.get(p, {}).items()
        },
        "state": learner.credit_state | {"generator": learner.generator.get_state()},
        "guards": learner.guards.state,
    }


def _restore(learner: Learner, stored: dict[str, dict[str, Tensor]]) -> None:
    with torch.no_grad():
        for i, parameter in enumerate(learner.models.policy.trainable()):
            parameter.copy_(stored["weights"][str(i)])
            moments: dict[str, Any] = {
                name.partition(".")[2]: value
                for name, value in stored["optimizer"].items()
                if name.partition(".")[0] == str(i)
            }
            # `step` too: the fused optimizer counts on the parameter's device
            moments = {k: v.to(parameter.device) for k, v in moments.items()}
            if "remainder" in moments:  # the policy holds the same tensor
                moments["remainder"] = learner.models.policy.remainders[parameter].copy_(moments["remainder"])
            learner.optimizer.state[parameter] = moments
    learner.guards.restore(stored.get("guards", {}))
    state = dict(stored["state"])
    learner.generator.set_state(state.pop("generator"))
    learner.credit_state = state


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
