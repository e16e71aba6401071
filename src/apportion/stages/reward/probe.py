"""The head's start: logistic regression on the frozen base, so that training begins from a sane score.

A random head is mostly noise to begin with, and small adapters spend their first hundreds of steps on it.
Linear probing before fine-tuning: Kumar et al. 2022 (arXiv 2202.10054).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apportion.stages.reward.excerpts import Excerpt, ExcerptPair, RankedExcerpts, flat, right_pad
from apportion.stages.reward.ranked import pair_rows
from apportion.system.progress import counted

PENALTY = 1e-3  # scikit-learn's C on standardised features: strong, features outnumber what short excerpts can tell
BATCH = 32


def probe_head(
    model: Any, head: Any, excerpts: Sequence[Excerpt | ExcerptPair] | Sequence[RankedExcerpts], pad: int
) -> float:
    """Set the `head` of classifier `model` to the weights w of a logistic regression on the features of `excerpts`.

    A head of 2 rows becomes ±w/2, one of 1 row w. Of pairs, and of all pairs of rankings, the features are the
    differences winner − loser (label 1) and their negatives (label 0): the regression is then the Bradley–Terry model
    of the frozen base.

    Returns:
        The share of `excerpts` that the probe itself judges right.
    """
    from sklearn.linear_model import LogisticRegression

    singles = flat(excerpts)
    features = pooled_features(model, head, singles, pad).numpy()
    labels = np.array([excerpt.label for excerpt in singles])
    if excerpts and isinstance(excerpts[0], ExcerptPair):
        half = features[: len(excerpts)] - features[len(excerpts) :]
        features = np.concatenate([half, -half])
    elif excerpts and isinstance(excerpts[0], RankedExcerpts):
        winners, losers = pair_rows([one for one in excerpts if isinstance(one, RankedExcerpts)])
        half = features[winners] - features[losers]
        features, labels = np.concatenate([half, -half]), np.repeat([1, 0], len(half))
    if len(set(labels.tolist())) < 2:
        return 0.0
    scale = features.std(axis=0) + 1e-6
    # no intercept: the heads of decoders have no bias to put it in
    probe = LogisticRegression(C=PENALTY, max_iter=500, fit_intercept=False).fit(features / scale, labels)
    weight = torch.tensor(probe.coef_[0] / scale, dtype=head.weight.dtype, device=head.weight.device)
    with torch.no_grad():
        head.weight.copy_(torch.stack([-weight / 2, weight / 2]) if len(head.weight) == 2 else weight[None])
        if head.bias is not None:
            head.bias.zero_()
    return float(probe.score(features / scale, labels))


def probe_count(excerpts: Sequence[Excerpt | ExcerptPair] | Sequence[RankedExcerpts], most: int) -> int:
    """Return how many of the first `excerpts` to probe: `most`, or the rankings with about so many completions."""
    if not isinstance(excerpts[0], RankedExcerpts):
        return most
    totals = accumulate(len(one.completions) for one in excerpts if isinstance(one, RankedExcerpts))
    return 1 + sum(total < most for total in totals)


@torch.no_grad()
def pooled_features(model: Any, head: Any, excerpts: Sequence[Excerpt], pad: int) -> Tensor:
    """Return what the head reads of each clip, (N,d) float32, in batches of like length."""
    caught: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    order = sorted(range(len(excerpts)), key=lambda i: len(excerpts[i].ids))
    out = torch.zeros(len(excerpts), head.weight.shape[1])
    try:
        starts = range(0, len(order), BATCH)
        for first in counted(starts, "probing the head", len(starts), unit="batch"):
            chosen = order[first : first + BATCH]
            ids, mask, _ = (t.to(head.weight.device) for t in right_pad([excerpts[i] for i in chosen], pad))
            model(input_ids=ids, attention_mask=mask.long())
            states = caught.pop()
            if states.dim() == 3:  # decoders apply the head at every position and pool afterwards
                states = states[torch.arange(len(chosen)), mask.sum(dim=1) - 1]
            out[chosen] = states.float().cpu()
    finally:
        handle.remove()
    return out
