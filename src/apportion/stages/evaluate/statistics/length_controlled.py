"""Length-controlled win rates: what the win rate would be if both answers to a prompt had the same length.

The logistic model of AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475), fitted by scikit-learn to one policy m
against one other policy b:

    P(m is preferred on prompt x) = σ(θ + φ·tanh((len_m − len_b)/sd(len_m − len_b)) + ψ·γ_x)

θ is the difference in quality, φ the preference for length, γ_x the difficulty of the prompt. The length-controlled
win rate is the mean prediction over the prompts with the length difference set to 0. docs/evaluation.md says where it
equals AlpacaEval's and where it differs.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

C = 100.0  # inverse strength of the L2 penalty on φ and ψ, as AlpacaEval's without cross-validation; θ has none
FREE = 10.0  # columns of the joint model that hardly any penalty is to act on are scaled by this
LEAST_SD = 1e-9


class Pairs(NamedTuple):
    """Pairs of answers, one entry each: preference in [0, 1], length difference, weight, and the prompt's number."""

    preference: np.ndarray
    length: np.ndarray
    weight: np.ndarray
    prompt: np.ndarray


def pairs_of(
    first: np.ndarray, second: np.ndarray, lengths: np.ndarray, other_lengths: np.ndarray, margin: float = 0.0
) -> Pairs:
    """Return all pairs of answers to a prompt, of scores (N,K) and (N,L) and lengths of the same shapes.

    The pairs of a prompt have the weight 1 together. Pairs with a score that is NaN are left out.
    """
    gaps = first[:, :, None] - second[:, None, :]
    prompt, i, j = np.nonzero(~np.isnan(gaps))
    gap = gaps[prompt, i, j]
    preference = np.where(gap > margin, 1.0, np.where(gap < -margin, 0.0, 0.5))
    counts = np.bincount(prompt, minlength=len(first))
    return Pairs(preference, lengths[prompt, i] - other_lengths[prompt, j], 1.0 / counts[prompt], prompt)


def length_controlled(pairs: Pairs, difficulty: np.ndarray | None = None) -> float | None:
    """Return the length-controlled win rate in [0, 1].

    Args:
        difficulty: γ (N,) by prompt; None leaves the term out.

    None where it is undefined: no pairs, or lengths that all differ by the same, which is then no evidence of what
    length does. Where every pair has the same preference, it is that one. Where the longer answer wins every pair, or
    the shorter one, it is ½: no finite φ is the best one then, and the penalty would decide.
    """
    if not len(pairs.preference):
        return None
    if np.ptp(pairs.preference) == 0:
        return float(pairs.preference[0])
    scaled = scaled_length(pairs.length)
    if scaled is None:
        return None
    if length_decides(pairs):
        return 0.5
    columns = [scaled] if scaled.any() else []
    if difficulty is not None:
        columns.append(difficulty[pairs.prompt])
    if not columns:
        return float(np.average(pairs.preference, weights=pairs.weight))
    features = np.stack(columns, axis=1)
    slopes, offset = fit(features, pairs.preference, pairs.weight, intercept=True)
    same = features.copy()
    if scaled.any():
        same[:, 0] = 0.0
    return float(np.average(sigmoid(same @ slopes + offset), weights=pairs.weight))


def length_decides(pairs: Pairs) -> bool:
    """Whether the sign of the length difference is the outcome of every pair, in the same direction."""
    outcome, sign = np.sign(pairs.preference - 0.5), np.sign(pairs.length)
    return bool(sign.any()) and (np.array_equal(outcome, sign) or np.array_equal(outcome, -sign))


def scaled_length(length: np.ndarray) -> np.ndarray | None:
    """Return tanh(difference/sd) of the length differences, as AlpacaEval scales them; None where all are one number.

    Zeros where no lengths differ.
    """
    if not length.any():
        return np.zeros(len(length))
    sd = float(np.std(length, ddof=1)) if len(length) > 1 else 0.0
    return np.tanh(length / sd) if sd > LEAST_SD else None


def fit(
    features: np.ndarray, preference: np.ndarray, weight: np.ndarray, *, intercept: bool, c: float = C
) -> tuple[np.ndarray, float]:
    """Return (coefficients, intercept) of a logistic regression on preferences in [0, 1].

    As in AlpacaEval, each row stands for two: label 1 with the weight of its preference, label 0 with the rest.
    """
    from scipy.sparse import issparse, vstack
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    twice = vstack([features, features]) if issparse(features) else np.concatenate([features, features])
    labels = np.repeat([1, 0], len(preference))
    weights = np.concatenate([weight * preference, weight * (1.0 - preference)])
    model = LogisticRegression(C=c, fit_intercept=intercept, tol=1e-8, max_iter=2000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of resamples that are separable
        model.fit(twice, labels, sample_weight=weights)
    return model.coef_[0], float(model.intercept_[0]) if intercept else 0.0


def difficulties(others: Sequence[Pairs], count: int) -> np.ndarray | None:
    """Return γ (N,) by prompt, mean 0 and sd 1, from the pairs of *other* policies against the same one.

    Joint logistic model of AlpacaEval's first step: a quality and a length term a policy, and an effect a prompt with
    the prior N(0, 1). High γ: prompts on which policies win easily. None without other policies, or where all prompts
    are alike. Pairs of the policy itself would make its own outcome the explanation of it.
    """
    from scipy.sparse import csr_matrix, hstack

    usable = [(pairs, scaled) for pairs in others if (scaled := scaled_length(pairs.length)) is not None]
    if not usable:
        return None
    blocks = []
    for place, (pairs, scaled) in enumerate(usable):
        policy = np.zeros((len(scaled), 2 * len(usable)))
        policy[:, 2 * place], policy[:, 2 * place + 1] = FREE, FREE * scaled
        rows = np.arange(len(scaled))
        prompt = csr_matrix((np.ones(len(scaled)), (rows, pairs.prompt)), shape=(len(scaled), count))
        blocks.append(hstack([csr_matrix(policy), prompt]).tocsr())
    from scipy.sparse import vstack

    preference = np.concatenate([pairs.preference for pairs, _ in usable])
    weight = np.concatenate([pairs.weight for pairs, _ in usable])
    slopes, _ = fit(vstack(blocks).tocsr(), preference, weight, intercept=False, c=1.0)
    effects = slopes[2 * len(usable) :]
    sd = float(effects.std())
    return (effects - effects.mean()) / sd if sd > 1e-6 else None


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return the logistic function of x, without overflow."""
    value: np.ndarray = np.exp(-np.logaddexp(0.0, -x))
    return value
