"""Seconds and memory of a batch beside a released trainer, each side in processes of its own, at the same work.

    python -m benchmarks.speed                                  # beside TRL's PPO: all weights, a separate value model
    python -m benchmarks.speed --ours default --peer_precision bfloat16

docs/bench.md explains each figure.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from apportion.errors import ApportionError, ConfigError
from apportion.models.loading import locate, pick_device
from apportion.models.tokenizers import load_tokenizer
from apportion.stages.method import build_method
from apportion.system import cpu
from benchmarks.harness import figures, machine
from benchmarks.harness.arguments import print_line, run_command, write_json
from benchmarks.harness.environment import environment, installed
from benchmarks.harness.ours import rl_config
from benchmarks.harness.settings import ENOUGH, PEERS, PRECISIONS, Peer, SpeedConfig, Work, check, shaped
from benchmarks.harness.tables import speed_table
from benchmarks.harness.workload import save_reward, write_prompts

EXAMPLES = """examples:
  python -m benchmarks.speed                                # beside TRL's PPO: all weights, a separate value model
  python -m benchmarks.speed --ours default --peer_precision bfloat16
  python -m benchmarks.speed --peer trl-grpo --json
  python -m benchmarks.speed --batch 8 --new_tokens 64 --epochs 2 --batches 10 --output mine.json

Each side runs in processes of its own, in turns. The peer's package is installed once, into the cache folder, and runs
with this environment's torch and transformers. `time_ratio` is the peer's seconds over ours, `memory_ratio` our peak
memory over the peer's: the median, the minimum and the maximum over all pairs of batches or processes. No ratio is
given (exit code 2) when prompts, tokens or optimizer steps differ. docs/bench.md explains each figure.
"""
TRIAL = 2  # timed batches of each precision when the best is requested
OnProgress = Callable[[str], None]
Result = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a table or one JSON object."""
    return run_command("speed", SpeedConfig, check, _measure, EXAMPLES, arguments)


def _measure(config: SpeedConfig, as_json: bool) -> int:
    result = speed(config, print_line)
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        speed_table(result)
        print_line(str(output_of(config)))
    return 0


def speed(config: SpeedConfig, on_progress: OnProgress = lambda line: None) -> Result:
    """Measure, write the result file and return its contents.

    Args:
        on_progress: called with a line before each process.

    Raises:
        ConfigError: a peer that cannot be installed or fails. DataError: the sides did different work; the result file
            then holds the work of each, and no ratio.
    """
    peer, output = PEERS[config.peer], output_of(config)
    config = shaped(config)
    config.threads = config.threads or cpu.available_cores().count
    config.device = str(pick_device(config.device))
    with tempfile.TemporaryDirectory(prefix="apportion-bench-") as name:
        works = make_works(config, peer, Path(name))
        on_progress(f"{peer.spec} in an environment of its own")
        package = installed(peer)
        on_progress("prompts and reward model")
        prepare(config, works["ours"])
        on_progress("matmul rates and bandwidth")
        before = machine.rates(config.device, config.threads)
        trials = try_precisions(config, peer, works["peer"], package, on_progress)
        works["peer"].precision = min(trials, key=lambda p: trials[p]["seconds"]) if trials else config.peer_precision
        runs = in_rounds(config, peer, works, package, on_progress)
        after = machine.rates(config.device, config.threads)
    rates = {key: max(before[key], after[key]) for key in before}  # other load only ever slows them down
    result = summary(config, runs, rates, trials, works["peer"].precision)
    refused = difference(result)
    if refused is None:
        result |= ratios(result)
    write_json(output, result | ({} if refused is None else {"refused": str(refused)}))
    if refused is not None:
        raise refused
    return result


def output_of(config: SpeedConfig) -> Path:
    """Return the result file."""
    name = config.output or f"benchmarks/results/speed-{config.peer}-{config.ours}.json"
    return Path(name).expanduser()


def make_works(config: SpeedConfig, peer: Peer, folder: Path) -> dict[str, Work]:
    """Return the work of each side, over all timed batches. Raises ConfigError for invalid settings of ours."""
    names = ("batch", "samples", "prompt_tokens", "new_tokens", "epochs", "mini_batch", "threads", "seed", "pad_token")
    shared = {name: getattr(config, name) for name in (*names, "device", "batches")}
    shared |= {"model": locate("model", config.model), "folder": str(folder), "reward": str(folder / "reward")}
    shared |= {"prompts": str(folder / "prompts.jsonl"), "algorithm": peer.algorithm, "lr": peer.lr}
    shared["micro_batch"] = config.peer_micro_batch
    ours = Work(role="ours", **shared, ours=config.ours, overrides=config.ours_settings)
    build_method(rl_config(ours))
    return {"ours": ours, "peer": Work(role="peer", **shared, checkpointing=config.peer_checkpointing)}


