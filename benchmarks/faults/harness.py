"""The whole experiment: reference runs, then kills in parallel, and their summary."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apportion.system.disk import explain_disk_errors
from benchmarks.faults.kills import Plan, Reference, kill_once, reference
from benchmarks.faults.process import import_libraries
from benchmarks.faults.settings import FaultsConfig
from benchmarks.faults.world import make_world

OnProgress = Callable[[int, str], None]


@contextmanager
def run_root(folder: str | None, prefix: str) -> Iterator[Path]:
    """Yield the folder for runs: the given one, or a temporary one that is removed at the end."""
    if folder is not None:
        path = Path(folder).expanduser().absolute()
        with explain_disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    path = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def clear(root: Path, *patterns: str) -> None:
    """Remove worlds and runs of an earlier benchmark in `root` whose names match; nothing else."""
    with explain_disk_errors(root):
        for path in (path for pattern in patterns for path in root.glob(pattern)):
            if (path / "status.json").is_file() or (path / "policy" / "config.json").is_file():
                shutil.rmtree(path)


def plans(config: FaultsConfig, root: Path) -> list[Plan]:
    """Return the kills: those on the whole model first, then the other kinds alternating; aimed ones at random."""
    rng = random.Random(config.seed)
    count = config.kills
    kinds = [("adapters", "all weights")[i % 2] for i in range(count - config.model_kills)]
    kinds = ["smollm2"] * config.model_kills + kinds  # slow ones first, so that none remains for the end
    aimed = [i < round(config.in_checkpoint * count + 0.499) for i in range(count)]
    rng.shuffle(aimed)
    shared = {"steps": config.steps, "checkpoint_every": config.checkpoint_every, "seed": config.seed}
    return [
        Plan(number, kind, aim, rng.randrange(2**32), root, shared)
        for number, (kind, aim) in enumerate(zip(kinds, aimed, strict=True))
    ]


def faults(config: FaultsConfig, on_progress: OnProgress = lambda done, line: None) -> dict[str, Any]:
    """Return the outcome of all kills.

    Args:
        on_progress: called with the number of finished kills and a line about the last.

    Raises:
        UnexpectedEnd: a run that did not end as planned; its output is in the message.
    """
    began = time.monotonic()
    with run_root(config.folder, "apportion-faults-") as root:
        import_libraries()
        clear(root, "world", "whole-*", "kill-*")
        make_world(root / "world", config.tokenizer)
        planned = plans(config, root)
        firsts = {plan.kind: plan for plan in reversed(planned)}
        forks = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(config.jobs, mp_context=forks) as pool:
            running = {kind: pool.submit(reference, plan) for kind, plan in firsts.items()}
            references = {kind: future.result() for kind, future in running.items()}
            timings = ", ".join(f"{kind} {one.seconds:.1f} s" for kind, one in references.items())
            on_progress(0, f"references: {timings}")
            kills = []
            for future in as_completed([pool.submit(kill_once, plan, references[plan.kind]) for plan in planned]):
                kills.append(future.result())
                on_progress(len(kills), describe(kills[-1]))
    return summary(config, references, kills) | {"seconds": round(time.monotonic() - began, 1)}


def describe(kill: dict[str, Any]) -> str:
    """Return a line about one kill."""
    where = "while writing a checkpoint" if kill["in_checkpoint"] else f"after {kill['batches_logged']} batches"
    outcome = "identical" if kill["weights"] and kill["logs"] else "DIFFERENT"
    return f"{kill['kind']}: killed {where}, resumed from step {kill['resumed_from']}: {outcome}"


def summary(config: FaultsConfig, references: dict[str, Reference], kills: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the totals over all kills and of each kind, and each kill."""
    hashes = {
        kind: {"weights": one.traces.weights, "logs": one.traces.logs, "seconds": round(one.seconds, 2)}
        for kind, one in sorted(references.items())
    }
    compared = {kind: {"weights": h["weights"], "logs": h["logs"]} for kind, h in hashes.items()}
    total = totals(kills)
    return {
        **total,
        "enough": enough(total),
        "reference_sha256": hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest(),
        "kinds": {kind: h | totals([k for k in kills if k["kind"] == kind]) for kind, h in hashes.items()},
        "settings": {
            name: getattr(config, name) for name in ("steps", "checkpoint_every", "jobs", "seed", "tokenizer")
        },
        "each": sorted(kills, key=lambda kill: kill["number"]),
    }


def enough(total: Mapping[str, int]) -> bool:
    """Whether a fifth of the kills hit the writing of a checkpoint and half of them had one to resume from."""
    hit, resumed = total["kills_in_checkpoint"], total["resumed_from_checkpoint"]
    return 5 * hit >= total["kills"] and 2 * resumed >= total["kills"]


def totals(kills: list[dict[str, Any]]) -> dict[str, int]:
    """Return the numbers of kills and of their outcomes."""
    return {
        "kills": len(kills),
        "kills_in_checkpoint": sum(k["in_checkpoint"] for k in kills),
        "resumed_from_checkpoint": sum(k["resumed_from"] > 0 for k in kills),
        "bit_identical": sum(k["weights"] and k["logs"] for k in kills),
        "log_rows_lost": sum(k["rows_lost"] for k in kills),
        "log_rows_doubled": sum(k["rows_doubled"] for k in kills),
    }
