"""Learning curves: reward, KL and judge per batch of our runs and of TRL's PPO, with the same prompts and reward model.

    python -m benchmarks.reward_curves --reward_model runs/demo/reward/final    # 3 seeds, 20 batches, an hour
    python -m benchmarks.reward_curves --reward_model ... --sides default peer --batches 15
    python -m benchmarks.reward_curves --reward_model ... --sides fast peer --against peer \
        --variant fast algorithm=red optim.lr=2e-3 --variant peer lr=1e-4

Sides: `default` (our defaults), `adapters` (the same at --adapters_lr), `prefix` (as that, with the credit
prefix_difference: GAE then is that of a critic that starts as the reward model), `full` (all weights, a separate value
model, float32 masters and moments), `full16` (the same with optim.moments: bfloat16), `peer` (TRL 1.12.0's PPO, all
weights in float32, its value model initialised from the reward model), `peer16` (the same with weights in bfloat16),
`peer_as_is` (as `peer`, at its own default rate), and each --variant: a name and settings of `apportion rl` over our
defaults, or, where the name begins with "peer", `lr` and `precision` of TRL's. Each run is a process of its own, as in
`benchmarks.speed`. The other sides' learning rate is --lr, chosen with seeds that are not reported (--first_seed 100),
as is --adapters_lr.

A batch's reward is the mean raw score of its rollouts, its KL the mean over them of log π − log π_ref in nats a
response, its judge the mean probability of good sentiment by word counts (`stages.evaluate.judge`), which has no part
in training. A seed gives all sides the same prompts. Intervals are over seeds: Student's t, 95%. `judge_at_kl` compares
the judge where both sides have the same KL: at the largest that both reached, by running means of 5 batches. Curves
already in --output are not run again: an interrupted benchmark resumes, and sides and seeds can be added.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from apportion.data.convert import no_progress_bars
from apportion.models.loading import locate
from apportion.models.reward import load_reward
from apportion.models.tokenizers import load_tokenizer
from apportion.stages.evaluate.judge import Judge, fit_judge
from apportion.system import cpu
from benchmarks.harness.environment import installed
from benchmarks.harness.machine import describe
from benchmarks.harness.settings import PEERS, SpeedConfig, Work, shaped
from benchmarks.harness.workload import write_prompts
from benchmarks.speed import process


class Side(NamedTuple):
    """One side: "default", "full" or "peer", its settings, and which of the rates that flags set is its own."""

    kind: str
    settings: tuple[str, ...] = ()
    rate: str | None = None


SIDES = {
    "default": Side("default"),
    "adapters": Side("default", (), "adapters_lr"),
    "prefix": Side("default", ("algorithm=red",), "adapters_lr"),
    "full": Side("full", (), "lr"),
    "full16": Side("full", ("optim.moments=bfloat16",), "lr"),
    "peer16": Side("peer", ("precision=bfloat16",), "lr"),
    "peer_as_is": Side("peer"),
    "peer": Side("peer", (), "lr"),
}
PEER = PEERS["trl-ppo"]
RECORDED = ("curves", "kl", "judge", "cost")
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
    sides = chosen_sides(options)
    result = load_output(options, sides)
    with tempfile.TemporaryDirectory(prefix="apportion-curves-") as name:
        work = make_work(options, Path(name))
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for name, side in sides.items():
                run = {key: result[key].setdefault(name, {}) for key in RECORDED}
                if str(seed) not in run["curves"]:
                    found = curve(replace(work, seed=seed), name, side, options)
                    result = load_output(options, sides)  # another process may have added to it
                    for key in RECORDED:
                        result[key].setdefault(name, {})[str(seed)] = found[key]
                    write(result, options)
                shown = " ".join(f"{score:+.2f}" for score in result["curves"][name][str(seed)])
                print(f"{name:10} seed {seed}: {shown}", file=sys.stderr, flush=True)
    result["compared"] = compared(result, options.against)
    write(result, options)
    print(json.dumps(result) if options.json else table(result))
    return 0


def chosen_sides(options: argparse.Namespace) -> dict[str, Side]:
    """Return the sides to run; exit for a name that is none, or settings that TRL's side has not."""
    known = dict(SIDES)
    for name, *settings in options.variant:
        theirs = name.startswith("peer")
        known[name] = Side("peer" if theirs else "default", tuple(settings))
        keys = [text.partition("=")[0] for text in settings]
        if any("=" not in text for text in settings) or (theirs and not {*keys} <= {"lr", "precision"}):
            allowed = "lr=… and precision=…" if theirs else "settings of apportion rl, as optim.lr=1e-3"
            sys.exit(f"--variant {name}: {settings}; expected {allowed}.")
    unknown = [name for name in [*options.sides, options.against] if name not in known]
    if unknown:
        sys.exit(f"--sides: {unknown[0]}; expected one of {', '.join(known)}, or a --variant.")
    return {name: known[name] for name in options.sides}


def load_output(options: argparse.Namespace, sides: Mapping[str, Side]) -> dict[str, Any]:
    """Return the contents of --output, or an empty result; exit where its curves have other settings."""
    own = {name: settings_of(side, options) for name, side in sides.items()}
    settings = {name: str(getattr(options, name)) for name in ("model", "prompts", "batches")}
    weights = sorted(Path(locate("--reward_model", options.reward_model)).glob("*.safetensors"))
    settings["reward_model"] = hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()[:16]
    result: dict[str, Any] = {"machine": describe(), "settings": settings, "sides": {}, **{key: {} for key in RECORDED}}
    if options.output and Path(options.output).is_file():
        result = json.loads(Path(options.output).read_text(encoding="utf-8"))
        other = {name: one for name, one in own.items() if result["sides"].get(name, one) != one}
        if result["settings"] != settings or other:
            stored = f"{result['settings']} with sides {result['sides']}"
            sys.exit(f"--output: {options.output} holds curves of {stored}. Name another.")
    result["sides"] |= own
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
    parser.add_argument("--sides", nargs="+", default=list(SIDES), help="names of the list above, or of variants")
    parser.add_argument("--variant", nargs="+", action="append", default=[], help="a name, then setting=value …")
    parser.add_argument("--against", default="peer", help="the side that the others are compared with")
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