def prepare(config: SpeedConfig, work: Work) -> None:
    """Write the prompts and the reward model that both sides use."""
    tokenizer = load_tokenizer("model", work.model, work.pad_token)
    most = max(-(-config.batches // config.rounds), TRIAL) + 2  # one to warm up, one that is counted
    count = most * work.batch // work.samples
    write_prompts(config.prompts, tokenizer, work.prompt_tokens, count, Path(work.prompts))
    save_reward(work.model, Path(work.reward), work.pad_token, work.seed)


def try_precisions(
    config: SpeedConfig, peer: Peer, work: Work, package: Path, on_progress: OnProgress
) -> dict[str, Any]:
    """Return seconds and memory of a few batches in every precision; empty unless the best is requested."""
    trials: dict[str, Any] = {}
    for precision in PRECISIONS if config.peer_precision == "best" else ():
        on_progress(f"{config.peer} in {precision}: {TRIAL} batches")
        run = process(replace(work, precision=precision, batches=TRIAL), peer, package, f"trial-{precision}")
        trials[precision] = {
            "seconds": median(batch["total"] for batch in run["batches"]),
            "peak": run["peak"],
        }
    return trials


def in_rounds(
    config: SpeedConfig, peer: Peer, works: Mapping[str, Work], package: Path, on_progress: OnProgress
) -> dict[str, list[Result]]:
    """Return the results of both sides' processes, run in turns; the side that starts alternates between rounds."""
    runs: dict[str, list[Result]] = {"ours": [], "peer": []}
    counts = [len(range(turn, config.batches, config.rounds)) for turn in range(config.rounds)]
    for turn, count in enumerate(counts):
        for role in ("ours", "peer") if turn % 2 == 0 else ("peer", "ours"):
            on_progress(
                f"round {turn + 1} of {config.rounds}: {config.peer if role == 'peer' else role}, {count} batches"
            )
            work = replace(works[role], batches=count, count=turn == 0)
            runs[role].append(process(work, peer, package, f"{role}-{turn}"))
    return runs


def process(work: Work, peer: Peer, package: Path, name: str) -> Result:
    """Run one side in a process of its own and return its result.

    Raises:
        ConfigError: it failed; its output is quoted.
    """
    folder = Path(work.folder) / name
    folder.mkdir()
    (folder / "work.json").write_text(json.dumps(asdict(replace(work, folder=str(folder)))))
    ours = work.role == "ours"
    module = "benchmarks.harness.ours" if ours else peer.module
    # -P: the current folder is not on the path; `environment` puts this checkout there
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
        contents: Result = json.loads(result.read_text())
        return contents
    error = folder / "error.txt"
    if error.is_file():
        raise ConfigError(error.read_text())
    raise failure(work, peer, done.returncode, folder / "output.txt")


def failure(work: Work, peer: Peer, code: int, output: Path) -> ConfigError:
    """Return the error of a failed process: its exit code and the last lines of its output."""
    lines = [line.strip() for line in output.read_text(encoding="utf-8", errors="replace").splitlines()]
    last = " | ".join([line for line in lines if line][-3:])
    side = "ours" if work.role == "ours" else f"{peer.spec} in {work.precision}"
    fix = "Try another --peer_precision, a smaller --batch, or --model; exit code -9 means that memory ran out."
    return ConfigError("process", f"{side}: exit code {code}: {last}", "a run that finishes", fix)


def summary(
    config: SpeedConfig, runs: Mapping[str, list[Result]], rates: Mapping[str, float], trials: Result, precision: str
) -> Result:
    """Return all measurements except the ratios."""
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


def difference(result: Result) -> ApportionError | None:
    """Return the error that refuses a ratio, or None where both sides did the same work."""
    try:
        figures.check_same_work(result["ours"]["work"], result["peer"]["work"])
    except ApportionError as error:
        return error
    return None


def ratios(result: Result) -> Result:
    """Return time_ratio (peer over ours) and memory_ratio (ours over peer), each {median, min, max}, and the phases."""
    ours, peer = result["ours"], result["peer"]
    return {
        "time_ratio": figures.ratio(peer["batch_seconds"], ours["batch_seconds"]),
        "memory_ratio": figures.ratio(ours["peak_mb"], peer["peak_mb"]),
        "phases": {
            name: {side: result[side]["phases"][name]["median"] for side in ("ours", "peer")} for name in figures.PHASES
        },
    }


if __name__ == "__main__":
    sys.exit(main())
