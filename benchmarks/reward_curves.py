"""Learning curves: reward per batch of our runs and of TRL's PPO, with the same prompts and reward model.

    python -m benchmarks.reward_curves --reward_model runs/demo/reward/final    # 3 seeds, 20 batches, an hour
    python -m benchmarks.reward_curves --reward_model ... --sides default peer --batches 15

Sides: `default` (our defaults: adapters, a value head on the shared trunk), `adapters` (the same at --adapters_lr),
`prefix` (as that, with the credit prefix_difference: GAE then is that of a critic that starts as the reward model),
`full` (all weights, a separate value model, float32 masters and moments), `full16` (the same with optim.moments:
bfloat16), `peer` (TRL 1.12.0's PPO, all weights in float32, its value model initialised from the reward model),
`peer16` (the same with weights in bfloat16), `peer_as_is` (as `peer`, at its own default rate). Each run is a process
of its own, as in `benchmarks.speed`. The other sides' learning rate is --lr, chosen with seeds that are not reported
(--first_seed 100), as is --adapters_lr.

A batch's reward is the mean raw score of its rollouts. A seed gives all sides the same prompts. Intervals are over
seeds: Student's t, 95%. Curves already in --output are not run again: an interrupted benchmark resumes, and sides and
seeds can be added.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from apportion.data.convert import no_progress_bars
from apportion.models.loading import locate
from apportion.models.reward import load_reward
from apportion.models.tokenizers import load_tokenizer
from apportion.system import cpu
from benchmarks.harness.environment import installed
from benchmarks.harness.machine import describe
from benchmarks.harness.settings import PEERS, SpeedConfig, Work, shaped
from benchmarks.harness.workload import write_prompts
from benchmarks.speed import process

OURS = {
    "default": ("default", []),
    "adapters": ("default", []),
    "prefix": ("default", ["algorithm=red"]),
    "full": ("full", []),
    "full16": ("full", ["optim.moments=bfloat16"]),
}
THEIRS = {"peer16": "bfloat16", "peer_as_is": "float32", "peer": "float32"}
SIDES = [*OURS, *THEIRS]
PEER = PEERS["trl-ppo"]
LAST = 5  # batches at the end whose mean is compared
T95 = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
    9: 2.262,
}  # by degrees of freedom


def main() -> int:
    """Run every side with every seed, print the curves and write them."""
    options = parse()
    result = load_output(options)
    with tempfile.TemporaryDirectory(prefix="apportion-curves-") as name:
        work = make_work(options, Path(name))
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for side in options.sides:
                curves = result["curves"].setdefault(side, {})
                if str(seed) not in curves:
                    curves[str(seed)], cost = curve(replace(work, seed=seed), side, options)
                    result["cost"].setdefault(side, {})[str(seed)] = cost
                    write(result, options)
                print(f"{side:10} seed {seed}: " + " ".join(f"{s:+.2f}" for s in curves[str(seed)]), file=sys.stderr)
    result["compared"] = compared(result["curves"], options.against)
    write(result, options)
    print(json.dumps(result) if options.json else table(result))
    return 0


def load_output(options: argparse.Namespace) -> dict[str, Any]:
    """Return the contents of --output, or an empty result; exit where its curves have other settings."""
    rates = {side: rate(side, options) for side in options.sides}
    settings = {name: str(getattr(options, name)) for name in ("model", "prompts", "batches")}
    weights = sorted(Path(locate("--reward_model", options.reward_model)).glob("*.safetensors"))
    settings["reward_model"] = hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()[:16]
    result: dict[str, Any] = {"machine": describe(), "settings": settings, "lr": {}, "curves": {}, "cost": {}}
    if options.output and Path(options.output).is_file():
        result = json.loads(Path(options.output).read_text(encoding="utf-8"))
        other = {k: v for k, v in rates.items() if result["lr"].get(k, v) != v}
        if result["settings"] != settings or other:
            stored = f"{result['settings']} at rates {result['lr']}"
            sys.exit(f"--output: {options.output} holds curves of {stored}. Name another.")
    result["lr"] |= rates
    return result


def write(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Write the result to --output."""
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--reward_model", required=True, help="a trained classifier with 1 or 2 labels: a folder")
    parser.add_argument("--model", default="smollm2", help="the policy's start: a built-in name or a folder")
    parser.add_argument("--prompts", default="imdb")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--against", choices=SIDES, default="peer", help="the side that the others are compared with")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--lr", type=float, default=PEER.lr, help="of the sides that train all weights")
    parser.add_argument("--adapters_lr", type=float, default=1e-3, help="of the sides adapters and prefix")
    parser.add_argument("--threads", type=int, default=cpu.available_cores().count)
    parser.add_argument("--output", help="a JSON file to write")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def make_work(options: argparse.Namespace, folder: Path) -> Work:
    """Write prompts and a reward model of one label, as TRL requires, and return the work of every run."""
    shape = shaped(SpeedConfig(batches=options.batches))
    base = locate("--model", options.model)
    tokenizer = load_tokenizer("--model", base)
    assert shape.batch and shape.prompt_tokens and shape.new_tokens and shape.epochs
    prompts = folder / "prompts.jsonl"
    write_prompts(options.prompts, tokenizer, shape.prompt_tokens, options.batches * shape.batch, prompts)
    return Work(
        role="ours",
        model=base,
        reward=str(one_label(options.reward_model, folder / "reward")),
        prompts=str(prompts),
        folder=str(folder),
        algorithm="ppo",
        lr=options.lr,
        batch=shape.batch,
        samples=1,
        prompt_tokens=shape.prompt_tokens,
        new_tokens=shape.new_tokens,
        epochs=shape.epochs,
        mini_batch=shape.batch,
        micro_batch=shape.batch,
        threads=options.threads,
        device="cpu",
        pad_token=None,
        seed=0,
        warmup=0,
        batches=options.batches,
    )


