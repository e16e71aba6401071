"""Rollouts for tests: random ones from a mask, poisoned where nothing may be read, and padded copies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from apportion import Rollouts

# evidence of shape (B,); all other is (B,T)
PER_ROW = ("bootstrap_values", "prompt_score", "shapley_empty", "shapley_error", "shapley_calls", "shapley_joined")
POISON = (float("nan"), float("inf"), float("-inf"))


def bools(rows: Iterable[Iterable[int]]) -> Tensor:
    """Return a (B,T) bool tensor from rows of 0 and 1."""
    return torch.tensor([list(r) for r in rows], dtype=torch.bool)


def poison(x: Tensor, mask: Tensor) -> Tensor:
    """Return `x` (B,T) with NaN and infinities off the mask, where no method may look."""
    bad = torch.tensor(POISON, dtype=x.dtype)[torch.arange(x.numel()).reshape(x.shape) % len(POISON)]
    return torch.where(mask, x, bad)


def evidence(name: str, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Return plausible evidence `name` for any method: attention and entropy are non-negative, log-probabilities
    negative, boundaries True or False."""
    name = name.partition("@")[0]  # what stands after it says how it is made
    if name in PER_ROW:
        return torch.randn(len(mask), generator=generator)
    noise = torch.randn(mask.shape, generator=generator)
    if "boundaries" in name:
        return noise > 0.5
    if name == "entropy":
        return noise.abs() * 2
    if "attention" in name:
        return noise.exp()
    return -noise.abs() if "logprobs" in name else noise


def rollouts(
    mask: Tensor, names: Iterable[str] = (), *, seed: int = 0, prompt: int = 3, dirty: bool = True, **given: Tensor
) -> Rollouts:
    """Return rollouts on `mask` (B,T) with random contents and evidence `names`; `given` overrides any of them.

    With `dirty`, everything that is float and (B,T) holds NaN or an infinity off the mask.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, length = mask.shape
    found = {n: given.pop(n) if n in given else evidence(n, mask, generator) for n in names}
    logprobs = given.pop("logprobs", -torch.rand(rows, length, generator=generator) * 3)
    if dirty:
        logprobs = poison(logprobs, mask)
        found = {n: poison(v, mask) if v.shape == mask.shape else v for n, v in found.items()}
    seen = mask.flip(1).cummax(dim=1).values.flip(1) if dirty and length else mask  # models attend to holes as well
    values = {
        "prompt_ids": torch.randint(5, 90, (rows, prompt), generator=generator),
        "prompt_mask": torch.ones(rows, prompt, dtype=torch.bool),
        "response_ids": torch.randint(5, 90, (rows, length), generator=generator),
        "mask": mask,
        "valid": seen,
        "logprobs": logprobs,
        "scores": torch.randn(rows, generator=generator) + 0.5,
        "group": torch.arange(rows),
        "evidence": found,
    }
    return Rollouts(**{**values, **given})


def padded(batch: Rollouts, left: int, right: int) -> Rollouts:
    """Return `batch` with `left` more prompt columns and `right` more response columns, none of them on a mask."""
    changes: dict[str, object] = {}
    for name in (f.name for f in fields(batch)):
        value = getattr(batch, name)
        if not isinstance(value, Tensor) or value.dim() < 2:
            continue
        sides = (left, 0) if name.startswith("prompt") else (0, right)
        changes[name] = pad(value, sides, value=float("nan") if value.is_floating_point() else 0)
    widened = {k: v if v.dim() < 2 else pad(v, (0, right), value=float("nan")) for k, v in batch.evidence.items()}
    return replace(batch, **changes, evidence=widened)


def cast(batch: Rollouts, dtype: torch.dtype) -> Rollouts:
    """Return `batch` with every floating tensor, evidence included, in `dtype`."""
    found = {k: v.to(dtype) for k, v in batch.evidence.items()}
    return replace(
        batch,
        logprobs=batch.logprobs.to(dtype),
        old_logprobs=batch.old_logprobs.to(dtype),
        scores=None if batch.scores is None else batch.scores.to(dtype),
        evidence=found,
    )
