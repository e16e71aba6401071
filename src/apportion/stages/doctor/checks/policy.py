"""Checks of the policy itself: its weights, its padding, its sampler, its reference, and whether it ever ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from apportion.generation import sample
from apportion.stages.doctor.case import Case
from apportion.stages.doctor.checks.probes import (
    BEGUN,
    LOGPROB,
    SHOWN,
    TOKENS,
    alone,
    difference,
    given,
    made_up,
    widened,
)
from apportion.stages.doctor.findings import fail, graded, ok, skip, warn
from apportion.stages.rl.policy import make_policy
from apportion.types import Rollouts

Said = tuple[str, str, str]


def weights(case: Case) -> Said:
    """The policy's weights are all stored."""
    ppo = case.config.ppo  # values are not looked at here, and the reward model is loaded after the policy
    if ppo.value_model == "reward":
        ppo = ppo.model_copy(update={"value_model": "separate"})
    case.policy = make_policy(case.config.model_copy(update={"ppo": ppo}))
    learning = sum(p.numel() for p in case.policy.trainable())
    return ok(f"{size(case.policy.model)}; {learning / 1e6:.3g} M learn")


def finite(case: Case) -> Said:
    """Every weight of the policy is a finite number."""
    return finite_weights(case.policy.model, "policy")


def size(model: Any) -> str:
    """Return how many weights a model has, in which format and where."""
    first, count = next(model.parameters()), sum(p.numel() for p in model.parameters())
    return f"{count / 1e6:.3g} M weights, {str(first.dtype).removeprefix('torch.')} on {first.device.type}"


def finite_weights(model: Any, named: str) -> Said:
    """Say how many tensors there are, and which hold numbers that are none."""
    every = dict(model.named_parameters())
    bad = [name for name, value in every.items() if not torch.isfinite(value).all()]
    said = f"{len(bad)} of {len(every)} tensors hold numbers that are not finite"
    if bad:
        return fail(f"{said}, the first {bad[0]}", f"Save the {named} again from a state before it diverged.")
    return ok(said)


def ends(case: Case) -> Said:
    """The policy writes, and where responses are to end at EOS some do, with it on their mask."""
    few = {"batch_size": SHOWN, "samples_per_prompt": 1, "rows": None}
    few["max_new_tokens"] = min(TOKENS, case.config.sampling.max_new_tokens)
    sampling = case.config.sampling.model_copy(update=few)
    generator = torch.Generator(device=case.policy.device).manual_seed(case.config.seed)
    rollouts = sample(case.policy, shown(case), sampling, generator)
    case.rollouts = rollouts
    lengths = rollouts.mask.sum(dim=1)
    said = f"{len(rollouts)} responses of {int(lengths.min())} to {int(lengths.max())} tokens"
    if sampling.stop == "length":
        return ok(f"{said}, of fixed length: EOS is never sampled")
    assert rollouts.ended is not None
    eos = case.policy.tokenizer.eos_token_id
    holds = ((rollouts.response_ids == eos) & rollouts.mask).any(dim=1)
    ended = int(rollouts.ended.sum())
    said = f"{said}; {ended} end with EOS within {sampling.max_new_tokens} tokens"
    if bool((rollouts.ended & ~holds).any()):
        return fail(f"{said}, some without it on their mask", "Report it: such a policy cannot learn to end.")
    if not ended:
        fix = "Raise sampling.max_new_tokens, check the EOS token, or use sampling.stop length."
        return warn(said, fix)
    return ok(said)


