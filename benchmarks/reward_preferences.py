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
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from apportion.config import RewardConfig
from apportion.data.answers.rankings import read_rankings
from apportion.intervals import clustered_mean, clustered_proportion
from apportion.models.loading import locate, pick_device, pick_dtype
from apportion.models.reward import load_reward
from apportion.models.tokenizers import load_tokenizer
from apportion.stages.reward.evaluation import scored
from apportion.stages.reward.excerpts import RankedExcerpts, right_pad
from apportion.stages.reward.ranked_evaluation import CLOSE, Pair, pairs_of
from apportion.stages.reward.ranked_inputs import Encoder
from apportion.system import cpu

SIDES = ("ours", "trl")
TEXTS = ("prompt", "chosen", "rejected")
Row = Mapping[str, Any]  # prompt, chosen, rejected; "tokens": whole lengths of chosen and rejected


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and judge every fold of every side; print and write accuracies."""
    options = _parser().parse_args(arguments)
    cpu.keep_freed_memory()
    torch.set_num_threads(options.threads)
    rows = short_rows(read_pairs(options.data), options)
    done = json.loads(options.output.read_text()) if options.output.exists() else {}
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
        if name not in done:
            training, test = split(part, fold, options.folds, salt)
            done[name] = judged(side, lr, training, test, options) | {"side": side, "lr": lr, "fold": fold}
            options.output.write_text(json.dumps(done) + "\n")
        if options.tune:
            print(name, shown(summary([pairs_in(done[name])])["accuracy"]), flush=True)
    if not options.tune:
        print_table({side: [one for one in done.values() if one["side"] == side] for side in options.sides})
    return 0


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


def read_pairs(path: str) -> list[Row]:
    """Return the pairs, whole texts."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [{name: row[name] for name in TEXTS} for row in rows]


def short_rows(rows: Sequence[Row], options: argparse.Namespace) -> list[Row]:
    """Return the rows with the last tokens of prompts and the first of answers.

    Pairs that the cut made equal answers, or equal to an earlier pair, go: the reader takes no item twice.
    """
    tokenizer = load_tokenizer("--model", locate("--model", options.model))
    first, last = slice(0, options.answer_tokens), slice(-options.prompt_tokens, None)
    parts = {"prompt": last, "chosen": first, "rejected": first}
    short, seen = list[Row](), set[tuple[str, frozenset[str]]]()
    for row in rows:
        ids = {name: tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in parts}
        cut = {name: str(tokenizer.decode(ids[name][part])) for name, part in parts.items()}
        item = (cut["prompt"], frozenset((cut["chosen"], cut["rejected"])))
        if len(item[1]) == 2 and item not in seen:
            seen.add(item)
            short.append(cut | {"tokens": (len(ids["chosen"]), len(ids["rejected"]))})
    return short


def fold_of(prompt: str, folds: int, salt: str = "") -> int:
    """Return the fold of a prompt, by hash."""
    return int.from_bytes(hashlib.sha256((salt + prompt).encode()).digest()[:8], "big") % folds


def split(rows: Sequence[Row], fold: int, folds: int, salt: str = "") -> tuple[list[Row], list[Row]]:
    """Return the pairs of the other folds, and those of `fold`."""
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        parts[fold_of(row["prompt"], folds, salt) == fold].append(row)
    return parts


# --- training and judging ---------------------------------------------------------------------------------------------


