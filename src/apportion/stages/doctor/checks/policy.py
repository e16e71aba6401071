"""Checks of the loaded policy: weights, responses that end, padding, sampler and reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from apportion.generation import sample
from apportion.generation.decoding import SLOW, tried
from apportion.generation.given import given_rollouts
from apportion.models.policy import load_policy
from apportion.models.value_head import ValueStart
from apportion.stages.doctor.case import Case
from apportion.stages.doctor.checks.probes import (
    BOS_GAIN,
    LOGPROB,
    PROMPTS,
    TOKENS,
    difference,
    random_rollouts,
    single_row,
    with_padding,
)
from apportion.stages.doctor.findings import Result, fail, grade, ok, skip, warn
from apportion.types import Rollouts


def weights(case: Case) -> Result:
    """All of the policy's weights are stored."""
    config, sampling = case.config, case.config.sampling
    # the value head is not checked, and the reward model is loaded after the policy
    kind = "shared" if config.ppo.value_model == "shared" else "separate"
    case.policy = load_policy(
        config.policy,
        lora=config.lora,
        max_length=sampling.max_length,
        dtype=config.dtype,
        device=config.device,
        pad_token=config.pad_token,
        stop=sampling.stop,
        temperature=sampling.temperature,
        values=ValueStart(kind),
        fast_kernels=config.fast_kernels,
    )
    trained = sum(p.numel() for p in case.policy.trainable())
    return ok(f"{size(case.policy.model)}; {trained / 1e6:.3g} M trainable")


def finite(case: Case) -> Result:
    """Every weight of the policy is finite."""
    return finite_weights(case.policy.model, "policy")


def size(model: Any) -> str:
    """Return the number of weights of a model, their format and their device, as text."""
    first, count = next(model.parameters()), sum(p.numel() for p in model.parameters())
    return f"{count / 1e6:.3g} M weights, {str(first.dtype).removeprefix('torch.')} on {first.device.type}"


def finite_weights(model: Any, named: str) -> Result:
    """Check that every weight is finite."""
    every = dict(model.named_parameters())
    bad = [name for name, value in every.items() if not torch.isfinite(value).all()]
    message = f"{len(bad)} of {len(every)} tensors hold non-finite values"
    if bad:
        return fail(f"{message}, the first {bad[0]}", f"Save the {named} again from a state before it diverged.")
    return ok(message)


def ends(case: Case) -> Result:
    """The policy generates responses; with `sampling.stop: eos` some end, with EOS or another end on their mask."""
    few = {"batch_size": PROMPTS, "samples_per_prompt": 1, "rows": None}
    few["max_new_tokens"] = min(TOKENS, case.config.sampling.max_new_tokens)
    sampling = case.config.sampling.model_copy(update=few)
    generator = torch.Generator(device=case.policy.device).manual_seed(case.config.seed)
    rollouts = sample(case.policy, some_prompts(case), sampling, generator)
    case.rollouts = rollouts
    lengths = rollouts.mask.sum(dim=1)
    message = f"{len(rollouts)} responses of {int(lengths.min())} to {int(lengths.max())} tokens"
    if sampling.stop == "length":
        return ok(f"{message}, of fixed length: EOS is never sampled")
    assert rollouts.ended is not None
    ends = torch.tensor(case.policy.ends, device=rollouts.mask.device)
    has_eos = (torch.isin(rollouts.response_ids, ends) & rollouts.mask).any(dim=1)
    ended = int(rollouts.ended.sum())
    message = f"{message}; {ended} end with EOS within {sampling.max_new_tokens} tokens"
    if bool((rollouts.ended & ~has_eos).any()):
        return fail(
            f"{message}, some without it on their mask", "Please report this: such a policy cannot learn to end."
        )
    if not ended:
        fix = "Raise sampling.max_new_tokens, check the EOS token, or use sampling.stop length."
        return warn(message, fix)
    return ok(message)


