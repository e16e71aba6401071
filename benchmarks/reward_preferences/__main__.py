"""Accuracy of reward models on people's preferences, beside length alone and TRL's RewardTrainer on the same pairs.

    python -m benchmarks.reward_preferences --data oasst_pairs.jsonl --output preferences.json
    python -m benchmarks.reward_preferences --data oasst_pairs.jsonl --tune --sides ours trl --lrs 1e-4 3e-4 1e-3

Cross-validation by prompt: each fold's pairs are judged by models that were trained on the other folds' pairs, ours by
`apportion reward`, TRL's by its RewardTrainer with the same adapters, batches, epochs and rate schedule. Prompts keep
their last and answers their first tokens, cut before either side reads them; lengths are those of whole answers, so
that answers that are equally long only through the cut do not count as alike. `--tune` compares rates on a fifth of
the first fold's training prompts, which are no test prompts of that fold. Folds that are in --output are not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from apportion.errors import ConfigError
from apportion.system import cpu
from benchmarks.reward_preferences.figures import pairs_in, print_table, shown, summary
from benchmarks.reward_preferences.pairs import fold_of, read_pairs, short_rows, split
from benchmarks.reward_preferences.sides import SIDES, judged

SHARED = ("model", "folds", "epochs", "batch", "prompt_tokens", "answer_tokens", "seed")  # by all models of a file


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and judge every fold of every side; print and write accuracies."""
    options = _parser().parse_args(arguments)
    cpu.keep_freed_memory()
    torch.set_num_threads(options.threads)
    rows = short_rows(read_pairs(options.data), options)
    done = earlier(options)
    if options.tune:
        inner = [row for row in rows if fold_of(row["prompt"], options.folds) != 0]
        jobs = [(f"{side} {lr:g}", side, lr, 0, inner, "inner") for side in options.sides for lr in options.lrs]
    else:
        rates = {"ours": options.lr, "trl": options.trl_lr}
        jobs = [
            (f"{side} fold {k}", side, rates[side], k, rows, "")
            for k in range(options.folds)
            if k in options.only
            for side in options.sides
        ]
    for name, side, lr, fold, part, salt in jobs:
        if name in done and done[name]["lr"] != lr:
            fix = f"Give that rate again, or another --output than {options.output}."
            raise ConfigError("--lr" if side == "ours" else "--trl_lr", lr, f"{done[name]['lr']:g}, as {name} has", fix)
        if name not in done:
            training, test = split(part, fold, options.folds, salt)
            done[name] = judged(side, lr, training, test, options) | {"side": side, "lr": lr, "fold": fold}
            options.output.write_text(json.dumps({"settings": settings(options), "models": done}) + "\n")
        if options.tune:
            print(name, shown(summary([pairs_in(done[name])])["accuracy"]), flush=True)
    if not options.tune:
        print_table({side: [one for one in done.values() if one["side"] == side] for side in options.sides})
    return 0


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what every model in one file of results has in common."""
    digest = hashlib.sha256(Path(options.data).read_bytes()).hexdigest()
    return {name: getattr(options, name) for name in SHARED} | {"data": digest}


def earlier(options: argparse.Namespace) -> dict[str, Any]:
    """Return the models in --output; raise ConfigError where they were trained on other data or with other settings."""
    if not options.output.exists():
        return {}
    found, now = json.loads(options.output.read_text()), settings(options)
    for name, value in now.items():
        if found["settings"][name] != value:
            fix = f"Give that again, or another --output than {options.output}."
            raise ConfigError(f"--{name}", value, f"{found['settings'][name]}, as the models there have", fix)
    return dict(found["models"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="JSON lines with prompt, chosen and rejected, all strings")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--only", nargs="+", type=int, default=list(range(99)), help="folds to run now")
    parser.add_argument("--lr", type=float, default=3e-4, help="our rate")
    parser.add_argument("--trl_lr", type=float, default=3e-4, help="TRL's rate")
    parser.add_argument("--lrs", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3], help="rates to compare by --tune")
    parser.add_argument("--tune", action="store_true", help="compare rates inside the first fold's training prompts")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16, help="pairs an optimizer step")
    parser.add_argument("--prompt_tokens", type=int, default=64, help="last tokens of a prompt that are kept")
    parser.add_argument("--answer_tokens", type=int, default=128, help="first tokens of an answer that are kept")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("preferences.json"), help="results, one object a model")
    return parser


if __name__ == "__main__":
    sys.exit(main())
