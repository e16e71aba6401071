"""The recorder of a measured process: seconds by phase, work, memory, operations, and the weights changed by a step."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from apportion.errors import ConfigError
from apportion.models.master_weights import join
from benchmarks.harness.operations import FORMULAS
from benchmarks.harness.settings import Work

COUNTED = ("prompts", "prompt_tokens", "generated_tokens", "trained_tokens", "optimizer_steps")
LEFT = ("generate", "score", "reference", "update")


class Recorder:
    """Records one run: `wrap` its functions, call `batch_done` at the end of each batch, `save` at the end.

    Phases are exclusive: the time of an inner one is not counted in the outer one. All timed batches are recorded; the
    counted batch at the end gives operations and the share of weights that its first step changed.
    """

    def __init__(self, work: Work) -> None:
        self.work, self.done = work, 0
        self.batches: list[dict[str, Any]] = []
        self.peak: dict[str, float] = {}
        self.flop: dict[str, float] = {}
        self.changed: float | None = None
        self._stack: list[list[Any]] = []
        self._counter: FlopCounterMode | None = None
        self._before: list[tuple[Tensor, Tensor]] | None = None
        self._cuda = work.device != "cpu" and torch.cuda.is_available()
        self._reset()
        # of every optimizer in the process, so that neither side needs code for it
        register_optimizer_step_pre_hook(self._before_step)
        register_optimizer_step_post_hook(self._after_step)

    # --- phases -------------------------------------------------------------------------------------------------------

    def wrap(self, owner: Any, name: str, phase: str, after: Callable[..., None] | None = None) -> None:
        """Time `owner.name` as `phase`; `after(result, *args, **kwargs)` may count its work.

        Raises:
            ConfigError: there is no such function (another version of the package).
        """
        if not callable(getattr(owner, name, None)):
            got = f"{getattr(owner, '__name__', type(owner).__name__)} without {name}"
            raise ConfigError("peer", got, "the measured version", "Check its installed version.")
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.enter(phase)
            try:
                result = inner(*args, **kwargs)
            finally:
                self.leave()
            if after is not None:
                after(result, *args, **kwargs)
            return result

        setattr(owner, name, timed)

    def enter(self, phase: str) -> None:
        """Begin a phase."""
        self._stack.append([phase, self._now(), self._operations(), 0.0, 0.0])

    def leave(self) -> None:
        """End the innermost phase."""
        phase, began, counted, inner_s, inner_flop = self._stack.pop()
        seconds, flop = self._now() - began, self._operations() - counted
        self._phases[phase] += seconds - inner_s
        self._flop[phase] += flop - inner_flop
        if self._stack:
            self._stack[-1][3] += seconds
            self._stack[-1][4] += flop

    def open(self, phase: str) -> None:
        """Begin a phase that lasts until the batch is done, unless it is open."""
        if not self.inside(phase):
            self.enter(phase)

    def inside(self, phase: str) -> bool:
        """Whether a phase is open."""
        return any(frame[0] == phase for frame in self._stack)

    def begin(self) -> None:
        """Start the clock of the first batch."""
        self._reset()

    def add(self, **counts: float) -> None:
        """Count work of the current batch."""
        for name, value in counts.items():
            self._counts[name] += int(value)

    def scored(self, scores: Tensor) -> None:
        """Record the reward model's raw scores of the current batch."""
        self._scores += scores.detach().flatten().tolist()

    def generated(self, responses: list[list[int]]) -> None:
        """Record the ids of the current batch's responses, where the work asks for them."""
        if self.work.responses:
            self._responses += responses

    # --- batches ------------------------------------------------------------------------------------------------------

    def batch_done(self) -> bool:
        """Close the batch; return whether it was the last one."""
        while self._stack:
            self.leave()
        wall, work = self._now() - self._began, self.work
        if work.warmup <= self.done < work.warmup + work.batches:
            phases = {name: self._phases.get(name, 0.0) for name in LEFT}
            phases["other"] = wall - sum(phases.values())
            score = sum(self._scores) / len(self._scores) if self._scores else None
            batch = {"total": wall, "phases": phases, "work": dict(self._counts), "score": score}
            self.batches.append(batch | ({"responses": self._responses} if work.responses else {}))
        self.done += 1
        if self.done == work.warmup + work.batches:
            self.peak = peak_memory(self._cuda)  # before anything of ours adds to it
            if work.count:
                self._counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
                self._counter.__enter__()
        elif self.done == work.total and self._counter is not None:
            self._counter.__exit__(None, None, None)
            self.flop = {**self._flop, "total": float(self._counter.get_total_flops())}
            self._counter = None
        self._reset()
        return self.done >= work.total

    def _reset(self) -> None:
        self._phases: dict[str, float] = defaultdict(float)
        self._flop: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = dict.fromkeys(COUNTED, 0)
        self._scores: list[float] = []
        self._responses: list[list[int]] = []
        self._began = self._now()

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _operations(self) -> float:
        return 0.0 if self._counter is None else float(self._counter.get_total_flops())

    # --- the optimizer's steps ----------------------------------------------------------------------------------------

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._counter is not None and self.changed is None:
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
            self._before = [(p, stepped_weight(optimizer, p)) for p in parameters]

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.add(optimizer_steps=1)
        if self._before is not None:
            different = sum(int((stepped_weight(optimizer, p) != old).sum()) for p, old in self._before)
            self.changed = different / max(1, sum(p.numel() for p, _ in self._before))
            self._before = None

    # --- the end ------------------------------------------------------------------------------------------------------

    def save(self, **more: Any) -> None:
        """Write result.json into the work's folder."""
        result = {"batches": self.batches, "peak": self.peak, "flop": self.flop, "changed": self.changed, **more}
        result["versions"] = versions()
        (Path(self.work.folder) / "result.json").write_text(json.dumps(result, indent=1))


def stepped_weight(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """Return a copy of the weight that the optimizer steps: its float32 master where there is one."""
    remainder = getattr(optimizer, "remainders", {}).get(parameter)
    return parameter.detach().clone() if remainder is None else join(parameter.detach(), remainder)


def peak_memory(cuda: bool) -> dict[str, float]:
    """Return the process's peak resident memory and peak memory allocated on the GPU (0 without one), MB."""
    return {"rss_mb": peak_rss(), "gpu_mb": torch.cuda.max_memory_allocated() / 1e6 if cuda else 0.0}


def peak_rss() -> float:
    """Return the peak resident memory of this process, MB.

    VmHWM on Linux, where ru_maxrss includes the parent's memory at the fork; ru_maxrss elsewhere.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    import resource

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / 1e6 if sys.platform == "darwin" else size * 1024 / 1e6


def versions() -> dict[str, str]:
    """Return the versions of the packages that this process has loaded."""
    names = ("torch", "transformers", "trl", "accelerate", "peft", "apportion")
    return {name: str(sys.modules[name].__version__) for name in names if hasattr(sys.modules.get(name), "__version__")}


def read_work() -> Work:
    """Return the work that the command line names, and set this process's threads and seed to its values."""
    work = Work(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(work.threads)
    torch.manual_seed(work.seed)
    return work