def shown(case: Case) -> list[list[int]]:
    """Return a few prompts of every length, so that they need padding, from the shortest to the longest."""
    rows = sorted(case.rows, key=len)
    count = min(SHOWN, len(rows))
    return [list(rows[i * (len(rows) - 1) // max(1, count - 1)]) for i in range(count)]


@torch.no_grad()
def begins(case: Case) -> Said:
    """Prompts without the beginning-of-text token are no less likely than with it."""
    bos, rows = case.policy.tokenizer.bos_token_id, [row for row in shown(case) if len(row) > 2]
    if bos is None or not rows:
        return skip("the tokenizer has no BOS token" if bos is None else "prompts are shorter than 3 tokens")
    if all(row[0] == bos for row in rows):
        return ok(f"{len(rows)} of {len(rows)} prompts begin with it")
    without, begun = (surprise(case, rows, before) for before in ([], [bos]))
    said = f"{without:.3g} nats a token as they are, {begun:.3g} after BOS"
    fix = "The policy learned its texts after BOS: let its tokenizer write one (add_bos_token), or the template."
    return warn(said, fix) if without - begun > BEGUN else ok(said)


def surprise(case: Case, rows: list[list[int]], before: list[int]) -> float:
    """Return the mean −log p of the prompts' own tokens after their first, with the ids `before` in front, nats."""
    banned = torch.tensor([case.policy.tokenizer.pad_token_id, *case.policy.banned])
    batch = given([[*before, row[0]] for row in rows], [row[1:] for row in rows], case.policy)
    counted = batch.mask & ~torch.isin(batch.response_ids, banned.to(batch.mask.device))
    batch = replace(batch, mask=counted, valid=batch.mask)
    return -float(case.policy.forward(batch, values=False).logprobs[counted].mean())


@torch.no_grad()
def sampler_gap(case: Case) -> Said:
    """The sampler's log-probabilities are the trainer's."""
    rollouts = rollouts_of(case)
    trained = case.policy.forward(rollouts, values=False).logprobs
    gap = difference(rollouts.logprobs, trained, rollouts.mask)
    most = float((rollouts.logprobs - trained).abs()[rollouts.mask].max())
    said = f"{gap:.2g} nats a token on average, {most:.2g} at most"
    fix = "Ratios would start away from 1: use --dtype float32, or a policy whose cache keeps what it reads."
    return graded(gap, LOGPROB[dtype_of(case)], said, fix)


@torch.no_grad()
def padding(case: Case) -> Said:
    """A rollout's log-probabilities do not depend on the pads around it."""
    rollouts = rollouts_of(case)
    fill = case.policy.tokenizer.pad_token_id
    together = read(case, rollouts)
    length = rollouts.mask.shape[1]
    gaps = {"left": together, "right": together}
    gaps["left"] = read(case, widened(rollouts, fill, 5, 0))
    gaps["right"] = read(case, widened(rollouts, fill, 0, 3))[:, :length]
    found = {side: difference(value, together, rollouts.mask) for side, value in gaps.items()}
    found["alone"] = max(alone_gap(case, rollouts, together, row) for row in range(len(rollouts)))
    worst = max(found.values(), key=lambda gap: (gap != gap, gap))
    said = ", ".join(f"{side} {gap:.2g}" for side, gap in found.items())
    fix = "Its results depend on the batch: check the pad token's embedding, or use a policy that reads its mask."
    return graded(worst, LOGPROB[dtype_of(case)], f"differences in nats a token: {said}", fix)


def alone_gap(case: Case, rollouts: Rollouts, together: Tensor, row: int) -> float:
    """Return how far a rollout read alone is from the same one read in the batch, nats a token."""
    one = alone(rollouts, row)
    length = one.mask.shape[1]
    return difference(read(case, one), together[row : row + 1, :length], one.mask)


@torch.no_grad()
def reference(case: Case) -> Said:
    """The reference is the policy as it starts: the KL is 0 before the first update."""
    rollouts = rollouts_of(case)
    gap = difference(read(case, rollouts), case.policy.reference_logprobs(rollouts), rollouts.mask)
    how = "a frozen copy" if case.policy.reference is not None else "the policy without its adapters"
    said = f"{gap:.2g} nats a token from {how}"
    fix = "Start from merged weights whose adapters do nothing yet: the KL would count from elsewhere."
    return graded(gap, (LOGPROB[dtype_of(case)][0] / 10, LOGPROB[dtype_of(case)][1]), said, fix)


def read(case: Case, rollouts: Rollouts) -> Tensor:
    """Return the trainer's log-probabilities (B,T) of `rollouts`."""
    found: Tensor = case.policy.forward(rollouts, values=False).logprobs
    return found


def rollouts_of(case: Case) -> Rollouts:
    """Return the responses that were sampled; made-up ones where the policy could not write."""
    if case.rollouts is None:
        case.rollouts = made_up(shown(case), case.policy)
    return case.rollouts


def dtype_of(case: Case) -> torch.dtype:
    """Return the dtype that the policy computes in."""
    dtype: torch.dtype = case.policy.model.get_output_embeddings().weight.dtype
    return dtype