def judged(
    side: str, lr: float, training: Sequence[Row], test: Sequence[Row], options: argparse.Namespace
) -> dict[str, Any]:
    """Train on `training`; return seconds and the pairs of `test`: prompt, score and length differences, length."""
    with tempfile.TemporaryDirectory(prefix="apportion-preferences-") as name:
        folder = Path(name)
        for part, rows in (("train", training), ("test", test)):
            lines = "".join(json.dumps({key: row[key] for key in TEXTS}) + "\n" for row in rows)
            (folder / f"{part}.jsonl").write_text(lines, encoding="utf-8")
        config = reward_config(folder, lr, options)
        tokenizer = load_tokenizer("model", locate("model", options.model))
        units = read_rankings(str(folder / "test.jsonl"), make=Encoder(config, lambda: tokenizer, "test_data"))
        began = perf_counter()
        scores = (ours if side == "ours" else trl)(config, units, folder, tokenizer)
        seconds = perf_counter() - began
    found = at_whole_length(pairs_of(units, scores.split([len(unit.completions) for unit in units])), test)
    return {"seconds": round(seconds, 1), "training": len(training), "pairs": [list(pair) for pair in found]}


def at_whole_length(pairs: Sequence[Pair], rows: Sequence[Row]) -> list[Pair]:
    """Return the pairs, one a row in the rows' order, with the lengths of the whole answers."""
    whole = [row["tokens"] for row in rows]
    return [
        pair._replace(longer=chosen - rejected, length=max(chosen, rejected))
        for pair, (chosen, rejected) in zip(pairs, whole, strict=True)
    ]


def reward_config(folder: Path, lr: float, options: argparse.Namespace) -> RewardConfig:
    """Return the settings of our side, from which TRL's are made."""
    config = RewardConfig(
        model=options.model,
        data=str(folder / "train.jsonl"),
        test_data=str(folder / "test.jsonl"),
        output=str(folder / "run"),
        batch_size=options.batch,
        micro_batch=options.batch,
        checkpoint_every=0,
        seed=options.seed,
        threads=options.threads,
    )
    config.preferences.whole, config.preferences.epochs = True, options.epochs
    config.preferences.max_tokens = options.answer_tokens + 8  # decoding and encoding may add some
    config.optim.lr, config.lora.targets = lr, "all"
    return config


def ours(config: RewardConfig, units: Sequence[RankedExcerpts], folder: Path, tokenizer: Any) -> Tensor:
    """Return the scores (N,) of all answers by a model of `apportion reward`."""
    from apportion.stages.reward.train import train

    train(config)
    reward = load_reward(str(folder / "run" / "final"), dtype=config.dtype, device=config.device, field="model")
    return scored(reward, [one for unit in units for one in unit.completions])


def trl(config: RewardConfig, units: Sequence[RankedExcerpts], folder: Path, tokenizer: Any) -> Tensor:
    """Return the scores (N,) of all answers by a model of TRL's RewardTrainer."""
    import datasets
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig as TRLConfig
    from trl import RewardTrainer

    torch.manual_seed(config.seed)
    dtype = pick_dtype(config.dtype, pick_device(config.device))
    model = AutoModelForSequenceClassification.from_pretrained(locate("model", config.model), num_labels=1, dtype=dtype)
    rows = [json.loads(line) for line in Path(config.data).read_text(encoding="utf-8").splitlines()]
    settings = TRLConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=config.batch_size,
        num_train_epochs=config.preferences.epochs,
        learning_rate=config.optim.lr,
        lr_scheduler_type="linear",
        warmup_steps=config.optim.warmup,
        adam_epsilon=config.optim.eps,
        max_grad_norm=config.optim.max_grad_norm,
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        seed=config.seed,
        disable_tqdm=True,
    )
    adapters = LoraConfig(
        r=config.lora.rank,
        lora_alpha=int(config.lora.alpha),
        target_modules="all-linear",
        modules_to_save=["score"],
        task_type="SEQ_CLS",
    )
    data = datasets.Dataset.from_list(rows)
    trainer = RewardTrainer(
        model=model, args=settings, processing_class=tokenizer, train_dataset=data, peft_config=adapters
    )
    trainer.train()
    return trl_scores(trainer.model, units, tokenizer)


