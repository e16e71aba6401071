"""The contract of a credit method, checked on small batches in order of size: the first failure is the smallest.

For methods of users: `apportion doctor --credit package.module:function`. Torch only; the built-in methods are tested
against the same clauses with far more cases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from apportion.types import Credit, Rollouts

TOLERANCE = 1e-5
# evidence of built-in producers that is one number a rollout
PER_ROW = frozenset(
    {"bootstrap_values", "prompt_score", "shapley_empty", "shapley_error", "shapley_calls", "shapley_joined"}
)


class Case(NamedTuple):
    """One small batch: rollouts, and the rewards (B,T) that the credit receives."""

    rollouts: Rollouts
    rewards: Tensor


class Violation(NamedTuple):
    """A clause that a credit broke, what was seen, and the smallest batch of those tried that shows it."""

    clause: str
    said: str
    case: Case


Check = Callable[[Credit, Case], str | None]


def violations(
    credit: Credit, extra: Mapping[str, Callable[[Tensor, torch.Generator], Tensor]] | None = None
) -> list[Violation]:
    """Return the broken clauses of `credit`, each with its smallest failing batch; nothing when it keeps them all.

    Args:
        extra: {name: (mask (B,T), generator) -> tensor} for evidence that is not a (B,T) of non-negative numbers.

    An exception that the credit raises on a valid batch breaks the clause that was being checked.
    """
    found: dict[str, Violation] = {}
    for case in cases(credit.needs, extra or {}):
        for name, check in CLAUSES.items():
            if name in found:
                continue
            try:
                said = check(credit, copied(case))
            except Exception as error:  # whatever a user's function raises is what is to be reported
                said = f"it raised {type(error).__name__}: {error}"
            if said is not None:
                found[name] = Violation(name, said, case)
    return [found[name] for name in CLAUSES if name in found]


def copied(case: Case) -> Case:
    """Return a batch of its own, so that a credit that changes its inputs spoils no other check."""
    evidence = {name: value.clone() for name, value in case.rollouts.evidence.items()}
    own = {name: getattr(case.rollouts, name).clone() for name in ("mask", "logprobs", "scores", "response_ids")}
    return Case(replace(case.rollouts, valid=own["mask"], evidence=evidence, **own), case.rewards.clone())


def cases(needs: frozenset[str], extra: Mapping[str, Callable[[Tensor, torch.Generator], Tensor]]) -> Iterator[Case]:
    """Yield small batches in order of size: full rows, holes, empty rows, T = 1, scores of both signs and of size 0."""
    for size in range(1, 13):
        for rows in (r for r in (1, 2, 3) if size % r == 0):
            for seed in range(8):
                yield _case(rows, size // rows, seed, needs, extra)


def _case(
    rows: int,
    length: int,
    seed: int,
    needs: frozenset[str],
    extra: Mapping[str, Callable[[Tensor, torch.Generator], Tensor]],
) -> Case:
    generator = torch.Generator().manual_seed(1000 * rows + 100 * length + seed)
    mask = torch.rand(rows, length, generator=generator) < (1.0 if seed < 3 else 0.6)
    if seed == 4:
        mask[0] = False
    evidence = {name: _evidence(name, mask, generator, extra) for name in sorted(needs)}
    scores = 3 * torch.randn(rows, generator=generator) * (seed != 1)
    rollouts = Rollouts(
        prompt_ids=torch.randint(5, 90, (rows, 2), generator=generator),
        prompt_mask=torch.ones(rows, 2, dtype=torch.bool),
        response_ids=torch.randint(5, 90, (rows, length), generator=generator),
        mask=mask,
        logprobs=-torch.rand(rows, length, generator=generator),
        scores=scores,
        group=torch.arange(rows),
        evidence=evidence,
    )
    rewards = torch.where(mask, torch.randn(rows, length, generator=generator), 0.0)
    return Case(rollouts, rewards)


def _evidence(
    name: str,
    mask: Tensor,
    generator: torch.Generator,
    extra: Mapping[str, Callable[[Tensor, torch.Generator], Tensor]],
) -> Tensor:
    if name in extra:
        return extra[name](mask, generator)
    base = name.partition("@")[0]
    noise = torch.rand(len(mask) if base in PER_ROW else mask.shape, generator=generator)
    return -noise if "logprobs" in name else noise


def _assign(credit: Credit, case: Case) -> Tensor:
    return credit.assign(case.rollouts, case.rewards, credit.init())[0]


def _shape(credit: Credit, case: Case) -> str | None:
    out = _assign(credit, case)
    if not isinstance(out, Tensor) or out.shape != case.rewards.shape:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        return f"it returned {got} for rewards {tuple(case.rewards.shape)}"
    return None


def _dtype(credit: Credit, case: Case) -> str | None:
    for dtype in (torch.float32, torch.bfloat16):
        out = credit.assign(case.rollouts, case.rewards.to(dtype), credit.init())[0]
        if out.dtype != dtype:
            return f"it returned {out.dtype} for rewards {dtype}"
    return None


def _zeros(credit: Credit, case: Case) -> str | None:
    left = _assign(credit, case)[~case.rollouts.mask]
    return f"{left[left != 0].tolist()} stand off the mask" if (left != 0).any() else None


def _finite(credit: Credit, case: Case) -> str | None:
    """What stands off the mask, NaN included, must not reach the rewards; nor may large scores overflow."""
    mask = case.rollouts.mask
    wild = {k: _poisoned(v, mask) for k, v in case.rollouts.evidence.items()}
    rollouts = replace(case.rollouts, logprobs=_poisoned(case.rollouts.logprobs, mask), evidence=wild)
    for factor in (1.0, 1e30):
        out = credit.assign(rollouts, _poisoned(case.rewards * factor, mask), credit.init())[0]
        if not torch.isfinite(out).all():
            return (
                f"it returned {out[~torch.isfinite(out)].tolist()}, with NaN off the mask and rewards times {factor:g}"
            )
    return None


def _poisoned(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, torch.nan) if values.shape == mask.shape else values


def _unchanged(credit: Credit, case: Case) -> str | None:
    before = [
        case.rewards.clone(),
        case.rollouts.logprobs.clone(),
        *(v.clone() for v in case.rollouts.evidence.values()),
    ]
    _assign(credit, case)
    after = [case.rewards, case.rollouts.logprobs, *case.rollouts.evidence.values()]
    names = ["the rewards", "the log-probabilities", *(f"evidence {k!r}" for k in case.rollouts.evidence)]
    changed = [n for n, a, b in zip(names, before, after, strict=True) if not torch.equal(a, b)]
    return f"it changed {', '.join(changed)} in place" if changed else None


def _state(credit: Credit, case: Case) -> str | None:
    state = credit.init()
    kept = {k: v.clone() for k, v in state.items()}
    after = credit.assign(case.rollouts, case.rewards, state)[1]
    if after.keys() != kept.keys() or any(not torch.equal(after[k], kept[k]) for k in kept):
        return "assign moved its state: controllers belong into `update`, which runs once a batch"
    return None


def _padding(credit: Credit, case: Case) -> str | None:
    rollouts, width = case.rollouts, case.rewards.shape[1]
    wide = {k: _widened(v, width) for k, v in rollouts.evidence.items()}
    more = replace(
        rollouts,
        response_ids=_widened(rollouts.response_ids, width),
        mask=_widened(rollouts.mask, width),
        valid=_widened(rollouts.valid, width),
        logprobs=_widened(rollouts.logprobs, width),
        old_logprobs=_widened(rollouts.old_logprobs, width),
        evidence=wide,
    )
    out = credit.assign(more, _widened(case.rewards, width), credit.init())[0]
    return _differs(out[:, :width], _assign(credit, case), "with two columns of padding on the right")


def _widened(values: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, 2)) if values.dim() == 2 and values.shape[1] == width else values


def _rows(credit: Credit, case: Case) -> str | None:
    parts = []
    for row in range(len(case.rollouts)):
        one = torch.tensor([row])
        parts.append(credit.assign(case.rollouts.select(one), case.rewards[one], credit.init())[0])
    return _differs(torch.cat(parts), _assign(credit, case), "one row at a time")


def _order(credit: Credit, case: Case) -> str | None:
    back = torch.arange(len(case.rollouts)).flip(0)
    out = credit.assign(case.rollouts.select(back), case.rewards[back], credit.init())[0]
    return _differs(out, _assign(credit, case)[back], "with the rows in reverse")


def _differs(one: Tensor, two: Tensor, when: str) -> str | None:
    gap = (one.double() - two.double()).abs().max() if one.numel() else torch.tensor(0.0)
    return f"its rewards differ by {float(gap):.3g} {when}" if gap > TOLERANCE else None


def _sum_kept(credit: Credit, case: Case) -> str | None:
    if not credit.keeps_return:
        return None
    drift = (_assign(credit, case).double().sum(dim=1) - case.rewards.double().sum(dim=1)).abs()
    limit = TOLERANCE * case.rewards.abs().sum(dim=1).clamp_min(1.0)
    some = case.rollouts.mask.any(dim=1)
    if not (some & (drift > limit)).any():
        return None
    row = int((drift * some).argmax())
    was, now = float(case.rewards[row].sum()), float(_assign(credit, case)[row].sum())
    return f"row {row} summed to {was:.4g} and now sums to {now:.4g}"


def _causal(credit: Credit, case: Case) -> str | None:
    if not credit.causal:
        return None
    out = _assign(credit, case)
    for cut in range(case.rewards.shape[1] - 1):
        later = torch.arange(case.rewards.shape[1]) > cut
        mask = _other_later(case.rollouts.mask, cut)
        changed = {k: _later(v, later, mask) for k, v in case.rollouts.evidence.items()}
        ids = torch.where(later, case.rollouts.response_ids + 1, case.rollouts.response_ids)
        lower = torch.where(later, case.rollouts.logprobs - 0.5, case.rollouts.logprobs)
        assert case.rollouts.scores is not None
        goes_on = case.rollouts.mask[:, cut + 1 :].any(dim=1)  # the score of a response that has ended is known
        scores = torch.where(goes_on, case.rollouts.scores + 0.9, case.rollouts.scores)
        tokens = {"response_ids": ids, "mask": mask, "valid": mask, "logprobs": lower}
        other = replace(case.rollouts, scores=scores, evidence=changed, **tokens)
        rewards = torch.where(mask, torch.where(later, case.rewards + 1.0, case.rewards), 0.0)
        found = credit.assign(other, rewards, credit.init())[0]
        gap = (found[:, : cut + 1] - out[:, : cut + 1]).abs().max()
        if gap > TOLERANCE:
            return f"declared causal, but rewards up to token {cut} moved by {float(gap):.3g} when later tokens changed"
    return None


def _other_later(mask: Tensor, cut: int) -> Tensor:
    """Return `mask` with other tokens after `cut`; whether any come is known at `cut`, since a response ends itself."""
    other = mask.clone()
    other[:, cut + 1 :] = ~mask[:, cut + 1 :]
    some = mask[:, cut + 1 :].any(dim=1)
    other[:, cut + 1 :] &= some[:, None]
    other[:, cut + 1] |= some & ~other[:, cut + 1 :].any(dim=1)
    return other


def _later(values: Tensor, later: Tensor, mask: Tensor) -> Tensor:
    return torch.where(later, values + 0.7, values) if values.shape == mask.shape else values


def _share(credit: Credit, case: Case) -> str | None:
    if credit.share is None:
        return None
    share, mask = credit.share(case.rollouts), case.rollouts.mask
    sums = share.sum(dim=1)
    bad = (sums - mask.any(dim=1).float()).abs() > TOLERANCE
    if share.shape != mask.shape or bad.any():
        return f"its shares sum to {sums.tolist()}, not to 1 in every row with tokens"
    return "a share is negative" if (share < 0).any() else None


def _stats(credit: Credit, case: Case) -> str | None:
    if credit.stats is None:
        return None
    for name, (total, count) in credit.stats(case.rollouts, case.rewards, case.rewards).items():
        if not torch.isfinite(total) or not torch.isfinite(count):
            return f"statistic {name!r} is ({float(total)}, {float(count)})"
    return None


CLAUSES: Mapping[str, Check] = {
    "shape kept": _shape,
    "dtype kept": _dtype,
    "zeros off the mask": _zeros,
    "finite": _finite,
    "inputs not changed": _unchanged,
    "state moved by `update` only": _state,
    "padding does not matter": _padding,
    "rows do not depend on one another": _rows,
    "order of rows does not matter": _order,
    "keeps_return as declared": _sum_kept,
    "causal as declared": _causal,
    "shares sum to 1": _share,
    "statistics are finite": _stats,
}
