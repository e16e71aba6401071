"""Win rates with ties: the share of pairs of answers to one prompt that a policy wins, by prompt."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from apportion.intervals import Interval, clustered_proportion


class Wins(NamedTuple):
    """Shares of won, tied and lost pairs, each (N,) by prompt; NaN where a prompt has no pair."""

    win: np.ndarray
    tie: np.ndarray
    loss: np.ndarray

    @property
    def preference(self) -> np.ndarray:
        """(N,): a win counts 1, a tie half."""
        preference: np.ndarray = self.win + self.tie / 2
        return preference


def wins(first: np.ndarray, second: np.ndarray, margin: float = 0.0) -> Wins:
    """Return how often the scores of `first` (N,K) beat those of `second` (N,L): all K·L pairs of a prompt.

    Args:
        margin: scores that differ by at most this are tied.

    A NaN is no answer, or one that the measure does not apply to: its pairs are left out.
    """
    gaps = first[:, :, None] - second[:, None, :]
    known = ~np.isnan(gaps)
    pairs = known.sum(axis=(1, 2)).astype(np.float64)
    pairs[pairs == 0] = np.nan
    win = (known & (gaps > margin)).sum(axis=(1, 2)) / pairs
    loss = (known & (gaps < -margin)).sum(axis=(1, 2)) / pairs
    return Wins(win, 1.0 - win - loss, loss)


def win_rate(found: Wins) -> Interval:
    """Return {mean, low, high, win, tie, loss}: the win rate, a tie counting half, and its three shares.

    The interval is Wilson's at the effective number of prompts (`intervals.clustered_proportion`), so that it has a
    width where one policy wins all of them.
    """
    known = found.preference[~np.isnan(found.preference)]
    rate = clustered_proportion(known.tolist(), [1] * len(known))
    shares = {"win": found.win, "tie": found.tie, "loss": found.loss}
    return rate | {name: float(np.nanmean(value)) if len(known) else 0.0 for name, value in shares.items()}
