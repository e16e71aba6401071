"""Records small real runs, and compares two recordings to the last digit: what a refactoring must not change.

    python tools/record_runs.py record OUT [--source src] [--world WORLD] [--only NAME ...]
    python tools/record_runs.py compare BEFORE AFTER [--added advantage/]

`record` trains tiny models through the command of the tree whose `src` is given (float32, one thread): PPO, ABC, macro
actions, GRPO, RLOO, a reward model and a diagnosis; adapters and all weights; one process, two, and two with sharded
weights; uninterrupted, and killed and resumed. OUT/NAME.json holds the metrics, the SHA-256 of the logged rollouts and
of the final weights. Kernels differ between processors: record both trees on one machine, with the same WORLD.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
MEASURED = ("time/", "memory/")  # metrics of how fast and how large a run is, not of what it computes
RENAMED = {"guards/": "monitors/", "/tightened": "/raised_kl_coef"}  # names of metrics that 0.1.0 had
OLD_FLAGS = {"excerpts": "clips", "excerpt_tokens": "clip_tokens", "probe_excerpts": "probe_clips"}  # of 0.1.0
NEW_FLAGS = {old: new for new, old in OLD_FLAGS.items()}
RL: dict[str, Any] = {
    "steps": 4,
    "checkpoint_every": 0,
    "sampling.batch_size": 8,
    "sampling.max_new_tokens": 6,
    "ppo.epochs": 2,
    "ppo.mini_batch": 4,
    "ppo.micro_batch": 3,
    "lora.rank": 4,
    "optim.lr": 0.01,
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
}
GROUPS = {"sampling.samples_per_prompt": 4, "ppo.epochs": 1}
FULL = {"lora.rank": 0, "optim.lr": 0.001}
ADAPTIVE = {"credit": "[attention, {kl_penalty: {coef: 0.1, target: 1.0, horizon: 50}}]"}
ENDING = {"policy": "ending", "sampling.stop": "eos", "sampling.max_new_tokens": 10}
RL_CASES: dict[str, dict[str, Any]] = {
    "ppo": {"algorithm": "ppo"},
    "ppo-full": {"algorithm": "ppo", **FULL},
    "abc": {"algorithm": "abc"},
    "abc-full": {"algorithm": "abc", **FULL},
    "abc-adaptive": {"algorithm": "abc", **ADAPTIVE},
    "macro": {"algorithm": "ma-ppo"},
    "abc-macro": {"algorithm": "abc-ma", "segments": "sentences"},
    "grpo": {"algorithm": "grpo", **GROUPS},
    "grpo-once": {"algorithm": "grpo", **GROUPS, "ppo.mini_batch": 8},
    "rloo": {"algorithm": "rloo", **GROUPS},
    "prefix-separate": {"credit": "prefix_difference", "ppo.value_model": "separate"},
    "critic-from-reward": {"algorithm": "ppo", "ppo.value_model": "reward"},
    "eos-bootstrap": {**ENDING, "ppo.truncated": "bootstrap", "algorithm": "ppo"},
    "eos-penalty": {**ENDING, "ppo.truncated": "penalty", "algorithm": "ppo"},
}
REWARD: dict[str, Any] = {
    "excerpts": 48,
    "excerpt_tokens": "[4, 12]",
    "probe_excerpts": 24,
    "batch_size": 8,
    "micro_batch": 3,
    "test_texts": 20,
    "checkpoint_every": 0,
    "lora.rank": 4,
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
}
DIAGNOSE: dict[str, Any] = {
    "count": 8,
    "samples": 4,
    "sampling.max_new_tokens": 6,
    "sampling.batch_size": 16,
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
    "methods": "[sparse, uniform, attention, grpo]",
}


def cases() -> dict[str, dict[str, Any]]:
    """Return every case by name: the stage, its settings, and how it is launched."""
    found: dict[str, dict[str, Any]] = {name: {"stage": "rl", "flags": RL | more} for name, more in RL_CASES.items()}
    found |= {"reward": {"stage": "reward", "flags": REWARD}}
    found |= {"reward-full": {"stage": "reward", "flags": REWARD | {"lora.rank": 0}}}
    found |= {"diagnose": {"stage": "diagnose", "flags": DIAGNOSE}}
    for name in ("ppo", "abc-full", "grpo", "reward"):
        found[f"{name}-two-processes"] = {**found[name], "processes": 2}
    for name in ("abc-full", "reward-full"):
        found[f"{name}-sharded"] = {**found[name], "processes": 2, "environment": FSDP2}
    for name in ("abc", "abc-adaptive", "grpo", "reward-full"):
        changed = found[name]["flags"] | {"checkpoint_every": 1}
        found[f"{name}-killed"] = {**found[name], "flags": changed, "killed": True}
    return found


def make_world(folder: Path) -> None:
    """Write tiny models, prompts and reviews to `folder`, from fixed seeds."""
    import torch

    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import tiny
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    tiny.save_policy(folder / "policy")
    tiny.save_reward(folder / "reward")
    tiny.save_prompts(folder / "prompts.jsonl")
    tiny.save_reviews(folder / "reviews.csv")
    ending: Any = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    ids = torch.randint(3, 400, (16, 8), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        mean = ending(ids, output_hidden_states=True).hidden_states[-1][:, -1].mean(dim=0)
        ending.get_output_embeddings().weight[1].copy_(3.5 * mean / mean.norm())
    ending.save_pretrained(folder / "ending")
    tiny.tokenizer().save_pretrained(folder / "ending")


def words_of(case: dict[str, Any], world: Path, source: Path, output: Path) -> list[str]:
    """Return the words of the command in the tree of `source`."""
    flags = dict(case["flags"])
    if (source / "apportion" / "config.py").exists():
        flags = {OLD_FLAGS.get(name, name): value for name, value in flags.items()}
    if case["stage"] == "reward":
        places: dict[str, Any] = {"model": world / "policy", "data": world / "reviews.csv"}
    else:
        start = world / flags.pop("policy", "policy")
        places = {"policy": start, "reward_model": world / "reward", "prompts": world / "prompts.jsonl"}
    chosen = places | {"output": output} | flags
    words = [case["stage"], *(str(w) for name, value in chosen.items() for w in (f"--{name}", value))]
    launcher = TORCHRUN if case.get("processes") == 2 else []
    return [sys.executable, *launcher, "-m", "apportion", *words]


def run(case: dict[str, Any], world: Path, source: Path, output: Path) -> None:
    """Run one case to its end."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_", "MASTER_"))}
    environment = plain | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= case.get("environment", {})
    words = words_of(case, world, source, output)
    if case.get("killed"):
        kill_after(words, environment, output / "metrics.jsonl", lines=2)
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\nexit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def kill_after(words: list[str], environment: dict[str, str], log: Path, lines: int) -> None:
    """Start the command and kill it once `log` has that many lines."""
    child = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while child.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < lines):
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()


