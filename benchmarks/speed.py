"""`apportion bench speed`: ours and a peer in turn, each in a process of its own, at the same work."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from apportion.errors import ApportionError, ConfigError
from apportion.models.loading import load_tokenizer, locate, pick_device
from apportion.stages.rl.method import build_method
from apportion.system import cpu
from apportion.training.run_folder import explained
from benchmarks.harness import figures, machine
from benchmarks.harness.environment import environment, installed
from benchmarks.harness.ours import rl_config
from benchmarks.harness.settings import ENOUGH, PEERS, PRECISIONS, Peer, SpeedConfig, Work, shaped
from benchmarks.harness.workload import save_reward, write_prompts

TRIAL = 2  # timed batches of each precision when the best is asked for
Tell = Callable[[str], None]
Result = dict[str, Any]


def speed(config: SpeedConfig, tell: Tell = lambda line: None) -> Result:
    """Measure, write the result file and return what it holds.

    Args:
        tell: called with a line before each process.

    Raises:
        ConfigError: a peer that cannot be installed or fails. DataError: both sides did not do the same work; the
            result file then holds what each did, and no ratio.
    """
    peer, output = PEERS[config.peer], output_of(config)
    config = replace(shaped(config), threads=config.threads or cpu.available_cores().count)
    config.device = str(pick_device(config.device))
    with tempfile.TemporaryDirectory(prefix="apportion-bench-") as name:
        works = make_works(config, peer, Path(name))
        tell(f"{peer.spec} in an environment of its own")
        package = installed(peer)
        tell("prompts and reward model")
        prepare(config, works["ours"])
        tell("matmul rates and bandwidth")
        before = machine.rates(config.device, config.threads)
        trials = try_precisions(config, peer, works["peer"], package, tell)
        works["peer"].precision = min(trials, key=lambda p: trials[p]["seconds"]) if trials else config.peer_precision
        runs = in_rounds(config, peer, works, package, tell)
        after = machine.rates(config.device, config.threads)
    rates = {key: max(before[key], after[key]) for key in before}  # a neighbour only ever slows them down
    found = summary(config, runs, rates, trials, works["peer"].precision)
    refused = difference(found)
    if refused is None:
        found |= ratios(found)
    store(output, found | ({} if refused is None else {"refused": str(refused)}))
    if refused is not None:
        raise refused
    return found


def output_of(config: SpeedConfig) -> Path:
    """Return the result file."""
    name = config.output or f"benchmarks/results/speed-{config.peer}-{config.ours}.json"
    return Path(name).expanduser()


def make_works(config: SpeedConfig, peer: Peer, folder: Path) -> dict[str, Work]:
    """Return the work of each side, of all timed batches. Raises ConfigError for settings of ours that cannot work."""
    names = ("batch", "samples", "prompt_tokens", "new_tokens", "epochs", "mini_batch", "threads", "seed", "pad_token")
    given = {name: getattr(config, name) for name in (*names, "device", "batches")}
    given |= {"model": locate("model", config.model), "folder": str(folder), "reward": str(folder / "reward")}
    given |= {"prompts": str(folder / "prompts.jsonl"), "algorithm": peer.algorithm, "lr": peer.lr}
    given["micro_batch"] = config.peer_micro_batch
    ours = Work(role="ours", **given, ours=config.ours, overrides=config.ours_settings)
    build_method(rl_config(ours))
    return {"ours": ours, "peer": Work(role="peer", **given, checkpointing=config.peer_checkpointing)}


def prepare(config: SpeedConfig, work: Work) -> None:
    """Write the prompts and the reward model that both sides are given."""
    tokenizer = load_tokenizer("model", work.model, work.pad_token)
    most = max(-(-config.batches // config.rounds), TRIAL) + 2  # one to warm up, one that is counted
    count = most * work.batch // work.samples
    write_prompts(config.prompts, tokenizer, work.prompt_tokens, count, Path(work.prompts))
    save_reward(work.model, Path(work.reward), work.pad_token, work.seed)


def try_precisions(config: SpeedConfig, peer: Peer, work: Work, package: Path, tell: Tell) -> dict[str, Any]:
    """Return seconds and memory of a few batches in every precision; nothing unless the best is asked for."""
    found: dict[str, Any] = {}
    for precision in PRECISIONS if config.peer_precision == "best" else ():
        tell(f"{config.peer} in {precision}: {TRIAL} batches")
        run = process(replace(work, precision=precision, batches=TRIAL), peer, package, f"trial-{precision}")
        found[precision] = {
            "seconds": median(batch["total"] for batch in run["batches"]),
            "peak": run["peak"],
        }
    return found


def in_rounds(
    config: SpeedConfig, peer: Peer, works: Mapping[str, Work], package: Path, tell: Tell
) -> dict[str, list[Result]]:
    """Return what the processes of both sides wrote, run in turns; each round begins with the other side."""
    runs: dict[str, list[Result]] = {"ours": [], "peer": []}
    counts = [len(range(turn, config.batches, config.rounds)) for turn in range(config.rounds)]
    for turn, count in enumerate(counts):
        for role in ("ours", "peer") if turn % 2 == 0 else ("peer", "ours"):
            tell(f"round {turn + 1} of {config.rounds}: {config.peer if role == 'peer' else role}, {count} batches")
            work = replace(works[role], batches=count, count=turn == 0)
            runs[role].append(process(work, peer, package, f"{role}-{turn}"))
    return runs


def process(work: Work, peer: Peer, package: Path, name: str) -> Result:
    """Run one side in a process of its own and return what it wrote.

    Raises:
        ConfigError: it failed; its output is quoted.
    """
    folder = Path(work.folder) / name
    folder.mkdir()
    (folder / "work.json").write_text(json.dumps(asdict(replace(work, folder=str(folder)))))
    ours = work.role == "ours"
    module = "benchmarks.harness.ours" if ours else peer.module
    # -P keeps the folder that it is called from off the path
    command = [sys.executable, "-P", "-m", module, str(folder / "work.json")]
    with open(folder / "output.txt", "w", encoding="utf-8") as log:
        done = subprocess.run(
            command,
            env=environment(work.threads, None if ours else package),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    result = folder / "result.json"
    if done.returncode == 0 and result.is_file():
        found: Result = json.loads(result.read_text())
        return found
    said = folder / "error.txt"
    if said.is_file():
        raise ConfigError(said.read_text())
    raise failure(work, peer, done.returncode, folder / "output.txt")


def failure(work: Work, peer: Peer, code: int, output: Path) -> ConfigError:
    """Return the error of a process that failed: its exit code, and the last lines that it wrote."""
    lines = [line.strip() for line in output.read_text(encoding="utf-8", errors="replace").splitlines()]
    last = " | ".join([line for line in lines if line][-3:])
    side = "ours" if work.role == "ours" else f"{peer.spec} in {work.precision}"
    fix = "Try another --peer_precision, a smaller --batch, or --model; exit code -9 means that memory ran out."
    return ConfigError("process", f"{side}: exit code {code}: {last}", "a run that ends by itself", fix)


def summary(
    config: SpeedConfig, runs: Mapping[str, list[Result]], rates: Mapping[str, float], trials: Result, precision: str
) -> Result:
    """Return everything that was measured but the ratios."""
    cuda = config.device == "cuda"
    return {
        "benchmark": "speed",
        "settings": asdict(config),
        "machine": machine.describe() | {"threads": config.threads},
        "rates": dict(rates),
        "peer": figures.summarise(runs["peer"], rates, cuda) | {"precision": precision, "trials": trials},
        "ours": figures.summarise(runs["ours"], rates, cuda),
        "enough": config.batches >= ENOUGH,
    }


def difference(found: Result) -> ApportionError | None:
    """Return the error that refuses a ratio, or None where both sides did the same work."""
    try:
        figures.check_same_work(found["ours"]["work"], found["peer"]["work"])
    except ApportionError as error:
        return error
    return None


def ratios(found: Result) -> Result:
    """Return time_ratio (peer over ours) and memory_ratio (ours over peer), each {median, min, max}, and the phases."""
    ours, peer = found["ours"], found["peer"]
    return {
        "time_ratio": figures.ratio(peer["batch_seconds"], ours["batch_seconds"]),
        "memory_ratio": figures.ratio(ours["peak_mb"], peer["peak_mb"]),
        "phases": {
            name: {side: found[side]["phases"][name]["median"] for side in ("ours", "peer")} for name in figures.PHASES
        },
    }


def store(path: Path, found: Result) -> None:
    """Write a result file, making its folder. Raises DiskError."""
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
