"""Evaluation of a reward model on held-out texts: accuracy, calibration, and the mean and deviation of its score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apportion.config import RewardConfig
from apportion.data import Labelled
from apportion.errors import ScoreError
from apportion.evidence.prefix import capture_head_outputs, scores_tokens
from apportion.intervals import calibration, mean_interval, proportion
from apportion.masking import check_finite
from apportion.models.reward import RewardModel, load_reward
from apportion.models.reward.reading import own_pad
from apportion.models.text.bos import added_bos, special_around
from apportion.models.text.labelled import token_rows
from apportion.stages.reward.excerpts import Excerpt, TokenRows, first_tokens, flat, random_cuts, right_pad
from apportion.stages.reward.losses import both_orders, decisions
from apportion.system.progress import counted

LENGTHS = (10, 20, 40, 80)  # tokens of the held-out excerpts that accuracy is also reported for
BY_LENGTH = 500  # texts or pairs for each of them


def evaluate(folder: Path, rows: Sequence[Labelled], config: RewardConfig) -> dict[str, Any]:
    """Return accuracy with its interval, by excerpt length too, calibration, and mean and sd of R, on held-out texts.

    Of preference pairs, accuracy is how often the chosen excerpt has the higher R, and calibration that of the
    probability of it; mean and sd are those of R on the texts of both kinds.
    """
    loading: dict[str, Any] = {"dtype": config.dtype, "device": config.device, "fast_kernels": config.fast_kernels}
    reward = load_reward(str(folder), **loading, field="model")
    tokens = token_ids(rows, reward.tokenizer, config)
    count = len(rows) // 2 if tokens.paired else len(rows)
    excerpts = random_cuts(tokens, count, config.excerpt_tokens, config.seed + 1)
    scores = scored(reward, flat(excerpts))
    margins, truth = decisions(scores, excerpts)
    doubled, classes = both_orders(margins, truth, tokens.paired)
    bins, error = calibration(torch.sigmoid(doubled).tolist(), classes)
    starts = {n: first_tokens(tokens, BY_LENGTH, n) for n in LENGTHS if n <= config.excerpt_tokens[1]}
    found = start_scores(reward, {length: flat(cut) for length, cut in starts.items()})
    by_length = {str(length): accuracy(*decisions(found[length], cut)) for length, cut in starts.items()}
    return {
        "accuracy": accuracy(margins, truth),
        "by_length": by_length,
        "calibration": bins,
        "ece": error,
        "score_mean": float(scores.mean()),
        "score_sd": float(scores.std(unbiased=False)),
        "score_interval": mean_interval(scores.tolist()),
        "texts": len(rows),
        "excerpt_tokens": list(config.excerpt_tokens),
    } | ({"pairs": count} if tokens.paired else {})


def start_scores(reward: RewardModel, starts: Mapping[int, Sequence[Excerpt]]) -> dict[int, Tensor]:
    """Return {length: R (N,) float32} of the starts of N texts, {length: the starts}.

    A decoder scores a text's shorter starts on the way to its longest one, in one forward.
    """
    if not starts:
        return {}
    longest, pad = starts[max(starts)], own_pad(reward.model)
    pairs = [pair for cut in starts.values() for pair in zip(longest, cut, strict=True)]
    nested = all(long.ids[: len(short.ids)] == short.ids for long, short in pairs)  # no special tokens behind them
    ids, mask, _ = right_pad(longest, reward.model.config.get_text_config().pad_token_id)
    padded = pad is not None and bool(((ids == pad) & mask).any())  # a score is then read before it
    if not nested or padded or not scores_tokens(reward, ids, mask):
        return {length: scored(reward, cut) for length, cut in starts.items()}
    ends = torch.tensor([[len(one.ids) for one in cut] for cut in starts.values()]).T  # (N, lengths)
    return dict(zip(starts, scored(reward, longest, ends).unbind(dim=1), strict=True))


def scored(
    reward: RewardModel, excerpts: Sequence[Excerpt], ends: Tensor | None = None, batch_size: int = 32
) -> Tensor:
    """Return R (N,) float32 of the excerpts, on the CPU, computed in batches of like length.

    Args:
        ends: (N,E) int64: return R (N,E) after so many of each excerpt's ids; for a model that scores every prefix.

    Raises:
        ScoreError: a score is not finite.
    """
    out = torch.zeros(len(excerpts) if ends is None else ends.shape)
    order = sorted(range(len(excerpts)), key=lambda i: len(excerpts[i].ids))
    device = next(reward.model.parameters()).device
    starts = range(0, len(order), batch_size)
    for first in counted(starts, "held-out texts", len(starts), unit="batch"):
        chosen = order[first : first + batch_size]
        ids, mask, _ = right_pad([excerpts[i] for i in chosen], reward.model.config.get_text_config().pad_token_id)
        with capture_head_outputs(reward.model, ends is not None) as captured:
            scores = reward.score(ids.to(device), mask.to(device))[0].cpu()
        if ends is not None:
            scores = reward.unchecked_scores(captured[-1]).cpu().gather(1, ends[chosen] - 1)
            check_finite("score of a text's start", scores, "Check the model's weights and dtype.", error=ScoreError)
        out[chosen] = scores
    return out


def accuracy(scores: Tensor, labels: Sequence[int]) -> dict[str, float]:
    """Return {mean, low, high} of how often R > 0 says the label."""
    hits = int(((scores > 0).long() == torch.tensor(labels)).sum())
    return proportion(hits, len(labels))


def token_ids(rows: Sequence[Labelled], tokenizer: Any, config: RewardConfig, longest: int | None = None) -> TokenRows:
    """Return the ids of each row's text as far as an excerpt needs them, without a BOS that every excerpt gets.

    Args:
        longest: tokens of an excerpt behind its prompt; None is `excerpt_tokens`'s.
    """
    ids, prompts = token_rows(rows, tokenizer, config.excerpt_tokens[1] if longest is None else longest)
    around, bos = special_around(tokenizer), added_bos(tokenizer)
    special = [([], []) if row.rendered else around for row in rows]
    for i, row in enumerate(rows):
        if bos and not row.rendered and ids[i][:1] == [tokenizer.bos_token_id]:
            ids[i], prompts[i] = ids[i][1:], max(0, prompts[i] - 1)
    return TokenRows(ids, [row.label for row in rows], prompts, special, bool(rows) and rows[0].paired)
