"""LoRA against training of all weights: a reward model's accuracy on IMDb pairs, trained bytes and peak memory.

    python -m benchmarks.lora_or_full                                   # 2,500 pairs, six runs
    python -m benchmarks.lora_or_full --tune --output tune.json         # rates, on pairs that are not the test's

Two models of `apportion reward` learn the same pairs of equally long beginnings of a positive and a negative review,
and judge the same others (PE-RLHF, Sidahmed et al. 2024, arXiv 2403.10704, compare both ways on preferences). Then four
runs of `apportion rl`, two steps each, with adapters and with all weights, with a critic on the policy's trunk and with
one of its own. Each run is a process of its own. Test pairs come from reviews of the part `judge`, training pairs from
`reward_train`, and those of --tune from the rest of it. Parts in --output are not run again.

Exit code 1 where the accuracies differ by 2 points or more, in either direction: a rate that does not suit one side is
no comparison.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apportion.data import labelled
from apportion.errors import ApportionError
from apportion.models.loading import locate
from apportion.models.tokenizers import load_tokenizer
from apportion.system import cpu
from benchmarks.harness.machine import describe
from benchmarks.harness.stored import load_parts, named, run_module, save_parts
from benchmarks.lora_or_full.figures import SIDES, accuracy, compared, rows_of, shown, table
from benchmarks.lora_or_full.pairs import make_pairs

RANK = {"LoRA": (), "full": ("--lora.rank", "0")}
# by all parts of a file; a rate is that of its side
SHARED = ("model", "data", "prompts", "pairs", "test", "tokens", "batch", "epochs", "lr", "full_lr", "rl", "seed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing in --output, print accuracies and the table; 1 where the accuracies are too far apart."""
    options = _parser().parse_args(arguments)
    try:
        return tune(options) if options.tune else measure(options)
    except ApportionError as error:
        print(error, file=sys.stderr)
        return 2


def measure(options: argparse.Namespace) -> int:
    """Run the six parts and print what they give."""
    settings = settings_of(options)
    done = load_parts(options.output, settings)
    train, test = write_pairs(options, "test")
    for side in SIDES:
        lr = options.lr if side == "LoRA" else options.full_lr
        flags = reward_flags(options, side, lr, train, test)
        run(options, settings, done, f"reward {side}", "reward", flags, test)
    for critic in ("shared", "separate"):
        for side in SIDES:
            run(options, settings, done, f"{critic} {side}", "rl", rl_flags(options, side, critic), None)
    found = compared(*(done[f"reward {side}"]["right"] for side in SIDES))
    rows = rows_of(done)
    save_parts(options.output, settings, done, compared=found, table=rows, machine=describe())
    print(f"{found['pairs']} test pairs: LoRA {shown(found['LoRA'])}, full {shown(found['full'])}")
    verdict = "under 2 points" if found["passed"] else "not under 2 points"
    print(f"LoRA − full, paired: {shown(found['difference'], '+')}: {verdict}\n\n{table(rows)}")
    return 0 if found["passed"] else 1


def tune(options: argparse.Namespace) -> int:
    """Compare rates of both sides on pairs that neither side of the comparison is trained or tested on."""
    settings = settings_of(options, skip=("lr", "full_lr")) | {"tune": True}
    done = load_parts(options.output, settings)
    train, test = write_pairs(options, "validation")
    for side, rates in (("LoRA", options.lrs), ("full", options.full_lrs)):
        for lr in rates:
            name = f"reward {side} {lr:g}"
            run(options, settings, done, name, "reward", reward_flags(options, side, lr, train, test), test)
            print(f"{side} {lr:g}: {shown(accuracy(done[name]['right']))}", flush=True)
    return 0


def settings_of(options: argparse.Namespace, skip: Sequence[str] = ()) -> dict[str, Any]:
    """Return what all parts of a file have in common; of files of texts, a digest."""
    settings = {name: getattr(options, name) for name in SHARED if name not in skip}
    return settings | {name: named(settings[name]) for name in ("data", "prompts")}


