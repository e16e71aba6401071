"""All kills: references first, then kills several at a time, and the sums that they are judged by."""

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
from benchmarks.faults.process import warm
from benchmarks.faults.settings import FaultsConfig
from benchmarks.faults.world import make_world

Tell = Callable[[int, str], None]


@contextmanager
def place(folder: str | None, prefix: str) -> Iterator[Path]:
    """Give a folder for runs: the one named, kept, or a temporary one, removed at the end."""
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
    """Remove what an earlier benchmark left in `root` under such names: worlds and runs, and nothing else."""
    with explain_disk_errors(root):
        for path in (path for pattern in patterns for path in root.glob(pattern)):
            if (path / "status.json").is_file() or (path / "policy" / "config.json").is_file():
                shutil.rmtree(path)


def plans(config: FaultsConfig, root: Path) -> list[Plan]:
    """Return the kills: kinds in turns, those on the whole model spread among them, the aimed ones among all."""
    chance = random.Random(config.seed)
    count = config.kills
    kinds = [("adapters", "all weights")[i % 2] for i in range(count - config.model_kills)]
    kinds = ["smollm2"] * config.model_kills + kinds  # the slow ones first, so that none is left at the end
    aimed = [i < round(config.in_checkpoint * count + 0.499) for i in range(count)]
    chance.shuffle(aimed)
    shared = {"steps": config.steps, "checkpoint_every": config.checkpoint_every, "seed": config.seed}
    return [
        Plan(number, kind, aim, chance.randrange(2**32), root, shared)
        for number, (kind, aim) in enumerate(zip(kinds, aimed, strict=True))
    ]


def faults(config: FaultsConfig, tell: Tell = lambda done, line: None) -> dict[str, Any]:
    """Return the outcome of all kills.

    Args:
        tell: called with how many kills are done and a line about the last.

    Raises:
        Broken: a run that ended otherwise than it should; what it printed is in the message.
    """
    began = time.monotonic()
    with place(config.folder, "apportion-faults-") as root:
        warm()
        clear(root, "world", "whole-*", "kill-*")
        make_world(root / "world", config.tokenizer)
        planned = plans(config, root)
        firsts = {plan.kind: plan for plan in reversed(planned)}
        forks = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(config.jobs, mp_context=forks) as pool:
            running = {kind: pool.submit(reference, plan) for kind, plan in firsts.items()}
            wholes = {kind: future.result() for kind, future in running.items()}
            tell(0, "references: " + ", ".join(f"{kind} {whole.seconds:.1f} s" for kind, whole in wholes.items()))
            found = []
            for future in as_completed([pool.submit(kill_once, plan, wholes[plan.kind]) for plan in planned]):
                found.append(future.result())
                tell(len(found), told(found[-1]))
    return summary(config, wholes, found) | {"seconds": round(time.monotonic() - began, 1)}


def told(kill: dict[str, Any]) -> str:
    """Return a line about one kill."""
    where = "while a checkpoint was written" if kill["in_checkpoint"] else f"after {kill['batches_logged']} batches"
    same = "the same" if kill["weights"] and kill["logs"] else "NOT THE SAME"
    return f"{kill['kind']}: killed {where}, went on from step {kill['resumed_from']}: {same}"


def summary(config: FaultsConfig, wholes: dict[str, Reference], found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the sums over all kills, each kind's, and each kill."""
    hashes = {
        kind: {"weights": w.traces.weights, "logs": w.traces.logs, "seconds": round(w.seconds, 2)}
        for kind, w in sorted(wholes.items())
    }
    parts = {kind: {"weights": h["weights"], "logs": h["logs"]} for kind, h in hashes.items()}
    total = sums(found)
    return {
        **total,
        "enough": enough(total),
        "reference_sha256": hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest(),
        "kinds": {kind: h | sums([k for k in found if k["kind"] == kind]) for kind, h in hashes.items()},
        "settings": {
            name: getattr(config, name) for name in ("steps", "checkpoint_every", "jobs", "seed", "tokenizer")
        },
        "each": sorted(found, key=lambda kill: kill["number"]),
    }


def enough(total: Mapping[str, int]) -> bool:
    """Whether the kills say much: a fifth of them in the writing of a checkpoint, half with one to go on from."""
    hit, resumed = total["kills_in_checkpoint"], total["resumed_from_checkpoint"]
    return 5 * hit >= total["kills"] and 2 * resumed >= total["kills"]


def sums(kills: list[dict[str, Any]]) -> dict[str, int]:
    """Return how many kills there were, and how many of what kind and outcome."""
    return {
        "kills": len(kills),
        "kills_in_checkpoint": sum(k["in_checkpoint"] for k in kills),
        "resumed_from_checkpoint": sum(k["resumed_from"] > 0 for k in kills),
        "bit_identical": sum(k["weights"] and k["logs"] for k in kills),
        "log_rows_lost": sum(k["rows_lost"] for k in kills),
        "log_rows_doubled": sum(k["rows_doubled"] for k in kills),
    }