def one_label(folder: str, target: Path) -> Path:
    """Write the reward model with R = logit(positive) − logit(negative) as its one logit; its statistics beside it."""
    reward = load_reward(folder, dtype="float32", device="cpu")
    model = reward.model
    with torch.no_grad():
        weight = model.score.weight
        if len(weight) == 2:
            weight = weight[reward.positive] - weight[1 - reward.positive]
            model.score.weight = torch.nn.Parameter(weight[None].clone())
            model.score.out_features = model.config.num_labels = 1
    with no_progress_bars():
        model.save_pretrained(target)
    reward.tokenizer.save_pretrained(target)
    (target / "reward.json").write_text(json.dumps({"mean": reward.mean or 0.0, "sd": reward.sd or 1.0}))
    return target


def rate(side: str, options: argparse.Namespace) -> float | None:
    """Return the learning rate of a side; None is our default."""
    adapters = options.adapters_lr
    return {"default": None, "adapters": adapters, "prefix": adapters, "peer_as_is": PEER.lr}.get(side, options.lr)


def curve(work: Work, side: str, options: argparse.Namespace) -> tuple[list[float], dict[str, float]]:
    """Return the mean raw score of each batch of one run, and its cost: median seconds of a batch after the first, and
    peak memory."""
    lr = rate(side, options)
    work = replace(work, lr=PEER.lr if lr is None else lr)
    if side in THEIRS:
        work, python = replace(work, role="peer", precision=THEIRS[side]), installed(PEER)
    else:
        ours, overrides = OURS[side]
        overrides = overrides if ours == "full" or lr is None else [*overrides, f"optim.lr={lr}"]
        work, python = replace(work, ours=ours, overrides=overrides), Path()
    result = process(work, PEER, python, f"{side}-{work.seed}")
    seconds = [batch["total"] for batch in result["batches"]]
    cost = {"batch_s": statistics.median(seconds[1:] or seconds), "peak_mb": max(result["peak"].values())}
    return [batch["score"] for batch in result["batches"]], cost


def compared(curves: dict[str, dict[str, list[float]]], other: str) -> dict[str, Any]:
    """Return, of each side against `other`, the paired difference of the last batches' rewards over seeds, and in how
    many batches its running mean first reached what the other one ended with."""
    ends = {side: {seed: statistics.fmean(run[-LAST:]) for seed, run in runs.items()} for side, runs in curves.items()}
    result: dict[str, Any] = {"against": other, "last_batches": LAST, "end": ends}
    for side in (s for s in curves if s != other and other in curves):
        seeds = [seed for seed in curves[side] if seed in curves[other]]
        differences = [ends[side][seed] - ends[other][seed] for seed in seeds]
        reached = [first(curves[side][seed], ends[other][seed]) for seed in seeds]
        result[side] = {"difference": interval(differences), "batches_to_reach": reached}
    return result


def first(run: list[float], level: float) -> int | None:
    """Return after how many batches the mean of the last few is at least `level`; None if never."""
    means = [statistics.fmean(run[i - LAST : i]) for i in range(LAST, len(run) + 1)]
    return next((i + LAST for i, mean in enumerate(means) if mean >= level), None)


def interval(values: list[float]) -> dict[str, float | None]:
    """Return {mean, low, high}; a single value has no interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    half = T95.get(len(values) - 1, 1.96) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def table(result: dict[str, Any]) -> str:
    """Return the mean curves and the comparison for a reader."""
    curves, comparison = result["curves"], result["compared"]
    lines = ["batch " + "".join(f"{side:>11}" for side in curves)]
    for step in range(int(result["settings"]["batches"])):
        means = (statistics.fmean(run[step] for run in runs.values()) for runs in curves.values())
        lines.append(f"{step + 1:5} " + "".join(f"{mean:>+11.2f}" for mean in means))
    for side, runs in result["cost"].items():
        spent, peak = ([cost[name] for cost in runs.values()] for name in ("batch_s", "peak_mb"))
        span = f"{min(spent):.2f}–{max(spent):.2f} s a batch, at most {max(peak) / 1000:.2f} GB"
        lines.append(f"{side}: {span}, over {len(runs)} runs")
    for side in curves:
        if side in comparison:
            d, reached = comparison[side]["difference"], ", ".join(str(n) for n in comparison[side]["batches_to_reach"])
            span = f"{d['mean']:+.2f} " + ("(one seed)" if d["low"] is None else f"[{d['low']:+.2f}, {d['high']:+.2f}]")
            lines.append(
                f"{side} − {comparison['against']}, last {LAST}: {span}; reached its end after {reached} batches"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