@torch.no_grad()
def trl_scores(model: Any, units: Sequence[RankedExcerpts], tokenizer: Any) -> Tensor:
    """Return the scores (N,) of all answers, each behind its prompt and with an end token, as TRL trains them."""
    model.eval()
    rows = [one for unit in units for one in unit.completions]
    ended = [row._replace(ids=[*row.ids, tokenizer.eos_token_id]) for row in rows]
    out, order = torch.zeros(len(rows)), sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    for first in range(0, len(order), 32):
        chosen = order[first : first + 32]
        ids, mask, _ = right_pad([ended[i] for i in chosen], model.config.get_text_config().pad_token_id)
        out[chosen] = model(input_ids=ids, attention_mask=mask).logits[:, 0].float()
    return out


# --- figures ----------------------------------------------------------------------------------------------------------


def pairs_in(result: Mapping[str, Any]) -> list[Pair]:
    """Return the judged pairs of one model."""
    return [Pair(*pair) for pair in result["pairs"]]


def summary(folds: Sequence[Sequence[Pair]]) -> dict[str, dict[str, float]]:
    """Return accuracy and length_only over all pairs, and over those of nearly one length, clustered by prompt."""
    pairs = _distinct(folds)
    near = [(key, pair) for key, pair in pairs if abs(pair.longer) <= CLOSE * pair.length]
    return {
        "accuracy": _share([(key, pair.right) for key, pair in pairs]),
        "length_only": _share([(key, pair.by_length) for key, pair in pairs]),
        "near": _share([(key, pair.right) for key, pair in near]),
        "near_length_only": _share([(key, pair.by_length) for key, pair in near]),
    }


def difference(folds: Sequence[Sequence[Pair]], others: Sequence[Sequence[Pair]]) -> dict[str, float]:
    """Return the difference of two sides' accuracies on the same pairs, clustered by prompt."""
    sums, counts = dict[tuple[int, int], float](), dict[tuple[int, int], int]()
    for (key, one), (_, other) in zip(_distinct(folds), _distinct(others), strict=True):
        sums[key] = sums.get(key, 0.0) + one.right - other.right
        counts[key] = counts.get(key, 0) + 1
    return dict(clustered_mean(list(sums.values()), list(counts.values())))


def _distinct(folds: Sequence[Sequence[Pair]]) -> list[tuple[tuple[int, int], Pair]]:
    """Return every pair with a key of its prompt over all folds."""
    return [((number, pair.prompt), pair) for number, pairs in enumerate(folds) for pair in pairs]


def _share(hits: Sequence[tuple[tuple[int, int], float]]) -> dict[str, float]:
    right, counts = dict[tuple[int, int], float](), dict[tuple[int, int], int]()
    for key, hit in hits:
        right[key] = right.get(key, 0.0) + hit
        counts[key] = counts.get(key, 0) + 1
    return dict(clustered_proportion(list(right.values()), list(counts.values()))) | {"pairs": len(hits)}


def shown(interval: Mapping[str, float]) -> str:
    """Return an interval as text, in percent."""
    return f"{interval['mean']:.1%} [{interval['low']:.1%}, {interval['high']:.1%}]"


def print_table(sides: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Print what each side reached, length alone, and the paired difference where both have the same folds."""
    folds = {side: [pairs_in(one) for one in sorted(runs, key=lambda one: one["fold"])] for side, runs in sides.items()}
    for side, runs in folds.items():
        found = summary(runs)
        print(
            f"{side:5} {len(runs)} folds, {int(found['accuracy']['pairs'])} pairs: {shown(found['accuracy'])}; "
            f"length alone {shown(found['length_only'])}; within {CLOSE:.0%} of each other's length "
            f"({int(found['near']['pairs'])}): {shown(found['near'])}, "
            f"{sum(one['seconds'] for one in sides[side]):.0f} s"
        )
    if set(folds) == set(SIDES) and len(folds["ours"]) == len(folds["trl"]):
        print(f"ours − trl: {shown(difference(folds['ours'], folds['trl']))}")


if __name__ == "__main__":
    sys.exit(main())
