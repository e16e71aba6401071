"""Accuracy of a reward model and of word counts on the same excerpts of held-out reviews.

    python -m benchmarks.reward_accuracy --model runs/demo/reward/final

The word counts are TF-IDF with logistic regression on the judge's reviews, on which the reward model was not
trained. The excerpts come from split reward_test, on which neither was trained. Prints accuracies with 95% intervals
and the paired difference.
"""

from __future__ import annotations

import argparse
import sys

import torch

from apportion.data import labelled
from apportion.intervals import mean_interval, proportion
from apportion.models.reward import load_reward
from apportion.stages.evaluate.judge import fit_judge, word_excerpts
from apportion.stages.reward.evaluation import scored
from apportion.stages.reward.excerpts import Excerpt

WORDS = (20, 30, 60)


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="runs/demo/reward/final", help="a reward model")
    parser.add_argument("--texts", type=int, default=1000, help="held-out reviews")
    options = parser.parse_args()
    rows = labelled("imdb", "reward_test")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: options.texts].tolist()
    texts, labels = [rows[i].text for i in order], [rows[i].label for i in order]
    reward, judge = load_reward(options.model, dtype="auto"), fit_judge()
    sys.stdout.write("words  reward model          TF-IDF                difference\n")
    for words in WORDS:
        excerpts = word_excerpts(texts, words, words, seed=words)
        ids = reward.tokenizer(excerpts, add_special_tokens=False)["input_ids"]
        ours = ((scored(reward, [Excerpt(row, 0) for row in ids]) > 0).long() == torch.tensor(labels)).tolist()
        theirs = [(p > 0.5) == bool(y) for p, y in zip(judge.probability(excerpts), labels, strict=True)]
        paired = mean_interval([float(a) - float(b) for a, b in zip(ours, theirs, strict=True)])
        shown = [proportion(sum(hits), len(hits)) for hits in (ours, theirs)] + [paired]
        cells = [f"{v['mean']:.3f} [{v['low']:+.3f}, {v['high']:+.3f}]" for v in shown]
        sys.stdout.write(f"{words:>5}  " + "  ".join(cells) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