def write_pairs(options: argparse.Namespace, kind: str) -> tuple[Path, Path]:
    """Write the pairs to train on and those of `kind`, "test" or "validation", and return both files."""
    tokenizer, tokens = load_tokenizer("--model", locate("--model", options.model)), tuple(options.tokens)
    count = options.pairs + (options.test if kind == "validation" else 0)
    rows = make_pairs(labelled(options.data, "reward_train"), tokenizer, count, tokens, options.seed)
    training, held_out = rows[: options.pairs], rows[options.pairs :]
    if kind == "test":
        held_out = make_pairs(labelled(options.data, "judge"), tokenizer, options.test, tokens, options.seed)
    options.folder.mkdir(parents=True, exist_ok=True)
    files = options.folder / "train.jsonl", options.folder / f"{kind}.jsonl"
    for path, pairs in zip(files, (training, held_out), strict=True):
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return files


def reward_flags(options: argparse.Namespace, side: str, lr: float, train: Path, test: Path) -> list[object]:
    """Return the flags of `apportion reward`."""
    flags = ["--model", options.model, "--data", train, "--test_data", test, "--optim.lr", lr, "--seed", options.seed]
    flags += ["--batch_size", options.batch, "--micro_batch", options.batch, "--checkpoint_every", 0]
    flags += ["--preferences.whole", "true", "--preferences.epochs", options.epochs, "--lora.targets", "all"]
    # the stage's own evaluation, of which nothing is used
    return [*flags, "--test_texts", min(100, options.test), "--threads", options.threads, *RANK[side]]


def rl_flags(options: argparse.Namespace, side: str, critic: str) -> list[object]:
    """Return the flags of `apportion rl`: two steps against the reward model that the first part trained."""
    reward = options.folder / "reward-LoRA" / "final"
    flags = ["--policy", options.model, "--reward_model", reward, "--prompts", options.prompts, "--steps", 2]
    flags += ["--checkpoint_every", 0, "--log_rollouts", 0, "--ppo.value_model", critic, "--seed", options.seed]
    more = [word for text in options.rl for word in (f"--{text.partition('=')[0]}", text.partition("=")[2])]
    return [*flags, "--threads", options.threads, *RANK[side], *more]


def run(
    options: argparse.Namespace,
    settings: dict[str, Any],
    done: dict[str, Any],
    name: str,
    stage: str,
    flags: Sequence[object],
    test: Path | None,
) -> None:
    """Run one part in a process of its own and add its result to `done` and to --output, unless it is there."""
    if name in done:
        return
    print(f"{name} …", file=sys.stderr, flush=True)
    folder = options.folder / name.replace(" ", "-")
    result = options.folder / f"{folder.name}.json"
    words = [stage, result, test or "-", "--output", folder, *flags]
    log = options.folder / f"{folder.name}.log"
    run_module("benchmarks.lora_or_full.process", *words, threads=options.threads, log=log)
    done[name] = json.loads(result.read_text(encoding="utf-8"))
    save_parts(options.output, settings, done)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="reward model, policy and critic start as it")
    parser.add_argument("--data", default="imdb", help="`imdb`, or a file of labelled texts")
    parser.add_argument("--prompts", default="imdb", help="of the runs of apportion rl")
    parser.add_argument("--pairs", type=int, default=2500, help="pairs to train on")
    parser.add_argument("--test", type=int, default=1000, help="pairs to judge")
    parser.add_argument("--tokens", nargs=2, type=int, default=[16, 64], help="shortest and longest text")
    parser.add_argument("--batch", type=int, default=16, help="pairs an optimizer step")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=3e-4, help="of LoRA")
    parser.add_argument("--full_lr", type=float, default=3e-5, help="of all weights")
    parser.add_argument("--tune", action="store_true", help="compare the rates of --lrs and --full_lrs instead")
    parser.add_argument("--lrs", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--full_lrs", nargs="+", type=float, default=[1e-5, 3e-5, 1e-4])
    parser.add_argument("--rl", nargs="+", default=[], help="more settings of apportion rl, as sampling.batch_size=8")
    parser.add_argument("--threads", type=int, default=cpu.available_cores().count)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/lora_or_full"), help="pairs and run folders")
    parser.add_argument("--output", type=Path, default=Path("lora-or-full.json"), help="results, one object a part")
    return parser


if __name__ == "__main__":
    sys.exit(main())