def some_prompts(case: Case) -> list[list[int]]:
    """Return a few prompts from the shortest to the longest, so that they need padding."""
    rows = sorted(case.rows, key=len)
    count = min(PROMPTS, len(rows))
    return [list(rows[i * (len(rows) - 1) // max(1, count - 1)]) for i in range(count)]


@torch.no_grad()
def begins(case: Case) -> Result:
    """Prompts without the beginning-of-text token are no less likely than with it."""
    bos, rows = case.policy.tokenizer.bos_token_id, [row for row in some_prompts(case) if len(row) > 2]
    if bos is None or not rows:
        return skip("the tokenizer has no BOS token" if bos is None else "prompts are shorter than 3 tokens")
    if all(row[0] == bos for row in rows):
        return ok(f"{len(rows)} of {len(rows)} prompts begin with it")
    without, with_bos = (mean_nll(case, rows, prefix) for prefix in ([], [bos]))
    message = f"{without:.3g} nats a token as they are, {with_bos:.3g} after BOS"
    fix = "The policy was trained on texts after BOS: let its tokenizer (add_bos_token) or its template add one."
    return warn(message, fix) if without - with_bos > BOS_GAIN else ok(message)


def mean_nll(case: Case, rows: list[list[int]], prefix: list[int]) -> float:
    """Return the mean −log p of the prompts' tokens after their first, with the ids `prefix` in front, in nats."""
    banned = torch.tensor(case.policy.banned, dtype=torch.int64)
    firsts, rest = [[*prefix, row[0]] for row in rows], [row[1:] for row in rows]
    batch = given_rollouts(firsts, rest, case.policy.pad, case.policy.device)
    counted = batch.mask & ~torch.isin(batch.response_ids, banned.to(batch.mask.device))
    batch = replace(batch, mask=counted, valid=batch.mask)
    return -float(case.policy.forward(batch, values=False).logprobs[counted].mean())


@torch.no_grad()
def sampler_gap(case: Case) -> Result:
    """The sampler's log-probabilities equal the trainer's, and those of each text alone."""
    rollouts, model = rollouts_of(case), case.policy.model
    why_slow = tried(case.policy, model).why_slow  # raises where they differ
    trained = case.policy.forward(rollouts, values=False).logprobs
    gap = difference(rollouts.logprobs, trained, rollouts.mask)
    most = float((rollouts.logprobs - trained).abs()[rollouts.mask].max())
    message = f"{gap:.2g} nats a token on average, {most:.2g} at most"
    message = message if why_slow is None else f"{message}; it {SLOW}: {why_slow}"
    fix = "Ratios would not start at 1: use --dtype float32, or a policy whose cache is exact."
    return grade(gap, LOGPROB[dtype_of(case)], message, fix)


@torch.no_grad()
def padding(case: Case) -> Result:
    """A rollout's log-probabilities do not depend on its padding."""
    rollouts = rollouts_of(case)
    fill = case.policy.pad
    in_batch = logprobs(case, rollouts)
    length = rollouts.mask.shape[1]
    padded = {
        "left": logprobs(case, with_padding(rollouts, fill, 5, 0)),
        "right": logprobs(case, with_padding(rollouts, fill, 0, 3))[:, :length],
    }
    gaps = {side: difference(value, in_batch, rollouts.mask) for side, value in padded.items()}
    gaps["alone"] = max(single_gap(case, rollouts, in_batch, row) for row in range(len(rollouts)))
    worst = max(gaps.values(), key=lambda gap: (gap != gap, gap))
    message = ", ".join(f"{side} {gap:.2g}" for side, gap in gaps.items())
    fix = "Its results depend on the batch: check the pad token's embedding, or use a policy that applies its mask."
    return grade(worst, LOGPROB[dtype_of(case)], f"differences in nats a token: {message}", fix)


def single_gap(case: Case, rollouts: Rollouts, in_batch: Tensor, row: int) -> float:
    """Return the difference between a rollout computed alone and in the batch, in nats a token."""
    one = single_row(rollouts, row)
    length = one.mask.shape[1]
    return difference(logprobs(case, one), in_batch[row : row + 1, :length], one.mask)


@torch.no_grad()
def reference(case: Case) -> Result:
    """The reference equals the initial policy: the KL is 0 before the first update."""
    rollouts = rollouts_of(case)
    gap = difference(logprobs(case, rollouts), case.policy.reference_logprobs(rollouts), rollouts.mask)
    how = "a frozen copy" if case.policy.reference is not None else "the policy without its adapters"
    message = f"{gap:.2g} nats a token from {how}"
    fix = "Start from merged weights and fresh adapters: the KL would be measured from another model."
    return grade(gap, (LOGPROB[dtype_of(case)][0] / 10, LOGPROB[dtype_of(case)][1]), message, fix)


def logprobs(case: Case, rollouts: Rollouts) -> Tensor:
    """Return the trainer's log-probabilities (B,T) of `rollouts`."""
    computed: Tensor = case.policy.forward(rollouts, values=False).logprobs
    return computed


def rollouts_of(case: Case) -> Rollouts:
    """Return the sampled responses, or random ones where the policy could not generate."""
    if case.rollouts is None:
        case.rollouts = random_rollouts(some_prompts(case), case.policy)
    return case.rollouts


def dtype_of(case: Case) -> torch.dtype:
    """Return the dtype of the policy's computation."""
    dtype: torch.dtype = case.policy.model.get_output_embeddings().weight.dtype
    return dtype