def digest(folder: Path) -> dict[str, Any]:
    """Return what a run left: metrics without measurements, and sums of the rest."""
    found: dict[str, Any] = {}
    if (folder / "metrics.jsonl").exists():
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found["metrics"] = [{renamed(k): v for k, v in row.items() if not k.startswith(MEASURED)} for row in rows]
    for name in ("evaluation.json", "diagnosis.json"):
        if (folder / name).exists():
            found[name] = without_seconds(json.loads((folder / name).read_text()))
    for path in sorted([*folder.glob("rollouts.jsonl"), *folder.glob("final/*.safetensors")]):
        found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def renamed(name: str) -> str:
    """Return the name of today's for a metric of 0.1.0."""
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


def without_seconds(value: Any) -> Any:
    """Return nested values without times and prose, under today's keys."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k != "why" and not k.endswith(("_ms", "seconds", "cost"))}
        return {NEW_FLAGS.get(k, k): without_seconds(v) for k, v in kept.items()}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value


def record(out: Path, source: Path, world: Path, only: list[str]) -> None:
    """Write OUT/NAME.json for every case."""
    out.mkdir(parents=True, exist_ok=True)
    if not world.exists():
        make_world(world)
    for name, case in cases().items():
        if only and name not in only:
            continue
        folder = out / "runs" / name
        shutil.rmtree(folder, ignore_errors=True)
        began = time.perf_counter()
        run(case, world, source, folder)
        (out / f"{name}.json").write_text(json.dumps(digest(folder), indent=1, sort_keys=True) + "\n")
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)


def compare(before: Path, after: Path, added: tuple[str, ...] = ()) -> int:
    """Print what differs between two recordings and return how many cases do.

    Metrics whose names begin with one of `added` may be in the second alone.
    """
    names = sorted({p.name for p in before.glob("*.json")} | {p.name for p in after.glob("*.json")})
    bad = 0
    for name in names:
        one, two = before / name, after / name
        if not (one.exists() and two.exists()):
            print(f"{name[:-5]}: only in {before if one.exists() else after}")
            bad += 1
            continue
        differ = differences(*(without_seconds(json.loads(path.read_text())) for path in (one, two)), added=added)
        print(f"{name[:-5]}: {'the same' if not differ else '; '.join(differ[:6])}")
        bad += bool(differ)
    print(f"{len(names) - bad} of {len(names)} cases are the same to the last digit")
    return bad


def differences(one: Any, two: Any, where: str = "", added: tuple[str, ...] = ()) -> list[str]:
    """Return the places in which two nested values differ; keys that begin with one of `added` may be only in `two`."""
    if isinstance(one, dict) and isinstance(two, dict):
        keys = sorted(one.keys() | two.keys())
        new = {k for k in keys if k not in one and k.startswith(added)} if added else set()
        missing = [f"{where}{k} in one only" for k in keys if (k in one) != (k in two) and k not in new]
        both = [k for k in keys if k in one and k in two]
        return missing + [d for k in both for d in differences(one[k], two[k], f"{where}{k} ", added)]
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        pairs = enumerate(zip(one, two, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{where}{i} ", added)]
    return [] if one == two else [f"{where}{str(one)[:24]} became {str(two)[:24]}"]


def main() -> int:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = parser.add_subparsers(dest="what", required=True)
    one = parts.add_parser("record")
    one.add_argument("out", type=Path)
    one.add_argument("--source", type=Path, default=ROOT / "src", help="the src folder of the tree to run")
    one.add_argument("--world", type=Path, help="tiny models and data, made where there are none; default OUT/world")
    one.add_argument("--only", nargs="*", default=[], help="names of cases")
    two = parts.add_parser("compare")
    two.add_argument("before", type=Path)
    two.add_argument("after", type=Path)
    two.add_argument("--added", nargs="*", default=[], help="beginnings of metrics that AFTER alone may have")
    options = parser.parse_args()
    if options.what == "compare":
        return bool(compare(options.before, options.after, tuple(options.added)))
    world = (options.world or options.out / "world").resolve()
    record(options.out.resolve(), options.source.resolve(), world, options.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