def settings_of(side: Side, options: argparse.Namespace) -> list[str]:
    """Return the settings of a side, with the rate that a flag gives it."""
    rate = [] if side.rate is None else [f"{'lr' if side.kind == 'peer' else 'optim.lr'}={getattr(options, side.rate)}"]
    return [side.kind, *side.settings, *rate]


def curve(work: Work, name: str, side: Side, options: argparse.Namespace) -> dict[str, Any]:
    """Return {curves, kl, judge: of each batch of one run; cost: median seconds of a batch after the first, and peak
    memory}."""
    kind, *settings = settings_of(side, options)
    work = replace(work, responses=True)
    if kind == "peer":
        given = dict(text.split("=", 1) for text in settings)
        rate = float(given.get("lr", PEER.lr))
        work = replace(work, role="peer", precision=given.get("precision", "float32"), lr=rate)
        python = installed(PEER)
    else:
        work, python = replace(work, ours=kind, overrides=settings), Path()
    result = process(work, PEER, python, f"{name}-{work.seed}")
    seconds = [batch["total"] for batch in result["batches"]]
    texts = load_tokenizer("--model", work.model).batch_decode
    return {
        "curves": [batch["score"] for batch in result["batches"]],
        "kl": result["kl"],
        "judge": [float(judge().probability(texts(batch["responses"])).mean()) for batch in result["batches"]],
        "cost": {"batch_s": statistics.median(seconds[1:] or seconds), "peak_mb": max(result["peak"].values())},
    }


@cache
def judge() -> Judge:
    """Return the judge of responses, fitted to texts that no reward model of ours was trained on."""
    return fit_judge("imdb")


def compared(result: dict[str, Any], other: str) -> dict[str, Any]:
    """Return, of each side against `other`, the paired differences over seeds of the last batches' rewards and of the
    judge at the same KL, and in how many batches its running mean first reached what the other one ended with."""
    curves = result["curves"]
    ends = {side: {seed: statistics.fmean(run[-LAST:]) for seed, run in runs.items()} for side, runs in curves.items()}
    found: dict[str, Any] = {"against": other, "last_batches": LAST, "end": ends}
    for side in (s for s in curves if s != other and other in curves):
        seeds = [seed for seed in curves[side] if seed in curves[other]]
        if not seeds:
            continue
        differences = [ends[side][seed] - ends[other][seed] for seed in seeds]
        reached = [first(curves[side][seed], ends[other][seed]) for seed in seeds]
        found[side] = {"difference": interval(differences), "batches_to_reach": reached}
        measures = [[[result[key][s][seed] for s in (side, other)] for key in ("kl", "judge")] for seed in seeds]
        levels = [judge_at_kl(*pair) for pair in measures]
        found[side] |= {"judge_at_kl": interval([a - b for _, a, b in levels]), "kl": [kl for kl, _, _ in levels]}
    return found


def judge_at_kl(kl: Sequence[Sequence[float]], judged: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Return (KL, the judge of one run, of the other) at the largest KL that both reached, by running means."""
    paths = [[running(run) for run in pair] for pair in zip(kl, judged, strict=True)]
    level = min(max(path[0]) for path in paths)
    values = []
    for ups, marks in paths:
        i = next(i for i, value in enumerate(ups) if value >= level)
        part = 0.0 if i == 0 else (ups[i] - level) / (ups[i] - ups[i - 1])
        values.append(marks[i] + part * (marks[max(i - 1, 0)] - marks[i]))
    return level, values[0], values[1]


def running(run: Sequence[float]) -> list[float]:
    """Return the means of the last few batches, from the first that has so many before it."""
    return [statistics.fmean(run[i - LAST : i]) for i in range(min(LAST, len(run)), len(run) + 1)]


def first(run: list[float], level: float) -> int | None:
    """Return after how many batches the mean of the last few is at least `level`; None if never."""
    return next((i + LAST for i, mean in enumerate(running(run)) if mean >= level), None)


def interval(values: list[float]) -> dict[str, float | None]:
    """Return {mean, low, high}; a single value has no interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    half = T95.get(len(values) - 1, 1.96) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def shown(found: Mapping[str, float | None], digits: int = 2) -> str:
    """Return a mean and its interval as text."""
    mean, low, high = (None if found[key] is None else f"{found[key]:+.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} (one seed)" if low is None else f"{mean} [{low}, {high}]"


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
        end = statistics.fmean(comparison["end"][side].values())
        last = [
            statistics.fmean(statistics.fmean(run[-LAST:]) for run in result[k][side].values()) for k in ("kl", "judge")
        ]
        line = f"{side}: last {LAST} reward {end:+.2f}, KL {last[0]:.1f}, judge {last[1]:.3f}; {span}, {len(runs)} runs"
        lines.append(line)
    for side in curves:
        if side in comparison:
            own, other = comparison[side], comparison["against"]
            reached = ", ".join(str(n) for n in own["batches_to_reach"])
            lines.append(f"{side} − {other}, last {LAST}: {shown(own['difference'])}; its end after {reached} batches")
            lines.append(f"{side} − {other}, judge at the same KL: {shown(own['judge_at_kl'], 3)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
